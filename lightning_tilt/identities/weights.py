"""Log weights: effective sample size, log Z, expectations under the tilt.

A path of the tuned chain carries the weight (Girsanov; 2409.08861)

    log w = lam r(X_K) - sum_k ( u_k . z_k + |u_k|^2 / 2 ),        E[w] = Z,    E[w f] / E[w] = E_p*[f]

and a path of the base (u = 0) the weight `log w = lam r`.  From n independent paths, with w_i = exp(log_w_i) and
p_i = w_i / sum w:

    ESS    = (sum w)^2 / (n sum w^2)                  in (0, 1]
    log Z  = log mean w                               without path i:   log Z  + log(1 - p_i) + log( n / (n - 1) )
    E*[f]  = m = sum p f                              without path i:   m - p_i (f_i - m) / (1 - p_i)

Both are biased by O(1/n), and so both are jackknifed (`estimate`), which leaves a bias of O(1/n^2).  Intervals of
1.96 se were seen to cover in 93 - 97 % of runs from ESS >= .5, n >= 1000 in all and n >= 64 in every stratum on; below
that they are too short and `Estimate.trustworthy` is False.
"""

import math

import torch
from torch import Tensor

from lightning_tilt.identities.estimate import Estimate, jackknifed

__all__ = ["ess", "ess_rows", "expectation", "forward_ess", "log_partition"]


def ess(log_w: Tensor) -> float:
    """Effective sample size of the log weights (n,), as a fraction of n.

    Example:
        >>> ess(torch.zeros(5)), round(ess(torch.tensor([0.0, -1e9])), 3)
        (1.0, 0.5)
    """
    return float(ess_rows(log_w.flatten()))


def ess_rows(log_w: Tensor) -> Tensor:
    """The same for each of many groups of n log weights: (..., n) to (...), float64."""
    log_w = log_w.double()
    log_n = math.log(log_w.shape[-1])
    fraction = torch.exp(2 * torch.logsumexp(log_w, -1) - torch.logsumexp(2 * log_w, -1) - log_n)
    return fraction.clamp(max=1)  # above 1 only by rounding


def forward_ess(log_w_backward: Tensor) -> float:
    """Effective sample size from log weights (n,) of paths of the target: `1/(E_Q[w] E_Q[1/w])`, in (0, 1].

    It estimates what `ess` estimates from paths of the model, since E_P[w^2] = Z E_Q[w] and Z = 1/E_Q[1/w], and unlike
    `ess` it sees the modes that the model never visits (2406.07423).

    Example:
        >>> forward_ess(torch.zeros(5)), round(forward_ess(torch.tensor([0.0, 9.0])), 4)
        (1.0, 0.0005)
    """
    log_w = log_w_backward.double()
    log_n = math.log(log_w.numel())
    return float(torch.exp(2 * log_n - torch.logsumexp(log_w, 0) - torch.logsumexp(-log_w, 0)).clamp(max=1))


def log_partition(log_w: Tensor) -> Estimate:
    """Log Z from the log weights (n,) of independent paths, jackknifed."""
    log_w = log_w.double()
    n = log_w.numel()
    log_mean = float(torch.logsumexp(log_w, 0)) - math.log(n)
    shift = torch.log(_rest(torch.softmax(log_w, 0))) + (math.log(n / (n - 1)) if n > 1 else 0.0)
    return jackknifed(log_mean, shift, ess(log_w))


def expectation(f: Tensor, log_w: Tensor) -> Estimate:
    """E*[f] from values f (n,) and log weights (n,), self-normalised, jackknifed."""
    f = f.double()
    p = torch.softmax(log_w.double(), 0)
    m = (p * f).sum()
    return jackknifed(float(m), -p * (f - m) / _rest(p), ess(log_w))


def _rest(p: Tensor) -> Tensor:
    """1 - p_i, not below 1/n: what is left beside a path that has nearly all the weight would be noise."""
    return (1 - p).clamp(min=1 / p.numel())
