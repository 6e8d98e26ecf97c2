"""Forty equal Gaussians scattered over a square of the plane: GMM40.

    E(x) = -log 1/40 sum_k N(x; m_k, s^2 I),    m_k uniform in [-40, 40]^2,    s = softplus(1) = 1.3132617

Three variants are about, and their numbers do not compare.  This is the one of FAB (Midgley et al., arXiv 2208.01893,
and its code): the means are the first 80 numbers of torch's CPU generator at seed 0, shaped (40, 2), the standard
deviation is softplus(1), the weights are equal.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_tilt.rewards.density import Density

__all__ = ["GMM40", "mode_counts"]


def mode_counts(x: Tensor, means: Tensor, std: float, radius: float = 3.0) -> Tensor:
    """How many samples (N, 2) lie within `radius * std` of each mean (K, 2), and nearer to it than to any other: (K,).

    The disc of radius 3 holds .989 of a Gaussian in the plane.
    """
    distance, nearest = torch.cdist(x.to(means), means).min(1)
    return nearest[distance <= radius * std].bincount(minlength=len(means))


class GMM40(Density):
    """Forty Gaussians in the plane, states (2,), log Z = 0; samples are exact.

    Attributes:
        means: (40, 2), float64 copies of float32 numbers.
        std: of each Gaussian.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> density = GMM40()
        >>> density.means[0]
        tensor([-0.2995, 21.4577], dtype=torch.float64)
        >>> density.modes_found(density.reference(1000))
        40
    """

    sources: ClassVar[tuple[str, ...]] = ("midgley2022flow",)
    log_z = 0.0
    state_shape = (2,)
    means: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        means = (torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32) - 0.5) * 80
        self.register_buffer("means", means.double(), persistent=False)
        self.std = float(softplus(torch.ones((), dtype=torch.float64)))

    def energy(self, x: Tensor) -> Tensor:
        """`-log p(x)` of (B, 2): (B,)."""
        m, s = self.means.to(x), self.std
        square = (x[:, None] - m).square().sum(-1)
        return math.log(len(m) * 2 * math.pi * s**2) - torch.logsumexp(-square / (2 * s**2), 1)

    def reference(self, n: int, seed: int = 0) -> Tensor:
        """`n` exact samples, (n, 2)."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (self.means.cpu()[k] + self.std * noise).float()

    def figures(self, x: Tensor) -> dict[str, float]:
        """`modes_found`: how many of the forty modes have a sample within three standard deviations."""
        return {"modes_found": self.modes_found(x)}

    def modes_found(self, x: Tensor, radius: float = 3.0) -> int:
        """How many of the 40 modes have a sample of `x` (N, 2) within `radius` standard deviations."""
        return int((mode_counts(x, self.means, self.std, radius) > 0).sum())
