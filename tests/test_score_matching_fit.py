"""Score matching in a fit: what is refused, counted, and left out."""

import math

import pytest
import torch
from end_points import INTERPOLANTS, SCORE_MATCHING, TILTED, net, one_fit, points_of, task_of
from torch import Tensor
from toys import SumReward

from lightning_tilt.chain import Evaluations
from lightning_tilt.interfaces import Prompts
from lightning_tilt.tasks import (
    ConditionalScoreMatchingTask,
    MixedScoreMatchingTask,
    NovelScoreMatchingTask,
    TargetScoreMatchingTask,
)


class Blind(SumReward):
    is_differentiable = False


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="path_weights: self_normalised, or say allow_unweighted"):
        ConditionalScoreMatchingTask(predictor=net(), reward=SumReward(), path_weights="none")
    with pytest.raises(ValueError, match="allow_unweighted"):
        MixedScoreMatchingTask(predictor=net(), reward=SumReward(), mixing=0.0)
    MixedScoreMatchingTask(predictor=net(), reward=SumReward(), mixing=0.0, path_weights="clipped")
    for mixing in (1.5, "best", -0.1):
        with pytest.raises(ValueError, match="mixing is"):
            MixedScoreMatchingTask(predictor=net(), reward=SumReward(), mixing=mixing)
    with pytest.raises(ValueError, match="precision must be positive"):
        NovelScoreMatchingTask(predictor=net(), reward=SumReward(), precision=0.0)
    with pytest.raises(ValueError, match="end_time lies between"):
        NovelScoreMatchingTask(predictor=net(), reward=SumReward(), end_time=1.0)
    for kind, parameters in ((TargetScoreMatchingTask, {}), (MixedScoreMatchingTask, {"mixing": 0.5})):
        with pytest.raises(ValueError, match="infinite at pure noise"):
            one_fit(kind, net(), SumReward(), [["one"]], t_min=0.0, **parameters)
    with pytest.raises(TypeError, match="needs the gradient of the reward"):
        one_fit(NovelScoreMatchingTask, net(), Blind(), [["one"]])
    one_fit(ConditionalScoreMatchingTask, net(), Blind(), [["one", "two"]])


def test_novel_score_matching_is_finite_at_both_ends() -> None:
    task = task_of("nsm", INTERPOLANTS["flow"])
    for t in (0.0, 1.0):
        y = task.target(points_of(INTERPOLANTS["flow"], TILTED.sample(10), t))
        assert y.isfinite().all()


def test_evaluations_are_counted_and_the_bases_score_is_asked_for_once_a_rollout() -> None:
    """Two updates of one rollout of 6 samples and 4 steps, 3 noisings: nothing is paid twice."""
    task, record = one_fit(
        NovelScoreMatchingTask, net(), SumReward(), [["one", "two"]] * 2, noisings=3, path_weights="self_normalised",
        sampler={"samples_per_condition": 3, "rollout_every": 2},
    )  # fmt: skip
    rollout, weights, tweedie, pairs = 6 * 4, 6 * 3, 6, 2 * 6 * 3
    assert task.sampler.evaluations == Evaluations(
        forward=rollout + weights + tweedie + pairs, backward=2 * pairs, pairs=pairs, reward=6
    )
    first, second = record.trajectories
    assert first.end_score is not None and first.end_score is second.end_score


class SometimesNaN(SumReward):
    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        bad = torch.arange(len(images)) % 3 == 1
        return torch.where(bad, math.nan, super().score(images, prompts))


@pytest.mark.parametrize("name", ["csm", "nsm", "optimal"])
@pytest.mark.filterwarnings("ignore:2 of 6 samples")
def test_bad_samples_are_left_out(name: str) -> None:
    """The gradient is that of the good points, whose weights have mean one among themselves."""
    kind, parameters = SCORE_MATCHING[name]
    predictor = net()
    task, record = one_fit(
        kind, predictor, SometimesNaN(), [["one", "two"]], path_weights="self_normalised", t_min=0.1, t_max=0.9,
        sampler={"samples_per_condition": 3, "on_bad_reward": "skip"}, **parameters,
    )  # fmt: skip
    ((points, y),) = task.seen
    assert points.weight[[1, 4]].tolist() == [0, 0] and y.isfinite().all()
    assert points.weight[[0, 2]].mean() == pytest.approx(1) and points.weight[[3, 5]].mean() == pytest.approx(1)
    total = torch.zeros((), dtype=torch.float64)
    for p in (0, 2, 3, 5):
        t = points.t[p]
        x1_hat = (
            points.x[p]
            + (1 - t) * predictor.predict(points.x[p : p + 1], t[None], points.condition[torch.tensor([p])])[0]
        )
        total = total + points.weight[p] * t / (1 - t) ** 3 * ((x1_hat - y[p]) ** 2).sum() / 4
    named = dict(predictor.named_parameters())
    for key, gradient in zip(named, torch.autograd.grad(total, list(named.values())), strict=True):
        torch.testing.assert_close(record.gradients[0][f"predictor.{key}"], gradient, rtol=1e-8, atol=1e-8)
