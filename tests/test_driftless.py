"""The driftless base: a Brownian motion from a point, as an interpolant and as a chain that is exact at any K."""

import math

import pytest
import torch
from torch import Tensor

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.models import GaussianBase
from lightning_tilt.process import Cosine, Driftless, Process, RectifiedFlow
from lightning_tilt.transition import DDIM, Brownian, EulerMaruyama, ExactGaussian, Transition

PROCESS = Driftless(0.1, 2.0)
INSIDE = torch.linspace(0.03, 0.97, 17, dtype=torch.float64)
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_nu_is_the_integral_of_the_noise() -> None:
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    sigma = 2.0 * (0.1 / 2.0) ** t * math.sqrt(2 * math.log(2.0 / 0.1))  # geometric, as the paper has it
    torch.testing.assert_close(PROCESS.sigma(t), sigma)
    nu = torch.cumulative_trapezoid(sigma**2, t)
    torch.testing.assert_close(PROCESS.nu(t)[1:], nu, rtol=1e-5, atol=0)
    assert PROCESS.end_variance == pytest.approx(2.0**2 - 0.1**2, rel=1e-14)


def test_it_is_the_bridge_of_its_noise() -> None:
    """Law of X_t given X_1 for a Brownian motion on the clock nu: covariance min(nu_s, nu_t)."""
    nu, end = PROCESS.nu(INSIDE), PROCESS.nu(ENDS)[1]
    torch.testing.assert_close(PROCESS.alpha(INSIDE), nu / end)
    torch.testing.assert_close(PROCESS.beta(INSIDE) ** 2, nu - nu * nu / end)


def test_ends_are_exact_and_never_negative() -> None:
    for process in (PROCESS, Driftless(1e-3, 30.0), Driftless(0.99, 1.0)):
        assert process.alpha(ENDS).tolist() == [0.0, 1.0] and process.beta(ENDS).tolist() == [0.0, 0.0]
        assert process.is_memoryless_start
        fine = torch.linspace(0, 1, 2001, dtype=torch.float64)
        for t in (fine, fine.float(), 1 - 1e-16 * torch.arange(50, dtype=torch.float64)):
            assert process.beta(t).isfinite().all() and (process.alpha(t) <= 1).all()
        assert (process.alpha(fine).diff() > 0).all()


