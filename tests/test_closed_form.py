"""Closed forms against quadrature on a grid, autograd, torch.distributions and draws."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_process import PROCESSES, processes, randn
from torch import Tensor

from lightning_tilt.interfaces import Condition, Predictor
from lightning_tilt.models import GaussianMixture, GaussianMixturePredictor, NeuralTilt, the_mixture
from lightning_tilt.process import PredictionType, Process, RectifiedFlow
from lightning_tilt.rewards.quadratic import ConjugateReward, LinearReward, QuadraticReward

MIXTURE, QUADRATIC = the_mixture()
LINEAR = LinearReward([0.7, -0.4])
REWARDS = pytest.mark.parametrize("reward", [QUADRATIC, LINEAR], ids=["quadratic", "linear"])
TIME = torch.tensor([0.0, 0.1, 0.35, 0.6, 0.9, 0.97], dtype=torch.float64)

# Fine and wide enough: a step of .1 against the narrowest law's .2 leaves the trapezoidal rule no error to speak of.
_AXIS = torch.linspace(-8, 8, 161, dtype=torch.float64)
GRID = torch.cartesian_prod(_AXIS, _AXIS)
CELL = float(_AXIS[1] - _AXIS[0]) ** 2


def density(x: Tensor) -> Tensor:
    """p_base by torch.distributions, component by component."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for w, m, c in zip(MIXTURE.weights, MIXTURE.means, MIXTURE.covariances, strict=True):
        total = total + w * torch.distributions.MultivariateNormal(m, c).log_prob(x).exp()
    return total


def naive_conditional(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """p(x_1 | x_t = x) on GRID, normalised to sum 1."""
    alpha, beta = float(process.alpha(t)), float(process.beta(t))
    weight = density(GRID) * (-((x - alpha * GRID) ** 2).sum(1) / (2 * beta**2)).exp()
    return weight / weight.sum()


def test_density_and_score() -> None:
    x = 2 * randn(9, 2).requires_grad_()
    torch.testing.assert_close(MIXTURE.log_prob(x).exp(), density(x))
    (score,) = torch.autograd.grad(MIXTURE.log_prob(x).sum(), x)
    torch.testing.assert_close(MIXTURE.score(x), score)


def test_moments_and_draws() -> None:
    p = density(GRID) * CELL
    torch.testing.assert_close(MIXTURE.mean, p @ GRID)
    torch.testing.assert_close(MIXTURE.covariance, (p[:, None] * GRID).T @ GRID - MIXTURE.mean.outer(MIXTURE.mean))
    n = 20_000
    x = MIXTURE.sample(n, torch.Generator().manual_seed(1))
    assert torch.equal(x, MIXTURE.sample(n, torch.Generator().manual_seed(1)))
    features = torch.stack([x[:, 0], x[:, 1], x[:, 0] * x[:, 1], (x[:, 0] < -0.5).double()], 1)
    grid = torch.stack([GRID[:, 0], GRID[:, 1], GRID[:, 0] * GRID[:, 1], (GRID[:, 0] < -0.5).double()], 1)
    z = (features.mean(0) - p @ grid) / (features.std(0) / math.sqrt(n))
    assert z.abs().max() < 4  # standard errors


@REWARDS
@pytest.mark.parametrize("lam", [0.5, 1.0, 3.0])
def test_tilt_by_quadrature(reward: ConjugateReward, lam: float) -> None:
    tilted, log_z = MIXTURE.tilt(reward, lam)
    weight = density(GRID) * (lam * reward.score(GRID, None)).exp()
    torch.testing.assert_close(log_z.exp(), weight.sum() * CELL)
    torch.testing.assert_close(tilted.mean, weight @ GRID / weight.sum())
    x = randn(5, 2)
    torch.testing.assert_close(tilted.log_prob(x), MIXTURE.log_prob(x) + lam * reward.score(x, None) - log_z)
    torch.testing.assert_close(tilted.weights.sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(("lam", "log_z", "mean"), [(1.0, -1.3756, (-0.01, 0.70)), (3.0, -2.963, (-0.48, 0.96))])
def test_figures_of_the_mixture(lam: float, log_z: float, mean: tuple[float, float]) -> None:
    tilted, found = MIXTURE.tilt(QUADRATIC, lam)
    assert float(found) == pytest.approx(log_z, abs=5e-4)
    assert tilted.mean.tolist() == pytest.approx(mean, abs=5e-3)
    assert MIXTURE.mean.tolist() == pytest.approx([0.35, 0.35])


def test_a_reward_that_beats_the_base_is_refused() -> None:
    hill = QuadraticReward([[-1.0, 0.0], [0.0, 0.0]], [0.0, 0.0])
    MIXTURE.tilt(hill, 1.0)
    with pytest.raises(ValueError, match=r"no finite mean at lam = 3"):
        MIXTURE.tilt(hill, 3.0)


@processes
def test_marginal_is_the_law_of_the_noised_data(process: Process) -> None:
    for t in (process.grid(4)[1], process.grid(4)[3]):
        alpha, beta = float(process.alpha(t)), float(process.beta(t))
        marginal, x = MIXTURE.marginal(process, t), randn(4, 2)
        kernel = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), beta)
        naive = (kernel.log_prob(x[:, None, :] - alpha * GRID).sum(-1).exp() * density(GRID)).sum(1) * CELL
        torch.testing.assert_close(marginal.log_prob(x).exp(), naive, rtol=1e-6, atol=1e-12)


