"""Jarzynski and Crooks step by step, against exact expectations of their own discretisation (tests/gaussian_path.py).

The problem: N(1.5, .5), reward -2.5 (x - 3)^2/2, sigma = 1, log Z = -1.6555.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from gaussian_path import Affine, GaussianPath
from torch import Tensor

from lightning_tilt.identities import (
    backward_drift,
    bennett,
    crooks_step,
    divergence,
    elbo,
    eubo,
    expectation,
    forward_drift,
    jarzynski_step,
    kernel_log_ratio,
    log_partition,
    midpoint,
    rademacher,
    value_and_divergence,
)
from lightning_tilt.transition import Gaussian

PATHS = [GaussianPath(), GaussianPath(transport=True)]
HARMLESS = GaussianPath(mu=0.5, v=0.6, q=0.5, c=0.0)


def orders(path: GaussianPath, kind: str, steps: tuple[int, ...]) -> tuple[list[float], list[float]]:
    errors = [path.expected(k, kind) - path.log_z for k in steps]
    return errors, [math.log2(a / b) for a, b in pairwise(errors)]


def test_orders_of_convergence_without_monte_carlo() -> None:
    guided, exact = PATHS
    assert guided.log_z == pytest.approx(-1.6555, abs=5e-5)
    _, order = orders(guided, "crooks", (20, 40, 80, 160))
    assert order == pytest.approx([1.03, 1.01, 1.01], abs=0.01)
    _, order = orders(exact, "crooks", (20, 40, 80, 160, 320))
    assert order == pytest.approx([0.72, 0.86, 0.93, 0.97], abs=0.01)
    errors, order = orders(exact, "left", (20, 40, 80, 160, 320))
    assert errors[0] == pytest.approx(0.153, abs=1e-3) and 1 < order[-1] < order[0] < 1.4
    errors, order = orders(exact, "middle", (20, 40, 80, 160, 320))
    assert errors[0] == pytest.approx(-0.0261, abs=1e-4) and order == pytest.approx([2.05, 2.03, 2.02, 2.01], abs=0.01)
    # Without the exact transport the law of X itself is right to first order only.
    assert orders(guided, "middle", (80, 160))[1] == pytest.approx([0.99], abs=0.01)


def at(f: Affine, x: Tensor) -> Tensor:
    return f[0] * x + f[1]


def kernels(path: GaussianPath, x: Tensor, t: float, s: float, forward: bool) -> tuple[Gaussian, Gaussian]:
    """F and F0 from x at t, or B and B0 from x at s: by the package's drifts."""
    here, h = (t, s - t) if forward else (s, t - s)
    v, score, w = (at(f(here), x) for f in (path.velocity, path.score, path.w))
    grad_r = -here * path.q * (x - path.c)
    drift = forward_drift if forward else backward_drift
    std = torch.full((1, 1), path.sigma * abs(h) ** 0.5, dtype=x.dtype)
    means = (x + h * drift(v, score, path.sigma, w, grad_r), x + h * drift(v, score, path.sigma))
    return Gaussian(means[0], std), Gaussian(means[1], std)


