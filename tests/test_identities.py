"""Estimates from log weights: naive formulas, extreme weights, and the coverage that their intervals promise.

A base N(0, 1) tilted by exp(c x) or exp(-c x^2/2) has everything in closed form:

    c x          log Z = c^2/2,             E*[x] = c,              ESS = exp(-c^2)
    -c x^2/2     log Z = -log(1 + c)/2,     E*[x^2] = 1/(1 + c),    ESS = sqrt(1 + 2c)/(1 + c)
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_tilt.identities import Estimate, ess, expectation, log_partition, mean, stratified

LOG_W = [0.3, -1.2, 2.0, 0.0, -0.4]
F = [1.0, 3.0, -2.0, 0.5, 4.0]


def test_estimates_equal_naive_loops() -> None:
    w = [math.exp(v) for v in LOG_W]
    n, total = len(w), sum(w)
    log_w, f = torch.tensor(LOG_W, dtype=torch.float64), torch.tensor(F, dtype=torch.float64)
    assert ess(log_w) == pytest.approx(total**2 / (n * sum(v * v for v in w)), rel=1e-12)

    z = log_partition(log_w)
    spread = math.sqrt(sum((v - total / n) ** 2 for v in w) / (n - 1))
    assert z.mean == pytest.approx(math.log(total / n), rel=1e-12)
    assert z.se == pytest.approx(spread / math.sqrt(n) / (total / n), rel=1e-12)
    assert (z.n, z.ess) == (n, ess(log_w))

    tilted = expectation(f, log_w)
    centre = sum(v * x for v, x in zip(w, F, strict=True)) / total
    variance = sum(v * v * (x - centre) ** 2 for v, x in zip(w, F, strict=True)) / total**2
    assert tilted.mean == pytest.approx(centre, rel=1e-12)
    assert tilted.se == pytest.approx(math.sqrt(variance), rel=1e-12)

    plain = mean(f)
    assert plain.mean == pytest.approx(sum(F) / n)
    assert plain.se == pytest.approx(math.sqrt(sum((x - sum(F) / n) ** 2 for x in F) / (n - 1) / n))
    assert plain.as_dict() == {"mean": plain.mean, "se": plain.se, "n": n}


@pytest.mark.parametrize("shift", [1e4, -1e4, 1e8])
def test_log_weights_may_be_huge(shift: float) -> None:
    log_w, f = torch.tensor(LOG_W, dtype=torch.float64), torch.tensor(F)
    far, near = log_partition(log_w + shift), log_partition(log_w)
    assert far.mean - shift == pytest.approx(near.mean, abs=1e-12 * abs(shift))
    # What is left of the weights' own digits after the shift is 1e-16 of it.
    rel = max(1e-9, 1e-15 * abs(shift))
    assert (far.se, far.ess) == pytest.approx((near.se, near.ess), rel=rel)
    shifted, plain = expectation(f, log_w + shift), expectation(f, log_w)
    assert (shifted.mean, shifted.se) == pytest.approx((plain.mean, plain.se), rel=rel)


def test_limits() -> None:
    one = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf])
    assert ess(one) == pytest.approx(0.25) and expectation(torch.tensor([9.0, 2.0, 9.0, 9.0]), one).mean == 2.0
    assert log_partition(one).mean == pytest.approx(-math.log(4))
    assert log_partition(torch.full((7,), 3.0)) == Estimate(3.0, 0.0, 7, 1.0)
    # One path says nothing about its spread, and float32 weights lose nothing on the way.
    assert math.isnan(log_partition(torch.zeros(1)).se) and math.isnan(mean(torch.zeros(1)).se)
    assert log_partition(torch.tensor([80.0, 80.0])).mean == pytest.approx(80.0, rel=1e-14)


Tilt = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float, float]
TILTS: dict[str, Tilt] = {
    "linear": (lambda x: 0.7 * x, lambda x: x, 0.7**2 / 2, 0.7),
    "quadratic": (lambda x: -2 * x**2, lambda x: x**2, -math.log(5) / 2, 1 / 5),
}


def intervals(x: Tensor, tilt: Tilt) -> list[tuple[Estimate, Estimate]]:
    log_w, f, *_ = tilt
    return [(log_partition(log_w(row)), expectation(f(row), log_w(row))) for row in x]


def covered(estimates: list[Estimate], true: float) -> float:
    return sum(abs(e.mean - true) <= 1.96 * e.se for e in estimates) / len(estimates)


@pytest.mark.parametrize("name", TILTS)
def test_intervals_cover_where_they_are_called_trustworthy(name: str) -> None:
    """1,000 runs of n = 1000; the share has a standard error of .7 %."""
    *_, log_z, value = TILTS[name]
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    runs = [run for run in intervals(x, TILTS[name]) if run[0].trustworthy]
    assert len(runs) > 950
    assert 0.93 <= covered([z for z, _ in runs], log_z) <= 0.97
    assert 0.93 <= covered([f for _, f in runs], value) <= 0.97


def test_few_or_uneven_samples_are_not_called_trustworthy_and_cover_less() -> None:
    assert not Estimate(0.0, 1.0, n=999).trustworthy and Estimate(0.0, 1.0, n=1000, ess=0.5).trustworthy
    uneven: Tilt = (lambda x: 2 * x, lambda x: x, 2.0, 2.0)  # ESS = exp(-4)
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    runs = intervals(x, uneven)
    assert not any(z.trustworthy or f.trustworthy for z, f in runs)
    assert covered([z for z, _ in runs], 2.0) < 0.9


def test_strata_of_equal_weight() -> None:
    a, b = Estimate(1.0, 0.3, 10, 0.5), Estimate(4.0, 0.4, 30, 0.7)
    both = stratified([a, b])
    assert (both.mean, both.n) == (2.5, 40)
    assert (both.se, both.ess) == pytest.approx((0.25, 0.6))
    assert stratified([a]) == a


def test_standard_error_of_strata_is_the_spread_over_runs() -> None:
    """The spread of 1,000 runs has a relative standard error of 2.2 %; four of them are allowed."""
    scales = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x = torch.randn(1000, 3, 100, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    runs = [stratified([log_partition(c * row) for c, row in zip(scales, run, strict=True)]) for run in x]
    means = torch.tensor([r.mean for r in runs])
    errors = torch.tensor([r.se for r in runs])
    assert float(means.std()) == pytest.approx(float(errors.mean()), rel=0.09)
    # log of a mean is biased by -se^2/2 a stratum, far below the standard error of this mean.
    assert float(means.mean()) == pytest.approx(float((scales**2).mean() / 2), abs=4 * float(means.std()) / 1000**0.5)
