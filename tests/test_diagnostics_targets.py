"""Bias and variance of targets: the four on the mixture, a Gaussian chain in closed form, and what losses register."""

import json
import math
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from toys import AffineControl, PromptedNet, SumReward, fit, gaussian

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.callbacks.mixture_variances import Spread, mixture_variances
from lightning_tilt.callbacks.nested import bias_and_variance, continued, gradient_noise
from lightning_tilt.callbacks.target_variance import TargetVariance
from lightning_tilt.interfaces.targets import control_factor, mean_slopes, x1_of_mean, x1_target
from lightning_tilt.models import GaussianMixturePredictor, NeuralTilt, the_mixture
from lightning_tilt.models.gaussian_mixture import GaussianMixture
from lightning_tilt.process import Cosine, RectifiedFlow
from lightning_tilt.rewards import QuadraticReward
from lightning_tilt.tasks import (
    AdjointMatchingTask,
    ConditionalScoreMatchingTask,
    GRPOTask,
    NovelScoreMatchingTask,
    ReinforceAdjointMatchingTask,
)

FLOW = RectifiedFlow()
TIMES = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.9, 0.98], dtype=torch.float64)
MU, V, LAM, C, STEPS = 0.3, 0.2, 2.0, 1.0, 10
CHAIN, TILT = oracles.ddim_chain(oracles.flow_schedule(STEPS), MU, V), oracles.Tilt(lam=LAM, q=1.0, c=C)


# The claims of the papers, on the mixture ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variances() -> dict[str, Spread]:
    mixture, reward = the_mixture()
    return mixture_variances(mixture, reward, 1.0, FLOW, TIMES, samples=10_000, steps=40)


def test_the_figures_of_the_mixture(variances: dict[str, Spread]) -> None:
    """In the score metric, traced over both coordinates, averaged over X_t; two digits are known."""
    known: dict[str, dict[int, float]] = {
        "target": {0: 2e4, 1: 829, 2: 92, 3: 16, 4: 0.63, 5: 0.019},
        "conditional": {0: 0.0015, 1: 0.053, 2: 0.9, 4: 190, 5: 5e3},
        "novel": {0: 0.0033, 1: 0.12, 2: 2.0, 4: 0.41, 5: 0.013},
        "adjoint": {4: 0.009, 5: 0.0003},  # between noise and data single paths carry its mean: no figure is stable
    }
    for name, figures in known.items():
        value, se, *_ = variances[name]
        for i, figure in figures.items():
            assert abs(float(value[i]) - figure) < 0.1 * figure + 3 * float(se[i]), (name, float(TIMES[i]))


def test_conditional_variance_is_the_posterior_covariance(variances: dict[str, Spread]) -> None:
    """alpha^2/beta^4 E tr Cov(X_1 | X_t), without a single draw of X_1 | X_t."""
    mixture, reward = the_mixture()
    tilted, _ = mixture.tilt(reward, 1.0)
    x1 = tilted.sample(20_000, torch.Generator().manual_seed(5))
    for i, t in enumerate(TIMES.tolist()):
        x = t * x1 + (1 - t) * torch.randn(x1.shape, generator=torch.Generator().manual_seed(6), dtype=x1.dtype)
        covariance = tilted.x1_posterior(FLOW, x, torch.tensor(t).double()).covariance
        exact = t**2 / (1 - t) ** 4 * covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        value, se = (float(v[i]) for v in variances["conditional"][:2])
        assert abs(value - float(exact.mean())) < 4 * math.hypot(se, float(exact.std()) / math.sqrt(len(exact)))


def test_which_targets_stay_finite() -> None:
    """TSM grows as 1/alpha^2 towards the noise, CSM as 1/beta^2 towards the data, NSM and AM nowhere."""
    mixture, reward = the_mixture()
    ends = torch.tensor([0.002, 0.004, 0.996, 0.998], dtype=torch.float64)
    seen = mixture_variances(mixture, reward, 1.0, FLOW, ends, samples=4000, steps=30)
    found = {name: spread.mean for name, spread in seen.items()}
    assert float(found["target"][0] / found["target"][1]) == pytest.approx(4, rel=0.1)
    assert float(found["conditional"][3] / found["conditional"][2]) == pytest.approx(4, rel=0.1)
    assert float(found["target"][0]) > 1e6 and float(found["conditional"][3]) > 1e5
    for name in ("novel", "adjoint"):
        assert float(found[name].max()) < 0.01, name


