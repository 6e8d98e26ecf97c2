"""Lennard-Jones clusters in space, held together by a harmonic well: LJ13 and LJ55.

    E(x) = sum_{i != j} v(d_ij) + 1/2 sum_i |x_i - mean x|^2,    v(d) = d^-12 - 2 d^-6,    d_ij = |x_i - x_j|

The sum is over ordered pairs: each pair counts twice, so that its well is 2 deep, at d = 1.  Codes that count a pair
once sample at twice this temperature.

v has no finite value at d = 0, and its gradient leaves float32 long before.  With q = d^2, v(q) = q^-6 - 2 q^-3 goes on
as its tangent in q below d = `core`:

    v(q) = v(q0) + v'(q0) (q - q0),    q < q0 = core^2,    v'(q) = -6 q^-7 + 6 q^-4

a cap on which the force falls to 0 as two particles meet, differentiable everywhere.  With core = .1 the density is the
same, number for number: below it exp(-E) is less than exp(-10^12), which is 0 in every float format, while gradients,
and their squares, stay finite in float32.
"""

from typing import Any, ClassVar

from torch import Tensor

from lightning_tilt.rewards.energies.particles import ParticleDensity, pair_squares, remove_mean

__all__ = ["LennardJones13", "LennardJones55", "lennard_jones_energy"]


def lennard_jones_energy(x: Tensor, core: float = 0.1) -> Tensor:
    """`sum_{i != j} v(d_ij) + 1/2 sum_i |x_i - mean x|^2` of particles (B, n, 3): (B,)."""
    q, q0 = pair_squares(x), core**2
    sixth = q.clamp(min=q0).reciprocal() ** 3  # d^-6
    slope = -6 * q0**-7 + 6 * q0**-4
    v = sixth.square() - 2 * sixth + slope * (q.clamp(max=q0) - q0)
    return 2 * v.sum(-1) + remove_mean(x).square().sum((-2, -1)) / 2


class _LennardJones(ParticleDensity):
    """What the clusters share."""

    sources: ClassVar[tuple[str, ...]] = ("akhoundsadegh2024iterated",)

    def __init__(self, core: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < core < 1:
            raise ValueError(f"core is a distance below that of the well's bottom, in (0, 1), not {core}")
        self.core = core

    def energy(self, x: Tensor) -> Tensor:
        """`E(x)` of (B, n, 3): (B,)."""
        return lennard_jones_energy(x, self.core)


class LennardJones13(_LennardJones):
    """LJ13, states (13, 3), on the mean-free subspace of dimension 36; log Z is not known.

    The constants are those of iDEM (arXiv 2402.06121) and its code, and of Adjoint Sampling: depth, length and
    stiffness 1, ordered pairs, temperature 1.

    The reference: 2,000 samples, ends of independent chains; mean energy -43.2 +- .2, standard deviation 7.0.

    Args:
        core: the distance below which the pair energy is capped. Values up to .5 or so change nothing that can be
            sampled; larger ones make the energy smoother, and another density of it.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if `core` is not in (0, 1).
    """

    particles = (13, 3)
    reference_file = "lennard_jones_13.safetensors"


class LennardJones55(_LennardJones):
    """LJ55, states (55, 3), on the mean-free subspace of dimension 162; log Z is not known. Constants as LJ13.

    The reference: 200 samples, ends of independent chains that started crowded and scattered; mean energy -324.5 +- .9,
    standard deviation 12.5. At this temperature the cluster is liquid: chains that start in the icosahedron, at -492,
    melt and come to the same mean from below.

    Args:
        core: the distance below which the pair energy is capped, as for LJ13.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if `core` is not in (0, 1).
    """

    particles = (55, 3)
    reference_file = "lennard_jones_55.safetensors"