@processes
def test_posterior_by_quadrature(process: Process) -> None:
    for t in process.grid(5)[:5]:
        x = 1.5 * randn(2, 2)
        posterior, prediction = MIXTURE.x1_posterior(process, x, t), MIXTURE.prediction(process, x, t)
        for i in range(2):
            p = naive_conditional(process, x[i], t)
            mean = p @ GRID
            covariance = (p[:, None] * GRID).T @ GRID - mean.outer(mean)
            torch.testing.assert_close(posterior.mean[i], mean, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(posterior.covariance[i], covariance, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(prediction.x1_hat, posterior.mean)
        expected = process.interpret(prediction.x1_hat, "sample", x, t)
        torch.testing.assert_close(prediction.eps_hat, expected.eps_hat, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(MIXTURE.velocity(process, x, t), process.velocity(expected, t), rtol=1e-7, atol=1e-7)


@processes
@REWARDS
def test_h_by_quadrature_and_autograd(process: Process, reward: ConjugateReward) -> None:
    for t in process.grid(5)[:5]:
        x = (1.5 * randn(2, 2)).requires_grad_()
        log_h = MIXTURE.log_h(process, reward, 1.5, x, t)
        for i in range(2):
            p = naive_conditional(process, x[i].detach(), t)
            naive = (p * (1.5 * reward.score(GRID, None)).exp()).sum().log()
            torch.testing.assert_close(log_h[i].detach(), naive, rtol=1e-6, atol=1e-7)
        (gradient,) = torch.autograd.grad(log_h.sum(), x)
        closed = MIXTURE.grad_log_h(process, reward, 1.5, x, t)
        torch.testing.assert_close(closed, gradient, rtol=1e-8, atol=1e-9)
        tilted = MIXTURE.tilted_score(process, reward, 1.5, x, t)
        torch.testing.assert_close(tilted, closed + MIXTURE.marginal(process, t).score(x))


def test_h_is_the_reward_at_the_data_and_z_at_pure_noise() -> None:
    process, x, one = RectifiedFlow(), randn(5, 2), torch.ones((), dtype=torch.float64)
    at_data = MIXTURE.log_h(process, QUADRATIC, 2.0, x, one)
    torch.testing.assert_close(at_data, 2 * QUADRATIC.score(x, None))
    at_noise = MIXTURE.log_h(process, QUADRATIC, 2.0, x, 0 * one)
    torch.testing.assert_close(at_noise, MIXTURE.tilt(QUADRATIC, 2.0)[1].expand(5))


@processes
def test_a_batch_of_times_is_each_time_alone(process: Process) -> None:
    t, x = process.grid(6)[:6], randn(6, 2)
    prediction, log_h = MIXTURE.prediction(process, x, t), MIXTURE.log_h(process, QUADRATIC, 1.0, x, t)
    posterior = MIXTURE.x1_posterior(process, x, t)
    for i in range(6):
        one = x[i : i + 1]
        torch.testing.assert_close(prediction.x1_hat[i : i + 1], MIXTURE.prediction(process, one, t[i]).x1_hat)
        torch.testing.assert_close(log_h[i : i + 1], MIXTURE.log_h(process, QUADRATIC, 1.0, one, t[i]))
        alone = MIXTURE.x1_posterior(process, one, t[i])
        torch.testing.assert_close(posterior.covariance[i : i + 1], alone.covariance)


def test_far_out_and_late_nothing_overflows() -> None:
    process = RectifiedFlow()
    x, t = torch.tensor([[300.0, -500.0], [0.0, 0.0]]), torch.tensor([0.3, 1 - 1e-5])
    narrow = MIXTURE.to(x)
    for value in (narrow.log_h(process, QUADRATIC, 1.0, x, t), narrow.prediction(process, x, t).x1_hat):
        assert value.isfinite().all() and value.dtype == torch.float32


def test_a_narrow_component_keeps_its_digits() -> None:
    thin = GaussianMixture(
        torch.ones(1).double(), torch.ones(1, 2).double(), torch.tensor([[[1.0, 0.0], [0.0, 1e-10]]]).double()
    )
    x1_hat = thin.prediction(RectifiedFlow(), randn(3, 2), torch.tensor(0.5).double()).x1_hat
    torch.testing.assert_close(x1_hat[:, 1], torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-8)


def test_what_is_no_mixture_is_refused() -> None:
    ones, eye = torch.ones(2), torch.eye(2).expand(2, 2, 2)
    with pytest.raises(ValueError, match=r"must be \(M,\), \(M, d\)"):
        GaussianMixture(ones, torch.zeros(3, 2), eye)
    with pytest.raises(ValueError, match="weights must be positive"):
        GaussianMixture(torch.tensor([1.0, 0.0]), torch.zeros(2, 2), eye)
    with pytest.raises(ValueError, match="must be symmetric"):
        GaussianMixture(ones, torch.zeros(2, 2), eye + torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="must be positive definite"):
        GaussianMixture(ones, torch.zeros(2, 2), -eye)


# Rewards -------------------------------------------------------------------------------------------------------------


@REWARDS
def test_rewards_are_what_their_coefficients_say(reward: ConjugateReward) -> None:
    x = randn(6, 2).requires_grad_()
    a, b, k = reward.coefficients()
    torch.testing.assert_close(reward.score(x, None), k + x @ b - torch.einsum("ni,ij,nj->n", x, a, x) / 2)
    (gradient,) = torch.autograd.grad(reward.score(x, None).sum(), x)
    torch.testing.assert_close(gradient, b - x @ a)
    reward.reset()
    reward.update(x)
    torch.testing.assert_close(reward.compute().double(), reward.score(x, None).mean(), rtol=1e-6, atol=1e-6)
    assert reward.score(x.float(), None).dtype == torch.float32 and not reward.state_dict()


def test_rewards_refuse_what_they_cannot_mean() -> None:
    with pytest.raises(ValueError, match="A must be symmetric"):
        QuadraticReward([[1.0, 0.5], [0.0, 1.0]], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"A must be \(d, d\)"):
        QuadraticReward([[1.0]], [0.0, 0.0])
    with pytest.raises(ValueError, match="b must be a vector"):
        LinearReward([[1.0]])  # type: ignore[list-item]


# Predictors ----------------------------------------------------------------------------------------------------------


class Other(Predictor):
    """The exact mixture, spoken in another prediction type."""

    def __init__(self, kind: PredictionType, process: Process) -> None:
        super().__init__()
        self.exact = GaussianMixturePredictor.of(MIXTURE, process)
        self.process, self.prediction_type, self.state_shape = process, kind, (2,)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = self.exact.predict(x, t, condition)
        prediction = self.process.interpret(output, "sample", x, t)
        return self.scale * self.process.express(prediction, self.prediction_type, x, t)

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        yield self

    def decode(self, x: Tensor) -> Tensor:
        return x + 1


@processes
def test_the_predictor_is_exact_and_differentiable(process: Process) -> None:
    predictor = GaussianMixturePredictor.of(MIXTURE, process)
    t, x = process.grid(6)[:6], randn(6, 2).requires_grad_()
    output = predictor.predict(x, t, predictor.encode(None, 6))
    torch.testing.assert_close(output, MIXTURE.prediction(process, x, t).x1_hat)
    g = randn(6, 2)
    (vjp,) = torch.autograd.grad(output, x, g)
    # d x1_hat/dx = alpha/beta^2 Cov(X_1 | x), a symmetric matrix
    covariance = MIXTURE.x1_posterior(process, x, t).covariance
    slope = (process.alpha(t) / process.beta(t) ** 2)[:, None]
    torch.testing.assert_close(vjp, slope * torch.einsum("nij,nj->ni", covariance, g))


def test_the_predictor_holds_nothing_to_train_or_save() -> None:
    predictor = GaussianMixturePredictor([1], [[0.0, 1.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    assert not list(predictor.parameters()) and not predictor.state_dict()
    assert predictor.state_shape == (2,) and isinstance(predictor.process, RectifiedFlow)
    with predictor.base() as base:
        assert base is predictor
    x, t = torch.randn(3, 2), torch.rand(3)
    exact = predictor.predict(x, t, predictor.encode(None, 3))
    half = copy.deepcopy(predictor).half().predict(x.half(), t, predictor.encode(None, 3))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=5e-3)


def test_a_first_call_in_inference_mode_spoils_no_later_gradient() -> None:
    predictor = GaussianMixturePredictor.of(MIXTURE, PROCESSES["sd15"])
    condition, t = predictor.encode(None, 3), torch.full((3,), 0.5)
    with torch.inference_mode():
        predictor.predict(torch.randn(3, 2), t, condition)
    x = torch.randn(3, 2, requires_grad=True)
    predictor.predict(x, t, condition).sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "velocity"])
@pytest.mark.parametrize("name", ["sd15", "flow"])
def test_a_neural_tilt_begins_at_its_base(kind: PredictionType, name: str) -> None:
    process = PROCESSES[name]
    base = Other(kind, process)
    tilt = NeuralTilt(base, hidden=16, layers=2)
    t, x = process.grid(6)[1:5], randn(4, 2)
    condition = tilt.encode(None, 4)
    exact = MIXTURE.prediction(process, x, t).x1_hat
    torch.testing.assert_close(tilt.predict(x, t, condition), exact, rtol=1e-8, atol=1e-8)
    torch.nn.init.normal_(tilt.last.weight)
    moved = tilt.predict(x, t, condition) - exact
    torch.testing.assert_close(moved, process.beta(t)[:, None] ** 2 * tilt.f(x, t).double(), rtol=1e-6, atol=1e-8)
    moved.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tilt.parameters())
    assert base.scale.grad is None and not base.training
    assert all("scale" not in key for key in tilt.state_dict()) and len(tilt.state_dict()) == 6
    assert torch.equal(tilt.decode(x), x + 1)
    with tilt.base() as view:
        assert view is base


def test_states_of_any_shape_and_half_precision() -> None:
    class Zero(Other):
        def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return torch.zeros_like(x)

    base = Zero("velocity", RectifiedFlow())
    base.state_shape = (4, 3, 3)
    tilt = NeuralTilt(base, hidden=8, layers=1)
    out = tilt.predict(torch.randn(2, 4, 3, 3).bfloat16(), torch.rand(2), tilt.encode(None, 2))
    assert out.shape == (2, 4, 3, 3) and out.dtype == torch.bfloat16
