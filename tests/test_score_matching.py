"""Score matching against closed forms: unbiased targets, their variances, gradients, the optimal mix."""

from typing import Any

import pytest
import torch
from end_points import (
    INTERPOLANTS,
    MIXTURE,
    SCORE_MATCHING,
    TILTED,
    ExactSampler,
    TiltedMixturePredictor,
    Unknown,
    features,
    net,
    one,
    one_fit,
    points_of,
    quadratic,
    task_of,
)
from torch import Tensor
from toys import SumReward

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.losses.base_score import base_score
from lightning_tilt.losses.score_matching import novel_target
from lightning_tilt.models import GaussianMixture, GaussianMixturePredictor
from lightning_tilt.noise import keyed_normal_rows
from lightning_tilt.process import RectifiedFlow, VariancePreserving
from lightning_tilt.tasks import MixedScoreMatchingTask
from lightning_tilt.transition import DDIM

all_tasks = pytest.mark.parametrize("name", SCORE_MATCHING)


@all_tasks
@pytest.mark.parametrize("process", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_targets_are_unbiased_at_every_state(name: str, process: Any) -> None:
    """E*[y | X_t = x] = x1_hat*(x) within 4 s.e., X_1 from the exact law of X_1 | X_t = x."""
    task = task_of(name, process)
    task.process = process
    for t in (0.05, 0.4, 0.9):
        t = float(process.node(torch.tensor(t, dtype=torch.float64)))
        x = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
        times = torch.tensor([t], dtype=torch.float64)
        exact = TILTED.prediction(process, x, times).x1_hat[0]
        x1 = one(TILTED.x1_posterior(process, x, times)).sample(20_000)
        y = task.target(points_of(process, x1, t, x=x))
        assert ((y.mean(0) - exact).abs() < 4 * y.std(0) / len(y) ** 0.5).all(), t


# Trace of the variance of the score's target around s*, on the mixture, rectified flow, t = .02 .1 .3 .6 .9 .98.
VARIANCES = {
    "tsm": [2.04e4, 811, 87.4, 16.8, 0.610, 0.0184],
    "csm": [0.00150, 0.0516, 0.947, 6.70, 190, 5.00e3],
    "nsm": [0.00330, 0.113, 1.96, 6.23, 0.397, 0.0122],
}


@pytest.mark.parametrize("name", VARIANCES)
def test_variances_of_the_targets(name: str) -> None:
    """The bias-variance picture within 5 % (Monte Carlo: 1 %); CSM's is also that of X_1 | X_t in closed form."""
    process, task = RectifiedFlow(), task_of(name, RectifiedFlow())
    for t, stated in zip((0.02, 0.1, 0.3, 0.6, 0.9, 0.98), VARIANCES[name], strict=True):
        points = points_of(process, TILTED.sample(40_000), t)
        score = (t * task.target(points) - points.x) / (1 - t) ** 2
        exact = TILTED.marginal(process, points.t).score(points.x)
        variance = float(((score - exact) ** 2).sum(1).mean())
        assert variance == pytest.approx(stated, rel=0.05), t
        if name == "csm":
            spread = TILTED.x1_posterior(process, points.x, points.t).covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
            assert variance == pytest.approx(float(spread.mean()) * t**2 / (1 - t) ** 4, rel=0.05)


def test_score_of_a_base() -> None:
    """A known law is differentiated; Tweedie's is that of the law smoothed by beta^2/alpha^2, and tends to it."""
    x, condition = TILTED.sample(50), Condition({}, None, 50)
    for process in (RectifiedFlow(), VariancePreserving.from_betas()):
        known = GaussianMixturePredictor.of(MIXTURE, process)
        chain = Chain(process, DDIM(), process.grid(5))
        torch.testing.assert_close(base_score(chain, known, x, condition, 0.5), MIXTURE.score(x))
        assert chain.evaluations.forward == 0
        errors = []
        for end_time in (0.9, 0.98, 0.998):
            t = process.node(torch.tensor(end_time, dtype=torch.float64))
            noise = float(process.beta(t) / process.alpha(t)) ** 2 * torch.eye(2, dtype=torch.float64)
            smooth = GaussianMixture(MIXTURE.weights, MIXTURE.means, MIXTURE.covariances + noise)
            found = base_score(chain, Unknown(known), x, condition, end_time)
            torch.testing.assert_close(found, smooth.score(x), rtol=1e-7, atol=1e-7)
            errors.append(float((found - MIXTURE.score(x)).norm()))
        assert errors[0] > 3 * errors[1] > 9 * errors[2] and chain.evaluations.forward == 150


def naive_target(name: str, x1: Tensor, x: Tensor, g: Tensor, t: float, m: float, c: float | None) -> Tensor:
    """From the targets of the score, one point: x1_hat = (x + beta^2 s)/alpha."""
    csm, tsm = -(x - t * x1) / (1 - t) ** 2, g / t
    if c is None:
        c = {"csm": 0.0, "tsm": 1.0}.get(name, t**2 / (t**2 + m * (1 - t) ** 2))
    return (x + (1 - t) ** 2 * ((1 - c) * csm + c * tsm)) / t


@all_tasks
@pytest.mark.parametrize("weights", ["none", "self_normalised"])
def test_gradient_equals_a_naive_loop(name: str, weights: str) -> None:
    """One noised point at a time, path weights and Tweedie's score by hand; the first update has rho = 1."""
    kind, parameters = SCORE_MATCHING[name]
    if name == "csm" and weights == "none":
        parameters = {"allow_unweighted": True}
    prompts, predictor = ["one", "three"], net()
    task, record = one_fit(
        kind, predictor, SumReward(), [prompts], lam=1.5, noisings=2, path_weights=weights, t_min=0.1, t_max=0.9,
        sampler={"samples_per_condition": 3}, **parameters,
    )  # fmt: skip
    path, m = record.trajectories[0], {"nsm m=3": 3.0, "optimal": 0.5}.get(name, 1.0)
    chain, w = task.sampler.chain(task, count=False), torch.ones(6, dtype=torch.float64)
    if weights != "none":
        for group in ([0, 1, 2], [3, 4, 5]):
            w[group] = 3 * path.log_w[group].exp() / path.log_w[group].exp().sum()
    ((points, y),) = task.seen
    eps = keyed_normal_rows(task.sampler.seed, "renoise", 1, range(12), (2,)).double()
    total = torch.zeros((), dtype=torch.float64)
    for p in range(12):
        n, t = p % 6, float(points.t[p])
        x1, condition = path.end[n], path.condition[path.index[n : n + 1]]
        x = t * x1 + (1 - t) * eps[p]
        with predictor.base() as base, torch.no_grad():
            v = base.predict(0.98 * x1[None], torch.tensor([0.98], dtype=torch.float64), condition)[0]
        end_score = 0.98**2 / 0.02**2 * (0.98 * x1 + 0.02 * v - x1)
        g = end_score + 1.5 * x1.cos()
        aim = naive_target(name, x1, x, g, t, m, 0.3 if name == "c=.3" else None)
        torch.testing.assert_close(y[p], aim, rtol=1e-8, atol=1e-8)
        x1_hat = x + (1 - t) * predictor.predict(x[None], points.t[p : p + 1], condition)[0]
        total = total + w[n] * (1 - t) / t * (t / (1 - t) ** 2) ** 2 * ((x1_hat - aim) ** 2).sum() / 12
    assert len(chain.t) == 5 and path.lam == 1.5
    named = dict(predictor.named_parameters())
    for key, gradient in zip(named, torch.autograd.grad(total, list(named.values())), strict=True):
        torch.testing.assert_close(record.gradients[0][f"predictor.{key}"], gradient, rtol=1e-8, atol=1e-8)
        assert gradient.abs().max() > 0


@all_tasks
def test_expected_gradient_vanishes_at_the_tilted_score(name: str) -> None:
    """At s*, with exact samples of p*, within 4 s.e.; with samples of the base it does not."""
    kind, parameters = SCORE_MATCHING[name]
    parameters = parameters | ({"allow_unweighted": True, "path_weights": "none"} if name == "csm" else {})
    for law, vanishes in ((TILTED, True), (MIXTURE, False)):
        sampler = type("Sampler", (ExactSampler,), {"law": law})
        task, record = one_fit(
            kind, TiltedMixturePredictor(RectifiedFlow()), quadratic(), [torch.zeros(4000)], t_min=0.1, t_max=0.9,
            time_weight="uniform", time_sampling="uniform", sampler_class=sampler, sampler={"steps": 2}, **parameters,
        )  # fmt: skip
        ((points, y),) = task.seen
        error = TILTED.prediction(RectifiedFlow(), points.x, points.t).x1_hat - y
        weighted = (points.t / (1 - points.t))[:, None] ** 2 * error
        parts = weighted[:, :, None] * features(points.x, points.t)[:, None]
        gradient, se = record.gradients[0]["predictor.W"], parts.std(0) / len(y) ** 0.5
        torch.testing.assert_close(gradient, parts.mean(0), rtol=1e-9, atol=1e-12)
        assert bool((gradient.abs() < 4 * se).all()) is vanishes


def test_the_optimal_mix_is_learnt_and_has_the_least_variance() -> None:
    """One batch gives the sums of a naive loop; then no other target has a smaller variance in any bin."""
    task, _ = one_fit(
        MixedScoreMatchingTask, TiltedMixturePredictor(RectifiedFlow()), quadratic(), [torch.zeros(4000)] * 2,
        t_min=0.05, t_max=0.95, precision=0.7, sampler_class=ExactSampler, sampler={"steps": 2},
        loss_micro_batch=1500, noisings=3,
    )  # fmt: skip
    batch, second = (
        [torch.cat(v) for v in zip(*((p.t, p.x, p.x1, novel_of(p)) for p, _ in part), strict=True)]
        for part in (task.seen[:8], task.seen[8:])
    )
    rho = task.least_variance.rho()
    for i in (0, 9, 31):
        tops, bottoms = [], []
        for t, x, x1, novel in (batch, second):
            here = ((t - 0.05) / 0.9 * 32).long() == i
            apart = (novel - x1)[here]
            error = (TILTED.prediction(RectifiedFlow(), x, t).x1_hat - x1)[here]
            tops.append((error * apart).sum() / here.sum())
            bottoms.append((apart**2).sum() / here.sum())
        expected = (0.99 * tops[0] + 0.01 * tops[1]) / (0.99 * bottoms[0] + 0.01 * bottoms[1])
        torch.testing.assert_close(rho[i], expected, rtol=1e-9, atol=0)
    t, x, x1, novel = second
    exact = TILTED.prediction(RectifiedFlow(), x, t).x1_hat
    bins = ((t - 0.05) / 0.9 * 32).long().clamp(max=31)
    most = 1 + 0.7 * ((1 - t) / t) ** 2

    def spread(share: Tensor) -> Tensor:
        squares = ((x1 + share[:, None] * (novel - x1) - exact) ** 2).sum(1)
        return torch.zeros(32, dtype=torch.float64).index_add(0, bins, squares)

    best, others = spread(task.least_variance(t, most)), [spread(s * torch.ones_like(t)) for s in (0.0, 1.0)]
    for other in (*others, spread(most)):
        assert (best < 1.01 * other).all()
    assert (best.sum() < 0.9 * min(o.sum() for o in others)) and rho.min() > 0 and rho.max() < 1.5


def novel_of(points: Any) -> Tensor:
    g = points.end_score + points.reward_gradient
    return novel_target(RectifiedFlow(), points.x, points.x1, g, points.t, 0.7)
