"""Checkpoints that are whole or not there: written beside, flushed to the disk, renamed; read as plain data alone.

    save    .last.ckpt.part  ->  fsync  ->  rename to last.ckpt  ->  fsync of the folder

A process that is killed, or a disk that fills up, while it writes leaves the earlier file as it was.  Reading says in
one line what is wrong with a file: cut short, another format, code inside.
"""

import errno
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["AtomicCheckpointIO", "last_checkpoint", "last_path", "read_checkpoint", "write_atomically"]

_CODE = re.compile(r"GLOBAL (\S+)")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("state_dict", "callbacks", "loops", "hyper_parameters", "settings", "base", "loss"), dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plain checkpoints, written atomically and read without running code.

    `TrajectorySampler` puts it into any Trainer whose checkpoints are Lightning's plain ones; where a Trainer has none:
    `Trainer(plugins=[AtomicCheckpointIO()])`.  Addresses of other file systems (s3://...) are Lightning's own business.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint whole, or leave what was there.

        Raises:
            OSError: if it cannot be written; the earlier file is intact then.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_atomically(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; only `weights_only=False`, said by the user, lets it run code.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no checkpoint of a fit.
        """
        if weights_only is False or "://" in str(path):
            found: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
            return found
        return read_checkpoint(path, map_location)


def write_atomically(content: Any, path: Path) -> None:
    """`torch.save` to a file that is whole or not there.

    Raises:
        OSError: if it cannot be written; an earlier file of the name is intact then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")  # one name: what a killed run leaves, the next one overwrites
    try:
        with draft.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        draft.unlink(missing_ok=True)
        if cause is None:
            raise
        kept = "the earlier one of that name is intact" if path.exists() else "nothing was left half-written"
        mend = "make room and go on from the last checkpoint" if cause.errno in _NO_ROOM else "mend that and go on"
        raise OSError(
            cause.errno, f"checkpoint {path} could not be written ({cause.strerror}); {kept}: {mend}"
        ) from error


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint as plain data: no code in it is run.

    Args:
        path: the file.
        map_location: where tensors go.
        mmap: leave tensors on the disk until they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut short, of another format, no checkpoint of a fit, or more than plain data.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    no = f"{path} cannot be read as a checkpoint, a file of plain data that a fit wrote"
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            page = opened.read(64).lstrip().lower().startswith((b"<!doctype", b"<html"))
        raise ValueError(f"{no}: it is {'a web page' if page else 'cut short, or of another format'}")
    try:
        found = torch.load(file, weights_only=True, map_location=map_location, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        code = _CODE.search(str(error))
        what = f"code ({code[1]})" if code else "more than plain data"
        raise ValueError(f"{no}: it holds {what}, and no code of a file is run") from error
    except Exception as error:
        raise ValueError(
            f"{no}: cut short, or of another format: {type(error).__name__}: {_first_line(error)}"
        ) from error
    missing = [k for k in ("state_dict", "pytorch-lightning_version") if not isinstance(found, dict) or k not in found]
    if missing:
        raise ValueError(f"{path} is no checkpoint of a fit: it has no {' and no '.join(missing)}")
    for key, kind in _KINDS.items():
        if not isinstance(found.get(key, kind()), kind):
            raise ValueError(f"{path} is damaged: its {key} is a {type(found[key]).__name__}, not a {kind.__name__}")
    bad = [key for key, state in found.get("callbacks", {}).items() if not isinstance(state, dict)]
    if bad:
        raise ValueError(f"{path} is damaged: the state of {bad[0]} in it is no dict")
    return dict(found)


def last_checkpoint(trainer: Trainer) -> Path | None:
    """Where a run that stops leaves its state, `last.ckpt` beside its other checkpoints; None: it keeps none."""
    callback = trainer.checkpoint_callback
    if callback is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None:
        return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    # What a checkpoint says of paths is not written to, unless it is this run's own folder.
    if Path(callback.last_model_path or "/").resolve().parent != Path(callback.dirpath).resolve():
        # Remembered, so that the run that goes on overwrites this file instead of counting versions of it.
        callback.last_model_path = last_path(callback) or os.path.join(callback.dirpath, "last.ckpt")
    return Path(callback.last_model_path)


def last_path(callback: ModelCheckpoint) -> str | None:
    """The path of a callback's last checkpoint; None: it has no folder yet, or the name is made of metrics."""
    if callback.dirpath is None or "{" in callback.CHECKPOINT_NAME_LAST:
        return None
    return os.path.join(callback.dirpath, callback.CHECKPOINT_NAME_LAST + callback.FILE_EXTENSION)


def _system_error(error: BaseException) -> OSError | None:
    """The system's error behind torch's writer, which says only that a write failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last, where folders can be flushed."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
