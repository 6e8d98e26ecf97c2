"""Log Z from both sides, against closed forms and naive loops, with the coverage that the intervals promise.

P = N(0, 1), tilted by exp(c x): Q = N(c, 1), log Z dQ/dP = c x, log Z = c^2/2, KL(P | Q) = KL(Q | P) = c^2/2.
Tilted by exp(-c x^2/2): Q = N(0, v), v = 1/(1 + c), log Z = log(v)/2, E_P[log w] = -c/2, E_Q[log w] = -c v/2.
"""

import math

import pytest
import torch
from torch import Tensor

from lightning_tilt.identities import Estimate, bennett, elbo, ess, eubo, expectation, forward_ess

# name: (log w, standard deviation and mean of Q, log Z, ELBO, EUBO)
C, V = 0.7, 1 / 3
PROBLEMS = {
    "linear": (lambda x: C * x, 1.0, C, C**2 / 2, 0.0, C**2),
    "quadratic": (lambda x: (1 - 1 / V) / 2 * x**2, V**0.5, 0.0, math.log(V) / 2, (1 - 1 / V) / 2, (V - 1) / 2),
}


def draws(runs: int, n: int, seed: int) -> Tensor:
    return torch.randn(runs, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covered(estimates: list[Estimate], true: float) -> float:
    return sum(abs(e.mean - true) <= 1.96 * e.se for e in estimates) / len(estimates)


@pytest.mark.parametrize(("n_p", "n_q"), [(1000, 1000), (1000, 250)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_intervals_cover(name: str, n_p: int, n_q: int) -> None:
    """1,000 runs; the share has a standard error of .7 %."""
    log_w, sd, shift, log_z, lower, upper = PROBLEMS[name]
    a = log_w(draws(1000, n_p, 1))
    b = log_w(shift + sd * draws(1000, n_q, 2))
    ratios = [bennett(f, g) for f, g in zip(a, b, strict=True)]
    assert 0.93 <= covered(ratios, log_z) <= 0.97
    assert 0.93 <= covered([elbo(f) for f in a], lower) <= 0.97
    assert 0.93 <= covered([eubo(g) for g in b], upper) <= 0.97
    means = torch.tensor([e.mean for e in ratios])
    # The spread of 1,000 runs has a relative standard error of 2.2 %; four are allowed.
    assert float(means.std()) == pytest.approx(sum(e.se for e in ratios) / 1000, rel=0.09)
    assert all(e.trustworthy and e.n == n_p + n_q and e.smallest == n_q for e in ratios)
    assert lower < log_z < upper


def test_the_acceptance_ratio_has_less_variance_than_either_side() -> None:
    a, b = 1.5 * draws(300, 500, 3), 1.5 * (1.5 + draws(300, 500, 4))
    both = torch.tensor([bennett(f, g).mean for f, g in zip(a, b, strict=True)])
    forward = a.logsumexp(1) - math.log(500)
    backward = math.log(500) - (-b).logsumexp(1)
    assert float(both.std()) < 0.8 * min(float(forward.std()), float(backward.std()))


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e6])
def test_the_ratio_is_the_root_and_its_error_the_naive_one(shift: float) -> None:
    a = [0.3, -1.2, 2.0, 0.0, -0.4]
    b = [1.0, 0.2, 3.0]
    estimate = bennett(torch.tensor(a, dtype=torch.float64) + shift, torch.tensor(b, dtype=torch.float64) + shift)
    c = estimate.mean - shift
    f = [1 / (1 + 5 / 3 * math.exp(c - v)) for v in a]
    g = [1 / (1 + 3 / 5 * math.exp(v - c)) for v in b]
    assert sum(f) == pytest.approx(sum(g), rel=1e-12 + 1e-15 * abs(shift))
    variance = 0.0
    for values in (f, g):
        n, centre = len(values), sum(values) / len(values)
        variance += (sum(v * v for v in values) / n / centre**2 - 1) / n
    assert estimate.se == pytest.approx(variance**0.5, rel=1e-8)
    assert estimate.ess == pytest.approx(sum(f) / 5 * 8 / 3, rel=1e-8)


def test_limits_of_the_ratio() -> None:
    same = bennett(torch.full((4,), 2.5), torch.full((9,), 2.5))
    assert (same.mean, same.se, same.ess) == pytest.approx((2.5, 0.0, 1.0), abs=1e-7)
    # Laws that hardly meet: finite, a large error, not to be trusted.
    far = bennett(torch.full((800,), -60.0), torch.full((800,), 50.0))
    assert -60 < far.mean < 50 and far.ess < 1e-20 and not far.trustworthy
    # A path that the target excludes counts as a weight of 0.
    hard = bennett(torch.tensor([0.0, -math.inf] * 500), torch.zeros(1000))
    assert hard.mean == pytest.approx(math.log(0.5), abs=1e-9)
    for a, b in (([0.0, math.nan], [0.0]), ([-math.inf], [0.0]), ([], [0.0])):
        with pytest.raises(ValueError, match="forward paths must hold a finite one"):
            bennett(torch.tensor(a), torch.tensor(b))
    for wrong in ([-math.inf, 0.0], [math.nan], []):
        with pytest.raises(ValueError, match="backward paths must be finite"):
            bennett(torch.zeros(3), torch.tensor(wrong))


def test_both_sides_of_the_effective_sample_size() -> None:
    """exp(-c^2), from paths of the model and of the target; the mode that the model misses is seen by one alone."""
    x = draws(1, 40_000, 5)[0]
    assert ess(C * x) == pytest.approx(math.exp(-(C**2)), rel=0.03)
    assert forward_ess(C * (C + x)) == pytest.approx(math.exp(-(C**2)), rel=0.03)
    w = [0.5, 2.0, 4.0]
    naive = 9 / (sum(w) * sum(1 / v for v in w))
    assert forward_ess(torch.tensor(w, dtype=torch.float64).log() + 1e4) == pytest.approx(naive, rel=1e-9)
    missed = torch.where(torch.arange(1000) < 300, 8.0, 0.0)  # 30 % of the target lies where the model never goes
    assert forward_ess(missed) < 0.01 and ess(torch.zeros(1000)) == 1


def test_the_upper_bound_from_weighted_forward_paths() -> None:
    x = draws(1, 20_000, 6)[0]
    estimate = expectation(C * x, C * x)
    assert abs(estimate.mean - C**2) < 4 * estimate.se
