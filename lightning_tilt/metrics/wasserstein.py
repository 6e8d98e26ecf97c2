"""Wasserstein-2 distances between samples x_i of weight p_i and reference samples y_j of weight q_j.

    W2^2 = min_pi sum_ij pi_ij |x_i - y_j|^2,     pi >= 0,   sum_j pi_ij = p_i,   sum_i pi_ij = q_j

*Exact*: the linear program, by POT's network simplex on the (n, m) matrix of squared distances.

*In one dimension* the plan is monotone: W2^2 = int_0^1 |F_x^-1(u) - F_y^-1(u)|^2 du.  Both quantile functions are
steps, so the integral is a finite sum over the merged levels of their jumps, exact for any sizes and weights; for equal
sizes without weights it is the mean squared difference of the sorted values.

*Sliced*: SW2^2 = mean_l W2^2(x . theta_l, y . theta_l) over L directions, uniform on the sphere, fixed by a seed.  The
mean is that of the squares, the root comes last.  N(a, s^2 I) and N(b, r^2 I) in d dimensions have
SW2^2 = |a - b|^2/d + (s - r)^2, against W2^2 = |a - b|^2 + d (s - r)^2: exact and sliced values are not comparable.

A name without "squared" is a distance, in the units of x.  Everything is computed in float64.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_tilt.metrics.reference import DistanceToReference

__all__ = [
    "EnergyWasserstein",
    "Wasserstein2",
    "sliced_wasserstein2",
    "squared_sliced_wasserstein2",
    "squared_transport_cost",
    "squared_wasserstein2",
    "squared_wasserstein2_1d",
    "wasserstein2",
]


def squared_transport_cost(cost: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    """Least mean cost of a transport plan, for costs (n, m) that are squared distances.

    Args:
        cost: (n, m).
        p: weights of the rows (n,), not negative; they are normalised. None: all equal.
        q: weights of the columns (m,), likewise.

    Raises:
        RuntimeError: if the network simplex did not reach the optimum.
        ValueError: if weights do not fit the costs, or are negative, not finite or all zero.
    """
    import ot  # type: ignore[import-untyped]

    n, m = cost.shape
    p, q = _normalised(p, n), _normalised(q, m)
    numpy = [v.detach().double().cpu().numpy() for v in (p, q, cost)]
    value, log = ot.emd2(*numpy, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"POT found no optimal plan between {n} and {m} samples: {log['warning']}")
    return torch.tensor(float(value), dtype=torch.float64, device=cost.device).clamp(min=0)


def squared_wasserstein2(x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    """Exact W2^2 between x (n, ...) and y (m, ...), flattened, with weights p (n,) and q (m,); O(n m) memory.

    Example:
        >>> float(squared_wasserstein2(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]])))
        4.0
    """
    x, y = _rows(x, y)
    # Not by |x|^2 + |y|^2 - 2 x.y, which loses the small distances that matter most.
    return squared_transport_cost(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2, p, q)


def wasserstein2(x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    """Root of `squared_wasserstein2`."""
    return squared_wasserstein2(x, y, p, q).sqrt()


def squared_wasserstein2_1d(x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    """Exact W2^2 of numbers x (n, ...) and y (m, ...) along the first dimension: (...), one for each of the others.

    Example:
        >>> float(squared_wasserstein2_1d(torch.tensor([0.0, 2.0]), torch.tensor([1.0])))
        1.0
    """
    n, m = len(x), len(y)
    x, i = x.detach().double().sort(0)
    y, j = y.detach().double().sort(0)
    if n == m and p is None and q is None:
        return ((x - y) ** 2).mean(0)
    F_x, F_y = (
        weights.to(i.device)[order].cumsum(0).movedim(0, -1).contiguous()
        for weights, order in ((_normalised(p, n), i), (_normalised(q, m), j))
    )
    u = torch.cat([F_x, F_y], -1).clamp(max=1).sort(-1).values
    du = u.diff(dim=-1, prepend=torch.zeros_like(u[..., :1]))
    # On (u_k-1, u_k] both quantile functions are constant: F^-1(u_k) is the first value whose F reaches u_k.
    q_x = x.movedim(0, -1).gather(-1, torch.searchsorted(F_x, u).clamp(max=n - 1))
    q_y = y.movedim(0, -1).gather(-1, torch.searchsorted(F_y, u).clamp(max=m - 1))
    return (du * (q_x - q_y) ** 2).sum(-1)


def squared_sliced_wasserstein2(
    x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None, projections: int = 128, seed: int = 0
) -> Tensor:
    """SW2^2 between x (n, ...) and y (m, ...), flattened, with weights p (n,) and q (m,).

    The directions depend on dimension, `projections` and `seed` alone, so that values can be compared; with 128 of
    them in the plane, directions add an error of a few per cent.
    """
    x, y = _rows(x, y)
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64).to(x.device)
    theta = theta / theta.norm(dim=0)
    return squared_wasserstein2_1d(x @ theta, y @ theta, p, q).mean()


def sliced_wasserstein2(
    x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None, projections: int = 128, seed: int = 0
) -> Tensor:
    """Root of `squared_sliced_wasserstein2`."""
    return squared_sliced_wasserstein2(x, y, p, q, projections, seed).sqrt()


class Wasserstein2(DistanceToReference):
    """`wasserstein2` or, with `projections`, `sliced_wasserstein2` to reference samples (M, ...).

    Args:
        reference: samples of the truth, (M, ...).
        projections: how many directions of the sliced distance; 0 is the exact distance.
        **kwargs: `squared`, `floor`, `seed` of `DistanceToReference`.

    Example:
        >>> metric = Wasserstein2(torch.tensor([[3.0], [2.0]]), squared=True)
        >>> metric.update(torch.tensor([[0.0], [1.0]]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'squared_wasserstein2': 4.0, 'n': 2, 'n_reference': 2}
    """

    def __init__(self, reference: Tensor, *, projections: int = 0, **kwargs: Any) -> None:
        super().__init__(reference, **kwargs)
        self.projections = projections
        self.stem = "sliced_wasserstein2" if projections else "wasserstein2"

    def squared_distance(self, x: Tensor, y: Tensor, p: Tensor | None = None) -> Tensor:
        """Exact or sliced."""
        if self.projections:
            return squared_sliced_wasserstein2(x, y, p, None, self.projections, self.seed)
        return squared_wasserstein2(x, y, p)


class EnergyWasserstein(DistanceToReference):
    """W2 between the energies E(x) of samples (n,) and of reference samples (M,): numbers, so it is exact by sorting.

    Example:
        >>> metric = EnergyWasserstein(torch.tensor([1.0, 2.0]))
        >>> metric.update(torch.tensor([5.0, 4.0]))
        >>> metric.compute()["energy_wasserstein2"].item()
        3.0
    """

    stem = "energy_wasserstein2"

    def squared_distance(self, x: Tensor, y: Tensor, p: Tensor | None = None) -> Tensor:
        """In the units of the energy, squared."""
        return squared_wasserstein2_1d(x, y, p)


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Flattened rows of one length, in float64."""
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"samples of shapes {tuple(x.shape[1:])} and {tuple(y.shape[1:])} have no distance")
    return x.detach().flatten(1).double(), y.detach().flatten(1).double()


def _normalised(weights: Tensor | None, n: int) -> Tensor:
    """Weights (n,) that sum to one, in float64."""
    if weights is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    weights = weights.detach().double()
    total = float(weights.sum()) if weights.shape == (n,) else math.nan
    if not (bool((weights >= 0).all()) and 0 < total < math.inf):
        raise ValueError(
            f"weights of {n} samples must be {n} finite numbers >= 0, not all 0; softmax log weights first"
        )
    return weights / total
