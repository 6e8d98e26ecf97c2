"""W2 between sets of particle systems, up to what their energy does not see: permutations, shifts, rotations, mirrors.

A system is x = (x_1, ..., x_N), N equal particles in d dimensions.  Its centre of mass is taken off; then

    c(x, y) = min_{s, R} sum_a |x_a - R y_s(a)|^2 = |x|^2 + |y|^2 - 2 max_{s, R} tr(R H),    H = sum_a y_s(a) x_a^T

    given s:  max_R tr(R H) = sum of the singular values of H = U S V^T, at R = V U^T (Kabsch 1976); without mirrors the
              smallest counts with the sign of det H
    given R:  s by linear assignment (Hungarian), maximising sum_a x_a . R y_s(a)

and W2^2 = min_pi sum_ij pi_ij c(x_i, y_j).  As a metric on orbits c is symmetric and 0 for equivalent systems.  Not
divided by N: the convention of bgflow, DEM and Adjoint Sampling.

How the joint minimum is searched:

    exact       all N! permutations, each with its best R: the minimum itself.  In the plane by complex numbers, without
                any factorisation: tr(R H) is at most |sum conj(x) y| over rotations and |sum x y| over mirrors
    published   one assignment in the given orientation, then one R: what public code does.  An upper bound of c
    alternate   from there on in turns, until the assignment stays: never more than `published`, still an upper bound
    thorough    alternate, from the given orientation and from the 2^d ones that lay principal axes on each other; the
                best of them.  Finds rotated copies, unless principal moments coincide

An upper bound on every c makes an upper bound of W2.  A value belongs to its search: only equal ones are comparable.

One core, a million pairs: .3 s for 4 particles in the plane (exact), about a minute for 4 in space (exact), one and a
half for 13 in space (alternate), ten for these by `thorough` (`benchmarks/wasserstein.py`).
"""

import itertools
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_tilt.metrics.reference import DistanceToReference
from lightning_tilt.metrics.wasserstein import squared_transport_cost

__all__ = ["Search", "SymmetricWasserstein2", "squared_symmetric_distances", "squared_symmetric_wasserstein2"]

Search = Literal["auto", "exact", "published", "alternate", "thorough"]
"""How the best relabelling and rotation of two systems is looked for."""

MOST_ENUMERATED = 5
ROUNDS = 30
PAIRS_AT_ONCE = 1 << 16


