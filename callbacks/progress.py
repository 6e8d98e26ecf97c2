"""A progress bar that shows what matters: updates done, reward and ESS."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

__all__ = ["TiltProgressBar"]


class TiltProgressBar(TQDMProgressBar):
    """Lightning's bar over the whole fit, counted in updates, with short names and without the version number.

    An epoch of prompts is often a few rollouts only; where `max_steps` is set, one bar goes from 0 to it.

    Args:
        refresh_rate: batches between two refreshes; 0 turns the bar off.
        leave: leave the bar on the screen when an epoch ends (where `max_steps` is not set).
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Go on with the bar of the fit."""
        if trainer.max_steps < 1:
            super().on_train_epoch_start(trainer, *args)
            return
        bar = self.train_progress_bar
        bar.total = trainer.max_steps
        if bar.n == 0:
            bar.initial = bar.n = trainer.global_step
            bar.set_description("Update")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show how many updates are done, and the values of the last one."""
        if trainer.max_steps < 1:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self.refresh_rate > 0 and (trainer.global_step % self.refresh_rate == 0):
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar of the fit alone."""
        if trainer.max_steps < 1:
            super().on_train_epoch_end(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Logged values, `train/reward` as `reward`."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/"): value for name, value in metrics.items()}
