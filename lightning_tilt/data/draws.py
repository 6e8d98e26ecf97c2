"""Nothing to condition on: for densities a batch says only how many samples to draw.

A batch is a tensor of sample indices (n,); its numbers are ids for the log, the sampler reads how many they are.
"""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lightning_tilt.data.loader import Loader, batch_state, check_batch

__all__ = ["DrawsDataModule"]


class _Indices(Dataset[Tensor]):
    """The integers 0 .. n - 1."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._n:
            raise IndexError(index)
        return torch.tensor(index)


class DrawsDataModule(LightningDataModule):
    """Batches of sample indices.

    Args:
        samples: samples a training batch and process.
        batches: training batches an epoch.
        val_samples: samples of a validation, in batches of `samples`, shared out among the processes.
        test_samples: samples of a test; None is `val_samples`.
        predict_samples: samples of a prediction; None is `val_samples`.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        samples: int = 256,
        batches: int = 100,
        val_samples: int = 1024,
        test_samples: int | None = None,
        predict_samples: int | None = None,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.batches = batches
        self.val_samples = val_samples
        self.test_samples = val_samples if test_samples is None else test_samples
        self.predict_samples = val_samples if predict_samples is None else predict_samples
        for name in ("samples", "batches", "val_samples", "test_samples", "predict_samples"):
            if self.__dict__[name] < 1:
                raise ValueError(f"{name} must be at least 1, not {self.__dict__[name]}")

    def train_dataloader(self) -> Loader:
        """`batches` batches of `samples` indices in every process."""
        world = 1 if self.trainer is None else self.trainer.world_size
        return self._loader(self.samples * self.batches * world)

    def state_dict(self) -> dict[str, Any]:
        """How many samples all processes draw together."""
        return batch_state(self, self.samples)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with training on larger or smaller batches than the checkpoint's.

        Raises:
            ValueError: naming the two sizes.
        """
        check_batch(self, state_dict, "data.samples", self.samples)

    def val_dataloader(self) -> Loader:
        """Indices of the validation's samples."""
        return self._loader(self.val_samples)

    def test_dataloader(self) -> Loader:
        """Indices of the test's samples."""
        return self._loader(self.test_samples)

    def predict_dataloader(self) -> Loader:
        """Indices of the prediction's samples."""
        return self._loader(self.predict_samples)

    def _loader(self, n: int) -> Loader:
        return Loader(dataset=_Indices(n), batch_size=self.samples)
