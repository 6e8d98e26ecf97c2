"""Four particles in the plane, every pair in a double well of its distance: DW4.

    E(x) = sum_{i<j} a (d_ij - d0)^4 + b (d_ij - d0)^2,    a = .9,  b = -4,  d0 = 4,    d_ij = |x_i - x_j|

Each pair counts once.  A pair is happiest at d0 +- sqrt(-b / 2 a) = 4 +- 1.4907, with energy b^2 / 4 a = 4.444 below
that at d0.  Six pairs of four points in the plane cannot all be happy: hence several shapes.
"""

from typing import ClassVar

from torch import Tensor

from lightning_tilt.rewards.energies.particles import ParticleDensity, pair_distances

__all__ = ["DoubleWell4", "double_well_energy"]


def double_well_energy(x: Tensor, a: float = 0.9, b: float = -4.0, d0: float = 4.0) -> Tensor:
    """`sum_{i<j} a (d_ij - d0)^4 + b (d_ij - d0)^2` of particles (B, n, d): (B,)."""
    square = (pair_distances(x) - d0).square()
    return (a * square.square() + b * square).sum(-1)


class DoubleWell4(ParticleDensity):
    """DW4, states (4, 2), on the mean-free subspace of dimension 6; log Z is not known exactly.

    The constants are those of Koehler, Klein, Noe, "Equivariant Flows" (arXiv 2006.02425), at temperature 1 and with
    their linear term 0, as iDEM (arXiv 2402.06121) and Adjoint Sampling use them. At coincident particles the energy is
    finite and the gradient is given as 0. log Z is 29.67 +- .01, by importance sampling from a Gaussian (4e7 samples).

    The reference: 4,000 samples, ends of independent chains (`make_references`); mean energy -22.5, standard deviation
    1.9.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> square = torch.tensor([[[0.0, 0.0], [0.0, 4.0], [4.0, 0.0], [4.0, 4.0]]])
        >>> DoubleWell4().energy(square)  # four sides at d0, two diagonals at 5.657
        tensor([-8.3966])
    """

    sources: ClassVar[tuple[str, ...]] = ("kohler2020equivariant", "akhoundsadegh2024iterated")
    particles = (4, 2)
    reference_file = "double_well_4.safetensors"

    def energy(self, x: Tensor) -> Tensor:
        """`E(x)` of (B, 4, 2): (B,)."""
        return double_well_energy(x)
