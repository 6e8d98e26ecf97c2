"""Log weights of recorded paths of a transport chain, less the reward of their ends: Crooks and Jarzynski.

    Crooks       -sum_{j < k} ( log F/F0 (X_{j+1} | X_j) - log B/B0 (X_j | X_{j+1}) )        + r_k(X_k): for pi_{t_k}
    Jarzynski    A_{K-1} - r_{K-1}(X_{K-1})                                                  + lam r(X_K): for the end

`identities.marginals` has the single steps.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_tilt.identities import jarzynski_step, kernel_log_ratio, midpoint, value_and_divergence
from lightning_tilt.interfaces.predictor import Predictor
from lightning_tilt.trajectory import Trajectory

if TYPE_CHECKING:
    from lightning_tilt.transport.chain import Fields, TransportChain

__all__ = ["crooks", "jarzynski"]


def crooks(
    chain: "TransportChain", predictor: Predictor, trajectory: Trajectory, scale: float = 1.0, rate: bool = False
) -> Iterator[tuple["Fields", Tensor]]:
    """State by state, k = 0 .. K - 1, its fields and `-sum_{j < k} (log F/F0 - log B/B0)`, (N,).

    F, and with it the w of B, is read off the recorded noise: the base alone is asked, but for the last state.

    Args:
        chain: the chain that made the paths, with the lam of then.
        predictor: the model.
        trajectory: N paths of the model as it is, or as it was.
        scale: guidance.
        rate: bring d_t r_t along.
    """
    condition = trajectory.condition[trajectory.index]
    total, stds, last = torch.zeros_like(trajectory.reward), chain.stds, chain.steps - 1
    for k in range(chain.steps):
        x, i = trajectory.states[k], torch.full((len(trajectory),), k)
        t = chain.times(k, x)
        f = chain.fields(predictor, x, t, condition, scale, rate=rate)
        if k < last:
            after, std = trajectory.states[k + 1], stds[k].to(x)
            unmoved = chain.forward(f, torch.zeros_like(x), x, i)[0].mean
            w = (after - std * trajectory.noise[k] - unmoved) / (chain.t[k + 1] - chain.t[k]).to(x)
        else:
            w = chain.transport(predictor, t, condition, scale, f.v)(x)
        if k > 0:
            total = total + kernel_log_ratio(*chain.backward(f, w, x, i), trajectory.states[k - 1])
        yield f, total
        if k < last:
            total = total - kernel_log_ratio(*chain.forward(f, w, x, i), trajectory.states[k + 1])


def jarzynski(chain: "TransportChain", predictor: Predictor, trajectory: Trajectory, scale: float = 1.0) -> Tensor:
    """`A_{K-1} - r_{K-1}(X_{K-1})`, at the midpoints of the transport, with the exact divergence: (N,).

    Args:
        chain: the chain that made the paths; its process must have continuous times.
        predictor: the model that made them, as it was.
        trajectory: N paths.
        scale: guidance.
    """
    condition = trajectory.condition[trajectory.index]
    total = torch.zeros_like(trajectory.reward)
    for k in range(chain.steps - 1):
        x = trajectory.states[k]
        t, h = chain.times(k, x), float(chain.t[k + 1] - chain.t[k])
        f = chain.fields(predictor, x, t, condition, scale)
        there = midpoint(x, h, f.v, chain.transport(predictor, t, condition, scale, f.v)(x))
        g = chain.fields(predictor, there, t + h / 2, condition, scale)
        w, div_w = value_and_divergence(chain.transport(predictor, t + h / 2, condition, scale), there)
        r, r_next = (chain.r(predictor, chain.times(j, x), condition, scale) for j in (k, k + 1))
        total = total + jarzynski_step(r, r_next, x, h, g.v, g.s, w, div_w)
    x = trajectory.states[-2]
    return total - chain.r(predictor, chain.times(chain.steps - 1, x), condition, scale)(x)
