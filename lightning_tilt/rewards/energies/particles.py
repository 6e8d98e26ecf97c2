"""Particles: n points in d dimensions, (B, n, d), whose energy knows their distances alone.

    E(x) = E(sigma(x) R + c)   for relabellings sigma, rotations and reflections R, translations c

A translation leaves exp(-E) as it is, so it has a finite integral only over the mean-free subspace sum_i x_i = 0, of
dimension (n - 1) d.  Samples, noise and normalisers belong to that subspace.
"""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_tilt.rewards.density import Density

__all__ = ["ParticleDensity", "pair_distances", "pair_squares", "relabelled", "remove_mean"]


def remove_mean(x: Tensor) -> Tensor:
    """Project (B, n, d) onto the mean-free subspace."""
    return x - x.mean(-2, keepdim=True)


def pair_squares(x: Tensor) -> Tensor:
    """`|x_i - x_j|^2` for i < j: (B, n, d) -> (B, n (n - 1)/2)."""
    i, j = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    particles = x.permute(1, 2, 0).contiguous()  # whole rows are gathered: three times as fast for 55 particles
    return (particles.index_select(0, i) - particles.index_select(0, j)).square().sum(1).mT


def pair_distances(x: Tensor) -> Tensor:
    """`|x_i - x_j|` for i < j: (B, n, d) -> (B, n (n - 1)/2).

    Where two particles coincide the distance has no gradient; it is given as 0, in first and higher derivatives.
    """
    square = pair_squares(x)
    apart = square > 0
    one, zero = torch.ones_like(square), torch.zeros_like(square)
    return torch.where(apart, torch.where(apart, square, one).sqrt(), zero)


def relabelled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each state (B, n, d) turned, or reflected, and relabelled at random: as probable as before."""
    n, d = x.shape[-2:]
    labels = torch.rand(len(x), n, generator=generator).argsort(1)
    q, r = torch.linalg.qr(torch.randn(len(x), d, d, generator=generator))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]  # uniform over the orthogonal group
    y: Tensor = x.gather(1, labels[..., None].expand_as(x)) @ q
    return y


class ParticleDensity(Density):
    """A density of particles whose reference samples are kept in a file beside this module.

    The files come from `python -m lightning_tilt.rewards.energies.make_references`, which prints the diagnostics of the
    chains.
    """

    particles: tuple[int, int]
    reference_file: str

    @property
    def state_shape(self) -> tuple[int, int]:
        """(n, d)."""
        return self.particles

    def reference(self, n: int, seed: int = 0) -> Tensor:
        """`n` of the kept samples, (n, *state_shape), mean-free, turned and relabelled at random.

        They are drawn without repetition while they last; of a larger `n` the rest are kept samples again, turned and
        relabelled anew, whose energies tell nothing new.
        """
        generator = torch.Generator().manual_seed(seed)
        kept = _read(Path(__file__).parent / self.reference_file)
        rounds = [torch.randperm(len(kept), generator=generator) for _ in range(-(-n // len(kept)))]
        chosen = torch.cat(rounds)[:n] if rounds else torch.empty(0, dtype=torch.long)
        return remove_mean(relabelled(kept[chosen], generator))


@cache
def _read(path: Path) -> Tensor:
    """The kept samples, (N, n, d), float32."""
    return load_file(path)["x"].float()
