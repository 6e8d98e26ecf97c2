"""Whether a fit can go on at the very batch where its checkpoint was written.

Lightning saves the states of loaders that have one.  A loader without one begins its epoch anew, one that shuffles
by torch's generator takes another order, and one without a length is a batch ahead of what its state says, since
Lightning fetches a batch early to know whether it is the last.
"""

from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, RandomSampler

__all__ = ["check_place", "finished_epochs", "plateaus", "watched_by"]

_FINISHED = "_iterator_finished"  # of a StatefulDataLoader's state


def check_place(trainer: Trainer, exact: bool) -> None:
    """Refuse to go on from a checkpoint where the place in the data is not known.

    Args:
        trainer: of a fit that has just loaded a checkpoint.
        exact: False warns instead.

    Raises:
        ValueError: naming the loader and the mend.
    """
    loop = trainer.fit_loop
    assert loop._combined_loader is not None
    progress = loop.epoch_loop.batch_progress
    within = progress.current.ready > 0 and not progress.is_last_batch
    for loader in loop._combined_loader.flattened:
        reason = _reason(loader, within)
        if reason is None:
            continue
        message = (
            f"this run cannot go on exactly: its training loader, a {type(loader).__name__}, {reason}. Use "
            "lightning_tilt.data, or a StatefulDataLoader of torchdata that has a length"
        )
        if exact:
            raise ValueError(message + "; sampler.exact_resume: false goes on all the same.")
        rank_zero_warn(message + ".")


def finished_epochs(loops: dict[str, Any]) -> None:
    """Mark the loaders of a fit that has trained on the last batch of an epoch as finished.

    torchdata's loaders notice only when they are asked for a batch more.  Loaded as unfinished they would make an empty
    epoch, and every later one would have the order of its successor.

    Args:
        loops: state of the fit loop, changed in place.
    """
    if loops["epoch_loop.batch_progress"]["is_last_batch"]:
        for loader in loops["state_dict"].get("combined_loader", []):
            if _FINISHED in loader:
                loader[_FINISHED] = True


def plateaus(trainer: Trainer) -> list[Any]:
    """Schedulers that step on a metric, which Lightning does only after a batch's checkpoint has been written."""
    return [c for c in trainer.strategy.lr_scheduler_configs if c.reduce_on_plateau and c.interval == "step"]


def watched_by(trainer: Trainer) -> list[float]:
    """What they are about to see."""
    metrics = trainer.callback_metrics
    return [float(metrics[c.monitor]) for c in plateaus(trainer) if c.monitor in metrics]


def _reason(loader: Any, within: bool) -> str | None:
    if sized_len(loader) is None:
        return "has no length, and is a batch ahead of its own state"
    if isinstance(loader, _Stateful):
        return None
    if within:
        return "does not know its place within an epoch"
    shuffles = isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler)
    return "shuffles by a random state that is not saved" if shuffles else None
