"""Distances between samples and reference samples of the truth, beside the distance of the truth from itself.

Two finite sets of samples of one law are apart.  `noise_floor` measures how far, truth against truth, at the same N; a
distance says something where it is well above that.  The floor of W2 falls about as N^-1/d (exact, d > 2) or N^-1/2
(sliced), that of squared distances twice as fast.  Seen by
`benchmarks/wasserstein.py --floors`, with the standard deviation of a single value:

    N                                            500           1000          2000          3000
    tilt of `the_mixture`, lam = 1, sliced W2    .15 +- .06    .11 +- .04    .07 +- .02    .06 +- .02
    40 Gaussians in the plane (GMM40), W2                      4.5 +- .8     3.4 +- .6
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_tilt.identities import Estimate, mean

__all__ = ["DistanceToReference", "noise_floor"]


def noise_floor(
    distance: Callable[[Tensor, Tensor], Tensor], reference: Tensor, n: int, repeats: int = 10, seed: int = 0
) -> Estimate:
    """Truth against truth: mean and standard error of `distance` between two disjoint sets of n reference samples.

    A single value scatters by se sqrt(repeats).  The repeats share the M reference samples, so the standard error is
    too small unless M is several times 2n.

    Args:
        distance: of two sets (n, ...).
        reference: samples of the truth, (M, ...), M >= 2n.
        n: how many samples there are in a set: as many as the number beside the floor was computed from.
        repeats: how many pairs of sets are drawn.
        seed: of the draws.

    Raises:
        ValueError: if there are fewer than 2n reference samples, or no repeats.
    """
    if len(reference) < 2 * n or repeats < 1:
        raise ValueError(
            f"a noise floor at n = {n} takes 2n = {2 * n} reference samples and at least one repeat, "
            f"not {len(reference)} and {repeats}: draw more reference samples, or measure fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randperm(len(reference), generator=generator).to(reference.device) for _ in range(repeats))
    return mean(torch.stack([distance(reference[i[:n]], reference[i[n : 2 * n]]).cpu() for i in draws]))


class DistanceToReference(Metric):
    """What distances to a fixed set of reference samples share: `update` collects, `compute` says all that belongs.

    `compute` returns {name: value, "n", "n_reference"}, and with a floor also {name + "_floor", name + "_floor_se"}.
    With a floor the samples are compared with as many reference samples, drawn by the seed, as the floor is: value and
    floor are then of the same N.  Samples are gathered from all processes; the reference must be the same on each.

    Args:
        reference: samples of the truth, (M, ...), of equal weight; with a floor at least twice as many as samples.
        squared: return the squared distance; the name says so.
        floor: repeats of the noise floor; 0 leaves it out.
        seed: of the draws for the floor, and of anything else random.
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    stem = ""

    samples: list[Tensor] | Tensor
    log_w: list[Tensor] | Tensor
    reference: Tensor

    def __init__(
        self, reference: Tensor, *, squared: bool = False, floor: int = 0, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.register_buffer("reference", reference.detach(), persistent=False)
        self.squared, self.floor, self.seed = squared, floor, seed
        self.add_state("samples", [], dist_reduce_fx="cat")
        self.add_state("log_w", [], dist_reduce_fx="cat")

    @property
    def name(self) -> str:
        """What `compute` calls the value."""
        return ("squared_" if self.squared else "") + self.stem

    @abstractmethod
    def squared_distance(self, x: Tensor, y: Tensor, p: Tensor | None = None) -> Tensor:
        """Of samples x (n, ...) with weights p (n,) and reference samples y (m, ...)."""

    def update(self, samples: Tensor, log_w: Tensor | None = None) -> None:
        """Add samples (n, ...) and, if they are weighted, their log weights (n,); without, the weight is 1."""
        if samples.shape[1:] != self.reference.shape[1:]:
            raise ValueError(
                f"samples of shape {tuple(samples.shape[1:])} have no distance to reference samples of shape "
                f"{tuple(self.reference.shape[1:])}"
            )
        if log_w is not None and log_w.shape != samples.shape[:1]:
            raise ValueError(f"{len(samples)} samples take log weights ({len(samples)},), not {tuple(log_w.shape)}")
        assert isinstance(self.samples, list) and isinstance(self.log_w, list)
        self.samples.append(samples.detach())
        zero = torch.zeros(len(samples), device=samples.device)
        self.log_w.append((zero if log_w is None else log_w.detach()).double())

    def compute(self) -> dict[str, Tensor]:
        """The distance under its name, the numbers of samples, and the floor if there is one."""
        x, log_w, y = dim_zero_cat(self.samples), dim_zero_cat(self.log_w), self.reference
        p = None if bool((log_w == log_w[0]).all()) else log_w.softmax(0)
        n = len(x)
        result = {}
        if self.floor:
            floor = noise_floor(self._distance, y, n, self.floor, self.seed)
            result = {f"{self.name}_floor": floor.mean, f"{self.name}_floor_se": floor.se}
            generator = torch.Generator().manual_seed(self.seed)
            y = y[torch.randperm(len(y), generator=generator)[:n].to(y.device)]
        result = {self.name: float(self._distance(x, y, p)), "n": n, "n_reference": len(y), **result}
        return {key: torch.tensor(value, device=x.device) for key, value in result.items()}

    def _distance(self, x: Tensor, y: Tensor, p: Tensor | None = None) -> Tensor:
        value = self.squared_distance(x, y, p)
        return value if self.squared else value.sqrt()
