"""What the tests of the regressions at noised end points share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from toys import PromptedNet, Recorder, fit

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.callbacks.scoring import score_end_points
from lightning_tilt.interfaces import Condition, Predictor
from lightning_tilt.losses.end_points import NoisedEnds
from lightning_tilt.models import GaussianMixture, GaussianMixturePredictor, the_mixture
from lightning_tilt.process import Cosine, Driftless, RectifiedFlow, VariancePreserving
from lightning_tilt.rewards import QuadraticReward
from lightning_tilt.tasks import (
    ConditionalScoreMatchingTask,
    MixedScoreMatchingTask,
    NovelScoreMatchingTask,
    TargetScoreMatchingTask,
)
from lightning_tilt.trajectory import Trajectory

MIXTURE, REWARD = the_mixture()
TILTED = MIXTURE.tilt(REWARD, 1.0)[0]
INTERPOLANTS = {
    "flow": RectifiedFlow(),
    "cosine": Cosine(),
    "vp": VariancePreserving.from_betas(),
    "driftless": Driftless(0.2, 2.0),
}


def quadratic() -> QuadraticReward:
    """The reward of the mixture, a new one: metrics have state."""
    return the_mixture()[1]


def points_of(process: Any, x1: Tensor, t: float, base: Any = MIXTURE, x: Tensor | None = None) -> NoisedEnds:
    """End points x1 (n, 2) noised to t (or said to have been noised to x), with the gradients at lam = 1."""
    n = len(x1)
    times = torch.full((n,), t, dtype=torch.float64)
    noised = process.add_noise(x1, torch.randn_like(x1), times) if x is None else x.expand(n, -1)
    reward = quadratic()
    a, b, _ = reward.coefficients()
    return NoisedEnds(
        x1, noised, times, Condition({}, None, n), torch.arange(n), reward.score(x1, None),
        reward_gradient=b - x1 @ a, lam=1.0, end_score=base.score(x1),
    )  # fmt: skip


def one(mixtures: GaussianMixture) -> GaussianMixture:
    """The first of a batch of mixtures, as a mixture of its own."""
    return GaussianMixture(mixtures.weights[0], mixtures.means[0], mixtures.covariances[0])


class TiltedMixturePredictor(Predictor):
    """The exact tilted prediction plus W f(x, t), W = 0 trained: the gradient in W is the error times f."""

    def __init__(self, process: Any, known: bool = True) -> None:
        super().__init__()
        self.process, self.prediction_type, self.state_shape = process, "sample", (2,)
        self._laws = [GaussianMixturePredictor.of(law, process) for law in (MIXTURE, TILTED)]
        self.W = nn.Parameter(torch.zeros(2, 4, dtype=torch.float64))
        self.known = known

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._laws[1].predict(x, t, condition) + features(x, t) @ self.W.T

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        yield self._laws[0] if self.known else Unknown(self._laws[0])


def features(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(t), t, x[:, 0].tanh(), x[:, 1].tanh()], 1)


class Unknown(Predictor):
    """A predictor whose law nobody is told."""

    def __init__(self, law: Predictor) -> None:
        super().__init__()
        self._law = [law]
        self.process, self.prediction_type, self.state_shape = law.process, law.prediction_type, law.state_shape

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._law[0].predict(x, t, condition)

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        yield self


class ExactSampler(TrajectorySampler):
    """Ends every rollout in exact samples of a law."""

    law: GaussianMixture = TILTED

    def rollout(self, host: Any, batch: Any, **kwargs: Any) -> Trajectory:
        path = super().rollout(host, batch, **kwargs)
        generator = torch.Generator().manual_seed(7 + kwargs["number"])
        states = torch.cat([path.states[:-1], self.law.sample(len(path), generator).to(path.states)[None]])
        return score_end_points(host, replace(path, states=states), kwargs.get("reward_gradient", False), None)


def watched(task_class: type) -> type:
    """The task, which keeps the points that it noised, and their targets."""

    class Watched(task_class):  # type: ignore[misc]
        def target(self, points: NoisedEnds) -> Tensor:
            y = super().target(points)
            self.__dict__.setdefault("seen", []).append((points, y))
            return y

    return Watched


def one_fit(task_class: type, predictor: Predictor, reward: Any, batches: Sequence[Any], **kwargs: Any) -> Any:
    """Updates that move nothing, in float64: the task (with `seen` points) and what was recorded."""
    sampler_class = kwargs.pop("sampler_class", TrajectorySampler)
    sampler = sampler_class(**({"steps": 4, "samples_per_condition": 1} | kwargs.pop("sampler", {})))
    extra = kwargs.pop("trainer", {})
    task = watched(task_class)(
        predictor=predictor, reward=reward, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **kwargs
    )
    recorder: Recorder = fit(task.to(torch.float64), sampler, batches, **extra)
    return task, recorder


SCORE_MATCHING: dict[str, tuple[type, dict[str, Any]]] = {
    "csm": (ConditionalScoreMatchingTask, {}),
    "tsm": (TargetScoreMatchingTask, {}),
    "nsm": (NovelScoreMatchingTask, {}),
    "nsm m=3": (NovelScoreMatchingTask, {"precision": 3.0}),
    "c=.3": (MixedScoreMatchingTask, {"mixing": 0.3}),
    "optimal": (MixedScoreMatchingTask, {"mixing": "variance_optimal", "precision": 0.5}),
}


def net() -> PromptedNet:
    torch.manual_seed(3)
    predictor = PromptedNet(RectifiedFlow())
    predictor.network[2].weight.data += 0.3
    return predictor.double()


def task_of(name: str, process: Any) -> Any:
    kind, parameters = SCORE_MATCHING[name]
    return kind(predictor=GaussianMixturePredictor.of(MIXTURE, process), reward=quadratic(), **parameters)