def squared_symmetric_distances(x: Tensor, y: Tensor, search: Search = "auto", mirrors: bool = True) -> Tensor:
    """c(x_i, y_j) of all pairs of systems x (n, N, d) and y (m, N, d): (n, m), float64.

    Args:
        x: positions.
        y: positions.
        search: see the module; "auto" is "exact" for up to 5 particles, else "alternate".
        mirrors: whether mirror images are the same system.

    Raises:
        ValueError: if the shapes disagree, the search is unknown, or there are too many particles to enumerate.
    """
    if x.ndim != 3 or y.ndim != 3 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"systems must be (n, N, d) and (m, N, d), not {tuple(x.shape)} and {tuple(y.shape)}")
    if search not in get_args(Search):
        raise ValueError(f"search must be one of {', '.join(get_args(Search))}, not {search!r}")
    N, d = x.shape[1:]
    if search == "auto":
        search = "exact" if N <= MOST_ENUMERATED else "alternate"
    if search == "exact" and N > MOST_ENUMERATED + 2:
        raise ValueError(f"{N}! permutations are too many to enumerate; take search='thorough'")
    x, y = (v.detach().double() - v.detach().double().mean(1, keepdim=True) for v in (x, y))
    rows = max(1, PAIRS_AT_ONCE // max(1, len(y)))
    if search != "exact":
        overlap = [_searched(part, y, search, mirrors) for part in x.split(rows)]
    elif d == 2:
        overlap = [_enumerated_plane(part, y, mirrors) for part in x.split(rows)]
    else:
        overlap = [_enumerated(part, y, mirrors) for part in x.split(rows)]
    x2, y2 = (v.square().sum((1, 2)) for v in (x, y))
    return (x2[:, None] + y2 - 2 * torch.cat(overlap)).clamp(min=0)


def squared_symmetric_wasserstein2(
    x: Tensor,
    y: Tensor,
    p: Tensor | None = None,
    q: Tensor | None = None,
    search: Search = "auto",
    mirrors: bool = True,
) -> Tensor:
    """W2^2 between systems x (n, N, d) and y (m, N, d), with weights p (n,) and q (m,), under c(x, y).

    Example:
        >>> x = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
        >>> y = torch.tensor([[[5.0, 3.0], [5.0, -1.0]]])  # shifted, turned, and twice as long
        >>> round(float(squared_symmetric_wasserstein2(x, y)), 6)
        2.0
    """
    return squared_transport_cost(squared_symmetric_distances(x, y, search, mirrors), p, q)


class SymmetricWasserstein2(DistanceToReference):
    """W2 to reference systems (M, N, d) under c(x, y), as "symmetric_wasserstein2" (or "squared_...").

    Args:
        reference: systems of the truth, (M, N, d).
        search: of `squared_symmetric_distances`.
        mirrors: likewise.
        **kwargs: `squared`, `floor`, `seed` of `DistanceToReference`.
    """

    stem = "symmetric_wasserstein2"

    def __init__(self, reference: Tensor, *, search: Search = "auto", mirrors: bool = True, **kwargs: Any) -> None:
        super().__init__(reference, **kwargs)
        self.search, self.mirrors = search, mirrors

    def squared_distance(self, x: Tensor, y: Tensor, p: Tensor | None = None) -> Tensor:
        """In the units of the positions, squared."""
        return squared_symmetric_wasserstein2(x, y, p, None, self.search, self.mirrors)


def _enumerated_plane(x: Tensor, y: Tensor, mirrors: bool) -> Tensor:
    """Largest overlap max tr(R H) of all pairs (n, m) of systems in the plane, over all permutations."""
    n, m = len(x), len(y)
    best = x.new_zeros(n, m)
    # Real parts and imaginary parts of sum conj(x) y and of sum x y, as products of matrices.
    left = torch.cat([x[..., 0], x[..., 1]], 1)
    for s in itertools.permutations(range(x.shape[1])):
        y0, y1 = y[:, s, 0], y[:, s, 1]
        sums = [(torch.cat([y0, y1], 1), torch.cat([y1, -y0], 1))]
        sums += [(torch.cat([y0, -y1], 1), torch.cat([y1, y0], 1))] if mirrors else []
        for real, imaginary in sums:
            square = (left @ real.T).square_().add_((left @ imaginary.T).square_())
            torch.maximum(best, square, out=best)
    return best.sqrt_()


def _enumerated(x: Tensor, y: Tensor, mirrors: bool) -> Tensor:
    """Largest overlap of all pairs (n, m) of systems in any dimension, over all permutations."""
    best = x.new_full((len(x), len(y)), -torch.inf)
    for s in itertools.permutations(range(x.shape[1])):
        best = torch.maximum(best, _overlap(torch.einsum("jae,iad->ijed", y[:, s], x), mirrors))
    return best


def _searched(x: Tensor, y: Tensor, search: Search, mirrors: bool) -> Tensor:
    """Overlap of all pairs (n, m) of systems: a lower bound of the largest, by assignments and rotations in turns."""
    n, m, d = len(x), len(y), x.shape[-1]
    x_axes, y_axes = (torch.linalg.eigh(v.mT @ v).eigenvectors for v in (x, y))
    i, j = torch.cartesian_prod(torch.arange(n), torch.arange(m)).to(x.device).unbind(1)
    x, y = x[i], y[j]
    starts = [torch.eye(d).to(x).expand(n * m, d, d)]
    if search == "thorough":
        for signs in itertools.product((1.0, -1.0), repeat=d):
            starts.append((x_axes[i] * x.new_tensor(signs)) @ y_axes[j].mT)
    rounds = 1 if search == "published" else ROUNDS
    return torch.stack([_in_turns(x, y, R, rounds, mirrors) for R in starts]).amax(0).reshape(n, m)


def _in_turns(x: Tensor, y: Tensor, R: Tensor, rounds: int, mirrors: bool) -> Tensor:
    """Overlap (B,) of systems x and y (B, N, d) after assignment and rotation in turns, from rotations R (B, d, d)."""
    overlap = x.new_zeros(len(x))
    going = torch.arange(len(x), device=x.device)
    before = going.new_full(x.shape[:2], -1)
    for _ in range(rounds):
        s = _assigned(x[going] @ (y[going] @ R.mT).mT)
        # Where the assignment stays, so does all that follows: these pairs are done.
        moved = (s != before).any(1)
        going, before = going[moved], s[moved]
        if len(going) == 0:
            break
        H = y[going].gather(1, before[..., None].expand_as(y[going])).mT @ x[going]
        overlap[going] = _overlap(H, mirrors)
        R = _rotation(H, mirrors)
    return overlap


def _assigned(gain: Tensor) -> Tensor:
    """For gains (B, N, N) the columns (B, N) that the rows get in the best assignment, exactly."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    if len(gain) == 0:
        return torch.empty(gain.shape[:2], dtype=torch.long, device=gain.device)
    columns = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in gain.cpu().numpy()]
    return torch.from_numpy(np.stack(columns)).to(gain.device)


def _overlap(H: Tensor, mirrors: bool) -> Tensor:
    """max_R tr(R H) for H (..., d, d): (...)."""
    S: Tensor = torch.linalg.svdvals(H)
    if mirrors:
        return S.sum(-1)
    return S[..., :-1].sum(-1) + S[..., -1] * torch.where(torch.linalg.det(H) < 0, -1.0, 1.0)


def _rotation(H: Tensor, mirrors: bool) -> Tensor:
    """The R (B, d, d) of max_R tr(R H)."""
    U, _, Vh = torch.linalg.svd(H)
    if not mirrors:
        sign = torch.where(torch.linalg.det(U @ Vh) < 0, -1.0, 1.0).to(H)
        U = torch.cat([U[..., :-1], U[..., -1:] * sign[:, None, None]], -1)
    R: Tensor = (U @ Vh).mT
    return R
