"""Log weights, log Z, effective sample size, expectations under the tilt - each with its standard error.

A path of the tuned chain carries the weight (theory: section 3)

    log w = lam r(X_K) - sum_k ( u_k . z_k + |u_k|^2 / 2 ),        E[w] = Z,    E[w f] / E[w] = E_p*[f]

and a path of the base (u = 0) the weight `log w = lam r`.  From n independent paths, with w_i = exp(log_w_i):

    ESS    = (sum w)^2 / (n sum w^2)                  in (0, 1]
    log Z  = log mean w,                              se = sqrt( Var(w) / n ) / mean w
    E*[f]  = sum w f / sum w,                         se = sqrt( sum w^2 (f - E*[f])^2 ) / sum w

The standard errors are by the delta method.  Their 95 % intervals cover as they should from ESS >= .5 and n >= 1000;
below that they are too short and `Estimate.trustworthy` is False.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "ess", "expectation", "log_partition", "mean", "stratified"]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    Attributes:
        mean: the estimate.
        se: its standard error.
        n: how many independent samples it rests on.
        ess: effective sample size of the weights, as a fraction of n; 1 without weights.
    """

    mean: float
    se: float
    n: int
    ess: float = 1.0

    @property
    def trustworthy(self) -> bool:
        """Whether a 95 % interval of mean +- 1.96 se has been seen to cover in 93 - 97 % of runs."""
        return self.ess >= 0.5 and self.n >= 1000

    def as_dict(self) -> dict[str, float | int]:
        """`{mean, se, n}`, as reports have it."""
        return {"mean": self.mean, "se": self.se, "n": self.n}


def ess(log_w: Tensor) -> float:
    """Effective sample size of the log weights (n,), as a fraction of n.

    Example:
        >>> ess(torch.zeros(5)), round(ess(torch.tensor([0.0, -1e9])), 3)
        (1.0, 0.5)
    """
    log_w = log_w.double()
    log_n = math.log(log_w.numel())
    fraction = torch.exp(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0) - log_n)
    return float(fraction.clamp(max=1))  # above 1 only by rounding


def mean(f: Tensor) -> Estimate:
    """Plain mean of independent values (n,)."""
    f = f.double()
    n = f.numel()
    se = float(f.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(f.mean()), se, n)


def log_partition(log_w: Tensor) -> Estimate:
    """Log Z from the log weights (n,) of independent paths, with the delta method's standard error."""
    log_w = log_w.double()
    n = log_w.numel()
    log_mean = float(torch.logsumexp(log_w, 0)) - math.log(n)
    relative = torch.exp(log_w - log_mean)
    se = float(relative.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(log_mean, se, n, ess(log_w))


def expectation(f: Tensor, log_w: Tensor) -> Estimate:
    """E*[f] from values f (n,) and log weights (n,), self-normalised, with the delta method's standard error."""
    f = f.double()
    p = torch.softmax(log_w.double(), 0)
    centre = float((p * f).sum())
    se = float((p**2 * (f - centre) ** 2).sum().sqrt())
    return Estimate(centre, se, f.numel(), ess(log_w))


def stratified(estimates: list[Estimate]) -> Estimate:
    """The mean of one estimate a stratum (a prompt), all strata of equal weight.

    The strata are fixed, so the standard error is that of their errors alone: sqrt(sum se^2) / S.
    """
    s = len(estimates)
    return Estimate(
        mean=sum(e.mean for e in estimates) / s,
        se=math.sqrt(sum(e.se**2 for e in estimates)) / s,
        n=sum(e.n for e in estimates),
        ess=sum(e.ess for e in estimates) / s,
    )
