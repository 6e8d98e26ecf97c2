"""`RunLogger`: metrics of a run as `metrics.csv` in the run's folder, appended to and never deleted.

Lightning's CSVLogger makes numbered sub-folders and removes a file that it finds.  Here the run's folder is the one
place for everything, a resumed run goes on in the same file, and a metric that appears late gets its column.
Only rows that come again are dropped: those that were written after the checkpoint from which a run goes on.
"""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["RunLogger", "read_metrics"]


class RunLogger(Logger):
    """Write each row of metrics to `save_dir/metrics.csv` as it comes.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self._columns: list[str] | None = None
        self._last: int | None = None  # the last step of the checkpoint that this run goes on from

    @property
    def save_dir(self) -> str:
        """The run's folder: checkpoints go there too."""
        return str(self._folder)

    @property
    def log_dir(self) -> str:
        """The same folder."""
        return str(self._folder)

    @property
    def name(self) -> str:
        """No sub-folder."""
        return ""

    @property
    def version(self) -> str:
        """No sub-folder."""
        return ""

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder / "metrics.csv"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row; a new metric rewrites the file with one more column."""
        row = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        if self._columns is None:
            self._columns = list(read_metrics(self.path)) if self.path.exists() else []
            if self._columns:
                self._add_columns([])  # a last line that a crash cut short gets its end
        new = [k for k in row if k not in self._columns]
        if new:
            self._add_columns(new)
        if step == self._last and self._replaced(row):
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def go_on_after(self, step: int) -> None:
        """Drop what the run wrote after the checkpoint that it goes on from: it comes again.

        Args:
            step: the checkpoint's last one. Its rows stay, and one that is written again takes its own place.
        """
        self._last = step
        if not self.path.exists():
            return
        self._columns = list(read_metrics(self.path))
        rows = self._rows()
        if rows and not self.path.read_text().endswith("\n"):
            del rows[-1]  # cut short, and so is its step perhaps
        self._write([row for row in rows if not row["step"] or float(row["step"]) <= step])

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration is saved beside the metrics."""

    def _add_columns(self, new: list[str]) -> None:
        assert self._columns is not None
        rows = self._rows()
        self._columns += new
        self._write(rows)

    def _replaced(self, row: dict[str, Any]) -> bool:
        """Whether the file has a row of the same step and metrics; then it is this one now."""
        rows = self._rows()
        for i, old in enumerate(rows):
            if old["step"] == str(row["step"]) and {k for k, v in old.items() if v} == set(row):
                rows[i] = row
                self._write(rows)
                return True
        return False

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """The whole file anew, whole or not at all."""
        assert self._columns is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(self.path)


def read_metrics(path: str | Path) -> dict[str, list[float]]:
    """Read a metrics.csv into columns; an empty cell is NaN."""
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        columns: dict[str, list[float]] = {name: [] for name in reader.fieldnames or []}
        for row in reader:
            for name, values in columns.items():
                values.append(float(row[name] or "nan"))
    return columns
