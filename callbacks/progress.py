"""A progress bar that shows what matters: reward and ESS."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

__all__ = ["TiltProgressBar"]


class TiltProgressBar(TQDMProgressBar):
    """Lightning's bar without the version number, and with short names.

    Args:
        refresh_rate: batches between two refreshes; 0 turns the bar off.
        leave: leave the bar on the screen when an epoch ends.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Logged values, `train/reward` as `reward`."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/"): value for name, value in metrics.items()}
