"""Reinforce Adjoint Matching (2605.10759) and a sibling without its bias: no reward gradient anywhere.

    X_1 from the current model,   X_t = alpha X_1 + beta eps,   I' = alpha' X_1 + beta' eps,   v = E_theta[I' | X_t]

**Reinforce Adjoint Matching** regresses v on  v_base + lam (r - c) (I' - v);  in the currency of x1_hat

    y = stop_gradient[ x1_base + f (X_1 - x1_hat) ],         f = lam (r(X_1) - c)

Its fixed point is v_base + lam Cov_theta(r, I' | X_t), while the tilt is v_base + int_0^lam Cov_a(r, I' | X_t) da along
p_a ~ p_base exp(a r).  The covariance at the end in place of its mean over the way: right to first order in lam, exact
for linear r on Gaussians, too little for concave r, too much for convex r.  The expected pull on v is -(1 + E[f | X_t])
(v - ...): where lam (E[r | X_t] - c) < -1 it pushes away, so lam times the range of r within a prompt has to be small.

**The exact sibling.**  Under p* the weight exp(-lam r) gives back the base: E*[(I' - v_base) exp(-lam r) | X_t] is
proportional to E_base[I' - v_base | X_t] = 0.  So for X_1 ~ p* and any constant c

    y = x1_base + f (X_1 - x1_base),         f = 1 - exp(-lam (r(X_1) - c)),         E*[y | X_t] = x1_hat*(X_t)

The tilt is a fixed point, with no first order about it.  The price is the variance of exp(-lam r), which at small t may
be infinite (quadratic r with lam v >= 1, v the base's variance): unclipped it then diverges, clipped it is biased.
Derived here, not published; experimental.

c is a mean of rewards of the same prompt (`reward_groups`); it moves no fixed point, only the variance.

X_1 comes from the sampler's chain, and few steps of an ODE end in too narrow a law (N(0, 1), rectified flow: variance
.77 / .88 / .94 at K = 10 / 20 / 40).  The covariance that is regressed on, and the tilt with it, is short by as much.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.losses.end_points import EndPointRegression, NoisedEnds
from lightning_tilt.losses.reward_groups import RewardGroups
from lightning_tilt.losses.times import TimeWeight
from lightning_tilt.process import expand
from lightning_tilt.trajectory import Trajectory

__all__ = [
    "Baseline",
    "ExactReinforceAdjointMatching",
    "ReinforceAdjointMatching",
    "exact_reinforce_factor",
    "reinforce_target",
]

Baseline = Literal["others", "mean", "none"]
"""What c is: the mean of the prompt's other samples, of all of them, or 0."""


def reinforce_target(start: Tensor, f: Tensor, x1: Tensor, x1_hat: Tensor) -> Tensor:
    """`start + f (X_1 - x1_hat)`.

    Args:
        start: what the target is for f = 0, (P, *shape).
        f: how far it goes towards the end point, (P,).
        x1: end points, (P, *shape).
        x1_hat: what they are compared with, (P, *shape).

    Returns:
        (P, *shape)
    """
    return start + expand(f, x1) * (x1 - x1_hat)


def exact_reinforce_factor(gain: Tensor, clip: float | None = None) -> Tensor:
    """`1 - exp(-gain)` of `gain = lam (r - c)`, the exponential at most `clip`: (N,) -> (N,).

    Example:
        >>> exact_reinforce_factor(torch.tensor([0.0, -10.0]), clip=3.0).tolist()
        [0.0, -2.0]
    """
    weight = torch.exp(-gain)
    return 1 - (weight if clip is None else weight.clamp(max=clip))


class _Reinforced(EndPointRegression):
    """What both share: a baseline, a factor f a sample, and targets that start at the base's x1_hat."""

    sources: ClassVar[tuple[str, ...]] = ("bergmeister2026reinforce",)
    needs_reward_gradient: ClassVar[bool] = False
    needs_memoryless: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        baseline: Baseline = "others",
        time_weight: TimeWeight = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, time_weight=time_weight, **kwargs)
        if baseline not in get_args(Baseline):
            raise ValueError(f"baseline is one of {get_args(Baseline)}, not {baseline!r}")
        self.baseline: Baseline = baseline

    @abstractmethod
    def factor(self, gain: Tensor) -> Tensor:
        """The f of `gain = lam (r - c)`, (N,) -> (N,)."""

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """Compare each sample with the others of its prompt."""
        trajectory = super().prepare(trajectory)
        gain = trajectory.lam * (trajectory.reward.double() - self._baseline(trajectory))
        gain = torch.where(trajectory.weight > 0, gain, 0.0)  # one that is left out must not overflow either
        return replace(trajectory, advantage=self.factor(gain).to(trajectory.reward))

    def target(self, points: NoisedEnds) -> Tensor:
        """The base's x1_hat, to which `completed` adds the way towards the end point."""
        with self.predictor.base() as base:
            return self.x1_hat(base, points)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """The regression, and how large its factors were."""
        assert trajectory.advantage is not None
        loss, logged = super().loss(trajectory)
        f = trajectory.advantage[trajectory.weight > 0]
        return loss, logged | {"factor_max": f.abs().max() if len(f) else f.new_zeros(())}

    def _baseline(self, trajectory: Trajectory) -> Tensor:
        if self.baseline == "none":
            return torch.zeros_like(trajectory.reward, dtype=torch.float64)
        groups = RewardGroups.of(self, trajectory)
        return groups.means(groups.reward, others=self.baseline == "others")[groups.mine]


