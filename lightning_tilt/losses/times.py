"""Times of the regressions at noised end points: how they are drawn, and how a time's error is weighed.

A regression of x1_hat has at time t the error e = x1_hat(x) - y. In the currencies of the field that is

    score      |alpha/beta^2 e|^2              the error of the score
    control    2 eta |alpha/beta^2 e|^2        the error of the control u = sigma grad log h: the KL between path laws
    uniform    |alpha/beta e|^2                the error of eps_hat, as base models are trained

Times are drawn on [t_min, t_max] from a density q and their terms divided by it, so that the mean stays the integral

    1/P sum_i  w(t_i) |e_i|^2 / q(t_i)   ->   int w(t) E|e|^2 dt/(t_max - t_min)

`uniform` has q = 1; `low_discrepancy` spreads the same q evenly over a batch (a Kronecker sequence of the golden ratio
from a random start); `importance` takes q ~ sqrt(E[(w |e|^2)^2]) in bins, from a running mean (2102.09672, 3.3).
"""

import math
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from lightning_tilt.process import Process

__all__ = ["TimeSampling", "TimeWeight", "Times", "time_weight"]

TimeWeight = Literal["control", "score", "uniform"]
"""In whose units a time's error is measured."""

TimeSampling = Literal["uniform", "importance", "low_discrepancy"]
"""How times are drawn."""

_BINS = 32
_GOLDEN = (math.sqrt(5) - 1) / 2
_KEPT = 0.99  # of the running mean
_EVEN = 0.1  # share of the even density in the importance density, so that no time is forgotten


def time_weight(process: Process, t: Tensor, kind: TimeWeight) -> Tensor:
    """What multiplies `|x1_hat - y|^2` at the times t (P,): (P,), float64."""
    t = t.double()
    gain = process.score_gain(t)
    if kind == "score":
        return gain**2
    if kind == "control":
        return 2 * process.eta(t) * gain**2
    return gain**2 * process.beta(t) ** 2


class Times(nn.Module):
    """Draws times on [t_min, t_max]; the importance density is its state.

    Args:
        sampling: `uniform`, `importance` or `low_discrepancy`.
        t_min: the noisiest time, > 0 where a target is infinite at pure noise.
        t_max: the cleanest time, < 1.

    Raises:
        ValueError: unless 0 <= t_min < t_max < 1, and for an unknown sampling.
    """

    moments: Tensor
    bins: int = _BINS

    def __init__(self, sampling: TimeSampling, t_min: float, t_max: float) -> None:
        super().__init__()
        if not 0 <= t_min < t_max < 1:
            raise ValueError(f"times need 0 <= t_min < t_max < 1, not t_min = {t_min}, t_max = {t_max}")
        if sampling not in get_args(TimeSampling):
            raise ValueError(f"time_sampling is one of {get_args(TimeSampling)}, not {sampling!r}")
        self.sampling, self.t_min, self.t_max = sampling, t_min, t_max
        self.register_buffer("moments", torch.zeros(_BINS, dtype=torch.float64))

    def forward(self, u: Tensor, start: float) -> tuple[Tensor, Tensor]:
        """Times and what divides their terms by the density.

        Args:
            u: independent uniform numbers, one a row of the batch, (P,), float64.
            start: one uniform number for the whole batch, where the low-discrepancy sequence starts.

        Returns:
            Times (P,), float64, and factors `1/q` (P,).
        """
        factor = torch.ones_like(u)
        if self.sampling == "low_discrepancy":
            u = (start + _GOLDEN * torch.arange(len(u), dtype=u.dtype)) % 1
        elif self.sampling == "importance" and bool((self.moments > 0).all()):
            q = self.density().to(u)
            edges = torch.cat([q.new_zeros(1), q.cumsum(0)])
            i = (torch.searchsorted(edges, u, right=True) - 1).clamp(0, _BINS - 1)
            u = ((i + (u - edges[i]) / q[i]) / _BINS).clamp(0, 1)
            factor = 1 / (_BINS * q[i])
        return self.t_min + (self.t_max - self.t_min) * u, factor

    def bin(self, t: Tensor) -> Tensor:
        """Which of the even bins of [t_min, t_max] each time is in, (P,), integer, on the CPU."""
        u = (t.double().cpu() - self.t_min) / (self.t_max - self.t_min)
        return (u * _BINS).long().clamp(0, _BINS - 1)

    def density(self) -> Tensor:
        """The importance density, a probability a bin, (bins,)."""
        root = self.moments.sqrt()
        return _EVEN / _BINS + (1 - _EVEN) * root / root.sum()

    @torch.no_grad()
    def update(self, t: Tensor, terms: Tensor) -> Tensor:
        """Squares of the terms a bin and their counts, (2, bins), for `learn` after a sum over the processes."""
        sums = torch.zeros(2, _BINS, dtype=torch.float64)
        squares = terms.detach().double().cpu() ** 2
        return sums.index_add(1, self.bin(t), torch.stack([squares, torch.ones_like(squares)]))

    @torch.no_grad()
    def learn(self, sums: Tensor) -> None:
        """Take squares and counts (2, bins) into the running means; a bin's first sight replaces its 0."""
        squares, counts = sums.to(self.moments)
        fresh = squares / counts.clamp(min=1)
        kept = torch.where(self.moments > 0, _KEPT * self.moments + (1 - _KEPT) * fresh, fresh)
        self.moments.copy_(torch.where((counts > 0) & squares.isfinite(), kept, self.moments))


def check_time_weight(kind: str) -> TimeWeight:
    """Refuse an unknown weight."""
    if kind not in get_args(TimeWeight):
        raise ValueError(f"time_weight is one of {get_args(TimeWeight)}, not {kind!r}")
    return cast(TimeWeight, kind)
