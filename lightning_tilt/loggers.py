"""`RunLogger`: metrics of a run as `metrics.csv` in the run's folder, appended to and never deleted.

Lightning's CSVLogger makes numbered sub-folders and removes a file that it finds.  Here the run's folder is the one
place for everything, a resumed run goes on in the same file, and a metric that appears late gets its column.
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
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration is saved beside the metrics."""

    def _add_columns(self, new: list[str]) -> None:
        assert self._columns is not None
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self._columns += new
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