@pytest.mark.parametrize("process", [FLOW, Cosine()])
def test_novel_score_matching_is_adjoint_sampling_for_a_gaussian_base(process: Any) -> None:
    """Path by path: the adjoint of N(0, I) needs no simulation, at any number of steps."""
    base = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    _, reward = the_mixture()
    found = mixture_variances(base, reward, 1.5, process, TIMES, samples=80, steps=7)
    for adjoint, novel in zip(found["adjoint"], found["novel"], strict=True):
        torch.testing.assert_close(adjoint, novel, rtol=1e-9, atol=0)


def test_quantiles_are_those_of_the_law() -> None:
    """Of a Gaussian tilt with an isotropic posterior |y - s*|^2 is a variance times a chi squared in two dimensions."""
    base = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    reward = QuadraticReward([[0.5, 0.0], [0.0, 0.5]], [1.0, -1.0])
    n = 40_000
    found = mixture_variances(base, reward, 1.0, FLOW, TIMES, samples=n, steps=3)["conditional"]
    t = TIMES
    posterior = 1 / (1.5 + t**2 / (1 - t) ** 2)  # of X_1 | X_t, a coordinate
    unit = t**2 / (1 - t) ** 4 * posterior
    for seen, p in ((found.median, 0.5), (found.q95, 0.95)):
        # chi^2_2 is twice an exponential; the quantile's error is sqrt(p (1 - p)/n)/density.
        error = math.sqrt(p * (1 - p) / n) * 2 / (1 - p)
        assert float((seen / unit + 2 * math.log(1 - p)).abs().max()) < 4 * error
    assert float((found.mean / unit - 2).abs().max()) < 4 * 2 / math.sqrt(n)


def test_the_adjoint_target_has_quantiles_that_steps_do_not_move() -> None:
    """In the middle single paths make its mean, which grows with the steps; quantiles are what two runs agree in."""
    mixture, reward = the_mixture()
    t = torch.tensor([0.4], dtype=torch.float64)
    coarse, fine = (
        mixture_variances(mixture, reward, 1.0, FLOW, t, samples=20_000, steps=steps, seed=steps)["adjoint"]
        for steps in (60, 120)
    )
    assert float(fine.median) == pytest.approx(float(coarse.median), rel=0.1)
    assert float(fine.q95) == pytest.approx(float(coarse.q95), rel=0.3)
    for spread in (coarse, fine):
        assert float(spread.mean) > 50 * float(spread.median)


# The estimators ------------------------------------------------------------------------------------------------------


def test_bias_and_variance_are_unbiased_at_few_inner_samples() -> None:
    """u - E[y] = (1, 2), Var y = 9 a coordinate; without the correction bias^2 would be 5 + 18/3."""
    y = 3 * torch.randn(20_000, 3, 2, dtype=torch.float64) + 7
    bias, variance = bias_and_variance(torch.tensor([8.0, 9.0]).expand(20_000, 2), y, 2.0)
    assert abs(bias.mean - 2 * 5) < 4 * bias.se < 1 and abs(variance.mean - 2 * 18) < 4 * variance.se < 1


def test_gradient_noise_is_that_of_one_sample() -> None:
    samples = torch.tensor([1.0, -2.0, 0.0]) + torch.randn(40_000, 3) * torch.tensor([1.0, 2.0, 3.0])
    signal, noise = gradient_noise(samples.reshape(1000, 40, 3).mean(1), 40)
    assert signal == pytest.approx(5, abs=4 * math.sqrt(4 * (1 + 16) / 40_000)) and noise == pytest.approx(14, rel=0.1)
    pure = [gradient_noise(torch.randn(4, 50), 7)[0] for _ in range(400)]
    spread = torch.tensor(pure).std() / 20
    assert abs(sum(pure) / 400) < 4 * float(spread)  # no signal is found where there is none


