"""The theorems of the discrete chain, solved exactly: its tilt, its best control, Adjoint Matching's fixed point."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from oracles import (
    Affine,
    Chain,
    Schedule,
    Tilt,
    adjoint_matching_fixed_point,
    adjoint_matching_gradient,
    best_control,
    control_cost,
    controlled,
    ddim_chain,
    flow_schedule,
    laws,
    log_z,
    sd15_schedule,
    tilted_end_law,
    tilted_kernels,
    tilted_law,
    values,
)

from lightning_tilt.models import GaussianMixture
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards.quadratic import LinearReward, QuadraticReward

SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "sd15": sd15_schedule,
    "zero-snr": lambda steps: sd15_schedule(steps, True),
    "flow": flow_schedule,
    "sd3": lambda steps: flow_schedule(steps, 3.0),
}
TILTS = {"quadratic": Tilt(2.0, q=1.0, c=1.5), "linear": Tilt(2.0, l=1.0), "both": Tilt(2.0, q=0.5, c=-1.0, l=0.4)}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
tilts = pytest.mark.parametrize("tilt", TILTS.values(), ids=TILTS.keys())
steps = pytest.mark.parametrize("K", [10, 28, 50])


def gaussian(mean: float, variance: float) -> GaussianMixture:
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, mean * one[None], variance * one[None, None])


def simulate(chain: Chain, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    start = x = chain.m0 + math.sqrt(chain.v0) * torch.randn(n, dtype=torch.float64)
    for A, b, s in zip(chain.A, chain.b, chain.s, strict=True):
        x = A * x + b + s * torch.randn(n, dtype=torch.float64)
    return start, x


@tilts
def test_value_function_by_simulation(tilt: Tilt) -> None:
    n = 40_000
    chain = ddim_chain(flow_schedule(10), 0.5, 0.25)
    _, x = simulate(chain, n)
    weight = (tilt.lam * (-tilt.q * (x - tilt.c) ** 2 / 2 + tilt.l * x)).exp()
    assert abs(weight.mean() - math.exp(log_z(chain, tilt))) < 4 * weight.std() / math.sqrt(n)
    mean, variance = tilted_end_law(chain, tilt)
    for f, exact in ((x, mean), (x**2, variance + mean**2)):
        error = (weight * f).mean() / weight.mean() - exact
        assert error.abs() < 4 * (weight * (f - exact)).std() / weight.mean() / math.sqrt(n)


@schedules
@tilts
def test_the_tilted_kernels_end_in_the_tilted_law(schedule: Callable[[int], Schedule], tilt: Tilt) -> None:
    chain = ddim_chain(schedule(28), 0.5, 0.25)
    assert laws(tilted_kernels(chain, tilt))[-1] == pytest.approx(tilted_end_law(chain, tilt), abs=1e-12)


@tilts
def test_log_z_of_the_end_law_is_that_of_the_recursion(tilt: Tilt) -> None:
    chain = ddim_chain(sd15_schedule(28), 0.5, 0.25)
    mean, variance = laws(chain)[-1]
    end = Chain([1.0], [0.0], [0.0], mean, variance)
    assert log_z(chain, tilt) == pytest.approx(log_z(end, tilt), abs=1e-12)
    mixture = gaussian(mean, variance)
    parts = [QuadraticReward([[tilt.q]], [tilt.c]), LinearReward([tilt.l])]
    once, first = mixture.tilt(parts[0], tilt.lam)
    twice, second = once.tilt(parts[1], tilt.lam)
    assert float(first + second) == pytest.approx(log_z(chain, tilt), abs=1e-12)
    assert float(twice.mean) == pytest.approx(tilted_law((mean, variance), tilt)[0], abs=1e-12)


@schedules
@tilts
def test_the_best_control_is_the_best(schedule: Callable[[int], Schedule], tilt: Tilt) -> None:
    chain = ddim_chain(schedule(10), 0.5, 0.25)
    best = best_control(chain, tilt)
    least = control_cost(chain, best, tilt)
    # KL(P_theta | P*) >= 0; the initial law of P* counts where it is not the base's
    assert least + log_z(chain, tilt) >= -1e-12
    for k in range(9):
        for change in ((1e-4, 0.0), (0.0, 1e-4)):
            gaps = []
            for sign in (1, -1):
                moved = list(best)
                moved[k] = (best[k][0] + sign * change[0], best[k][1] + sign * change[1])
                gaps.append(control_cost(chain, moved, tilt) - least)
            assert min(gaps) > 0 and gaps[0] == pytest.approx(gaps[1], rel=1e-3)  # no slope, only curvature


@schedules
@tilts
@steps
def test_adjoint_matching_is_at_rest_at_the_best_control(
    schedule: Callable[[int], Schedule], tilt: Tilt, K: int
) -> None:
    chain = ddim_chain(schedule(K), 0.5, 0.25)
    best, fixed = best_control(chain, tilt), adjoint_matching_fixed_point(chain, tilt)
    assert _largest_gap(best, fixed) < 1e-14
    assert max(abs(g) for pair in adjoint_matching_gradient(chain, best, tilt) for g in pair) < 1e-14
    wrong = adjoint_matching_fixed_point(chain, tilt, shift=1)
    assert max(abs(g) for pair in adjoint_matching_gradient(chain, wrong, tilt) for g in pair) > 1e-3


def _largest_gap(one: list[Affine], two: list[Affine]) -> float:
    return max(abs(a - b) for p, q in zip(one, two, strict=True) for a, b in zip(p, q, strict=True))


@schedules
@tilts
@steps
@pytest.mark.parametrize("v", [0.1, 0.25])
def test_the_fixed_point_has_the_mean_of_the_tilt(
    schedule: Callable[[int], Schedule], tilt: Tilt, K: int, v: float
) -> None:
    """Mean within 1 % of itself and of the way from base to tilt; with a_k it misses by 4 % of the way and more."""
    chain = ddim_chain(schedule(K), 0.5, v)
    start, target = laws(chain)[-1][0], tilted_end_law(chain, tilt)[0]
    right, wrong = (
        laws(controlled(chain, adjoint_matching_fixed_point(chain, tilt, shift)))[-1][0] for shift in (0, 1)
    )
    assert abs(right - target) < 0.01 * abs(target - start)
    assert abs(right - target) < 0.01 * abs(target)
    assert abs(wrong - target) > 0.04 * abs(target - start)


@tilts
@steps
def test_only_the_initial_value_keeps_the_mean_from_being_exact(tilt: Tilt, K: int) -> None:
    errors = {}
    for name, schedule in SCHEDULES.items():
        chain = ddim_chain(schedule(K), 0.5, 0.25)
        errors[name] = laws(controlled(chain, best_control(chain, tilt)))[-1][0] - tilted_end_law(chain, tilt)[0]
    assert abs(errors.pop("sd15")) > 1e-5
    assert max(abs(e) for e in errors.values()) < 1e-12


def test_the_variance_of_the_fixed_point_is_too_large_and_shrinks_with_the_steps() -> None:
    """N(0, 1), flow, lam = 2, a quadratic reward: 14, 5.5 and 3.2 % at 10, 28 and 50 steps; none for a linear one."""
    for tilt, expected in ((Tilt(2.0, q=1.0, c=1.0), (0.141, 0.055, 0.032)), (Tilt(2.0, l=1.0), (0.0, 0.0, 0.0))):
        for K, excess in zip((10, 28, 50), expected, strict=True):
            chain = ddim_chain(flow_schedule(K), 0.0, 1.0)
            ours, exact = laws(controlled(chain, best_control(chain, tilt)))[-1], tilted_end_law(chain, tilt)
            assert ours[0] == pytest.approx(exact[0], abs=1e-12)
            assert ours[1] / exact[1] - 1 == pytest.approx(excess, abs=1e-3)


def test_the_discrete_value_function_tends_to_the_continuous_one() -> None:
    """log h_t of the continuous process in closed form, against V_k at the same times: first order in 1/K."""
    tilt = Tilt(2.0, q=1.0, c=1.5)
    process, reward = RectifiedFlow(), QuadraticReward([[1.0]], [1.5])
    base = gaussian(0.5, 0.25)
    x, errors = 0.3, []
    for K in (50, 100, 200, 400):
        P, Q, R = values(ddim_chain(flow_schedule(K), 0.5, 0.25), tilt)[K // 2]
        state, t = torch.full((1, 1), x, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
        errors.append(abs(-P * x * x / 2 + Q * x + R - float(base.log_h(process, reward, 2.0, state, t))))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.1)
