"""Small predictors and runs that several tests share."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.interfaces import Condition, Predictor, Prompts, Reward
from lightning_tilt.models import GaussianMixturePredictor
from lightning_tilt.process import Process
from lightning_tilt.tasks import AdjointMatchingTask
from lightning_tilt.transition import DDIM


def gaussian(mu: float, v: float, process: Process) -> GaussianMixturePredictor:
    return GaussianMixturePredictor([1.0], [[mu]], [[[v]]], process)


class AffineControl(Predictor):
    """A one-dimensional base whose means are moved by std_k u_k(x), u_k(x) = g_k x + h_k, with (g, h) trained."""

    def __init__(self, base: Predictor, steps: int, control: Sequence[tuple[float, float]] | None = None) -> None:
        super().__init__()
        self._base = [base]
        self.process, self.prediction_type, self.state_shape = base.process, "sample", base.state_shape
        self.t = self.process.grid(steps)
        start = torch.zeros(steps, 2, dtype=torch.float64) if control is None else torch.tensor(control).double()
        self.control = nn.Parameter(start)

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        k = torch.searchsorted(self.t, t - 1e-9)
        now, after = self.t[k], self.t[k + 1]
        alpha, beta, alpha_s, beta_s = (f(i) for i in (now, after) for f in (self.process.alpha, self.process.beta))
        b2 = beta**2 - (alpha / alpha_s) ** 2 * beta_s**2
        std = b2.sqrt() * beta_s / beta
        slope = alpha_s - (beta_s**2 - std**2).clamp(min=0).sqrt() * alpha / beta  # d mean / d x1_hat at fixed x
        u = self.control[k, :1] * x + self.control[k, 1:]
        return self._base[0].predict(x, t, condition) + (std / slope)[:, None] * u

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        yield self._base[0]


class PromptedNet(Predictor):
    """A small conditional network with a frozen twin as its base: prompts are their lengths."""

    def __init__(self, process: Process, d: int = 2) -> None:
        super().__init__()
        self.process, self.prediction_type, self.state_shape = process, "velocity", (d,)
        self.network = nn.Sequential(nn.Linear(d + 2, 8), nn.Tanh(), nn.Linear(8, d))
        self._twin = [nn.Sequential(nn.Linear(d + 2, 8), nn.Tanh(), nn.Linear(8, d)).requires_grad_(False)]
        self._twin[0].load_state_dict(self.network.state_dict())
        self._asked = [self.network]

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        features = torch.stack([t.to(x.dtype), condition.tensors["length"].to(x.dtype)], 1)
        return self._asked[0](torch.cat([x, features], 1))

    def encode(self, prompts: Prompts, size: int) -> Condition:
        assert prompts is not None
        return Condition({"length": torch.tensor([len(p) / 10 for p in prompts])}, list(prompts), size)

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        self._twin[0].to(self.network[0].weight.dtype)
        self._asked[0] = self._twin[0]
        try:
            yield self
        finally:
            self._asked[0] = self.network


class SumReward(Reward):
    """r(x) = sum of sin(x): smooth, bounded slope, works on any state."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return images.flatten(1).sin().sum(1)


class Recorder(lightning.Callback):
    """Keeps each batch's trajectory and gradients."""

    def __init__(self) -> None:
        self.trajectories: list[Any] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.trajectories.append(pl_module.sampler.trajectory)
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def trainer(callbacks: list[Any], **kwargs: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_steps": 1,
    }  # fmt: skip
    return lightning.Trainer(callbacks=callbacks, **(quiet | kwargs))


def fit(module: Any, sampler: TrajectorySampler, batches: Sequence[Any], **kwargs: Any) -> Recorder:
    """Fit on the given batches; returns what was seen."""
    recorder = Recorder()
    extra = kwargs.pop("callbacks", [])
    run = trainer([sampler, recorder, *extra], **({"max_steps": len(batches)} | kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # Lightning's advice on loaders, logs and modes
        warnings.filterwarnings("ignore", message=".*they are left out")  # has tests of its own
        run.fit(module, DataLoader(list(batches), batch_size=None))
    return recorder


def one_update(
    predictor: Predictor, reward: Reward, batch: Any, steps: int, dtype: torch.dtype = torch.float64,
    sampler: dict[str, Any] | None = None, **loss: Any,
) -> tuple[AdjointMatchingTask, Any, dict[str, Tensor]]:  # fmt: skip
    """One rollout and its gradient, without moving anything."""
    task = AdjointMatchingTask(
        predictor=predictor,
        reward=reward,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        **({"checkpoint": False} | loss),
    ).to(dtype)
    callback = TrajectorySampler(
        **({"steps": steps, "samples_per_condition": 1, "transition": DDIM()} | (sampler or {}))
    )
    recorder = fit(task, callback, [batch])
    return task, recorder.trajectories[0], recorder.gradients[0]