# A Gaussian chain ----------------------------------------------------------------------------------------------------


def _look(tmp_path: Path, control: list[tuple[float, float]], samples: int = 600) -> list[dict[str, Any]]:
    predictor = AffineControl(gaussian(MU, V, FLOW), STEPS, control)
    task = AdjointMatchingTask(
        predictor, QuadraticReward([[1.0]], [C]), lam=LAM, checkpoint=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    ).double()  # fmt: skip
    look = TargetVariance(samples=samples, inner=6, times=(0.1, 0.5, 0.8), gradient_batches=30, micro_batch=500)
    sampler = TrajectorySampler(steps=STEPS, samples_per_condition=1, seed=3)
    fit(task, sampler, [torch.zeros(2)], callbacks=[look], default_root_dir=tmp_path)
    written = json.loads((tmp_path / "target_variance.json").read_text())
    assert (tmp_path / "target_variance.png").stat().st_size > 0 and written["outer"] == samples
    rows: list[dict[str, Any]] = written["times"]
    return rows


def _close(estimate: dict[str, float], exact: float) -> bool:
    return abs(estimate["mean"] - exact) < 4 * estimate["se"] + 1e-12


@pytest.mark.parametrize("kind", ["none", "best"])
def test_adjoint_matchings_variance_and_bias_on_a_gaussian_chain(tmp_path: Path, kind: str) -> None:
    control = [(0.0, 0.0)] * STEPS if kind == "none" else oracles.best_control(CHAIN, TILT)
    law = oracles.controlled(CHAIN, control)
    P, Q, _ = TILT.end()
    gradient = oracles.adjoint_matching_gradient(CHAIN, control, TILT)
    for row in _look(tmp_path, control):
        k, h = row["step"], 1 / STEPS
        assert row["t"] == pytest.approx(k / STEPS)
        D, s, F = math.prod(CHAIN.A[k + 1 :]), CHAIN.s[k], math.prod(law.A[k:])
        left = sum(law.s[j] ** 2 * math.prod(law.A[j + 1 :]) ** 2 for j in range(k, STEPS))  # Var(X_K | X_k)
        assert _close(row["control"]["variance"], s**2 / h * D**2 * P**2 * left)
        # u + s E[a | x] = (g + s D P F) x + ...: squared, its mean over X_k by moments
        (g, o), (m, v) = control[k], oracles.laws(law)[k]
        mean_a = D * (P * oracles.laws(law)[-1][0] - Q)
        slope, middle = g + s * D * P * F, g * m + o + s * mean_a
        assert _close(row["control"]["bias2"], (slope**2 * v + middle**2) / h)
        if kind == "none":
            assert row["control"]["bias2"]["mean"] > 10 * row["control"]["bias2"]["se"]
        signal, noise = row["gradient"]["squared_mean"], row["gradient"]["variance"]
        exact = sum(c**2 for c in gradient[k]) / h**2
        assert abs(signal - exact) < 4 * math.sqrt(4 * exact * noise / 600 + 2 * (noise / 600) ** 2)


def test_continued_paths_share_the_past_and_step_by_the_models_own_means() -> None:
    """The mixture in flow: the past is kept, the means are the network's, the last one (std = 0) is the base's."""
    mixture, reward = the_mixture()
    task = NovelScoreMatchingTask(NeuralTilt(GaussianMixturePredictor.of(mixture), hidden=8, layers=1), reward)
    for p in task.predictor.trained_parameters().values():
        torch.nn.init.normal_(p, std=0.3)
    fit(task, TrajectorySampler(steps=5, samples_per_condition=1, seed=1), [torch.zeros(3)])
    outer = task.sampler.rollout(task, torch.zeros(1), stream="report", number=0, samples_per_condition=4)
    path, chain = continued(task, outer, 2, 3, 0, 5), task.sampler.chain(task, count=False)
    assert path.states.shape == (6, 12, 2) and path.reward_gradient is not None
    torch.testing.assert_close(path.states[:3], outer.states[:3].repeat_interleave(3, 1), rtol=0, atol=0)
    assert len(path.end[:, 0].unique()) == 12
    with torch.no_grad():
        condition = path.condition[path.index]
        for k in (2, 3):
            after = chain.mean(task.predictor, condition)(path.states[k], k) + chain.stds[k].float() * path.noise[k]
            torch.testing.assert_close(path.states[k + 1], after)
        with task.predictor.base() as base:
            torch.testing.assert_close(path.end, chain.mean(base, condition)(path.states[4], 4))


