"""Scalar field theory with a quartic self-interaction on a periodic square lattice: phi^4 in two dimensions.

    S(phi) = sum_s [ sum_mu (phi_{s + mu} - phi_s)^2 + m^2 phi_s^2 + g phi_s^4 ],    mu the two directions

m^2 (`mass_squared`) may be negative, g (`coupling`) is positive.  There is no 1/2 and no 1/4! in it: the action of
Albergo, Kanwar, Shanahan (arXiv 1904.12072), whose kinetic term as they write it, 4 phi_s^2 - sum_mu phi_s
(phi_{s + mu} + phi_{s - mu}), has the same sum over s.  Codes with S/2, or with g/4!, sample other couplings.  S is
even in phi: at a negative m^2 and below a critical g the field has two phases, of positive and of negative mean.

For g = 0 the modes of the lattice are independent Gaussians, and

    log Z = 1/2 sum_k log(pi / (m^2 + sum_mu 4 sin^2(k_mu / 2))),    k_mu = 2 pi j / L,  j = 0 .. L - 1
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.energies.mala import integrated_autocorrelation, mala, relaxed, tuned_step_size

__all__ = ["Phi4", "free_log_z", "phi4_action"]

_CHAINS = 128  # at least: the autocorrelation time of fewer is a guess
_STEPS = 1000


def phi4_action(phi: Tensor, mass_squared: float, coupling: float) -> Tensor:
    """`S(phi)` of fields (B, L, L): (B,)."""
    square = phi.square()
    kinetic = sum((phi.roll(-1, mu) - phi).square() for mu in (1, 2))
    return (kinetic + mass_squared * square + coupling * square.square()).sum((1, 2))


def free_log_z(side: int, mass_squared: float) -> float:
    """Log Z of the free field, g = 0, with m^2 > 0."""
    momentum = 4 * torch.sin(math.pi * torch.arange(side, dtype=torch.float64) / side).square()
    return float(torch.log(math.pi / (mass_squared + momentum[:, None] + momentum)).sum() / 2)


class Phi4(Density):
    """A phi^4 field, states (L, L); log Z is known for `coupling` 0 alone.

    The defaults, L = 8, m^2 = -4, g = 8, are those of the tutorial of Albergo et al. (arXiv 2101.08176), in the
    symmetric phase.

    Args:
        side: L.
        mass_squared: m^2.
        coupling: g >= 0.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if exp(-S) has no finite integral, or `side` is not positive.

    Example:
        >>> Phi4(side=2).energy(torch.ones(1, 2, 2))  # 4 (m^2 + g)
        tensor([16.])
    """

    sources: ClassVar[tuple[str, ...]] = ("albergo2019flow", "albergo2021introduction")

    def __init__(self, side: int = 8, mass_squared: float = -4.0, coupling: float = 8.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if side < 1:
            raise ValueError(f"side must be positive, not {side}")
        if coupling < 0 or (coupling == 0 and mass_squared <= 0):
            raise ValueError(
                f"exp(-S) has no finite integral with coupling {coupling} and mass_squared {mass_squared}: give a "
                "positive coupling, or coupling 0 and a positive mass_squared"
            )
        self.state_shape = (side, side)
        self.mass_squared = mass_squared
        self.coupling = coupling
        self.log_z = free_log_z(side, mass_squared) if coupling == 0 else None

    def energy(self, x: Tensor) -> Tensor:
        """`S(phi)` of fields (B, L, L): (B,)."""
        return phi4_action(x, self.mass_squared, self.coupling)

    def reference(self, n: int, seed: int = 0) -> Tensor | None:
        """`n` fields, (n, L, L), ends of independent MALA chains.

        1,000 fields of 8 x 8 take about ten seconds.

        None where the chains are too short for the field: fewer than ten autocorrelation times of the action, as in the
        phase of two signs or on large lattices near it.
        """
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(max(n, _CHAINS), *self.state_shape, generator=generator) / 2
        x = relaxed(self.energy, x, 20, 0.02, 1.0)  # of thousands of fields one starts where no proposal is accepted
        x, h = tuned_step_size(self.energy, x, 0.02, generator)
        run = mala(self.energy, x, _STEPS, h, generator)
        if 10 * integrated_autocorrelation(run.energies[_STEPS // 2 :]) > _STEPS:
            return None
        return run.x[:n]
