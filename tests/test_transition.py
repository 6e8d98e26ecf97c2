"""Transitions against diffusers, conditional Gaussians, and the exact laws of Gaussian chains."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from oracles import Schedule, ddim_chain, end_correlation, flow_euler_chain, flow_schedule, laws, sd15_schedule
from test_process import PROCESSES, SD15, processes, randn
from torch import Tensor

from lightning_tilt.models import GaussianMixturePredictor
from lightning_tilt.process import Process, RectifiedFlow, VariancePreserving
from lightning_tilt.transition import DDIM, EulerMaruyama, Gaussian, Transition, control, path_log_ratio

MU, V = 0.4, 0.25


def affine(transition: Transition, process: Process, t: Tensor, s: Tensor, mu: float = MU, v: float = V) -> list[float]:
    """[A, b, std] of the package's step for data N(mu, v), read off at x = 0 and x = 1."""
    base = GaussianMixturePredictor([1.0], [[mu]], [[[v]]], process)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    output = base.predict(x, t.expand(2), base.encode(None, 2))
    step = transition(process, x, process.interpret(output, "sample", x, t), t, s)
    return [float(step.mean[1] - step.mean[0]), float(step.mean[0]), float(step.std.flatten()[0])]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_steps_are_diffusers_ddim(eta: float) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SD15, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    process = VariancePreserving(scheduler.alphas_cumprod)
    grid = process.grid(20)
    for k in (0, 3, 11, 18, 19):
        x, eps, z = randn(2, 3), randn(2, 3), randn(2, 3)
        step = DDIM(eta)(process, x, process.interpret(eps, "epsilon", x, grid[k]), grid[k], grid[k + 1])
        n = int(scheduler.timesteps[k])
        mean = scheduler.step(eps, n, x, eta=eta, variance_noise=torch.zeros_like(z)).prev_sample
        noisy = scheduler.step(eps, n, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(step.mean, mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(step.std * z, noisy - mean, rtol=0, atol=1e-5)


def test_full_noise_is_diffusers_ddpm() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SD15, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    process = VariancePreserving(scheduler.alphas_cumprod)
    grid = process.grid(20)
    for k in (0, 3, 11, 18, 19):
        x, eps = randn(2, 3), randn(2, 3)
        step = DDIM()(process, x, process.interpret(eps, "epsilon", x, grid[k]), grid[k], grid[k + 1])
        theirs = scheduler.step(eps, int(scheduler.timesteps[k]), x, generator=torch.Generator().manual_seed(k))
        z = torch.randn(2, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        torch.testing.assert_close(step.sample(z), theirs.prev_sample, rtol=0, atol=1e-5)


@processes
@pytest.mark.parametrize("k", [0, 1, 5, 8])
def test_full_noise_is_the_conditional_law(process: Process, k: int) -> None:
    grid = process.grid(10)
    t, s = grid[k], grid[k + 1]
    alpha, beta, alpha_s, beta_s = (float(f(u)) for u in (t, s) for f in (process.alpha, process.beta))
    # Covariance of (X_1, X_s, X_t) under the noising chain X_t = a X_s + fresh noise.
    a = alpha / alpha_s
    var_s, var_t = alpha_s**2 * V + beta_s**2, alpha**2 * V + beta**2
    joint = torch.tensor([[V, alpha_s * V, alpha * V], [alpha_s * V, var_s, a * var_s], [alpha * V, a * var_s, var_t]])
    joint = joint.double()
    slope = a * var_s / var_t  # E[X_s | X_t]
    given = joint[1, [0, 2]] @ torch.linalg.solve(joint[[0, 2]][:, [0, 2]], joint[[0, 2], 1])
    A, b, std = affine(DDIM(), process, t, s)
    assert [A, b] == pytest.approx([slope, alpha_s * MU - slope * alpha * MU], abs=1e-9)
    assert std == pytest.approx(math.sqrt(float(joint[1, 1] - given)), abs=1e-6)


@processes
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_last_step_is_x1_hat(process: Process, eta: float) -> None:
    t, x = process.grid(10)[-2:], randn(3, 2)
    prediction = process.interpret(randn(3, 2), "velocity", x, t[0])
    step = DDIM(eta)(process, x, prediction, t[0], t[1])
    assert torch.equal(step.std, torch.zeros(1, 1, dtype=torch.float64))
    assert torch.equal(step.mean, prediction.x1_hat)


@pytest.mark.parametrize("steps", [10, 28])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("sd15", sd15_schedule),
        ("zero-snr", lambda k: sd15_schedule(k, True)),
        ("flow", flow_schedule),
        ("sd3", lambda k: flow_schedule(k, 3.0)),
    ],
)
def test_chains_are_the_oracles(name: str, schedule: Callable[[int], Schedule], eta: float, steps: int) -> None:
    process = PROCESSES[name]
    chain, grid = ddim_chain(schedule(steps), MU, V, eta), process.grid(steps)
    for k in range(steps):
        ours = affine(DDIM(eta), process, grid[k], grid[k + 1])
        assert ours == pytest.approx([chain.A[k], chain.b[k], chain.s[k]], abs=1e-10)


def test_start_and_end_are_independent_only_from_pure_noise() -> None:
    found = [end_correlation(ddim_chain(sd15_schedule(k), MU, v)) for k in (10, 50, 1000) for v in (0.1, 1.0, 3.0)]
    assert 0.02 < min(found) < 0.03 and 0.13 < max(found) < 0.15
    for schedule in (sd15_schedule(28, True), flow_schedule(28), flow_schedule(28, 3.0)):
        assert end_correlation(ddim_chain(schedule, MU, V)) == pytest.approx(0, abs=1e-12)
    # ... and only with the full noise
    assert abs(end_correlation(ddim_chain(flow_schedule(28), MU, V, 0.5))) > 0.1


@pytest.mark.parametrize(("steps", "variance"), [(50, 0.907), (100, 0.951), (200, 0.975)])
def test_chains_of_few_steps_are_under_dispersed(steps: int, variance: float) -> None:
    mean, var = laws(ddim_chain(flow_schedule(steps), 0.0, 1.0))[-1]
    assert mean == 0 and var == pytest.approx(variance, abs=6e-4)


def test_euler_maruyama_is_the_oracle_and_of_first_order() -> None:
    process, start, errors = RectifiedFlow(), 0.4, []
    for steps in (80, 160, 320, 640):
        times = torch.linspace(start, 1, steps + 1, dtype=torch.float64)
        chain = flow_euler_chain(times.tolist(), MU, V, start * MU, start**2 * V + (1 - start) ** 2)
        for k in (0, steps // 2, steps - 1):
            ours = affine(EulerMaruyama(), process, times[k], times[k + 1])
            assert ours == pytest.approx([chain.A[k], chain.b[k], chain.s[k]], abs=1e-9)
        mean, var = laws(chain)[-1]
        assert mean == pytest.approx(MU, abs=1e-12)
        errors.append(abs(var - V))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.1)


@processes
def test_both_families_agree_in_small_steps(process: Process) -> None:
    t, x = process.grid(2)[1], randn(4, 2)
    gaps = []
    for h in (4e-4, 2e-4, 1e-4):  # inside one interval of a discrete schedule
        prediction = process.interpret(randn(4, 2) * 0 + 0.3, "velocity", x, t)
        one, two = (kind(process, x, prediction, t, t + h) for kind in (DDIM(), EulerMaruyama()))
        gaps.append((one.mean - two.mean).abs().max())
        torch.testing.assert_close(one.std, two.std, rtol=20 * h, atol=0)
    assert gaps[0] / gaps[1] > 3.5 and gaps[1] / gaps[2] > 3.5  # the means differ by O(h^2)


def test_euler_maruyama_refuses_the_singular_start() -> None:
    process, x = RectifiedFlow(), randn(2, 2)
    t, s = torch.zeros(2), torch.full((2,), 0.1)
    prediction = process.interpret(randn(2, 2), "velocity", x, t)
    with pytest.raises(ValueError, match=r"singular at t = 0.*use DDIM\(ddim_eta=1.0\)"):
        EulerMaruyama()(process, x, prediction, t, s)
    bounded = EulerMaruyama(1.0)(process, x, prediction, t, s)
    assert bounded.mean.isfinite().all()
    torch.testing.assert_close(bounded.std, torch.full((2, 1), math.sqrt(0.1), dtype=torch.float64), rtol=1e-7, atol=0)


def test_only_the_full_noise_is_memoryless() -> None:
    assert DDIM().memoryless and not DDIM(0.9).memoryless and not DDIM(0.0).memoryless
    assert EulerMaruyama().memoryless and not EulerMaruyama(1.0).memoryless
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="ddim_eta must lie in"):
            DDIM(bad)
    for worse in (-1.0, "full"):
        with pytest.raises(ValueError, match="sigma must"):
            EulerMaruyama(worse)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transition", [DDIM(), DDIM(0.3), EulerMaruyama()])
