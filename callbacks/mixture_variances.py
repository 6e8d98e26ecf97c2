"""Variances of the four targets of the tilted score, on a Gaussian mixture whose tilt is known: no model, no training.

At X_t ~ p*_t the targets below all have E[y | X_t] = s*(X_t), for X_1 ~ p*(. | X_t), g = grad log p*(X_1):

    target         g/alpha                                            2402.08667     Var ~ 1/alpha^2 towards the noise
    conditional    -(X_t - alpha X_1)/beta^2                          Vincent 2011   Var ~ 1/beta^2 towards the data
    novel          (alpha (g + m X_1) - m X_t)/(alpha^2 + m beta^2)   2402.06320     finite at both ends
    adjoint        s_base(X_t) - a_t                                  2409.08861     finite at both ends

Novel is Adjoint Sampling for a Gaussian base of precision m.  The variance is E[ tr Cov(y | X_t) ] = E |y - s*(X_t)|^2:
of scores, summed over the coordinates, averaged over X_t.  2 eta_t times it is that of the control metric.  s* is
known, so that every sample counts and the law of |y - s*|^2 is seen whole, by quantiles too.

Everything is sampled from closed forms.  Given X_t and X_1 the tilted path is the same bridge as the base's, since both
are memoryless, so the path that the lean adjoint a_t is swept along is drawn exactly as well,

    X_s' | X_s, X_1 ~ N( b X_1 + c X_s, beta_s'^2 b2/beta_s^2 I )
    a = alpha_s/alpha_s'    b2 = beta_s^2 - a^2 beta_s'^2    b = alpha_s' b2/beta_s^2    c = a beta_s'^2/beta_s^2

and the base's Jacobian over the same step is c I + b alpha_s/beta_s^2 Cov(X_1 | X_s).

Between the modes of a base that Jacobian is large, and the few paths that stay there carry the mean of |y - s*|^2 of
the adjoint target.  On `the_mixture`, rectified flow, one path in a thousand makes half of it in the middle of time; of
20,000 paths its standard error is a fourth of it and still too small; and it grows with the steps of the sweep, which
resolve longer stays: at t = .4 9, 24 and 87 for 30, 60 and 120 steps.  The median stays where it is, the 95 % quantile
nearly (15, 18, 20).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.gaussian_mixture import GaussianMixture
from ..process import Process
from ..rewards.quadratic import ConjugateReward

__all__ = ["Spread", "mixture_variances"]


class Spread(NamedTuple):
    """The law of |y - s*(X_t)|^2 at T times.

    Attributes:
        mean: the variance of the target, (T,).
        se: its standard error, (T,).
        median: (T,).
        q95: what 95 % stay below, (T,).
    """

    mean: Tensor
    se: Tensor
    median: Tensor
    q95: Tensor


def mixture_variances(
    mixture: GaussianMixture,
    reward: ConjugateReward,
    lam: float,
    process: Process,
    times: Tensor,
    *,
    samples: int = 20_000,
    steps: int = 60,
    precision: float = 1.0,
    seed: int = 0,
) -> dict[str, Spread]:
    """|y - s*(X_t)|^2 of the four targets: E[tr Cov(y | X_t)] and quantiles, by samples of exact laws.

    Args:
        mixture: the base, float64.
        reward: what tilts it.
        lam: the multiplier.
        process: the interpolant.
        times: t in (0, 1), (T,), float64.
        samples: pairs of X_t and X_1.
        steps: of the path from t to 1 that the adjoint is swept along.
        precision: m of the novel target.
        seed: of all draws.

    Returns:
        For "target", "conditional", "novel" and "adjoint" what is seen at the times.
    """
    tilted, _ = mixture.tilt(reward, lam)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {}
    for t in times.double():
        alpha, beta = process.alpha(t), process.beta(t)
        x = alpha * tilted.sample(samples, generator)
        x = x + beta * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x1 = _posterior_sample(tilted, process, x, t, generator)
        g, m = tilted.score(x1), precision
        a = _adjoint(mixture, reward, lam, process, x, x1, t, steps, generator)
        targets = {
            "target": g / alpha,
            "conditional": -(x - alpha * x1) / beta**2,
            "novel": (alpha * (g + m * x1) - m * x) / (alpha**2 + m * beta**2),
            "adjoint": mixture.marginal(process, t).score(x) - a,
        }
        score = tilted.marginal(process, t).score(x)
        for name, y in targets.items():
            far = (y - score).square().sum(1)
            numbers = torch.stack([far.mean(), far.std() / samples**0.5, far.median(), far.quantile(0.95)])
            found.setdefault(name, []).append(numbers)
    return {name: Spread(*torch.stack(rows, 1)) for name, rows in found.items()}


def _posterior_sample(
    law: GaussianMixture, process: Process, x: Tensor, t: Tensor, generator: torch.Generator
) -> Tensor:
    """A draw of X_1 given each X_t = x, (B, d)."""
    posterior = law.x1_posterior(process, x, t)
    i = torch.multinomial(posterior.weights, 1, generator=generator).flatten()
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    # Axes and variances of a component are the same for all x at one time.
    mean = posterior.means[torch.arange(len(x)), i]
    return mean + torch.einsum("nij,nj->ni", posterior.axes[i], posterior.variances[i].sqrt() * z)


def _adjoint(
    base: GaussianMixture,
    reward: ConjugateReward,
    lam: float,
    process: Process,
    x: Tensor,
    x1: Tensor,
    t: Tensor,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """The lean adjoint a_t along bridges from x to x1, (P, d): the Jacobians first, then the sweep."""
    grid = t + (1 - t) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    A, b, _ = (v.to(x1) for v in reward.coefficients())
    eye, jacobians = torch.eye(x.shape[1]).to(x), []
    for now, after in pairwise(grid):
        alpha, beta, alpha_s, beta_s = process.alpha(now), process.beta(now), process.alpha(after), process.beta(after)
        a = alpha / alpha_s
        b2 = beta**2 - a**2 * beta_s**2
        to_x1, to_x = alpha_s * b2 / beta**2, a * beta_s**2 / beta**2
        covariance = base.x1_posterior(process, x, now).covariance
        jacobians.append(to_x * eye + to_x1 * alpha / beta**2 * covariance)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = to_x1 * x1 + to_x * x + b2.sqrt() * beta_s / beta * z
    adjoint = -lam * (b - x1 @ A)
    for jacobian in reversed(jacobians):
        adjoint = torch.einsum("nij,nj->ni", jacobian, adjoint)  # symmetric: its own transpose
    return adjoint
