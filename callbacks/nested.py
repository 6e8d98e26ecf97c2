"""Nested samples: what is known of X_1, and of a loss's target, when X_t is.

    E|u - y|^2 = E|u - E[y | X_t]|^2 + E Var(y | X_t)

From n outer states, and for each of them m targets y of independent continuations of the current chain,

    Var       mean_n f s_n^2,                          s_n^2 = 1/(m - 1) sum_i |y_i - y_mean|^2, summed over the state
    bias^2    mean_n f ( |u - y_mean|^2 - s_n^2/m )    since y_mean carries the noise s_n^2/m itself

f is the factor of a metric.  Both are unbiased; bias^2 can come out below 0 where it is small.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..chain import slices
from ..identities import Estimate, mean
from ..interfaces import Loss, Sampler, find_sampler
from ..noise import keyed_normal_rows
from ..trajectory import Trajectory
from .scoring import score_end_points

__all__ = ["bias_and_variance", "continued", "gradient_noise"]


def bias_and_variance(u: Tensor, y: Tensor, factor: float) -> tuple[Estimate, Estimate]:
    """Bias^2 and variance of targets, with standard errors over the outer states.

    Args:
        u: what is trained, at n states, (n, *shape).
        y: m targets of each, (n, m, *shape), m >= 2.
        factor: of the metric.
    """
    u, y = factor**0.5 * u.double().flatten(1), factor**0.5 * y.double().flatten(2)
    centre, m = y.mean(1), y.shape[1]
    variance = ((y - centre[:, None]) ** 2).sum((1, 2)) / (m - 1)
    return mean(((u - centre) ** 2).sum(1) - variance / m), mean(variance)


def gradient_noise(gradients: Tensor, batch: int) -> tuple[float, float]:
    """|g|^2 of the mean gradient, and the variance of a single sample's, sum over the parameters.

    Args:
        gradients: of B batches of independent samples, each a mean over its batch, (B, parameters), B >= 2.
        batch: samples of a batch.

    Returns:
        Both unbiased: the noise of the mean, variance/(B batch), is taken off |g|^2, which may then be below 0.
    """
    gradients, b = gradients.double(), len(gradients)
    centre = gradients.mean(0)
    spread = float(((gradients - centre) ** 2).sum()) / (b - 1)
    return float((centre**2).sum()) - spread / b, spread * batch


def continued(host: Any, outer: Trajectory, k: int, inner: int, number: int, micro_batch: int | None) -> Trajectory:
    """Paths that share X_0 ... X_k with the outer ones and go on from there with noise of their own, scored.

    Args:
        host: a loss with its host.
        outer: paths of the current chain, N of them.
        k: the last step that is shared.
        inner: continuations of each path, those of one side by side.
        number: key of the noise, in the stream "probes".
        micro_batch: samples in one network call; None: all.
    """
    sampler, shape = find_sampler(host), host.predictor.state_shape
    shared = outer[torch.arange(len(outer)).repeat_interleave(inner)]
    size, steps = len(shared), outer.steps - k
    noise = keyed_normal_rows(sampler.seed, "probes", number, range(size), (steps, *shape)).transpose(0, 1)
    noise = host.predictor.project(noise).to(shared.states)
    parts = [_steps(host, sampler, shared[i], noise[:, i], k) for i in slices(size, micro_batch)]
    states = torch.cat([shared.states[: k + 1], torch.cat(parts, 1)])
    path = replace(shared, states=states, noise=torch.cat([shared.noise[:k], noise]), log_w=None, reward_gradient=None)
    gradient = isinstance(host, Loss) and host.needs_reward_gradient
    return score_end_points(host, path, gradient, micro_batch)


@torch.no_grad()
def _steps(host: Any, sampler: Sampler, path: Trajectory, noise: Tensor, k: int) -> Tensor:
    """X_{k+1} ... X_K, (K - k, N, *shape)."""
    chain, condition, x, states = sampler.chain(host), path.condition[path.index], path.states[k], []
    own = chain.mean(host.predictor, condition, sampler.guidance_scale)
    for j, z in zip(range(k, chain.steps), noise, strict=True):
        std = chain.stds[j].to(x)
        if std == 0 and sampler.weighted:
            with host.predictor.base() as base:
                x = chain.mean(base, condition, sampler.guidance_scale)(x, j)
        else:
            x = own(x, j) + std * z
        states.append(x)
    return torch.stack(states)
