"""The lean adjoint (2409.08861): the reward's gradient at the end, carried backwards through the base alone.

    a_K = -lam grad r(X_K),        a_k = J[m_base,k](X_k)^T a_{k+1}            one VJP of the base's mean a step

It is the gradient of -lam r through the chain with its innovations held: x_{k+1} = m_base,k(x_k) + (X_{k+1} -
m_base,k(X_k)).  Under the tilted process E[-a_k | X_k] = grad log h.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["lean_adjoint"]


def lean_adjoint(
    base_mean: Callable[[Tensor, int], Tensor], states: Tensor, terminal: Tensor, steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sweep the adjoint backwards through the base's means.

    Args:
        base_mean: `(x, k) -> m_base,k(x)`, differentiable in x.
        states: X_0 ... X_K, (K + 1, N, *shape).
        terminal: a_K, (N, *shape).
        steps: the supervised steps, increasing; the sweep stops at the first.

    Returns:
        a_{k+1} and m_base,k(X_k) for each supervised k, both (J, N, *shape).
    """
    adjoints, means = [], []
    a = terminal
    for k in reversed(range(steps[0], len(states) - 1)):
        x = states[k].detach().requires_grad_(k > steps[0])
        with torch.set_grad_enabled(k > steps[0]):
            mean = base_mean(x, k)
        if k in steps:
            adjoints.append(a)
            means.append(mean.detach())
        if k > steps[0]:
            # Linear in a: scaled to size one, small adjoints survive a half-precision network.
            size = a.abs().flatten(1).amax(1).clamp(min=torch.finfo(a.dtype).tiny).reshape(-1, *(1,) * (a.ndim - 1))
            (a,) = torch.autograd.grad(mean, x, a / size)
            a = a * size
    return torch.stack(adjoints[::-1]), torch.stack(means[::-1])