# What losses register ------------------------------------------------------------------------------------------------


def _net() -> NeuralTilt:
    return NeuralTilt(GaussianMixturePredictor.of(the_mixture()[0]), hidden=8, layers=1)


def _path(task: Any) -> Any:
    fit(task, TrajectorySampler(steps=6, samples_per_condition=1, seed=1), [torch.zeros(3)])
    path = task.sampler.rollout(
        task, torch.zeros(1), stream="report", number=0, samples_per_condition=5, reward_gradient=True
    )
    return path


def test_end_point_losses_have_the_targets_of_their_formulas() -> None:
    mixture, reward = the_mixture()
    csm = ConditionalScoreMatchingTask(_net(), reward, path_weights="none", allow_unweighted=True, checkpoint=False)
    path = _path(csm)
    torch.testing.assert_close(x1_target(csm, path, 3, 2), path.end, rtol=0, atol=0)
    nsm = NovelScoreMatchingTask(_net(), reward, checkpoint=False)
    path = _path(nsm)
    path = path.__class__(**{**path.__dict__, "lam": 1.0})
    t, x, x1 = float(path.t[3]), path.states[3], path.end
    g = mixture.score(x1.double()) + torch.autograd.functional.jacobian(
        lambda y: reward.score(y, None).sum(), x1.double()
    )
    D = t**2 + (1 - t) ** 2
    score = (t * (g + x1) - x) / D
    torch.testing.assert_close(x1_target(nsm, path, 3, None), ((x + (1 - t) ** 2 * score) / t).float())


def test_a_target_that_holds_the_models_own_prediction_is_completed() -> None:
    task = ReinforceAdjointMatchingTask(_net(), the_mixture()[1], checkpoint=False, baseline="none")
    path = _path(task)
    path = path.__class__(**{**path.__dict__, "lam": 1.0})
    chain, k = task.sampler.chain(task, count=False), 3
    with torch.no_grad():
        own = chain.output(task.predictor, path.states[k], k, path.condition[path.index])  # x1_hat, of type "sample"
        with task.predictor.base() as base:
            y = chain.output(base, path.states[k], k, path.condition[path.index])
    expected = y + path.reward[:, None] * (path.end - own)
    torch.testing.assert_close(x1_target(task, path, k, 2), expected)


def test_a_mean_is_an_affine_function_of_x1_hat() -> None:
    task = AdjointMatchingTask(_net(), the_mixture()[1], checkpoint=False)
    path = _path(task)
    chain = task.sampler.chain(task, count=False)
    x1_hat = torch.randn(5, 2)
    for k in (0, 3):
        mean = chain.kernel(task.predictor, x1_hat, path.states[k], k).mean
        torch.testing.assert_close(x1_of_mean(chain, path.states[k], mean, k), x1_hat, rtol=1e-4, atol=1e-5)
    # In the limit of small steps the factor is 2 eta (alpha/beta^2)^2: for the flow 2 beta/alpha alpha^2/beta^4.
    fine = chain.__class__(chain.process, chain.transition, chain.process.grid(4000))
    assert float(control_factor(fine)[2000]) == pytest.approx(2 * 0.5 / 0.5**3, rel=5e-3)
    assert float(mean_slopes(fine)[0]) == pytest.approx(1 / 4000, rel=1e-6)


def test_losses_without_a_target_say_so() -> None:
    task = GRPOTask(PromptedNet(FLOW), SumReward(), checkpoint=False)
    with pytest.raises(TypeError, match="GRPOTask has no target"):
        x1_target(task, None, 0, None)
    with pytest.raises(ValueError, match="inner"):
        TargetVariance(inner=1)
    with pytest.raises(ValueError, match="times"):
        TargetVariance(times=(2.0,))
