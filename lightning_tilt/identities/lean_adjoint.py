"""The lean adjoint (2409.08861): the reward's gradient at the end, carried backwards through the base alone.

    a_K = -lam grad r(X_K),        a_k = J[m_base,k](X_k)^T a_{k+1}            one VJP of the base's mean a step

It is the gradient of -lam r through the chain with its innovations held: x_{k+1} = m_base,k(x_k) + (X_{k+1} -
m_base,k(X_k)).  Under the tilted process E[-a_k | X_k] = grad log h.

**How long it can be.**  If -hess log p_base >= m I with m > 0, then Var(X_1 | X_t) <= beta^2/D I (Brascamp and Lieb
1976), D = alpha^2 + m beta^2, and the Jacobian of the ancestral mean is at most D_s/alpha_s alpha_t/D_t, so that

    |a_k| <= (alpha_k/D_k) (D_K/alpha_K) |a_K|         at any K; at t_K = 1:  alpha_t/(alpha_t^2 + m beta_t^2) |a_1|

with equality for a Gaussian base of precision m.  In general the factor is exp(int_t^1 mu), mu the largest eigenvalue
of the drift's symmetrised Jacobian.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_tilt.process import Process

__all__ = ["adjoint_bound", "lean_adjoint"]


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


def adjoint_bound(process: Process, t: Tensor, precision: float) -> Tensor:
    """`(alpha_k/D_k) (D_K/alpha_K)`: how many times longer than a_K the adjoint at each time can be.

    It holds for the memoryless steps `DDIM(ddim_eta=1.0)` and `ExactGaussian` of a base with `-hess log p_base >= m I`.

    Args:
        process: the interpolant.
        t: times t_0 ... t_K of a chain, (K + 1,).
        precision: m, positive.

    Returns:
        (K + 1,), 1 at the last; 0 at pure noise.

    Raises:
        ValueError: for an m that is not positive: then there is no such bound.
    """
    if precision <= 0:
        raise ValueError(f"the bound is for log-concave bases, of precision m > 0, not {precision}")
    slope = process.posterior_slope(t.double(), precision)
    return slope / slope[-1]
