"""`ExponentialMovingAverage`: the average of the trained parameters over the updates of a fit.

After update k = 0, 1, 2, ... of the parameters theta

    m  <-  d_k m + (1 - d_k) theta,        d_k = min(decay, (1 + k)/(10 + k))

with m = theta before the first.  Without warm-up d_k = decay.  Only what is trained is averaged: of a large model with
adapters, the adapters.
"""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ..interfaces import Predictor
from ..shards import dealt, need_whole, whole, wholes

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage(Callback):
    """Average the trained parameters, and look at the average wherever the model is judged.

    Validation, test and prediction see the average, and so do the callbacks that report and export when a fit ends
    (`on_fit_end`), wherever they stand in the list.  Training, and the module after the fit, have the raw parameters.
    A checkpoint has the raw parameters in its `state_dict` and the average in this callback's state, at any time, so
    that a resumed fit goes on exactly; whoever loads one with this callback in the Trainer gets both.  (A checkpoint of
    weights alone, `save_weights_only`, holds those in use when it is written: after the last update, the average.)

    Args:
        decay: largest d, the weight of the past; 1 - d is that of the newest parameters.
        warmup: begin with a short memory, (1 + k)/(10 + k), which forgets the untrained start.
        evaluate: let the average be judged; False keeps it, in checkpoints, and judges the raw parameters.

    Raises:
        ValueError: if the decay is not in [0, 1).
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True, evaluate: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.warmup = warmup
        self.evaluate = evaluate
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._owner: Predictor | None = None
        self._raw: dict[str, Tensor] = {}
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew with another model; a checkpoint's average is loaded after this."""
        predictor = _predictor(pl_module)
        if self._owner is not predictor:
            self._owner, self.average, self._raw, self.updates = predictor, {}, {}, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average starts at the parameters, unless a checkpoint brought one."""
        need_whole(trainer, "ExponentialMovingAverage")
        trained = _predictor(pl_module).trained_parameters()
        start = {n: p.detach().to(_dtype(p), copy=True) for n, p in trained.items()}
        self._check(trained)
        self.average = {n: dealt(self.average[n].to(p.dtype), p) for n, p in start.items()} if self.average else start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the update that the fit starts at."""
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after an update; a batch that only accumulates gradients moves nothing."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        k = self.updates
        d = min(self.decay, (1 + k) / (10 + k)) if self.warmup else self.decay
        for name, p in _predictor(pl_module).trained_parameters().items():
            self.average[name].lerp_(p.to(self.average[name].dtype), 1 - d)
        self.updates += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the raw parameters."""
        self._swap_out(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self._swap_in(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the raw parameters."""
        self._swap_out(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the average."""
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the raw parameters."""
        self._swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before any callback's `on_fit_end`: they report and export the average."""
        self._swap_in(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where a resumed fit had nothing left to train: then there is no `on_train_end`."""
        self._swap_in(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After every callback's `on_fit_end`: the module keeps the raw parameters."""
        self._swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no average behind."""
        self._swap_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The raw parameters, also where the average is in use."""
        for name, value in self._raw.items():
            checkpoint["state_dict"]["predictor." + name] = whole(value)

    def state_dict(self) -> dict[str, Any]:
        """The average, whole, by the parameters' names, and the number of updates in it."""
        return {"updates": self.updates, "average": wholes(self.average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a checkpoint's average."""
        self.updates, self.average = state_dict["updates"], dict(state_dict["average"])

    def _swap_in(self, pl_module: LightningModule) -> None:
        if not self.evaluate or self._raw or not self.average:
            return
        trained = _predictor(pl_module).trained_parameters()
        self._check(trained)
        # Evaluation runs in inference mode, and a copy made there could not be trained on.
        with torch.inference_mode(False), torch.no_grad():
            self._raw = {n: p.detach().clone() for n, p in trained.items()}
            for name, p in trained.items():
                p.copy_(dealt(self.average[name], p))

    def _swap_out(self, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.no_grad():
            trained = _predictor(pl_module).trained_parameters() if self._raw else {}
            for name, p in trained.items():
                p.copy_(self._raw[name])
        self._raw = {}

    def _check(self, trained: dict[str, nn.Parameter]) -> None:
        shapes = {n: v.shape for n, v in self.average.items()}
        if self.average and shapes != {n: p.shape for n, p in trained.items()}:
            raise ValueError(
                "the average in the checkpoint is of other parameters than this model trains: give the predictor the "
                "settings that it was saved with, or remove ExponentialMovingAverage"
            )


def _predictor(pl_module: LightningModule) -> Predictor:
    predictor = pl_module.predictor
    assert isinstance(predictor, Predictor)
    return predictor


def _dtype(p: Tensor) -> torch.dtype:
    """At least float32: an average moves by less than half precision can say."""
    return torch.promote_types(p.dtype, torch.float32)
