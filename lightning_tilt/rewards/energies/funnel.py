"""Neal's funnel: a scale that is itself random.

    x_0 ~ N(0, 3^2),    x_i | x_0 ~ N(0, exp(x_0)),  i = 1 .. 9

    E(x) = x_0^2 / 18 + 9/2 x_0 + exp(-x_0)/2 sum_i x_i^2 + log 3 + 5 log 2 pi

exp(x_0) is the variance of x_i, its standard deviation is exp(x_0/2); 3 is the standard deviation of x_0.  Neck at
x_0 < 0, mouth at x_0 > 0.  Beware of codes that have the mirrored funnel (exp(-x_0): mouth at x_0 < 0), of those whose
variance of x_0 is 3, and of those whose x_0 has standard deviation 1: their numbers do not compare.

Source: Neal, Slice sampling, Annals of Statistics 31 (2003), section 8, in ten dimensions.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_tilt.rewards.density import Density

__all__ = ["Funnel"]


class Funnel(Density):
    """The ten-dimensional funnel with standard deviation 3, states (10,), log Z = 0; samples are exact.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> Funnel().energy(torch.zeros(1, 10))  # log 3 + 5 log 2 pi
        tensor([10.2880])
    """

    sources: ClassVar[tuple[str, ...]] = ("neal2003slice",)
    log_z = 0.0
    state_shape = (10,)

    def energy(self, x: Tensor) -> Tensor:
        """`-log p(x)` of (B, 10): (B,)."""
        x_0, z = x[:, 0], x[:, 1:] * torch.exp(-x[:, :1] / 2)  # not exp(-x_0): it leaves float32 twice as early
        normaliser = math.log(3) + 5 * math.log(2 * math.pi)
        return x_0.square() / 18 + 9 * x_0 / 2 + z.square().sum(1) / 2 + normaliser

    def reference(self, n: int, seed: int = 0) -> Tensor:
        """`n` exact samples, (n, 10)."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 10, generator=generator, dtype=torch.float64)
        x[:, 0] *= 3
        x[:, 1:] *= torch.exp(x[:, :1] / 2)
        return x.float()
