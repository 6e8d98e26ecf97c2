"""Adjoint Sampling: the closed-form adjoint, the identity with novel score matching, clipping, and the density."""

from typing import Any

import pytest
import torch
from end_points import INTERPOLANTS, MIXTURE, TILTED, one, one_fit, points_of, quadratic
from torch import Tensor
from toys import PromptedNet, SumReward

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.identities.lean_adjoint import lean_adjoint
from lightning_tilt.losses.adjoint_sampling import clipped
from lightning_tilt.losses.score_matching import novel_target
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt
from lightning_tilt.process import Driftless, Process, RectifiedFlow, VariancePreserving
from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.mixture_density import TiltedMixture
from lightning_tilt.tasks import AdjointSamplingTask
from lightning_tilt.transition import DDIM, Brownian, ExactGaussian

PROCESSES = INTERPOLANTS | {"zero-snr": VariancePreserving.from_betas(zero_terminal_snr=True)}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def gaussian(process: Process) -> GaussianBase:
    """N(.3, 1.2^2 I) where the process allows it."""
    return GaussianBase([2], process=process) if process in UNMOVED else GaussianBase([2], 1.2, 0.3, process=process)


UNMOVED = (INTERPOLANTS["driftless"], INTERPOLANTS["vp"])


def density() -> TiltedMixture:
    reward = quadratic()
    return TiltedMixture(MIXTURE.weights, MIXTURE.means, MIXTURE.covariances, reward.A, reward.c)


def task_of(base: GaussianBase, **kwargs: Any) -> AdjointSamplingTask:
    task = AdjointSamplingTask(predictor=base, reward=density(), **kwargs)
    task.reward.bind(base)
    return task


def density_points(base: GaussianBase, x1: Tensor, t: float, x: Tensor | None = None) -> Any:
    """Points with the gradients of log p_base, and of r = -E - log p_base."""
    score = -base.precision * (x1 - base.mean)
    points = points_of(base.process, x1, t, x=x)
    return type(points)(**(points.__dict__ | {"end_score": score, "reward_gradient": TILTED.score(x1) - score}))


@processes
def test_it_is_novel_score_matching_with_the_bases_precision(process: Process) -> None:
    """Equality of the targets, for every interpolant, mean and scale; also at both ends of time."""
    base = gaussian(process)
    for t in (0.0, 0.1, 0.5, 0.98, 1.0):
        points = density_points(base, TILTED.sample(50), t)
        g = points.end_score + points.reward_gradient
        novel = novel_target(process, points.x, points.x1, g, points.t, base.precision)
        torch.testing.assert_close(task_of(base).target(points), novel, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["flow", "cosine", "zero-snr"])
def test_the_adjoint_is_that_of_the_sweep(name: str) -> None:
    """The score's target is s_base - a_t, a_t the lean adjoint swept through the base's own chain."""
    process = PROCESSES[name]
    base, condition = gaussian(process), Condition({}, None, 5)
    chain = Chain(process, DDIM(), process.grid(6))
    states = torch.randn(7, 5, 2, dtype=torch.float64)
    gradient = torch.randn(5, 2, dtype=torch.float64)
    adjoint, _ = lean_adjoint(chain.mean(base, condition), states, -gradient, list(range(6)))
    for k in (1, 3, 5):
        t = chain.t[k].expand(5)
        alpha, beta = process.alpha(t)[:, None], process.beta(t)[:, None]
        points = points_of(process, torch.randn(5, 2).double(), float(chain.t[k]), x=states[k])
        points = type(points)(**(points.__dict__ | {"reward_gradient": gradient}))
        s_base = -(states[k] - alpha * base.mean) / (alpha**2 * base.scale**2 + beta**2)
        s_y = (alpha * task_of(base).target(points) - states[k]) / beta**2
        torch.testing.assert_close(s_y, s_base - adjoint[k - 1], rtol=1e-9, atol=1e-9)