def forward_paths(path: GaussianPath, steps: int, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """End points and log weights of the three kinds, on paths of P."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    log_w = {kind: torch.zeros(n, dtype=torch.float64) for kind in ("crooks", "left", "middle")}
    for k in range(steps):
        t, s = k / steps, (k + 1) / steps
        h, F = s - t, kernels(path, x, t, s, True)
        y = F[0].sample(torch.randn(n, 1, generator=generator, dtype=torch.float64))
        log_w["crooks"] -= crooks_step(x, y, *F, *kernels(path, y, t, s, False))
        r, r_next = reward(path, t), reward(path, s)
        middle = midpoint(x, h, at(path.velocity(t), x), at(path.w(t), x))
        for kind, place, time in (("left", x, t), ("middle", middle, t + h / 2)):
            v, score, w = (at(f(time), place) for f in (path.velocity, path.score, path.w))
            moved = (w, torch.full((n,), path.w(time)[0], dtype=torch.float64)) if path.transport else (None, None)
            log_w[kind] += jarzynski_step(r, r_next, x, h, v, score, *moved)
        x = y
    log_w["crooks"] += reward(path, 1.0)(x)
    return x, log_w


def reward(path: GaussianPath, t: float) -> Callable[[Tensor], Tensor]:
    return lambda x: -t * path.q / 2 * (x - path.c).square().flatten(1).sum(1)


def backward_paths(path: GaussianPath, steps: int, n: int, seed: int) -> Tensor:
    """Crooks' log weights on paths of Q: from exact draws of p*, back in time."""
    generator = torch.Generator().manual_seed(seed)
    m, v = path.tilted(1.0)
    y = m + v**0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    log_w = reward(path, 1.0)(y)
    for k in reversed(range(steps)):
        t, s = k / steps, (k + 1) / steps
        B = kernels(path, y, t, s, False)
        x = B[0].sample(torch.randn(n, 1, generator=generator, dtype=torch.float64))
        log_w = log_w - crooks_step(x, y, *kernels(path, x, t, s, True), *B)
        y = x
    return log_w


@pytest.mark.parametrize("path", [*PATHS, HARMLESS], ids=["guided", "transport", "harmless"])
def test_paths_have_the_expectations_of_their_discretisation(path: GaussianPath) -> None:
    """Ten steps, 40,000 paths: log Z and the tilted mean within four standard errors of the recursion's."""
    x, weights = forward_paths(path, 10, 40_000, 1)
    for kind, log_w in weights.items():
        z, f = log_partition(log_w), expectation(x[:, 0], log_w)
        e = 1e-4
        tilted = (path.expected(10, kind, tilt=e) - path.expected(10, kind, tilt=-e)) / (2 * e)
        assert abs(z.mean - path.expected(10, kind)) < 4 * z.se < 0.1, kind
        assert abs(f.mean - tilted) < 4 * f.se < 0.1, kind
        if path is HARMLESS:
            assert f.mean == pytest.approx(path.tilted(1.0)[0], abs=0.03)


def test_exact_transport_leaves_nothing_to_chance() -> None:
    """Jarzynski's A is the same on every path in the limit, and log Z."""
    spread = [float(forward_paths(PATHS[1], k, 500, 2)[1]["middle"].std()) for k in (20, 40)]
    assert spread[1] < 0.3 * spread[0] < 0.05
    assert float(forward_paths(PATHS[0], 20, 500, 2)[1]["middle"].std()) > 0.3


def test_both_directions_bound_and_meet() -> None:
    """Forty steps: ELBO < log Z < EUBO, and the acceptance ratio within the first-order bias."""
    for path in (*PATHS, HARMLESS):
        a = forward_paths(path, 40, 4000, 3)[1]["crooks"]
        b = backward_paths(path, 40, 4000, 4)
        ratio, lower, upper = bennett(a, b), elbo(a), eubo(b)
        bias = abs(path.expected(40, "crooks") - path.log_z)
        assert abs(ratio.mean - path.log_z) < 1.5 * bias + 4 * ratio.se
        assert lower.mean + 2 * lower.se < ratio.mean < upper.mean - 2 * upper.se


def test_discretised_coverage_of_the_estimators() -> None:
    """1,000 runs of 1,000 paths of one pool drawn at once: 93 - 97 % cover the discretisation's own log Z."""
    x, weights = forward_paths(HARMLESS, 5, 1_000_000, 5)
    runs = weights["crooks"].reshape(1000, 1000)
    e = 1e-4
    tilted = (HARMLESS.expected(5, "crooks", tilt=e) - HARMLESS.expected(5, "crooks", tilt=-e)) / (2 * e)
    z = [log_partition(r) for r in runs]
    f = [expectation(v, r) for v, r in zip(x[:, 0].reshape(1000, 1000), runs, strict=True)]
    assert sum(v.trustworthy for v in z) > 990
    for estimates, true in ((z, HARMLESS.expected(5, "crooks")), (f, tilted)):
        assert 930 <= sum(abs(v.mean - true) <= 1.96 * v.se for v in estimates) <= 970


def test_the_noising_process_gives_back_the_control_form() -> None:
    g = torch.Generator().manual_seed(6)
    x, y, m, m0 = (torch.randn(5, 2, 3, generator=g, dtype=torch.float64) for _ in range(4))
    std = torch.rand(5, 1, 1, generator=g, dtype=torch.float64) + 0.1
    F, F0, B0 = Gaussian(m, std), Gaussian(m0, std), Gaussian(y, std)
    step = crooks_step(x, y, F, F0, B0, B0)
    u, z = (m - m0) / std, (y - m) / std
    torch.testing.assert_close(step, (u * z + u**2 / 2).flatten(1).sum(1))
    wide = Gaussian(m0, 2 * std)
    torch.testing.assert_close(kernel_log_ratio(F, wide, y), F.log_prob(y.clone()) - _log_prob(wide, y))
    with pytest.raises(ValueError, match="std = 0 has no density"):
        kernel_log_ratio(F, Gaussian(m0, 0 * std), y)


def _log_prob(law: Gaussian, y: Tensor) -> Tensor:
    std = law.std.expand_as(y)
    return torch.distributions.Normal(law.mean, std).log_prob(y).flatten(1).sum(1)


def test_close_kernels_of_many_dimensions_lose_no_digits() -> None:
    g = torch.Generator().manual_seed(7)
    z, u = (torch.randn(1, 50_000, generator=g, dtype=torch.float64) for _ in range(2))
    std, u = torch.full((1, 1), 0.01, dtype=torch.float64), u * 1e-3
    tensors = [(std * u, 0 * z, std, std * (z + u))]
    tensors += [tuple(v.float() for v in tensors[0])]
    ratio = [float(kernel_log_ratio(Gaussian(m, sd), Gaussian(m0, sd), y)) for m, m0, sd, y in tensors]
    assert ratio[0] == pytest.approx(float((u * z + u**2 / 2).sum()), rel=1e-6)
    assert ratio[1] == pytest.approx(ratio[0], abs=1e-3)


class Field(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(8)).double())

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.a).sin().reshape(x.shape) * x


