"""`PredictionWriter`: what `lightning-tilt predict` leaves in `predictions/`: images, a grid, and a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..run_folder import name_within, set_aside, write_csv
from .pictures import image_grid

__all__ = ["PredictionWriter"]


class PredictionWriter(BasePredictionWriter):
    """Write `00000.png ...`, `grid.png` (a row a prompt) and `samples.csv`; states of a density as `samples.npy`.

    Args:
        folder: name in the run's folder.

    Raises:
        ValueError: if `folder` leads elsewhere.
    """

    def __init__(self, folder: str = "predictions") -> None:
        super().__init__(write_interval="batch")
        self.folder = name_within("PredictionWriter.folder", folder)
        self._images: list[Tensor] = []
        self._rows: list[tuple[str, str, float]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep an earlier prediction under the next free number: its images must not mix with these."""
        set_aside(self._folder(trainer))

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the images of one batch."""
        folder = self._folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        images, prompts = prediction["images"], prediction["prompts"]
        for i, (image, reward) in enumerate(zip(images, prediction["reward"].tolist(), strict=True)):
            name = f"{len(self._rows):05d}.png" if image.ndim == 3 else str(len(self._rows))
            if image.ndim == 3:
                image_grid(folder / name, image[None], columns=1, gap=0)
            self._rows.append((name, "" if prompts is None else prompts[i], reward))
        self._images.append(images)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the grid and the table, once all processes have said that their samples are good."""
        if not self._images:
            return
        folder, images = self._folder(trainer), torch.cat(self._images)
        if images.ndim == 4:
            row = next((i for i, r in enumerate(self._rows) if r[1] != self._rows[0][1]), len(self._rows))
            image_grid(folder / "grid.png", images, columns=min(row, 16))
        else:
            np.save(folder / "samples.npy", images.numpy())
        write_csv(folder / "samples.csv", [("sample", "prompt", "reward"), *self._rows])
        rank_zero_info(f"PredictionWriter: {len(self._rows)} samples in {folder}")
        self._images, self._rows = [], []

    def _folder(self, trainer: Trainer) -> Path:
        name = self.folder if trainer.world_size == 1 else f"{self.folder}_{trainer.global_rank}"
        return Path(trainer.default_root_dir) / name