def test_driftless_target_is_the_published_one() -> None:
    """Drift/sigma^2 regressed on grad log p*(X_1) + X_1/nu_1, and x1_hat = x + (nu_1 - nu_t) drift/sigma^2."""
    process = Driftless(0.2, 2.0)
    base = GaussianBase([2], process=process)
    points = density_points(base, TILTED.sample(20), 0.3)
    nu, end = 4 * (1 - 0.1**0.6), 4 * (1 - 0.01)
    expected = points.x + (end - nu) * (TILTED.score(points.x1) + points.x1 / end)
    torch.testing.assert_close(task_of(base).target(points), expected, rtol=1e-10, atol=1e-10)


@processes
def test_target_is_unbiased_at_every_state(process: Process) -> None:
    """E*[y | X_t = x] = x1_hat*(x) within 4 s.e., from the exact law of X_1 | X_t = x."""
    base = gaussian(process)
    for t in (0.1, 0.5, 0.9):
        times = process.node(torch.tensor([t], dtype=torch.float64))
        x = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
        x1 = one(TILTED.x1_posterior(process, x, times)).sample(20_000)
        y = task_of(base).target(density_points(base, x1, float(times), x=x))
        exact = TILTED.prediction(process, x, times).x1_hat[0]
        assert ((y.mean(0) - exact).abs() < 4 * y.std(0) / len(y) ** 0.5).all()


def test_density_of_the_tilted_mixture() -> None:
    """log Z, energies and samples against the closed form; its integral on a grid."""
    problem = density()
    assert problem.log_z == pytest.approx(-1.3756, abs=5e-5)
    x = TILTED.sample(50)
    torch.testing.assert_close(-problem.energy(x), TILTED.log_prob(x) + problem.log_z)
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    assert float((-problem.energy(grid)).logsumexp(0) + 2 * torch.log(axis[1] - axis[0])) == pytest.approx(
        problem.log_z, abs=1e-6
    )
    samples = problem.reference(20_000, seed=1)
    assert ((samples.mean(0) - TILTED.mean).abs() < 4 * samples.std(0) / 20_000**0.5).all()
    assert torch.equal(samples, problem.reference(20_000, seed=1)) and samples.dtype == torch.float32
    assert problem.state_dict() == {}
    reward = quadratic()
    doubled = TiltedMixture(MIXTURE.weights, MIXTURE.means, MIXTURE.covariances, reward.A, reward.c, lam=3.0)
    assert doubled.log_z == pytest.approx(-2.963, abs=5e-4)


class Steep(Density):
    """E = |x|^4/4: gradients without bound."""

    def energy(self, x: Tensor) -> Tensor:
        return (x**2).flatten(1).sum(1) ** 2 / 4


@pytest.mark.parametrize("shape", [[2], [3, 2]])
def test_energy_gradients_are_clipped_before_the_bases_score(shape: list[int]) -> None:
    """Against a loop over samples (particles), through a fit; the fraction is logged."""
    torch.manual_seed(1)
    predictor = NeuralTilt(GaussianBase(shape, 1.5, mean_free=len(shape) == 2), hidden=8, layers=1)
    sampler = {"transition": ExactGaussian(1 / 1.5**2)}
    task, _ = one_fit(AdjointSamplingTask, predictor, Steep(), [torch.zeros(40)], energy_clip=2.0, sampler=sampler)
    ((points, y),) = task.seen
    base, longer = GaussianBase(shape, 1.5, mean_free=len(shape) == 2), []
    for p in range(40):
        x1, t = points.x1[p], points.t[p]
        gradient = x1 * (x1**2).sum()
        for row in [gradient] if len(shape) == 1 else gradient:
            length = row.norm()
            longer.append(bool(length > 2))
            row *= min(1.0, 2 / float(length))
        if len(shape) == 2:
            gradient = gradient - gradient.mean(0)
        lam_gradient = -gradient + x1 / 1.5**2
        slope = t / (t**2 + (1 - t) ** 2 / 1.5**2)
        expected = slope * points.x[p] + (1 - t) * (1 - t) / (t**2 + (1 - t) ** 2 / 1.5**2) * lam_gradient
        torch.testing.assert_close(y[p], expected, rtol=1e-6, atol=1e-6)  # noise is float32
    share = sum(longer) / len(longer)
    assert 0.1 < share < 0.9
    assert float(task.trainer.callback_metrics["train/clipped_fraction"]) == pytest.approx(share)
    assert base.precision == pytest.approx(1 / 2.25)
    x = torch.randn(5, 3, 2)
    assert clipped(x, 1.0).norm(dim=-1).max() <= 1 + 1e-6 and torch.equal(clipped(x, 100.0), x)


