"""Sixteen independent double wells in the plane, 2^16 modes of unequal weight: ManyWell32.

    exp(-E(x)) = prod_i f(x_2i) g(x_2i+1),    f(y) = exp(-y^4 + 6 y^2 + y/2),    g(y) = exp(-y^2/2)

Every second coordinate, the first included, is in a double well of its own; the others are standard Gaussians.

| of one f | |
| --- | --- |
| integral of f | 11784.509270 |
| P(y > 0) | .844307 |
| E y, E y^2 | 1.187961, 2.959806 |

and log Z = 16 log(11784.50927 sqrt(2 pi)) = 164.695675.  FAB (Midgley et al., arXiv 2208.01893), after Noe et al.
(Science 365, 2019); the numbers by quadrature.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_tilt.rewards.density import Density

__all__ = ["ManyWell32", "double_well"]

_REACH = 4.0  # f(+-4) is 1e-69 of f's integral
_POINTS = 100_001


def double_well(y: Tensor) -> Tensor:
    """`-log f(y) = y^4 - 6 y^2 - y/2`, elementwise."""
    square = y.square()
    return square.square() - 6 * square - y / 2


class ManyWell32(Density):
    """Sixteen double wells, states (32,), log Z = 164.695675; samples are exact.

    The samples of f come from its inverse distribution function on a grid of 100,001 points.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> x = torch.zeros(1, 32)
        >>> x[0, 0], x[0, 1] = 1.0, 2.0  # a double well at 1, a Gaussian at 2
        >>> ManyWell32().energy(x)
        tensor([-3.5000])
    """

    sources: ClassVar[tuple[str, ...]] = ("midgley2022flow",)
    log_z = 164.69567531318
    state_shape = (32,)

    def energy(self, x: Tensor) -> Tensor:
        """`E(x)` of (B, 32): (B,)."""
        return double_well(x[:, 0::2]).sum(1) + x[:, 1::2].square().sum(1) / 2

    def reference(self, n: int, seed: int = 0) -> Tensor:
        """`n` exact samples, (n, 32)."""
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(n, 16, generator=generator, dtype=torch.float64)
        x = torch.randn(n, 32, generator=generator, dtype=torch.float64)
        x[:, 0::2] = _double_well_quantile(u)
        return x.float()


def _double_well_quantile(u: Tensor) -> Tensor:
    """The `u` quantile of f, by linear interpolation of its distribution function."""
    y = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    f = torch.exp(-double_well(y))
    mass = torch.cat([f.new_zeros(1), ((f[1:] + f[:-1]) / 2).cumsum(0)])
    cdf = mass / mass[-1]
    k = torch.searchsorted(cdf, u, right=True).clamp(1, _POINTS - 1)
    part = (u - cdf[k - 1]) / (cdf[k] - cdf[k - 1]).clamp(min=1e-300)
    return y[k - 1] + part.clamp(0, 1) * (y[k] - y[k - 1])
