"""A path of tilted marginals from the base's noise to the tilt, and the two identities along it: Jarzynski and Crooks.

    pi_t ~ p_t exp(r_t),    r_0 = 0,   r_1 = lam r        for instance r_t(x) = t lam r(x), or t lam r(x1_hat(x, t))

p_t, v, s are the marginal, velocity and score of the base, w a transport that is added to the velocity (the base has
w = 0, r = 0), sigma any bounded noise, t from noise (0) to data (1), step h from t_k to t_{k+1}:

    forward    dX = (v + w + sigma^2/2 (s + grad r_t)) dt + sigma dB              (P, from p_0)
    backward   the reversal with drift v + w - sigma^2/2 (s + grad r_t)           (Q, from p*)

    F(x_{k+1} | x_k) = N(x_k     + h forward(x_k, t_k),          sigma_k^2 h),         F0 the base's
    B(x_k | x_{k+1}) = N(x_{k+1} - h backward(x_{k+1}, t_{k+1}), sigma_{k+1}^2 h),     B0 the base's

*Crooks*  (as in CMCD, 2307.01050; for a tilt no density of the base appears)

    log Z dQ/dP = r_1(X_K) - sum_k ( log F/F0 - log B/B0 )

E_P[exp] = Z and E_Q[1/exp] = 1/Z up to a bias of first order in h: B0 is the base's reversal to first order only.  With
B = B0 and the memoryless noise it is the control form, which has no bias.

*Jarzynski*  (as in NETS, 2410.02711)    dA = [ d_t r_t + (v + w).grad r_t + div w + w.s ] dt,    E[exp A_1] = Z,
E[exp(A_1) f(X_1)] = Z E_p*[f].  Discrete, without d_t, so that integer timesteps and x1_hat will do:

    A_{k+1} - A_k = r_{k+1}(x + h (v + w)) - r_k(x) + h (div w + w.s)

v, w, div w, s at the left point (x, t_k): first order in h.  At the midpoint of the transport, x + h/2 (v + w)(x, t_k)
and t_k + h/2: second order, if w is exact (then A_K = log Z on every path in the limit); with any other w the law of X
itself is right to first order only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_tilt.transition import Gaussian

__all__ = [
    "backward_drift",
    "crooks_step",
    "divergence",
    "forward_drift",
    "jarzynski_step",
    "kernel_log_ratio",
    "midpoint",
    "rademacher",
    "value_and_divergence",
]


def forward_drift(
    v: Tensor, s: Tensor, sigma: Tensor | float, w: Tensor | float = 0.0, grad_r: Tensor | float = 0.0
) -> Tensor:
    """`v + w + sigma^2/2 (s + grad r_t)`, (B, ...); the defaults give the base's."""
    return v + w + sigma**2 / 2 * (s + grad_r)


def backward_drift(
    v: Tensor, s: Tensor, sigma: Tensor | float, w: Tensor | float = 0.0, grad_r: Tensor | float = 0.0
) -> Tensor:
    """`v + w - sigma^2/2 (s + grad r_t)`, (B, ...): a step back in time is `x - h backward_drift`."""
    return v + w - sigma**2 / 2 * (s + grad_r)


def kernel_log_ratio(F: Gaussian, F0: Gaussian, y: Tensor) -> Tensor:
    """`log F(y)/F0(y)` of two Gaussians, summed over the state: (B,).

    The difference is taken number by number, so that close kernels of many dimensions lose no digits.

    Raises:
        ValueError: where a std is 0: such a step has no density and stands in no ratio.
    """
    if bool((F.std == 0).any()) or bool((F0.std == 0).any()):
        raise ValueError("a kernel with std = 0 has no density; leave its step out of the sum of log ratios")
    z, z0 = (y - F.mean) / F.std, (y - F0.mean) / F0.std
    return ((z0 - z) * (z0 + z) / 2 + (F0.std / F.std).log()).flatten(1).sum(1)


