"""Resampling: n particles of log weights become n of equal weight, each kept n p_i times on average.

With p_i = w_i / sum w, F_i = p_1 + ... + p_i, and points u_1 < ... < u_n in [0, 1), particle i is kept once for every
point in [F_{i-1}, F_i):

    systematic     u_j = (j - 1 + U)/n,     one U for all       counts are floor(n p_i) or ceil(n p_i)
    stratified     u_j = (j - 1 + U_j)/n,   one U_j each        counts differ from n p_i by less than 2

Both are unbiased, E[count_i] = n p_i (Kitagawa 1996; Douc, Cappe, Moulines 2005, who compare their variances).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Resampling", "resample"]

Resampling = Literal["systematic", "stratified"]
"""How the points lie: one uniform number for all, or one each."""


def resample(
    log_w: Tensor,
    kind: Resampling = "systematic",
    *,
    count: int | None = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices of the particles that are kept.

    Args:
        log_w: log weights, (n,); -inf is never kept.
        kind: how the points lie.
        count: how many are kept, m; None: as many as there are.
        uniforms: numbers in [0, 1), (m,); systematic resampling reads the first alone.  None draws them.
        generator: what draws them where none are given.

    Returns:
        Indices, not falling, (m,), integer.

    Raises:
        ValueError: for an unknown kind, too few uniforms, or weights that do not sum to a positive number.

    Example:
        >>> resample(torch.tensor([0.5, 0.25, 0.25, 1e-9]).log(), uniforms=torch.tensor([0.5])).tolist()
        [0, 0, 1, 2]
    """
    if kind not in get_args(Resampling):
        raise ValueError(f"unknown resampling {kind!r}; known are {', '.join(get_args(Resampling))}")
    n = log_w.numel()
    m = n if count is None else count
    wanted = m if kind == "stratified" else 1
    if uniforms is None:
        uniforms = torch.rand(wanted, dtype=torch.float64, generator=generator, device=log_w.device)
    if uniforms.numel() < wanted:
        raise ValueError(f"{kind} resampling to {m} particles needs {wanted} uniforms, not {uniforms.numel()}")
    p = torch.softmax(log_w.double(), 0)
    if n == 0 or bool(p.isnan().any()):
        raise ValueError("log weights to resample by must hold a finite one, and no NaN or +inf")
    points = (torch.arange(m, device=p.device) + uniforms.flatten()[:wanted].to(p)) / m
    total = p.cumsum(0)
    # Divided by its last, so that rounding leaves no point above the last particle of positive weight.
    return torch.searchsorted(total / total[-1], points.clamp(max=1 - 2**-53), right=True)
