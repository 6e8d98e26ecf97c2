"""What a loss asks of the module that carries it, said before anything is computed."""

import inspect
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from lightning_tilt.interfaces.predictor import Predictor
from lightning_tilt.interfaces.reward import Reward
from lightning_tilt.process import Process

__all__ = ["check_host", "check_training_step"]


def check_host(host: Any) -> None:
    """Refuse a host that does not offer what a loss reads.

    Raises:
        TypeError: if its predictor, process or reward is none, or `score` does not take images and prompts.
    """
    for name, kind in (("predictor", Predictor), ("process", Process), ("reward", Reward)):
        try:
            offered = getattr(host, name)
        except AttributeError:
            offered = None
        if not isinstance(offered, kind):
            raise TypeError(
                f"{type(host).__name__} needs self.{name}, a lightning_tilt {kind.__name__}; "
                f"it found {type(offered).__name__}. Set it in __init__, or build on lightning_tilt.TiltModule."
            )
    score = inspect.signature(host.reward.score)
    try:
        score.bind(None, None)
    except TypeError:
        raise TypeError(
            f"{type(host.reward).__name__}.score({', '.join(score.parameters)}) does not take the images and the "
            "prompts: def score(self, images, prompts)"
        ) from None


def check_training_step(host: LightningModule, loss: type[Any]) -> None:
    """Refuse an optimisation by hand, and name a training step that is not called because the loss's comes first.

    Args:
        host: the whole module.
        loss: the class whose `training_step` is the loss's.

    Raises:
        TypeError: if `automatic_optimization` is False: the host's loop would wait for updates that nobody makes.
    """
    name = type(host).__name__
    if not host.automatic_optimization:
        raise TypeError(
            f"{name} optimises by hand (automatic_optimization is False), and a loss returns what Lightning is to "
            "optimise: leave automatic_optimization True"
        )
    unheard = [c for c in type(host).__mro__ if "training_step" in vars(c) and c not in (loss, LightningModule)]
    if type(host).training_step is loss.training_step and unheard:
        rank_zero_info(
            f"{unheard[0].__name__}.training_step is not called: {name} trains on the tilt's loss alone. To have both, "
            f"define training_step in {name} and add to what super().training_step returns"
        )
