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

    def tilted_mean(keep: list[int]) -> float:
        return sum(w[i] * F[i] for i in keep) / sum(w[i] for i in keep)

    def log_mean(keep: list[int]) -> float:
        return math.log(sum(w[i] for i in keep) / len(keep))

    for estimate, naive in ((log_partition(log_w), log_mean), (expectation(f, log_w), tilted_mean)):
        whole, left_out = naive([*range(n)]), [naive([j for j in range(n) if j != i]) for i in range(n)]
        centre = sum(left_out) / n
        assert estimate.mean == pytest.approx(n * whole - (n - 1) * centre, rel=1e-12)
        assert estimate.se == pytest.approx(
            math.sqrt((n - 1) / n * sum((e - centre) ** 2 for e in left_out)), rel=1e-12
        )
        assert (estimate.n, estimate.ess) == (n, ess(log_w))

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
    # One path with all the weight: nothing says how much is missed, and the estimate stays finite and says so.
    alone = log_partition(one)
    assert -math.log(4) < alone.mean < 0 and alone.se > 0.5
    constant = log_partition(torch.full((7,), 3.0))
    assert (constant.mean, constant.se) == pytest.approx((3.0, 0.0), abs=1e-14) and (constant.n, constant.ess) == (7, 1)
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
    assert (both.se, both.ess, both.smallest) == (pytest.approx(0.25), pytest.approx(0.6), 10)
    assert stratified([both, b]).smallest == 10
    assert stratified([a]) == a


def test_standard_error_of_strata_is_the_spread_over_runs() -> None:
    """The spread of 1,000 runs has a relative standard error of 2.2 %; four of them are allowed."""
    scales = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x = torch.randn(1000, 3, 100, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    runs = [stratified([log_partition(c * row) for c, row in zip(scales, run, strict=True)]) for run in x]
    means = torch.tensor([r.mean for r in runs])
    errors = torch.tensor([r.se for r in runs])
    assert float(means.std()) == pytest.approx(float(errors.mean()), rel=0.09)
    # Without the jackknife the log of a mean is biased by -se^2/2 a stratum.
    assert float(means.mean()) == pytest.approx(float((scales**2).mean() / 2), abs=4 * float(means.std()) / 1000**0.5)


@pytest.mark.parametrize(("strata", "n"), [(10, 192), (30, 64), (100, 64)])
def test_intervals_of_strata_cover(strata: int, n: int) -> None:
    """The bias of one stratum is that of all: at ESS .5, 300 runs (share: a standard error of 1.3 %, two allowed)."""
    c = math.sqrt(math.log(2))
    x = torch.randn(300, strata, n, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    runs = [[(log_partition(c * row), expectation(row, c * row)) for row in run] for run in x]
    log_z, tilted = ([stratified([pair[i] for pair in run]) for run in runs] for i in (0, 1))
    for estimates, true in ((log_z, c**2 / 2), (tilted, c)):
        assert 0.905 <= covered(estimates, true) <= 0.98
        centre = sum(e.mean for e in estimates) / len(estimates)
        error = sum(e.se for e in estimates) / len(estimates)
        assert abs(centre - true) < 4 * error / 300**0.5  # the plain estimates miss by .2 to 1.3 errors
    assert sum(e.trustworthy for e in log_z) > 200


def test_small_strata_are_not_called_trustworthy() -> None:
    small = [Estimate(0.0, 1.0, n=63, ess=0.9)] * 30
    assert not stratified(small).trustworthy
    assert stratified([Estimate(0.0, 1.0, n=64, ess=0.9)] * 30).trustworthy
