"""Particles: each pair counted as often as it should be, symmetries, particles that meet, a known minimum."""

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from lightning_tilt.rewards.energies import DoubleWell4, LennardJones13, LennardJones55
from lightning_tilt.rewards.energies.lennard_jones import lennard_jones_energy
from lightning_tilt.rewards.energies.particles import ParticleDensity, pair_distances, relabelled, remove_mean

PARTICLES = [DoubleWell4, LennardJones13, LennardJones55]


def states(kind: type[ParticleDensity], dtype: torch.dtype) -> Tensor:
    """Three states, about as wide as the density's own."""
    return (2 * torch.randn(3, *kind().particles, dtype=torch.float64)).to(dtype)


def loop(x: Tensor, ordered: bool, pair: Callable[[float], float]) -> float:
    points = x.tolist()
    pairs = permutations(points, 2) if ordered else ((a, b) for i, a in enumerate(points) for b in points[i + 1 :])
    return sum(pair(math.dist(a, b)) for a, b in pairs)


def test_double_well_counts_every_pair_once() -> None:
    x = 3 * torch.randn(3, 4, 2, dtype=torch.float64)
    naive = [loop(row, False, lambda d: 0.9 * (d - 4) ** 4 - 4 * (d - 4) ** 2) for row in x]
    torch.testing.assert_close(DoubleWell4().energy(x), torch.tensor(naive, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "n"), [(LennardJones13, 13), (LennardJones55, 55)])
def test_lennard_jones_counts_every_pair_twice(kind: type[ParticleDensity], n: int) -> None:
    x = 2 * torch.randn(2, n, 3, dtype=torch.float64) + 1
    naive = [loop(row, True, lambda d: d**-12 - 2 * d**-6) for row in x]
    for i, row in enumerate(x):
        mean = row.mean(0)
        naive[i] += sum(float((point - mean) @ (point - mean)) for point in row) / 2
    torch.testing.assert_close(kind().energy(x), torch.tensor(naive, dtype=torch.float64))


@pytest.mark.parametrize("kind", PARTICLES)
def test_labels_turns_reflections_and_translations_do_not_matter(kind: type[ParticleDensity]) -> None:
    density = kind()
    n, d = density.particles
    x = states(kind, torch.float64)
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    flip = turn * torch.tensor([-1.0] + [1.0] * (d - 1), dtype=torch.float64)
    moved = [x[:, torch.randperm(n)], x @ turn, x @ flip, x + torch.randn(1, 1, d, dtype=torch.float64)]
    for y in moved:
        assert not torch.allclose(y, x)
        torch.testing.assert_close(density.energy(y), density.energy(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", PARTICLES)
def test_particles_may_meet(kind: type[ParticleDensity], dtype: torch.dtype) -> None:
    """All in one point, two in one point, two very close: energies, gradients and their squares are finite."""
    x = states(kind, dtype)
    x[0] = 0
    x[1, 1] = x[1, 0]
    x[2, 1] = x[2, 0] + 1e-7
    x = x.requires_grad_()
    energy = kind().energy(x)
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    assert energy.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.square().sum().isfinite()


def test_the_core_changes_nothing_outside_and_joins_smoothly() -> None:
    def pair(d: float, core: float) -> tuple[float, float]:
        """Energy and slope of thirteen particles, two of them d apart and the rest out of reach."""
        x = torch.zeros(1, 13, 3, dtype=torch.float64)
        x[0, :, 0] = 100.0 * torch.arange(13)
        x[0, 1, 0] = d
        x.requires_grad_()
        energy = LennardJones13(core=core).energy(x)
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        return float(energy.detach()), float(gradient[0, 1, 0])

    for d in (0.5, 0.81, 1.0, 1.3):
        assert pair(d, 0.1) == pytest.approx(pair(d, 0.8 if d > 0.8 else 0.4), rel=1e-12)
    inside, outside = pair(0.8 - 1e-9, 0.8), pair(0.8 + 1e-9, 0.8)
    assert inside == pytest.approx(outside, rel=1e-6)
    assert pair(0.3, 0.8)[0] < pair(0.3, 0.1)[0]
    for core in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"core is a distance .* in \(0, 1\)"):
            LennardJones13(core=core)


def test_the_icosahedron_has_the_energy_of_the_literature() -> None:
    """-44.326801, each pair once: the best cluster of thirteen (Hoare and Pal 1971)."""
    golden = (1 + 5**0.5) / 2
    corners = [[0.0, a, b] for a in (1, -1) for b in (golden, -golden)]
    x = torch.tensor([[0.0, 0.0, 0.0]] + [c[k:] + c[:k] for c in corners for k in range(3)], dtype=torch.float64)
    d = pair_distances(x[None])
    x = x * float(((d**-12).sum() / (d**-6).sum()) ** (1 / 6))  # of all sizes the one of lowest energy
    pairs = lennard_jones_energy(x[None]) - x.square().sum() / 2
    assert float(pairs) == pytest.approx(2 * -44.326801, abs=2e-6)


def test_relabelled_keeps_distances_and_forgets_everything_else() -> None:
    x = remove_mean(torch.randn(1, 5, 3)).expand(4000, 5, 3)
    y = relabelled(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(pair_distances(y).sort().values, pair_distances(x).sort().values)
    size = (x[0].square().sum() / 15) ** 0.5
    assert y.mean(0).abs().max() < 4.5 * size * 1.5 / 4000**0.5
    order = y.norm(dim=2).argsort(1)  # the labels are gone, the lengths are not
    assert (order[:, 0].bincount(minlength=5) - 800).abs().max() < 4.5 * 800**0.5
    by_size = y.gather(1, order[..., None].expand_as(y))
    handed = torch.linalg.det(by_size[:, :3]).sign()
    assert abs(float(handed.mean())) < 4 / 4000**0.5  # as many reflections as turns