@pytest.mark.parametrize("name", ["flow", "driftless", "vp"])
@pytest.mark.parametrize("weights", ["none", "self_normalised"])
def test_gradient_equals_a_naive_loop(name: str, weights: str) -> None:
    process = PROCESSES[name]
    base = GaussianBase([2], process=process)
    torch.manual_seed(1)
    predictor = NeuralTilt(base, hidden=8, layers=1).double()
    torch.nn.init.normal_(predictor.last.weight)
    transition = Brownian() if name == "driftless" else ExactGaussian()
    task, record = one_fit(
        AdjointSamplingTask, predictor, density(), [torch.zeros(6)], noisings=2, path_weights=weights, lam=1.0,
        t_min=0.1, t_max=0.9, sampler={"transition": transition},
    )  # fmt: skip
    path = record.trajectories[0]
    ((points, _),) = task.seen
    w = 6 * path.log_w.softmax(0) if weights != "none" else torch.ones(6).double()
    total = torch.zeros((), dtype=torch.float64)
    for p in range(12):
        n, t = p % 6, points.t[p]
        alpha, beta = float(process.alpha(t)), float(process.beta(t))
        m = base.precision
        x1, x = path.end[n], points.x[p]
        y = (m * beta**2 * x1 + alpha * x + beta**2 * TILTED.score(x1[None])[0]) / (alpha**2 + m * beta**2)
        x1_hat = predictor.predict(x[None], t[None], Condition({}, None, 1))[0]
        eta = float(process.eta(t))
        total = total + w[n] * eta * (alpha / beta**2) ** 2 * ((x1_hat - y) ** 2).sum() / 12
    named = dict(predictor.named_parameters())
    for key, gradient in zip(named, torch.autograd.grad(total, list(named.values())), strict=True):
        torch.testing.assert_close(record.gradients[0][f"predictor.{key}"], gradient, rtol=1e-8, atol=1e-8)
        assert gradient.abs().max() > 0
    # The closed-form base is no network: 4 steps of 6 paths, their weights, 12 pairs.
    steps = len(task.sampler.chain(task, count=False).noisy_steps)
    assert task.sampler.evaluations.forward == 24 + (6 * steps if weights != "none" else 0) + 12


def test_what_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    mixture = NeuralTilt(GaussianMixturePredictor.of(MIXTURE), hidden=4, layers=1)
    with pytest.raises(TypeError, match="needs a GaussianBase"):
        one_fit(AdjointSamplingTask, mixture, quadratic(), [torch.zeros(2)])
    with pytest.raises(TypeError, match="needs a GaussianBase"):
        one_fit(AdjointSamplingTask, PromptedNet(RectifiedFlow()), SumReward(), [["one"]])
    tilt = NeuralTilt(GaussianBase([2], 1.5), hidden=4, layers=1)
    with pytest.raises(ValueError, match=r"exact for another base: the precision of this one is 1/scale\^2 = 0.444444"):
        one_fit(AdjointSamplingTask, tilt, density(), [torch.zeros(2)], sampler={"transition": ExactGaussian()})
    with pytest.raises(ValueError, match="energy_clip is a length"):
        AdjointSamplingTask(predictor=tilt, reward=density(), energy_clip=0.0)
    one_fit(AdjointSamplingTask, tilt, density(), [torch.zeros(2)], path_weights="clipped", sampler={"steps": 4})
    assert "Path weights of DDIM(ddim_eta=1.0) carry its discretisation" in caplog.text
