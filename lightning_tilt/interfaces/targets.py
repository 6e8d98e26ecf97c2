"""What a loss regresses its prediction on: the hook of diagnostics that look at targets.

    E|x1_hat - y|^2 = E|x1_hat - E[y | X_t]|^2 + E Var(y | X_t)

All targets are in the currency x1_hat, which is finite from pure noise to the data.  At fixed x a step's mean is affine
in it,

    m_k(x; x1_hat) = m_k(x; 0) + c_k x1_hat            u_k = c_k/std_k (x1_hat - x1_hat_base)

so that targets of means and controls are targets of x1_hat too.  The error of a target weighs

    control    (c_k/std_k)^2/h_k       |u_k|^2/h_k, in the limit of small steps 2 eta_t |score|^2: the KL between paths
    score      (alpha/beta^2)^2        |score|^2

Losses register what their target is: `x1_target.register`, in `losses.targets`.
"""

from functools import singledispatch

import torch
from torch import Tensor

from lightning_tilt.chain import Chain
from lightning_tilt.interfaces.loss import Loss
from lightning_tilt.trajectory import Trajectory

__all__ = ["control_factor", "mean_slopes", "score_factor", "x1_of_mean", "x1_target"]


@singledispatch
def x1_target(loss: Loss, path: Trajectory, k: int, micro_batch: int | None) -> Tensor:
    """What the loss regresses x1_hat on at the states X_k of paths, given all that comes after.

    Args:
        loss: which loss, with its host.
        path: scored paths of the current model, of N samples.
        k: the step.
        micro_batch: samples in one network call; None: all.

    Returns:
        (N, *shape), without gradient.

    Raises:
        TypeError: for a loss that is no regression.
    """
    raise TypeError(
        f"{type(loss).__name__} has no target that its prediction is regressed on: remove TargetVariance, or register "
        "one with lightning_tilt.interfaces.targets.x1_target.register"
    )


def x1_of_mean(chain: Chain, x: Tensor, mean: Tensor, k: int) -> Tensor:
    """The x1_hat that a step's mean (N, *shape) from states x (N, *shape) belongs to."""
    return (mean - _mean(chain, x, torch.zeros_like(x), k)) / mean_slopes(chain)[k].to(x)


def mean_slopes(chain: Chain) -> Tensor:
    """c_k of all steps, (K,), float64."""
    t, s = chain.t[:-1], chain.t[1:]
    zero = torch.zeros(chain.steps, 1, dtype=torch.float64, device=t.device)
    prediction = chain.process.interpret(zero + 1, "sample", zero, t)
    return chain.transition(chain.process, zero, prediction, t, s).mean.flatten()


def control_factor(chain: Chain) -> Tensor:
    """`(c_k/std_k)^2/h_k` of all steps, (K,), float64; infinite where std_k = 0."""
    return (mean_slopes(chain) / chain.stds) ** 2 / (chain.t[1:] - chain.t[:-1])


def score_factor(chain: Chain) -> Tensor:
    """`(alpha/beta^2)^2` of all steps, (K,), float64."""
    return chain.process.score_gain(chain.t[:-1]) ** 2


def _mean(chain: Chain, x: Tensor, x1_hat: Tensor, k: int) -> Tensor:
    t, s = chain.t[k].to(x.device), chain.t[k + 1].to(x.device)
    prediction = chain.process.interpret(x1_hat, "sample", x, t)
    return chain.transition(chain.process, x, prediction, t, s).mean
