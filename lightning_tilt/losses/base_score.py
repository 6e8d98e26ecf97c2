"""The base's score at end points, `grad log p_base(X_1)`: what turns a reward's gradient into that of the tilted law.

    grad log p*(X_1) = grad log p_base(X_1) + lam grad r(X_1)

A base of known law is differentiated.  Any other is asked for its own prediction near the data (Tweedie), which is the
score of the base smoothed by Gaussian noise of variance beta^2/alpha^2,

    grad log p_base(X_1) ~ alpha^2/beta^2 ( x1_hat(alpha X_1, t) - X_1 )        t = end_time

The nearer `end_time` is to 1, the less is smoothed, and the more the network's own error is multiplied: it is divided
by beta.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_tilt.chain import Chain, evaluating, slices
from lightning_tilt.condition import Condition
from lightning_tilt.identities import Treatment
from lightning_tilt.interfaces import KnownLaw, LamSchedule, Predictor
from lightning_tilt.losses.end_points import EndPointRegression, NoisedEnds
from lightning_tilt.process import expand
from lightning_tilt.trajectory import Trajectory

__all__ = ["EndScoreRegression", "base_score", "tilted_score"]


def base_score(
    chain: Chain, base: Predictor, x1: Tensor, condition: Condition, end_time: float, scale: float = 1.0
) -> Tensor:
    """`grad log p_base` at end points.

    Args:
        chain: whose process, precision and counter serve the calls.
        base: the untuned model; a `KnownLaw` is differentiated, and neither `end_time` nor `scale` play a part.
        x1: end points, (N, *shape).
        condition: N conditions.
        end_time: where any other base is asked, snapped to what its network knows.
        scale: its guidance.

    Returns:
        (N, *shape), without gradient.
    """
    if isinstance(base, KnownLaw):
        with torch.enable_grad():
            x = x1.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(base.log_prob(x).sum(), x)
        return gradient
    process = chain.process
    t = process.node(torch.full((len(x1),), end_time, dtype=torch.float64))
    alpha = process.alpha(t)
    x = expand(alpha, x1) * x1
    with torch.no_grad():
        output = chain.output_at(base, x, t.to(x.device), condition, scale)
    x1_hat = process.interpret(output, base.prediction_type, x, t).x1_hat
    return expand(alpha * process.score_gain(t), x1) * (x1_hat - x1)


class EndScoreRegression(EndPointRegression):
    """Base of the regressions that read the tilted law's own gradient at the end points, `grad log p*(X_1)`.

    Args:
        end_time: where a base without a known law is asked for its score, once a rollout; see the module.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    needs_reward_gradient = True
    needs_memoryless = False
    on_policy = False

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        end_time: float = 0.98,
        path_weights: Treatment = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, path_weights=path_weights, **kwargs)
        if not 0 < end_time < 1:
            raise ValueError(f"end_time lies between noise (0) and data (1), near the data, not at {end_time}")
        self.end_time = end_time

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """Weigh the paths, if asked to, and ask the base for its score at the end points."""
        trajectory, chain, scale = super().prepare(trajectory), self.sampler.chain(self), self.sampler.guidance_scale
        with evaluating(self.predictor), self.predictor.base() as base:
            parts = [
                base_score(chain, base, part.end, part.condition[part.index], self.end_time, scale)
                for part in (trajectory[i] for i in slices(len(trajectory), self.loss_micro_batch))
            ]
        return replace(trajectory, end_score=torch.cat(parts))


def tilted_score(points: NoisedEnds) -> Tensor:
    """`g = grad log p*` at the end points, (P, *shape)."""
    assert points.end_score is not None and points.reward_gradient is not None
    return points.end_score + points.lam * points.reward_gradient
