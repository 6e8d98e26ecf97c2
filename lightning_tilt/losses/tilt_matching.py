"""Tilt Matching (2512.21829): from the base to the tilt by small steps of the multiplier, no reward gradient.

    p_a ~ p_base exp(a r),    a = 0 ... lam,        b_a(x) = E_a[I' | X_t = x],    I' = alpha' X_1 + beta' eps

The current model is taken as b_a: it is rolled out, and a copy of it is kept.  Esscher's formula says where to go,

    b_{a+h}(x) = E_a[I' exp(h r(X_1)) | X_t = x] / E_a[exp(h r(X_1)) | X_t = x]

With c the mean reward and w = exp(h r)/mean exp(h r) over the other samples of the prompt (`reward_groups`), the
regressions are, in the currency of x1_hat and with x1_a the copy's,

    explicit   y = x1_a + h (r - c) (X_1 - x1_a)                      b_{a+h} to first order in h
    implicit   y = stop_gradient[ x1_a + (w - 1) (X_1 - x1_hat) ]     exact in h, if x1_a is E_a[X_1 | X_t]
    weighted   y = X_1, weight w a sample                             exact in h; needs no copy; the noisiest

A reward that is constant within a prompt has c = r and w = 1: nothing changes.  Implicit amplifies whatever x1_a is
wrong by 1/E[w | X_t].  Explicit Tilt Matching is Reinforce Adjoint Matching annealed, and has no bias but O(h).

**Levels.**  At each fresh rollout (if the model moved since the last one) the model is declared to be at the level that
it was trained towards, a <- a + h, and a new h is chosen: the largest for which the ESS of exp(h r), as a fraction,
is still `level_ess`, a mean over the prompts, and never beyond lam.  So `sampler.rollout_every` is the number of
updates a level is given, and what a level misses is not made good by the next.  At a = lam there is nothing to regress
on - explicit and implicit would distil the model into itself, weighted would fit it to its own samples, drifting - so
training stops there, before an update of that level.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_tilt.interfaces import LamSchedule, Predictor
from lightning_tilt.losses.end_points import EndPointRegression, NoisedEnds
from lightning_tilt.losses.reinforce_adjoint_matching import reinforce_target
from lightning_tilt.losses.reward_groups import RewardGroups
from lightning_tilt.losses.times import TimeWeight
from lightning_tilt.shards import dealt, need_whole
from lightning_tilt.trajectory import Trajectory

__all__ = ["TiltMatching", "TiltVariant", "holding", "tilt_weights"]

TiltVariant = Literal["explicit", "implicit", "weighted"]
"""Which of the three regressions."""

_BISECTIONS = 40


def tilt_weights(groups: RewardGroups, h: float) -> Tensor:
    """`w = exp(h r)/mean exp(h r)`, the mean over the other good samples of the group: (n,).

    The mean of the others is independent of X_1, so that E[w (X_1 - x1_hat) | X_t] = 0 has the solution b_{a+h} at any
    number of samples; with the mean of all n it is short of it by the part 1/n.
    """
    weight = torch.exp(h * (groups.reward - groups.means(groups.reward, others=False)))  # any number will do for c
    return weight / groups.means(weight)


@contextmanager
def holding(predictor: Predictor, parameters: dict[str, Tensor]) -> Iterator[Predictor]:
    """The predictor with other values of its trained parameters, for the length of a `with` block without gradient.

    The storage is exchanged, nothing is copied: graphs that were built before the block still find their values.
    """
    trained = predictor.trained_parameters()
    own = {name: p.data for name, p in trained.items()}
    try:
        for name, p in trained.items():
            p.data = dealt(parameters[name], p).to(p.dtype)
        yield predictor
    finally:
        for name, p in trained.items():
            p.data = own[name]


class TiltMatching(EndPointRegression):
    """Tilt Matching as a mixin. Consistent as h -> 0 (explicit), or at any h (implicit, weighted).

    It needs neither the reward's gradient, nor noise, nor a path: a few steps of an ODE serve (`DDIM(ddim_eta=0)`,
    `base_last_step: false`); each end point is worth several `noisings`. Explicit and implicit cost two network
    forwards and one backward a supervised pair, weighted one of each. Training ends when `lam` is reached; `max_steps`
    only bounds it, and `train/tilt_level` says how far it came.

    Args:
        lam: multiplier of the reward, positive, in units of one over the reward. It grows by levels: no warm-up.
        variant: "explicit", "implicit" or "weighted"; see the module's opening.
        level_ess: ESS of exp(h r) that a step of the multiplier leaves, as a fraction in (0, 1); larger: more levels,
            each with less noise and, for explicit, less bias.
        time_weight: as in `EndPointRegression`; "uniform", since the variance of "control" is infinite at the data.
        args: passed on to the host.
        kwargs: passed on to the host.

    Raises:
        ValueError: for a schedule with a warm-up, a multiplier that is not positive, an unknown variant; at set-up for
            path weights, a buffer of several rollouts or `min_steps`.
    """

    sources: ClassVar[tuple[str, ...]] = ("potaptchik2025tilt",)
    on_policy: ClassVar[bool] = False  # a level is its rollout's
    needs_reward_gradient: ClassVar[bool] = False
    needs_memoryless: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        variant: TiltVariant = "explicit",
        level_ess: float = 0.9,
        time_weight: TimeWeight = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, time_weight=time_weight, **kwargs)
        if variant not in get_args(TiltVariant):
            raise ValueError(f"variant is one of {get_args(TiltVariant)}, not {variant!r}")
        if self.lam.warmup > 0:
            raise ValueError(
                f"{type(self).__name__} raises the multiplier level by level: give lam as a number, without a warm-up"
            )
        if self.lam.lam <= 0:
            raise ValueError(f"{type(self).__name__} goes from 0 up to lam, which must be positive: {self.lam.lam}")
        if not 0 < level_ess < 1:
            raise ValueError(f"level_ess is a fraction in (0, 1), not {level_ess}")
        self._variant: TiltVariant = variant
        self.level_ess = level_ess
        self.tilt_level, self.tilt_goal = 0.0, 0.0  # a, a + h
        self._level_step = -1  # updates that had been made when the level began
        self._copy: dict[str, Tensor] = {}  # the trained parameters of b_a

    @property
    def variant(self) -> str | None:
        """Which of the three regressions: part of the report's name of the loss."""
        return self._variant

    def setup(self, stage: str) -> None:
        """Refuse what has no meaning for levels."""
        super().setup(stage)
        if stage != "fit":
            return
        name, sampler = type(self).__name__, self.sampler
        need_whole(self.trainer, name)
        if self.path_weights != "none":
            raise ValueError(f"{name}: path weights belong to lam, and a level is below it: path_weights: none")
        if sampler.buffer_size > 1:
            raise ValueError(f"{name}: a level is one rollout, and older ones are of other levels: buffer_size: 1")
        if self.trainer.fit_loop.min_steps:
            raise ValueError(f"{name} ends where lam is reached: leave trainer.min_steps out")

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """Begin a level, if the model has moved since the last one, and compare the samples of each prompt."""
        trajectory = super().prepare(trajectory)
        groups = RewardGroups.of(self, trajectory)
        if self.trainer.global_step > self._level_step:
            self._begin_level(groups)
        h = self.tilt_goal - self.tilt_level
        if self._variant == "explicit":
            advantage = h * (groups.reward - groups.means(groups.reward))
        else:
            advantage = tilt_weights(groups, h) - 1
        advantage = torch.where(groups.good > 0, advantage, 0.0)[groups.mine].to(trajectory.reward)
        importance = 1 + advantage if self._variant == "weighted" else None
        return replace(trajectory, advantage=advantage, importance=importance)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Stop where lam is reached, before the batch is trained on."""
        response = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        if self.tilt_level < self.lam.lam:
            return cast(int | None, response)
        self.trainer.should_stop = True
        return -1

    def on_train_end(self) -> None:
        """Say so, if lam was not reached."""
        super().on_train_end()  # type: ignore[misc]
        if self.tilt_goal < self.lam.lam:
            rank_zero_info(
                f"{type(self).__name__} ends at tilt level {self.tilt_goal:.4g} of lam = {self.lam.lam:.4g}: the model "
                "is tilted by that much. Give it more updates, a smaller rollout_every or a smaller level_ess."
            )

    def target(self, points: NoisedEnds) -> Tensor:
        """x1_a, or the whole target where the model's own x1_hat is not in it, (P, *shape)."""
        if self._variant == "weighted":
            return points.x1
        assert points.advantage is not None
        with holding(self.predictor, self._copy) as b_a:
            x1_a = self.x1_hat(b_a, points)
        return reinforce_target(x1_a, points.advantage, points.x1, x1_a) if self._variant == "explicit" else x1_a

    def completed(self, points: NoisedEnds, y: Tensor, x1_hat: Tensor) -> Tensor:
        """Implicit: `x1_a + (w - 1) (X_1 - x1_hat)`."""
        if self._variant != "implicit":
            return y
        assert points.advantage is not None
        return reinforce_target(y, points.advantage, points.x1, x1_hat)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """The regression, and the level: `tilt_level` a and `tilt_goal` a + h."""
        loss, logged = super().loss(trajectory)
        level = {"tilt_level": self.tilt_level, "tilt_goal": self.tilt_goal}
        return loss, logged | {name: torch.tensor(value) for name, value in level.items()}

    def carried(self) -> dict[str, Any]:
        """The level, and the copy that its targets come from."""
        level = {"level": self.tilt_level, "goal": self.tilt_goal, "step": self._level_step, "copy": self._copy}
        return {**super().carried(), "tilt_matching": level}

    def carry(self, carried: dict[str, Any]) -> None:
        """Go on with the level of a checkpoint."""
        super().carry(carried)
        if "tilt_matching" not in carried:
            raise ValueError(
                f"the checkpoint is of another loss: it has no tilt level for {type(self).__name__} to go on from; "
                "start a new fit, or give it the loss that it was saved with"
            )
        saved = carried["tilt_matching"]
        self.tilt_level, self.tilt_goal, self._level_step = saved["level"], saved["goal"], saved["step"]
        self._copy = dict(saved["copy"])

    def _begin_level(self, groups: RewardGroups) -> None:
        """`a <- a + h`, a copy of the model, and the next h."""
        self.tilt_level, self._level_step = self.tilt_goal, self.trainer.global_step
        if self._variant != "weighted":
            self._copy = {name: p.detach().clone() for name, p in self.predictor.trained_parameters().items()}
        room = self.lam.lam - self.tilt_level
        low, high = 0.0, room
        if self._ess(groups, room) >= self.level_ess:
            self.tilt_goal = self.lam.lam
            return
        for _ in range(_BISECTIONS):
            h = (low + high) / 2
            low, high = (h, high) if self._ess(groups, h) >= self.level_ess else (low, h)
        self.tilt_goal = self.tilt_level + low

    def _ess(self, groups: RewardGroups, h: float) -> float:
        """ESS of exp(h r) as a fraction, the mean over the groups of all processes."""
        total, n = self.mean_over_ranks(groups.ess(h)).tolist()
        return total / n if n > 0 else 1.0
