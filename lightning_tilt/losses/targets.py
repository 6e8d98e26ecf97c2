"""The targets of the regressions, as diagnostics ask for them (`interfaces.targets`): all in the currency x1_hat.

    Adjoint Matching      m_base,k(X_k) - std_k^2 a_{k+1} as the step's mean, a the lean adjoint along the path
    end-point losses      `target` and `completed` at X_t = X_k, X_1 = X_K of the same path

Path weights are not applied: what is looked at is the regression of the samples as they are drawn.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_tilt.chain import evaluating, slices
from lightning_tilt.identities.lean_adjoint import lean_adjoint
from lightning_tilt.interfaces.targets import x1_of_mean, x1_target
from lightning_tilt.losses.adjoint_matching import AdjointMatching
from lightning_tilt.losses.end_points import EndPointRegression, NoisedEnds
from lightning_tilt.trajectory import Trajectory

__all__ = ["adjoint_matching_target", "end_point_target"]


@x1_target.register
def adjoint_matching_target(loss: AdjointMatching, path: Trajectory, k: int, micro_batch: int | None) -> Tensor:
    """See `x1_target`: one base evaluation and one VJP for each later step."""
    chain = loss.sampler.chain(loss)
    scale = loss.sampler.guidance_scale if loss.adjoint_guidance is None else loss.adjoint_guidance
    with evaluating(loss.predictor), loss.predictor.base() as base:
        parts = []
        for i in slices(len(path), micro_batch):
            part = path[i]
            mean = chain.mean(base, part.condition[part.index], scale)
            assert part.reward_gradient is not None
            terminal = -part.lam * part.reward_gradient
            (a,), (base_mean,) = lean_adjoint(_later(mean, k), part.states[k:], terminal, [0])
            parts.append(x1_of_mean(chain, part.states[k], base_mean - chain.stds[k].to(a) ** 2 * a, k))
    return torch.cat(parts)


@x1_target.register
def end_point_target(loss: EndPointRegression, path: Trajectory, k: int, micro_batch: int | None) -> Tensor:
    """See `x1_target`: what `prepare`, `target` and `completed` ask of networks."""
    path = loss.prepare(path)
    parts = []
    with torch.no_grad(), evaluating(loss.predictor):
        for i in slices(len(path), micro_batch):
            part = path[i]
            points = NoisedEnds.of(part, part.states[k], part.t[k].expand(len(part)), part.weight)
            x1_hat = loss.x1_hat(loss.predictor, points)
            parts.append(loss.completed(points, loss.target(points), x1_hat))
    return torch.cat(parts)


def _later(mean: Callable[[Tensor, int], Tensor], k: int) -> Callable[[Tensor, int], Tensor]:
    """The means of a chain that begins at step k."""
    return lambda x, j: mean(x, k + j)