def crooks_step(x: Tensor, y: Tensor, F: Gaussian, F0: Gaussian, B: Gaussian, B0: Gaussian) -> Tensor:
    """`log F/F0 (y | x) - log B/B0 (x | y)` of one step: (B,).

    Over a path `log Z dQ/dP = r_1(X_K) - sum of these`, whether the path was drawn forwards or backwards.

    Args:
        x: states x_k, (B, ...).
        y: states x_{k+1}, (B, ...).
        F: forward kernel at (x_k, t_k), with transport and guidance.
        F0: the base's, from the same states.
        B: backward kernel at (x_{k+1}, t_{k+1}).
        B0: the base's, from the same states.
    """
    return kernel_log_ratio(F, F0, y) - kernel_log_ratio(B, B0, x)


def jarzynski_step(
    r: Callable[[Tensor], Tensor],
    r_next: Callable[[Tensor], Tensor],
    x: Tensor,
    h: float,
    v: Tensor,
    s: Tensor,
    w: Tensor | None = None,
    div_w: Tensor | None = None,
) -> Tensor:
    """`r_{k+1}(x + h (v + w)) - r_k(x) + h (div w + w.s)`, what a step adds to A: (B,).

    Args:
        r: r_k, states (B, ...) to (B,).
        r_next: r_{k+1}.
        x: states x_k, (B, ...).
        h: t_{k+1} - t_k.
        v: the base's velocity, at (x, t_k), or for second order at `midpoint` and t_k + h/2; so are the others.
        s: the base's score.
        w: the transport; None: 0.
        div_w: its divergence, (B,); given with `w`.

    Raises:
        ValueError: if only one of `w` and `div_w` is given.
    """
    if (w is None) != (div_w is None):
        raise ValueError("a transport w comes with its divergence div_w (see `divergence`), and neither alone")
    if w is None or div_w is None:
        return r_next(x + h * v) - r(x)
    return r_next(x + h * (v + w)) - r(x) + h * (div_w + (w * s).flatten(1).sum(1))


def midpoint(x: Tensor, h: float, v: Tensor, w: Tensor | float = 0.0) -> Tensor:
    """`x + h/2 (v + w)` with v, w at (x, t_k), (B, ...): where second-order Jarzynski looks, at t_k + h/2."""
    return x + h / 2 * (v + w)


def rademacher(x: Tensor, probes: int, generator: torch.Generator | None = None) -> Tensor:
    """Signs +-1 with equal chance, (probes, *x.shape), like `x`: Hutchinson's probes of least variance."""
    bits = torch.randint(0, 2, (probes, *x.shape), generator=generator, device=x.device)
    return (2 * bits - 1).to(x)


def divergence(
    f: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor | None = None, create_graph: bool = False
) -> Tensor:
    """`div f = sum_i d f_i/d x_i` at each state: (B,).

    Args:
        f: a field, (B, ...) to (B, ...); row i depends on row i alone.
        x: states, (B, ...).
        probes: None: exactly, one VJP a dimension.  Else (P, B, ...) independent numbers of mean 0 and variance 1
            (`rademacher`): the mean of e.(J e), unbiased (Hutchinson 1989), one VJP a probe.
        create_graph: let gradients flow through the result, to the parameters of `f` and to `x`.
    """
    return value_and_divergence(f, x, probes, create_graph)[1]


def value_and_divergence(
    f: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor | None = None, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """`f(x)` and `div f(x)` for one evaluation of `f`; see `divergence`."""
    with torch.enable_grad():
        if not (create_graph and x.requires_grad):
            x = x.detach().requires_grad_()
        value = f(x)
    if probes is None:
        d = x[0].numel()
        probes = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)
        count = 1
    else:
        count = len(probes)
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    if value.requires_grad:  # else f does not depend on x
        for e in probes:
            (vjp,) = torch.autograd.grad(
                value, x, e, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )
            total = total + (vjp * e).flatten(1).sum(1)
    return value if create_graph else value.detach(), total / count
