"""The tilted Gaussian mixture as an unnormalised density, for samplers that start from a Gaussian.

    exp(-E(x)) = p_mix(x) exp(lam r(x)),      r(x) = -(x - c)' A (x - c)/2

Everything is known of it: log Z = log E_mix[exp(lam r)], and exact samples (`GaussianMixture.tilt`).  With the figures
of `the_mixture` and lam = 1, log Z = -1.3756.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tilt.frozen import Frozen
from lightning_tilt.models.closed_form import GaussianMixturePredictor
from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.quadratic import QuadraticReward

__all__ = ["TiltedMixture"]


class TiltedMixture(Density):
    """`E(x) = -log p_mix(x) - lam r(x)`.

    Args:
        weights: of the mixture's components, (M,).
        means: (M, d).
        covariances: (M, d, d).
        A: of the quadratic reward, (d, d), symmetric.
        c: where the reward is largest, (d,).
        lam: multiplier of the reward within the energy; that of the loss stays 1.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if a shape is wrong, or exp(-E) has no finite integral.

    Example:
        >>> density = TiltedMixture([1.0], [[0.0]], [[[1.0]]], A=[[1.0]], c=[0.0])
        >>> round(density.log_z, 4), density.energy(torch.zeros(1, 1))  # log(2)/2 and log(2 pi)/2
        (-0.3466, tensor([0.9189]))
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        covariances: Sequence[Sequence[Sequence[float]]] | Tensor,
        A: Sequence[Sequence[float]] | Tensor,
        c: Sequence[float] | Tensor,
        lam: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.lam = lam
        self._reward = Frozen(QuadraticReward(A, c))
        self._law = Frozen(GaussianMixturePredictor(weights, means, covariances))
        self.tilted, log_z = self._law.module.mixture.tilt(self._reward.module, lam)
        self.log_z = float(log_z)

    def energy(self, x: Tensor) -> Tensor:
        """`-log p_mix(x) - lam r(x)` of states (B, d): (B,)."""
        return -self._law.module.log_prob(x) - self.lam * self._reward.module.score(x, None)

    def reference(self, n: int, seed: int = 0) -> Tensor:
        """Exact samples, (n, d), float32."""
        return self.tilted.sample(n, torch.Generator().manual_seed(seed)).float()
