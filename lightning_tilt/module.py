"""`TiltModule`: the host of the loss mixins - predictor, reward, optimiser, and the steps that only look.

A mixin brings `training_step`; the host brings what is trained and how.  Validation and test roll the current model out
with seeds of their own and report the reward with its standard error; prediction returns decoded images.
"""

from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_tilt.chain import slices
from lightning_tilt.interfaces import Evaluator, Loss, Predictor, Reward, find_sampler
from lightning_tilt.interfaces.not_finite import judge_together
from lightning_tilt.metrics import MeanWithError, PairwiseDiversity
from lightning_tilt.noise import Stream
from lightning_tilt.shards import clip_gradients, in_pieces
from lightning_tilt.strategies import shard
from lightning_tilt.trajectory import Trajectory

__all__ = ["TiltModule"]


class TiltModule(LightningModule):
    """Host of a loss: `class AdjointMatchingTask(AdjointMatching, TiltModule)`.

    Args:
        predictor: what is tuned, with its base.
        reward: what is maximised.
        optimizer: makes the optimiser of the trained parameters.
        lr_scheduler: makes a learning-rate scheduler, stepped after every update; None: constant.
            `ReduceLROnPlateau` watches `train/reward`, which is to grow: it needs `mode: max`.

    Raises:
        ValueError: when the optimisers are made, for a `ReduceLROnPlateau` of another mode.
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

    def configure_model(self) -> None:
        """Under a sharding strategy: shard the predictor."""
        shard(self)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients together, whether sharded or not; otherwise as Lightning does."""
        if gradient_clip_val and gradient_clip_algorithm != "value" and not in_pieces(self.trainer):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip_gradients([p.grad for p in parameters if p.grad is not None], gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """The optimiser of what predictor and loss learn, and its scheduler, stepped per update."""
        own = self.loss_parameters() if isinstance(self, Loss) else []
        optimizer = self._optimizer([*self.predictor.trained_parameters().values(), *own])
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if scheduler.mode != "max":
                raise ValueError("ReduceLROnPlateau watches train/reward, which is to grow: give it mode: max")
            settings["monitor"] = "train/reward"
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def on_validation_epoch_start(self) -> None:
        """Forget the samples of the last validation."""
        self._seen = _Seen(self.device)

    def on_test_epoch_start(self) -> None:
        """Forget the samples of the last test."""
        self._seen = _Seen(self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Sample the current model, always from the same seeds."""
        self._look(batch, batch_idx, "validate")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same on the test prompts, unless an `Evaluation` samples them anyway."""
        if not self._evaluated:
            self._look(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log `val/reward`, its standard error `val/reward_se`, and `val/diversity`."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/reward`, its standard error `test/reward_se`, and `test/diversity`."""
        if not self._evaluated:
            self._report("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Images of the current model: {"images": (N, ...), "prompts": list or None, "reward": (N,)}, on the CPU."""
        bad = list[str]()
        trajectory = self._rollout(batch, batch_idx, "predict", bad)
        judge_together(self, find_sampler(self).on_bad_reward, bad, running=True)
        return {
            "images": self._decode(trajectory).cpu(),
            "prompts": trajectory.prompts,
            "reward": torch.where(trajectory.weight > 0, trajectory.reward, torch.nan).cpu(),
        }

    def on_predict_epoch_end(self) -> None:
        """Wait for processes that have one batch more, and hear what they have found."""
        while judge_together(self, find_sampler(self).on_bad_reward, []):
            pass

    @property
    def _evaluated(self) -> bool:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(c, Evaluator) for c in callbacks)

    def _look(self, batch: Any, batch_idx: int, stream: Stream) -> None:
        trajectory = self._rollout(batch, batch_idx, stream, self._seen.bad)
        trajectory = trajectory[trajectory.weight > 0]  # without samples that were skipped
        if len(trajectory) == 0:
            return
        self._seen.reward.update(trajectory.reward)
        images = self._decode(trajectory)
        group = trajectory.index if trajectory.prompts is not None else torch.zeros_like(trajectory.index)
        for g in group.unique().tolist():
            if int((group == g).sum()) > 1:
                self._seen.diversity.update(images[group == g])

    def _report(self, name: str) -> None:
        judge_together(self, find_sampler(self).on_bad_reward, self._seen.bad)
        estimate = self._seen.reward.compute()
        values = {f"{name}/reward": estimate["mean"], f"{name}/reward_se": estimate["se"]}
        # `compute` waits for all processes: all of them enter it, or none, whoever saw groups of its own.
        if int(self.trainer.strategy.reduce(self._seen.diversity.groups.clone(), reduce_op="sum")) > 0:
            values[f"{name}/diversity"] = self._seen.diversity.compute()
        self.log_dict(values, sync_dist=True)  # the metrics are summed over the processes: a mean of equal numbers

    def _decode(self, trajectory: Trajectory) -> Tensor:
        cuts = slices(len(trajectory), find_sampler(self).reward_micro_batch)
        with torch.no_grad():
            return torch.cat([self.predictor.decode(trajectory.end[i]) for i in cuts])

    def _rollout(self, batch: Any, batch_idx: int, stream: Stream, bad: list[str]) -> Trajectory:
        return find_sampler(self).rollout(self, batch, stream=stream, number=batch_idx, bad=bad)


class _Seen:
    """What a validation has seen so far, on the device that processes exchange it from."""

    def __init__(self, device: torch.device) -> None:
        self.reward, self.diversity = MeanWithError().to(device), PairwiseDiversity().to(device)
        self.bad: list[str] = []
