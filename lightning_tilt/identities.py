"""Log weights, log Z, effective sample size, expectations under the tilt - each with its standard error.

A path of the tuned chain carries the weight (theory: section 3)

    log w = lam r(X_K) - sum_k ( u_k . z_k + |u_k|^2 / 2 ),        E[w] = Z,    E[w f] / E[w] = E_p*[f]

and a path of the base (u = 0) the weight `log w = lam r`.  From n independent paths, with w_i = exp(log_w_i) and
p_i = w_i / sum w:

    ESS    = (sum w)^2 / (n sum w^2)                  in (0, 1]
    log Z  = log mean w                               without path i:   log Z  + log(1 - p_i) + log( n / (n - 1) )
    E*[f]  = m = sum p f                              without path i:   m - p_i (f_i - m) / (1 - p_i)

Both are biased by O(1/n), and the mean over many strata (prompts) keeps the bias of one while its standard error
shrinks.  So both are jackknifed: from the n estimates e_i that leave one path out (Miller 1974, "The jackknife")

    e  ->  n e - (n - 1) mean(e_i),                   se = sqrt( (n - 1)/n sum (e_i - mean(e_i))^2 )

which leaves a bias of O(1/n^2).  Intervals of 1.96 se were seen to cover in 93 - 97 % of runs from ESS >= .5,
n >= 1000 in all and n >= 64 in every stratum on; below that they are too short and `Estimate.trustworthy` is False.
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
        smallest: samples of the smallest stratum; None without strata.
    """

    mean: float
    se: float
    n: int
    ess: float = 1.0
    smallest: int | None = None

    @property
    def trustworthy(self) -> bool:
        """Whether a 95 % interval of mean +- 1.96 se has been seen to cover in 93 - 97 % of runs."""
        return self.ess >= 0.5 and self.n >= 1000 and (self.smallest is None or self.smallest >= 64)

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
    """Log Z from the log weights (n,) of independent paths, jackknifed."""
    log_w = log_w.double()
    n = log_w.numel()
    log_mean = float(torch.logsumexp(log_w, 0)) - math.log(n)
    shift = torch.log(_rest(torch.softmax(log_w, 0))) + (math.log(n / (n - 1)) if n > 1 else 0.0)
    return _jackknifed(log_mean, shift, log_w)


def expectation(f: Tensor, log_w: Tensor) -> Estimate:
    """E*[f] from values f (n,) and log weights (n,), self-normalised, jackknifed."""
    f = f.double()
    p = torch.softmax(log_w.double(), 0)
    m = (p * f).sum()
    return _jackknifed(float(m), -p * (f - m) / _rest(p), log_w)


def stratified(estimates: list[Estimate]) -> Estimate:
    """The mean of one estimate a stratum (a prompt), all strata of equal weight.

    The strata are fixed, so the standard error is that of their errors alone: sqrt(sum se^2) / S.
    """
    s = len(estimates)
    if s == 1:
        return estimates[0]
    return Estimate(
        mean=sum(e.mean for e in estimates) / s,
        se=math.sqrt(sum(e.se**2 for e in estimates)) / s,
        n=sum(e.n for e in estimates),
        ess=sum(e.ess for e in estimates) / s,
        smallest=min(e.n if e.smallest is None else e.smallest for e in estimates),
    )


def _rest(p: Tensor) -> Tensor:
    """1 - p_i, not below 1/n: what is left beside a path that has nearly all the weight would be noise."""
    return (1 - p).clamp(min=1 / p.numel())


def _jackknifed(estimate: float, shift: Tensor, log_w: Tensor) -> Estimate:
    """From what leaving path i out adds to the estimate, shift (n,); a single path has no standard error."""
    n = shift.numel()
    if n == 1:
        return Estimate(estimate, math.nan, 1)
    bias = (n - 1) * shift.mean()
    se = ((n - 1) / n * ((shift - shift.mean()) ** 2).sum()).sqrt()
    return Estimate(estimate - float(bias), float(se), n, ess(log_w))