def test_derivatives_and_the_memoryless_noise() -> None:
    h = 1e-6
    for f, d in ((PROCESS.alpha, PROCESS.d_alpha), (PROCESS.beta, PROCESS.d_beta)):
        torch.testing.assert_close(d(INSIDE), (f(INSIDE + h) - f(INSIDE - h)) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(PROCESS.eta(INSIDE), Process.eta(PROCESS, INSIDE))


@pytest.mark.parametrize("precision", [1 / PROCESS.end_variance, 0.3, 5.0])
def test_posteriors_are_those_of_the_bridge(precision: float) -> None:
    torch.testing.assert_close(
        PROCESS.posterior_variance(INSIDE, precision), Process.posterior_variance(PROCESS, INSIDE, precision)
    )
    torch.testing.assert_close(
        PROCESS.posterior_slope(INSIDE, precision), Process.posterior_slope(PROCESS, INSIDE, precision)
    )
    assert PROCESS.posterior_variance(ENDS, precision).tolist() == pytest.approx([1 / precision, 0.0])


def test_its_own_base_has_what_noise_is_left() -> None:
    t = torch.cat([ENDS, INSIDE])
    own = 1 / PROCESS.end_variance
    torch.testing.assert_close(PROCESS.posterior_variance(t, own), PROCESS.end_variance - PROCESS.nu(t))
    torch.testing.assert_close(PROCESS.posterior_slope(t, own), torch.ones_like(t))


def test_predictions() -> None:
    t = torch.cat([ENDS[:1], INSIDE])
    x1_hat, eps_hat = randn(len(t), 3), randn(len(t), 3)
    x = PROCESS.add_noise(x1_hat, eps_hat, t).requires_grad_()
    back = PROCESS.interpret(x1_hat, "sample", x, t)
    assert back.eps_hat[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(back.eps_hat[1:], eps_hat[1:])
    assert torch.equal(PROCESS.express(back, "sample", x, t), x1_hat)
    (gradient,) = torch.autograd.grad(back.eps_hat.sum(), x)
    assert gradient.isfinite().all()
    for kind in ("epsilon", "v_prediction", "velocity"):
        with pytest.raises(ValueError, match=f"{kind}.*use a model that predicts x1_hat"):
            PROCESS.interpret(x1_hat, kind, x, t)
        with pytest.raises(ValueError, match=f"{kind}.*use a model that predicts x1_hat"):
            PROCESS.express(back, kind, x, t)


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_base_ends_in_its_law_at_any_number_of_steps(steps: int) -> None:
    base = GaussianBase([1], process=PROCESS)
    chain = Chain(PROCESS, Brownian(), PROCESS.grid(steps))
    mean, var = 0.0, 0.0
    for k in range(steps):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        law = chain.kernel(base, chain.output(base, x, k, Condition({}, None, 2)), x, k)
        slope = float(law.mean[1] - law.mean[0])
        mean, var = slope * mean + float(law.mean[0]), slope**2 * var + float(law.std[0]) ** 2
    assert mean == 0 and var == pytest.approx(PROCESS.end_variance, rel=1e-12)
    assert len(chain.noisy_steps) == steps  # none is deterministic, the last neither


def test_draws_start_at_the_point() -> None:
    n = 20_000
    base, chain = GaussianBase([1], process=PROCESS), Chain(PROCESS, Brownian(), PROCESS.grid(4))
    states, _ = chain.rollout(base, Condition({}, None, n), randn(5, n, 1))
    assert torch.equal(states[0], torch.zeros(n, 1, dtype=torch.float64))
    assert abs(states[-1].mean()) < 4 * math.sqrt(PROCESS.end_variance / n)
    relative = states[-1].square().mean() / PROCESS.end_variance - 1
    assert abs(relative) < 4 * math.sqrt(2 / n)


def test_the_step_is_the_exact_gaussian_one() -> None:
    """Inside, where its formula is no 0/0: DDIM's ancestral step and what it leaves out of the variance."""
    x, x1_hat, t, s = randn(4, 2), randn(4, 2), INSIDE[5], INSIDE[9]
    step = Brownian()(PROCESS, x, PROCESS.interpret(x1_hat, "sample", x, t), t, s)
    a, b_t, b_s = PROCESS.alpha(t) / PROCESS.alpha(s), PROCESS.beta(t), PROCESS.beta(s)
    b2 = b_t**2 - a**2 * b_s**2
    c1, c2 = PROCESS.alpha(s) * b2 / b_t**2, a * b_s**2 / b_t**2
    torch.testing.assert_close(step.mean, c1 * x1_hat + c2 * x)
    var = b2 * b_s**2 / b_t**2 + c1**2 * (PROCESS.end_variance - PROCESS.nu(t))
    torch.testing.assert_close(step.std.flatten(), var.sqrt()[None])


@pytest.mark.parametrize("transition", [DDIM(), DDIM(0.0), ExactGaussian(), EulerMaruyama(), EulerMaruyama(1.0)])
def test_other_transitions_name_the_one_to_use(transition: Transition) -> None:
    chain = Chain(PROCESS, transition, PROCESS.grid(3))
    with pytest.raises(TypeError, match=r"0/0 at the start of Driftless.*use the transition Brownian\(\)"):
        _ = chain.stds


@pytest.mark.parametrize("process", [RectifiedFlow(), Cosine()])
def test_brownian_steps_are_of_no_other_process(process: Process) -> None:
    with pytest.raises(TypeError, match=r"Brownian steps the process Driftless.*use DDIM\(\) or ExactGaussian\(\)"):
        _ = Chain(process, Brownian(), process.grid(3)).stds


def test_impossible_schedules_are_refused() -> None:
    for bad in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
            Driftless(*bad)
    with pytest.raises(ValueError, match="at least 1 step"):
        PROCESS.grid(0)
