"""What a loss asks of the module that carries it and of its loader, said before anything is computed."""

import inspect
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_tilt.interfaces.predictor import Predictor
from lightning_tilt.interfaces.reward import Reward
from lightning_tilt.process import Process

__all__ = ["check_host", "check_loader", "check_training_step"]


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


def check_loader(loader: Any) -> None:
    """Refuse a plain list of batches, which Lightning takes for several loaders: a batch would be one item of each.

    Args:
        loader: what the Trainer was given.

    Raises:
        TypeError: naming the mend.
    """
    if isinstance(loader, (list, tuple)) and any(isinstance(b, (str, list, tuple, dict, Tensor)) for b in loader):
        raise TypeError(
            "a plain list of batches is no loader: Lightning reads each entry as a loader of its own, and makes "
            "batches of one item of each. Use DataLoader(prompts, batch_size=4) of a flat list of prompts, or "
            "DataLoader(batches, batch_size=None)"
        )
