"""Where a fit that goes on keeps its checkpoints: `last.ckpt` is its newest, in whatever folder it goes on.

A checkpoint names files by the path that they had when it was written.  Lightning forgets them all where the folder is
called otherwise now - moved, copied, a link, a relative path - and then writes `last-v1.ckpt` beside a `last.ckpt` that
grows old.  Here names are carried over to the folder's present path; of another run's checkpoint none are.
"""

import os
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..checkpoints import last_path
from ..run_folder import set_aside

__all__ = ["carry_names_over", "goes_on_here", "keep_last_newest"]


def goes_on_here(trainer: Trainer) -> bool:
    """Whether the checkpoint that a run goes on from is one of its own folder."""
    if trainer.ckpt_path is None:
        return False
    found = Path(trainer.ckpt_path).absolute().parent.resolve()
    homes = [Path(callback.dirpath).resolve() for callback in _keepers(trainer) if callback.dirpath]
    # SLURM's requeued runs have theirs beside the other outputs.
    return found == Path(trainer.default_root_dir).resolve() or any(found.is_relative_to(home) for home in homes)


def carry_names_over(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint of this run's folder speak of the folder by its present path.

    Args:
        trainer: of a fit that goes on.
        checkpoint: what is about to be loaded, changed in place.
    """
    for callback in _keepers(trainer) if goes_on_here(trainer) else []:
        state, now = checkpoint["callbacks"].get(callback.state_key, {}), callback.dirpath
        before = state.get("dirpath")
        if before is None or now is None or before == now:
            continue
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = _carried(state.get(name, ""), before, now)
        state["best_k_models"] = {_carried(k, before, now): v for k, v in state.get("best_k_models", {}).items()}
        state["dirpath"] = now


def keep_last_newest(trainer: Trainer) -> None:
    """Write `last.ckpt` itself again, and no numbered one beside it; that of another run is kept under a number."""
    own = goes_on_here(trainer)
    for callback in _keepers(trainer):
        last = last_path(callback)
        if not callback.save_last or last is None or callback.last_model_path == last:
            continue
        if not own and trainer.is_global_zero:
            set_aside(last)
        callback.last_model_path = last


def _keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _carried(path: str, before: str, now: str | Path) -> str:
    if not path or not Path(path).is_relative_to(before):
        return path
    inside = Path(path).relative_to(before)
    return path if ".." in inside.parts else os.path.join(now, inside)
