"""What a checkpoint needs for a fit to go on from it.

in any case    places of the loops, optimiser, schedulers: a checkpoint of weights alone has fewer
to be exact    the sampler's state, the names of the base, what the loss carries
if present     weights that are finite
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_tilt.interfaces.sampler import Sampler

__all__ = ["check_complete", "check_finite", "not_exact", "same_optimizer"]

_NO_SETTINGS = {"params", "param_names", "initial_lr"}
_WHOLE = ("loops", "optimizer_states", "lr_schedulers")


def check_complete(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks what a fit goes on from.

    Raises:
        ValueError: naming what is missing; what only exactness needs is a warning under `exact_resume: false`.
    """
    missing = [key for key in _WHOLE if key not in checkpoint]
    if missing:
        raise ValueError(
            f"a fit cannot go on from this checkpoint, which has no {' and no '.join(missing)}: give --ckpt_path one "
            "that holds more than weights (ModelCheckpoint's save_weights_only: false)"
        )
    places = checkpoint["loops"].get("fit_loop")
    if not isinstance(places, dict) or "epoch_loop.batch_progress" not in places:
        raise ValueError("the checkpoint is damaged: its loops do not say how far a fit was; take an earlier one")
    states = checkpoint.get("callbacks", {})
    missing = [f"state of the {s.state_key}" for s in _samplers(trainer) if s.state_key not in states]  # type: ignore[attr-defined]
    missing += ["state of the loss"] if "loss" not in checkpoint else []
    if missing:
        not_exact(trainer, f"its checkpoint has no {' and no '.join(missing)}", "Give it a checkpoint of such a run")


def not_exact(trainer: Trainer, reason: str, mend: str) -> None:
    """Refuse to go on where that cannot be exact, or warn if the sampler has been told not to mind.

    Raises:
        ValueError: unless `sampler.exact_resume` is false.
    """
    message = f"this run cannot go on exactly: {reason}. {mend}"
    if all(sampler.exact_resume for sampler in _samplers(trainer)):
        raise ValueError(message + "; sampler.exact_resume: false goes on all the same")
    rank_zero_warn(message)


def same_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Refuse the state of another optimiser, known by its settings: torch takes it, and fails at the next step.

    Raises:
        ValueError: naming settings that only one of them has.
    """
    saved, mine = set(state["param_groups"][0]) - _NO_SETTINGS, set(optimizer.defaults)
    if saved - mine and mine - saved:  # one of another version only adds some
        raise ValueError(
            f"the checkpoint is of another optimizer than {type(optimizer).__name__}: it has {_few(saved - mine)} and "
            f"no {_few(mine - saved)}; go on with the one that it was saved with"
        )


def check_finite(saved: Mapping[str, Any], trained: set[str]) -> None:
    """Refuse weights that are not finite, before they are taken for the reward's fault.

    Args:
        saved: a checkpoint's `state_dict`.
        trained: the names that training moves.

    Raises:
        ValueError: naming the first.
    """
    values = {name: value for name, value in saved.items() if name in trained and isinstance(value, Tensor)}
    bad = [name for name, value in values.items() if not torch.isfinite(value).all()]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ValueError(f"the checkpoint's weights are not finite: {bad[0]}{more}; take an earlier checkpoint")


def _samplers(trainer: Trainer) -> list[Sampler]:
    return [c for c in trainer.callbacks if isinstance(c, Sampler)]  # type: ignore[attr-defined]


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3])