class ReinforceAdjointMatching(_Reinforced):
    """Reinforce Adjoint Matching as a mixin: the tilt to first order in lam, without the reward's gradient.

    Biased: see `bias` and the module's opening. It needs neither noise nor a path, so a few steps of an ODE serve
    (`DDIM(ddim_eta=0)`, `base_last_step: false`); each end point is worth several `noisings`. Two network forwards and
    one backward a supervised pair.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        baseline: what a reward is compared with: the mean of the "others" of its prompt; their "mean" with itself
            among them, as published, which shrinks the effective lam by 1/n; or "none", 0.
        time_weight: as in `EndPointRegression`; "uniform", since the variance of "control" is infinite at the data.
        args: passed on to the host.
        kwargs: passed on to the host.

    Raises:
        ValueError: at set-up, if path weights are asked for: the covariance is one of the model's own samples.
    """

    bias: ClassVar[str | None] = (
        "reaches v_base + lam Cov_theta(r, I' | x), the tilt to first order in lam: under-tilted for concave rewards, "
        "over-tilted for convex ones"
    )

    def setup(self, stage: str) -> None:
        """Refuse path weights."""
        super().setup(stage)
        if stage == "fit" and self.path_weights != "none":
            raise ValueError(
                f"{type(self).__name__} regresses on a covariance of the model's own samples, which path weights would "
                "make another law's: path_weights: none, or ExactReinforceAdjointMatching, which takes them"
            )

    def factor(self, gain: Tensor) -> Tensor:
        """`f = lam (r - c)`, (N,)."""
        return gain

    def completed(self, points: NoisedEnds, y: Tensor, x1_hat: Tensor) -> Tensor:
        """`x1_base + f (X_1 - x1_hat)`, (P, *shape)."""
        assert points.advantage is not None
        return reinforce_target(y, points.advantage, points.x1, x1_hat)


class ExactReinforceAdjointMatching(_Reinforced):
    """The sibling of Reinforce Adjoint Matching whose fixed point is the tilt. Experimental.

    Consistent on policy as long as nothing is clipped and the variance is finite: watch `clipped_fraction`. What it
    needs and costs is what `ReinforceAdjointMatching` needs and costs. With `path_weights` it is consistent for samples
    of any model, not at the tilt alone.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        factor_clip: largest exp(-lam (r - c)) of a sample; None: no bound. It biases: samples of low reward push the
            model away less than they should, and the model stays between base and tilt.
        baseline: as in `ReinforceAdjointMatching`.
        time_weight: likewise.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    bias: ClassVar[str | None] = "where factor_clip cuts exp(-lam (r - c)), towards the base; none while it does not"

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        factor_clip: float | None = 10.0,
        baseline: Baseline = "others",
        time_weight: TimeWeight = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, baseline=baseline, time_weight=time_weight, **kwargs)
        if factor_clip is not None and factor_clip <= 1:
            raise ValueError(f"factor_clip bounds exp(-lam (r - c)), which is 1 at r = c: above 1, not {factor_clip}")
        self.factor_clip = factor_clip

    def factor(self, gain: Tensor) -> Tensor:
        """`f = 1 - exp(-lam (r - c))`, clipped, (N,)."""
        return exact_reinforce_factor(gain, self.factor_clip)

    def completed(self, points: NoisedEnds, y: Tensor, x1_hat: Tensor) -> Tensor:
        """`x1_base + f (X_1 - x1_base)`, (P, *shape)."""
        assert points.advantage is not None
        return reinforce_target(y, points.advantage, points.x1, y)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """The regression, and the fraction of samples that were clipped."""
        assert trajectory.advantage is not None
        loss, logged = super().loss(trajectory)
        if self.factor_clip is not None:
            clipped = (trajectory.advantage <= 1 - self.factor_clip) & (trajectory.weight > 0)
            logged["clipped_fraction"] = clipped.sum() / (trajectory.weight > 0).sum().clamp(min=1)
        return loss, logged
