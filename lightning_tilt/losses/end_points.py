"""Regressions at noised end points: one rollout, many noisings, no path.

    X_1 from the current model or a buffer,    X_t = alpha X_1 + beta eps,    eps ~ N(0, I),    t ~ q

    L = E[ w(t) | x1_hat_theta(X_t, t) - y |^2 ]/2                  w(t), q: `times`

All targets of this family are written for x1_hat, which is finite at pure noise and at the data, for every interpolant:
a target s_y of the score or v_y of the velocity belongs to

    y = (X_t + beta^2 s_y)/alpha,        v_y - v = (alpha' - beta' alpha/beta) (y - x1_hat)

so that, e.g., the velocity I' = alpha' X_1 + beta' eps of conditional flow matching is the target y = X_1.

A subclass gives `target(points)`; whatever network calls that makes are without gradient.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_tilt.chain import Chain, evaluating, slices
from lightning_tilt.condition import Condition
from lightning_tilt.identities import Treatment
from lightning_tilt.interfaces import LamSchedule, Predictor
from lightning_tilt.interfaces.groups import sample_rows
from lightning_tilt.losses.path_weights import PathWeighted
from lightning_tilt.losses.times import Times, TimeSampling, TimeWeight, check_time_weight, time_weight
from lightning_tilt.noise import keyed_normal_rows, keyed_uniform_rows
from lightning_tilt.process import Process
from lightning_tilt.trajectory import Trajectory

__all__ = ["EndPointRegression", "NoisedEnds", "regression_terms"]


def regression_terms(x1_hat: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    """`factor |x1_hat - y|^2 / 2` of P points: (P,)."""
    return 0.5 * factor.to(x1_hat) * ((x1_hat - y) ** 2).flatten(1).sum(1)


@dataclass(frozen=True)
class NoisedEnds:
    """P end points, each noised to a time.

    Attributes:
        x1: end points, (P, *shape).
        x: their noised states, (P, *shape).
        t: times, (P,), float64.
        condition: P conditions.
        index: which condition of the rollout each has, (P,), on the CPU.
        reward: (P,).
        reward_gradient: at x1, (P, *shape), where the loss asked for it.
        lam: the multiplier in force.
        advantage: (P,), where the loss computed it.
        end_score: gradient of log p_base at x1, (P, *shape), where the loss has prepared it.
        weight: of the sample in the loss, (P,): 0 for one that is left out, else its path weight, 1 without any.
    """

    x1: Tensor
    x: Tensor
    t: Tensor
    condition: Condition
    index: Tensor
    reward: Tensor
    reward_gradient: Tensor | None
    lam: float
    advantage: Tensor | None = None
    end_score: Tensor | None = None
    weight: Tensor = field(default_factory=lambda: torch.ones(()))

    @classmethod
    def of(cls, path: Trajectory, x: Tensor, t: Tensor, weight: Tensor) -> "NoisedEnds":
        """The end points of P samples with their noised states (P, *shape), times (P,) and weights (P,)."""
        return cls(
            x1=path.end,
            x=x,
            t=t,
            condition=path.condition[path.index],
            index=path.index,
            reward=path.reward,
            reward_gradient=path.reward_gradient,
            lam=path.lam,
            advantage=path.advantage,
            end_score=path.end_score,
            weight=weight,
        )


class EndPointRegression(PathWeighted):
    """Base of the regressions at noised end points.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        noisings: times and noises that each end point is given in an update.
        time_weight: how a time's error is weighed: "control" (the KL between path laws), "score", or "uniform" (the
            error of eps_hat, as base models are trained).
        time_sampling: "uniform", "low_discrepancy", or "importance" (more often where terms are large; unbiased).
        t_min: the noisiest time that is drawn.
        t_max: the cleanest time that is drawn.
        path_weights: see `PathWeighted`.
        weight_clip: see `PathWeighted`.
        loss_micro_batch: points in one network call; None: all. Values and gradients do not depend on it.
        checkpoint: recompute each micro-batch in the backward pass, for one more forward a point.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    needs_path: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        noisings: int = 1,
        time_weight: TimeWeight = "control",
        time_sampling: TimeSampling = "low_discrepancy",
        t_min: float = 0.001,
        t_max: float = 0.999,
        path_weights: Treatment = "none",
        weight_clip: float = 10.0,
        loss_micro_batch: int | None = None,
        checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, path_weights=path_weights, weight_clip=weight_clip, **kwargs)
        if noisings < 1:
            raise ValueError(f"noisings must be at least 1, not {noisings}")
        self.noisings = noisings
        self.time_weight = check_time_weight(time_weight)
        self.times = Times(time_sampling, t_min, t_max)
        self.loss_micro_batch = loss_micro_batch
        self.checkpoint = checkpoint

    def setup(self, stage: str) -> None:
        """Refuse end points that are not the model's."""
        super().setup(stage)
        if stage == "fit" and self.sampler.weighted and not self.sampler.chain(self, count=False).noisy_steps:
            raise ValueError(
                f"{type(self).__name__}: sampler.base_last_step: true lets the base make the steps of std = 0, and of "
                "an ODE these are all: the samples would be the base's. Say base_last_step: false."
            )

    @abstractmethod
    def target(self, points: NoisedEnds) -> Tensor:
        """What x1_hat is regressed on at the noised points, (P, *shape); called without gradient."""

    def completed(self, points: NoisedEnds, y: Tensor, x1_hat: Tensor) -> Tensor:
        """The target y where it has the model's own x1_hat in it, which is given without gradient: y itself, if not."""
        return y

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples and noisings of the weighted terms."""
        chain = self.sampler.chain(self)
        good = self.mean_good(trajectory.weight)
        t, factor, eps = self._draw(trajectory, chain.process)
        total, seen = trajectory.end.new_zeros(()), []
        for pairs in slices(len(t), self.loss_micro_batch):
            n = torch.arange(pairs.start, pairs.stop) % len(trajectory)
            points = self._noised(chain.process, trajectory, n, t[pairs], eps[pairs])
            with torch.no_grad(), evaluating(self.predictor):
                y = self.target(points)
            terms = self._terms(chain, points, y, time_weight(chain.process, points.t, self.time_weight))
            seen.append(terms.detach())
            total = total + (terms * factor[pairs].to(terms) * points.weight).sum()
        chain.evaluations.pairs += len(t)
        if self.times.sampling == "importance":
            sums = self.times.update(t, torch.cat(seen)).to(total.device)
            self.times.learn(cast(Tensor, self.trainer.strategy.reduce(sums, reduce_op="sum")))
        return total / (good * self.noisings), {"term_max": torch.cat(seen).max()}

    def x1_hat(self, predictor: Predictor, points: NoisedEnds) -> Tensor:
        """A predictor's (guided) x1_hat at the points, (P, *shape)."""
        chain = self.sampler.chain(self)
        return self._x1_hat(chain, predictor, points.x, points.t, points.condition)

    def _terms(self, chain: Chain, points: NoisedEnds, y: Tensor, factor: Tensor) -> Tensor:
        """The terms of a micro-batch by one (checkpointed) network call, (P,)."""

        def terms(x: Tensor) -> Tensor:
            x1_hat = self._x1_hat(chain, self.predictor, x, points.t, points.condition)
            with torch.no_grad():
                aim = self.completed(points, y, x1_hat.detach())
            return regression_terms(x1_hat, aim, factor)

        chain.evaluations.backward += len(y) * self.predictor.backward_cost
        if self.checkpoint:
            return cast(Tensor, checkpoint(terms, points.x, use_reentrant=False))
        return terms(points.x)

    def _x1_hat(self, chain: Chain, predictor: Predictor, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = chain.output_at(predictor, x, t.to(x.device), condition, self.sampler.guidance_scale)
        return chain.process.interpret(output, predictor.prediction_type, x, t).x1_hat

    def _noised(self, process: Process, trajectory: Trajectory, n: Tensor, t: Tensor, eps: Tensor) -> NoisedEnds:
        path = trajectory[n]
        weight = path.weight if path.importance is None else path.weight * path.importance
        return NoisedEnds.of(path, process.add_noise(path.end, eps, t.to(path.end.device)), t, weight)

    def _draw(self, trajectory: Trajectory, process: Process) -> tuple[Tensor, Tensor, Tensor]:
        """Times, factors 1/q and noises of all noisings, noising by noising: (P,), (P,), (P, *shape)."""
        total, seed, number = len(trajectory) * self.trainer.world_size, self.sampler.seed, self.sampler.batches
        everywhere = keyed_uniform_rows(seed, "times", number, range(total * self.noisings + 1))
        times, factors = self.times(everywhere[1:], float(everywhere[0]))
        mine = (torch.arange(self.noisings)[:, None] * total + sample_rows(self, trajectory)).flatten()
        t, factor = process.node(times[mine]), factors[mine]
        shape = self.predictor.state_shape
        eps = keyed_normal_rows(seed, "renoise", number, mine.tolist(), shape).to(trajectory.end)
        return t, factor, self.predictor.project(eps)
