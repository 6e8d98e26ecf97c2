"""`TiltModule`: the host of the loss mixins - predictor, reward, optimiser, and the steps that only look.

A mixin brings `training_step`; the host brings what is trained and how.  Validation and test roll the current model out
with seeds of their own and report the reward with its standard error; prediction returns decoded images.
"""

from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_tilt.identities import mean
from lightning_tilt.interfaces import Predictor, Reward, Sampler
from lightning_tilt.noise import Stream
from lightning_tilt.trajectory import Trajectory

__all__ = ["TiltModule"]


class TiltModule(LightningModule):
    """Host of a loss: `class AdjointMatchingTask(AdjointMatching, TiltModule)`.

    Args:
        predictor: what is tuned, with its base.
        reward: what is maximised.
        optimizer: makes the optimiser of the trained parameters.
        lr_scheduler: makes a learning-rate scheduler, stepped after every update; None: constant.
    """

    def __init__(
        self,
        predictor: Predictor,
        reward: Reward,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.predictor = predictor
        self.process = predictor.process
        self.reward = reward
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

    def configure_optimizers(self) -> Any:
        """The optimiser of what the predictor trains, and its scheduler, stepped per update."""
        optimizer = self._optimizer(list(self.predictor.trained_parameters().values()))
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Mean reward of fresh samples of the current model, always from the same seeds."""
        self._look(batch, batch_idx, "validate", "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same on the test prompts."""
        self._look(batch, batch_idx, "test", "test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Images of the current model: {"images": (N, ...), "prompts": list or None, "reward": (N,)}."""
        trajectory = self._rollout(batch, batch_idx, "predict")
        with torch.no_grad():
            images = self.predictor.decode(trajectory.end)
        return {"images": images.cpu(), "prompts": trajectory.prompts, "reward": trajectory.reward.cpu()}

    def _look(self, batch: Any, batch_idx: int, stream: Stream, name: str) -> None:
        trajectory = self._rollout(batch, batch_idx, stream)
        estimate = mean(trajectory.reward)
        n = len(trajectory)
        self.log(f"{name}/reward", estimate.mean, prog_bar=True, batch_size=n, sync_dist=True)

    def _rollout(self, batch: Any, batch_idx: int, stream: Stream) -> Trajectory:
        (sampler,) = (c for c in self.trainer.callbacks if isinstance(c, Sampler))  # type: ignore[attr-defined]
        return sampler.rollout(self, batch, stream=stream, number=batch_idx)