def test_states_keep_their_dtype_and_shape(dtype: torch.dtype, transition: Transition) -> None:
    process, x = RectifiedFlow(3.0), torch.randn(3, 4, 2, 2, dtype=dtype)
    t, s = process.grid(10)[[2, 3, 7]], process.grid(10)[[3, 4, 8]]
    step = transition(process, x, process.interpret(x, "velocity", x, t), t, s)
    assert step.mean.dtype == step.std.dtype == dtype
    assert step.mean.shape == x.shape and step.std.shape == (3, 1, 1, 1)
    alone = transition(process, x[1:2], process.interpret(x[1:2], "velocity", x[1:2], t[1]), t[1], s[1])
    assert torch.equal(alone.mean, step.mean[1:2]) and torch.equal(alone.std, step.std[1:2])


def test_density_of_a_step() -> None:
    step = Gaussian(randn(3, 4), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None])
    x = randn(3, 4)
    expected = torch.distributions.Normal(step.mean, step.std.expand(3, 4)).log_prob(x).sum(1)
    torch.testing.assert_close(step.log_prob(x), expected)
    with pytest.raises(ValueError, match="std = 0 has no density"):
        Gaussian(x, torch.zeros(1, 1)).log_prob(x)


def test_control_and_path_ratio_are_a_ratio_of_densities() -> None:
    std = torch.tensor([0.3, 1.2], dtype=torch.float64)[:, None]
    base, tuned, z = Gaussian(randn(2, 5), std), Gaussian(randn(2, 5), std), randn(2, 5)
    x = tuned.sample(z)
    u = control(tuned.mean, base.mean, std)
    torch.testing.assert_close(path_log_ratio(u, z), tuned.log_prob(x) - base.log_prob(x))


def test_a_step_without_noise_has_no_control_and_no_gradient() -> None:
    mean = randn(2, 3).requires_grad_()
    u = control(mean, randn(2, 3), torch.tensor([[0.0], [0.5]], dtype=torch.float64))
    u.square().sum().backward()
    assert torch.equal(u[0], torch.zeros(3)) and mean.grad is not None
    assert mean.grad.isfinite().all() and torch.equal(mean.grad[0], torch.zeros(3, dtype=torch.float64))