def test_divergence_is_the_trace_of_the_jacobian() -> None:
    field, x = Field(), torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    naive = []
    for row in x:
        J = torch.autograd.functional.jacobian(lambda y: field(y[None])[0].flatten(), row).reshape(6, 6)
        naive.append(J.trace())
    with torch.no_grad():
        torch.testing.assert_close(divergence(field, x), torch.stack(naive))
    value, div = value_and_divergence(field, x)
    torch.testing.assert_close(value, field(x).detach())
    assert not div.requires_grad and not x.requires_grad
    # Hutchinson: one probe at a time, so that its own spread says how far it may be off.
    probes = rademacher(x, 2000, torch.Generator().manual_seed(10))
    assert probes.shape == (2000, 4, 2, 3) and set(probes.unique().tolist()) == {-1.0, 1.0}
    single = torch.stack([divergence(field, x, e[None]) for e in probes[:300]])
    assert bool(((single.mean(0) - div).abs() < 4 * single.std(0) / 300**0.5).all())
    torch.testing.assert_close(divergence(field, x, probes[:300]), single.mean(0))
    # Signs make it exact where the Jacobian is diagonal; a constant field has none.
    torch.testing.assert_close(divergence(torch.sin, x, probes[:1]), x.cos().flatten(1).sum(1))
    assert divergence(lambda y: torch.ones_like(y), x).tolist() == [0.0] * 4


def test_divergence_can_be_trained() -> None:
    field, x = Field(), torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    divergence(field, x, create_graph=True).square().sum().backward()
    assert field.a.grad is not None
    e = 1e-6
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            field.a[1, 2] += sign * e
            losses.append(float(divergence(field, x).square().sum()))
            field.a[1, 2] -= sign * e
    assert float(field.a.grad[1, 2]) == pytest.approx((losses[0] - losses[1]) / (2 * e), rel=1e-5)


def test_half_a_transport_is_refused() -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="comes with its divergence"):
        jarzynski_step(reward(HARMLESS, 0.0), reward(HARMLESS, 0.1), x, 0.1, x, x, x)
