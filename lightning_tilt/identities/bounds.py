"""Log Z from both sides: the bounds, and Bennett's acceptance ratio between them.

P is the law of the paths that are simulated, Q the tilted one, and a path of either has the value

    log w = log( Z dQ/dP )                    in control form lam r(X_K) - log dP/dP_base, or Crooks' (`marginals`)

    forward paths  a_i = log w,  i = 1 .. n_P, from P:      E[a] = log Z - KL(P | Q)     ELBO, a lower bound
    backward paths b_j = log w,  j = 1 .. n_Q, from Q:      E[b] = log Z + KL(Q | P)     EUBO, an upper bound

*Bennett's acceptance ratio* (Bennett 1976; the maximum-likelihood estimate: Shirts et al. 2003) has the least variance
of all that use both.  With l = log(n_Q/n_P), c = log Z is the only root of

    sum_i f_i = sum_j g_j,          f_i = sigmoid(a_i - c + l),      g_j = sigmoid(-(b_j - c + l))

    Var(c) = (mean f^2 / (mean f)^2 - 1)/n_P + (mean g^2 / (mean g)^2 - 1)/n_Q          Bennett's equation 10a

since d/dc log(mean f/mean g) = -1 in the limit.  Backward paths are exact samples of p* that are noised: from a closed
form, or independent of the forward paths in some other way; from weighted forward paths nothing new comes.
"""

import math

import torch
from torch import Tensor

from lightning_tilt.identities.estimate import Estimate, mean

__all__ = ["bennett", "elbo", "eubo"]

# More than bisection alone would need from the widest bracket of float64 numbers that occurs.
_ITERATIONS = 200


def elbo(log_w_forward: Tensor) -> Estimate:
    """Lower bound of log Z: the mean log weight (n_P,) of paths of the model."""
    return mean(log_w_forward)


def eubo(log_w_backward: Tensor) -> Estimate:
    """Upper bound of log Z: the mean log weight (n_Q,) of paths of the target.

    Without such paths `expectation(log_w, log_w)` of the forward ones is its self-normalised estimate.
    """
    return mean(log_w_backward)


def bennett(log_w_forward: Tensor, log_w_backward: Tensor) -> Estimate:
    """Log Z by Bennett's acceptance ratio, with the standard error of its asymptotic formula.

    Args:
        log_w_forward: log(Z dQ/dP) on paths of the model, (n_P,); -inf is legal.
        log_w_backward: the same on independent paths of the target, (n_Q,).

    Returns:
        The estimate.  Its `n` is n_P + n_Q, its `smallest` the lesser of both, and its `ess` the overlap of P and Q,
        the integral of their harmonic mean with weights n_P and n_Q: 1 where P = Q, 0 where they never meet.

    Raises:
        ValueError: without a path on either side, or if a log weight is NaN or +inf, or -inf on a path of the target,
            or on all paths of the model.
    """
    a, b = log_w_forward.double().flatten(), log_w_backward.double().flatten()
    _check(a, b)
    n_p, n_q = len(a), len(b)
    log_ratio = math.log(n_q / n_p)
    c = _root(a + log_ratio, b + log_ratio)
    # Means of f and g by their logarithms: where P and Q hardly meet, both are tiny.
    log_f = torch.nn.functional.logsigmoid(a - c + log_ratio)
    log_g = torch.nn.functional.logsigmoid(-(b - c + log_ratio))
    overlap = math.exp(float(log_f.logsumexp(0)) - math.log(n_p)) * (n_p + n_q) / n_q
    se = math.sqrt(_relative_variance(log_f) / n_p + _relative_variance(log_g) / n_q)
    return Estimate(c, se, n_p + n_q, min(overlap, 1.0), min(n_p, n_q))


def _check(a: Tensor, b: Tensor) -> None:
    if len(b) == 0 or not bool(torch.isfinite(b).all()):
        raise ValueError("the log weights of backward paths must be finite, and there must be one: they have Q > 0")
    if not bool((a < math.inf).all()) or not bool((a > -math.inf).any()):
        raise ValueError("the log weights of forward paths must hold a finite one, and no NaN or +inf")


def _relative_variance(log_f: Tensor) -> float:
    """Mean f^2 / (mean f)^2 - 1."""
    n = log_f.numel()
    return max(math.expm1(float(torch.logsumexp(2 * log_f, 0) - 2 * torch.logsumexp(log_f, 0)) + math.log(n)), 0.0)


def _root(a: Tensor, b: Tensor) -> float:
    """The root c of sum sigmoid(a - c) = sum sigmoid(-(b - c)); the difference falls with c.  Newton in a bracket."""
    finite = torch.cat([a[a > -math.inf], b])
    # Outside of all values by log(n) one side has outweighed the other.
    margin = math.log(len(a) + len(b)) + 1
    low, high = float(finite.min()) - margin, float(finite.max()) + margin
    c = (low + high) / 2
    for _ in range(_ITERATIONS):
        f, g = torch.sigmoid(a - c), torch.sigmoid(c - b)
        excess, slope = float(f.sum() - g.sum()), float((f * (1 - f)).sum() + (g * (1 - g)).sum())
        low, high = (c, high) if excess > 0 else (low, c)
        newton = c + excess / slope if slope > 0 else math.inf
        previous, c = c, newton if low < newton < high else (low + high) / 2
        if abs(c - previous) <= 1e-15 * max(1.0, abs(c)):
            break
    return c
