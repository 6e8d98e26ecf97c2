"""What a loss may do to path weights before it uses them: less variance for some bias.

With v_i = w_i / mean w, the self-normalised weights of n paths,

    none               1                       no variance; the model's own law in place of the tilted one
    self_normalised    v                       E[v f] = E*[f] + O(1/n); the variance is 1/ESS - 1
    clipped            min(v, c)               biased towards the model for every n, the more the smaller c
    truncated          min(v, sqrt(n))         the bias vanishes as n grows, the variance of E*[f] is bounded by the
                                               truncation (Ionides 2008, "Truncated importance sampling")

and the result is divided by its mean again, so that a loss has the same size under every treatment; a clipped weight
may then be a little above its c.  Each group (a prompt) has its own Z, so means and n are those of the group.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Treatment", "treat_weights"]

Treatment = Literal["none", "self_normalised", "clipped", "truncated"]
"""What becomes of path weights."""


def treat_weights(log_w: Tensor, kind: Treatment, *, group: Tensor | None = None, clip: float = 10.0) -> Tensor:
    """Path weights as a loss uses them, of mean 1 in every group.

    Args:
        log_w: log path weights, (n,); -inf is a weight of 0.
        kind: the treatment; its bias is said above.
        group: which prompt a path belongs to, (n,), integer; None: one group.
        clip: c of "clipped", in units of the group's mean weight, at least 1; the others ignore it.

    Returns:
        (n,), in the dtype of `log_w`.

    Raises:
        ValueError: for an unknown kind, a `clip` below 1, or a group whose weights are all 0, or have NaN or +inf.

    Example:
        >>> weights = treat_weights(torch.tensor([8.0, 1.0, 1.0, 1e-9]).log(), "clipped", clip=1.6)
        >>> [round(w, 2) for w in weights.tolist()]
        [2.67, 0.67, 0.67, 0.0]
    """
    if kind not in get_args(Treatment):
        raise ValueError(f"unknown treatment of weights {kind!r}; known are {', '.join(get_args(Treatment))}")
    if clip < 1:
        raise ValueError(f"clip must be at least 1, the mean weight, not {clip}")
    if kind == "none":
        return torch.ones_like(log_w)
    values = log_w.double()
    if group is None:
        group = torch.zeros_like(values, dtype=torch.long)
    labels, group = torch.unique(group.to(values.device), return_inverse=True)
    largest = values.new_full((len(labels),), -math.inf).scatter_reduce(0, group, values, "amax")
    if not bool(torch.isfinite(largest).all()) or bool(values.isnan().any()):
        raise ValueError("every group of log weights needs a finite one, and none may be NaN or +inf")
    n = torch.bincount(group).double()[group]
    v = _mean_one(torch.exp(values - largest[group]), group, n)
    if kind == "clipped":
        v = _mean_one(v.clamp(max=clip), group, n)
    elif kind == "truncated":
        v = _mean_one(torch.minimum(v, n.sqrt()), group, n)
    return v.to(log_w.dtype)


def _mean_one(v: Tensor, group: Tensor, n: Tensor) -> Tensor:
    """`v` over its group's mean."""
    total = v.new_zeros(int(group.max()) + 1 if len(group) else 0).index_add(0, group, v)
    return v * n / total[group]
