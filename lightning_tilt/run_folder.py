"""The run's folder (`trainer.default_root_dir`): everything of a run is in it, and nothing in it is ever overwritten.

A new run in a used folder first moves what the earlier one left into `previous/001/`, `previous/002/`, ...; one that
goes on from a checkpoint of the folder adds to it, and what it writes anew leaves the earlier one as `report.1.json`,
`report.2.json`, ...
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

__all__ = [
    "RUN_OUTPUTS",
    "keep_previous",
    "name_within",
    "need_writable",
    "set_aside",
    "write_csv",
    "write_json",
    "write_text",
]

_DIAGNOSTICS = ("target_variance", "adjoint_norm", "work", "ess", "density")

RUN_OUTPUTS = (
    "config.yaml",
    "metrics.csv",
    "report.json",
    "evaluation.json",
    "evaluation.csv",
    "evaluation_samples.csv",
    "evaluation.html",
    "evaluation.png",
    "checkpoints",
    "lora",
    "weights",
    "pipeline",
    "predictions",
    "predictions_[0-9]*",
    "before_after.png",
    "curves.png",
    "reward_histogram.png",
    "steering.json",
    *(f"{name}.{kind}" for name in _DIAGNOSTICS for kind in ("json", "png")),
)
"""What a run writes, also under a number (`report.1.json`); nothing else in the folder is touched."""


def need_writable(folder: str | Path) -> None:
    """Refuse, before anything is computed, a folder that nothing can be written into; nothing is made or left there.

    Args:
        folder: the run's folder; it need not exist.

    Raises:
        OSError: naming the folder and what the system says of it.
    """
    folder = Path(folder).expanduser().absolute()
    try:
        with TemporaryFile(dir=next(place for place in (folder, *folder.parents) if place.exists())):
            pass
    except OSError as error:
        raise OSError(
            f"the run's folder {str(folder)!r} cannot be written to ({error.strerror}); give another one: "
            "--trainer.default_root_dir FOLDER"
        ) from None


def name_within(setting: str, name: str) -> str:
    """The name, if it is one of something that lies in the run's folder itself.

    Args:
        setting: whose value it is, for the message.
        name: to be checked.

    Raises:
        ValueError: if it leads elsewhere, where what it names would be renamed before it is written.
    """
    if name != Path(name).name or name in ("", "..") or "\0" in name:
        raise ValueError(f"{setting} is a name in the run's folder, and {name!r} is none: give one without a slash")
    return name


def keep_previous(folder: str | Path) -> Path | None:
    """Move an earlier run's outputs aside.

    Args:
        folder: the run's folder; it need not exist.

    Returns:
        Where they are now, or None if there were none.
    """
    folder = Path(folder)
    patterns = [p for name in map(Path, RUN_OUTPUTS) for p in (name.name, f"{name.stem}.[0-9]*{name.suffix}")]
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not found:
        return None
    count = 1
    while (kept := folder / "previous" / f"{count:03d}").exists():
        count += 1
    kept.mkdir(parents=True)
    for path in found:
        path.rename(kept / path.name)
    return kept


def set_aside(path: str | Path) -> None:
    """Rename a file or folder to the first of `report.1.json`, `report.2.json`, ... that is not taken, if it exists."""
    path = Path(path)
    count = 1
    while (free := path.with_name(f"{path.stem}.{count}{path.suffix}")).exists():
        count += 1
    if path.exists():
        path.rename(free)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; an earlier one is kept under the next free number."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """The same of a text file, in UTF-8; what has no UTF-8 is written as an escape."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    set_aside(path)
    draft.replace(path)


def write_csv(path: str | Path, rows: Iterable[Sequence[object]]) -> None:
    """The same of a table; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([_plain(cell) for cell in row] for row in rows)
    write_text(path, text.getvalue())


def _plain(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
