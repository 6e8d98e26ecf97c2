"""GRPO on the Gaussian transitions of a chain (Flow-GRPO, 2505.05470; DanceGRPO, 2505.07818).

A group is the samples of one prompt.  With the step's ratio to the law that drew the path, rho_k = exp(l_k - l_k^v),

    L = E sum_k [ -min( rho_k A_k, clip(rho_k, 1 - clip, 1 + clip) A_k ) + q_k ]           q_k = |u_k|^2/2, a step's KL

in units in which the KL has factor one: lam is one over the published beta.  Two ways to weigh the penalty:

    published    A_k = lam (r - mean r)                            the same for all steps
    exact        A_k = lam r - sum_{j>k} q_j^v - mean              `reinforce`: at clip: null, on policy, it is that

The published penalty is differentiated step by step, at states that are held: it forgets that the noise of a step also
moves the KL still to come.  It does not reach the tilt: for a base N(0, 1) and r = -(x - 1)^2/2, with K = 100 steps,

    lam                    .5      2      8
    published penalty     .285   .545   .753        mean of the fixed point
    the tilt              .322   .656   .884

Dividing the advantage by the group's std of r turns lam into lam/std: another multiplier a prompt, and one that grows
as samples agree.  It makes rewards of unknown scale comparable; it does not tilt by lam.  Means leave the sample itself
out; with it, the advantage is short by 1 - 1/n, and lam with it.
"""

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.losses.path_controls import PathControls
from lightning_tilt.losses.reinforce import reward_to_go
from lightning_tilt.trajectory import Trajectory

__all__ = ["GRPO", "Penalty", "clipped_terms"]

Penalty = Literal["published", "exact"]
"""How the KL is weighed: step by step, or with what is still to come."""

_SMALL = 1e-6  # of a std that is divided by


def clipped_terms(advantage: Tensor, log_rho: Tensor, clip: float | None) -> Tensor:
    """`-min(rho A, clip(rho, 1 - clip, 1 + clip) A)`, elementwise.

    Args:
        advantage: A, without gradient.
        log_rho: log ratio of the model's density of the step to the rollout's, with gradient.
        clip: half the width of the interval; None does not clip.
    """
    rho = log_rho.exp()
    if clip is None:
        return -rho * advantage
    return -torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)


class GRPO(PathControls):
    """Group-relative policy optimisation with the exact KL of every step.

    Consistent on policy with `penalty: exact` and `divide_by_std: false`; with the published penalty or the division it
    does not reach the tilt (see the module). With several updates a rollout (`sampler.rollout_every`, `buffer_size: 1`)
    the clipped ratio bounds the error, which is one of a trust region. Needs memoryless transitions, at least two
    samples a prompt, no reward gradient. Costs 2 forwards and 1 backward a pair beside the rollout, 1 forward more if
    checkpointed.

    Args:
        lam: multiplier of the reward, one over the published beta; with `divide_by_std`, without unit.
        penalty: "exact" counts the KL still to come in the advantage; "published" leaves it out, and is biased.
        divide_by_std: divide rewards by their standard deviation in the group: lam becomes lam/std.
        clip: half the width of the interval that a step's ratio is clipped to; None does not clip.
        args: passed on to the host.
        kwargs: passed on to the host.

    Raises:
        ValueError: for an unknown penalty, or a clip outside (0, 1).
    """

    sources: ClassVar[tuple[str, ...]] = ("liu2025flowgrpo", "xue2025dancegrpo")
    bias: ClassVar[str | None] = (
        "penalty: published forgets the KL still to come and falls short of the tilt; divide_by_std tilts by lam/std; "
        "clipped ratios of replayed paths are those of a trust region. With penalty: exact and divide_by_std: false, "
        "on policy, there is none."
    )

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        penalty: Penalty = "exact",
        divide_by_std: bool = False,
        clip: float | None = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if penalty not in get_args(Penalty):
            raise ValueError(f"penalty is one of {get_args(Penalty)}, not {penalty!r}")
        if clip is not None and not 0 < clip < 1:
            raise ValueError(f"clip lies between 0 and 1, or is null for none, not {clip}")
        self.penalty: Penalty = penalty
        self.divide_by_std = divide_by_std
        self.clip = clip

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples; `clipped_fraction` is the share of ratios outside of the interval."""
        chain, weight = self.sampler.chain(self), trajectory.weight
        good = self.mean_good(weight)
        drawn, steps = self.drawn_terms(chain, trajectory), self.model_terms(chain, trajectory)
        log_rho = (steps.log_ratio - drawn.log_ratio).where(weight > 0, 0.0)
        terms = (clipped_terms(self._advantage(trajectory, drawn.kl), log_rho, self.clip) + steps.kl).sum(0)
        logged = {"kl": (weight * drawn.kl.sum(0)).sum() / good}
        if self.clip is not None:
            outside = (log_rho.detach().exp() - 1).abs() > self.clip
            logged["clipped_fraction"] = outside.to(weight).mean()
        return (weight * terms).sum() / good, logged

    def _advantage(self, trajectory: Trajectory, kl: Tensor) -> Tensor:
        """A_k of each step and sample, (J, N), or (1, N) where it is the same for all steps."""
        gain = trajectory.lam * trajectory.reward
        if self.divide_by_std:
            mean, n = self.group_means(trajectory, trajectory.reward)
            square, _ = self.group_means(trajectory, (trajectory.reward - mean) ** 2)
            gain = gain / ((square * n / (n - 1).clamp(min=1)).sqrt() + _SMALL)
        return self.centred(trajectory, gain[None] if self.penalty == "published" else reward_to_go(gain, kl))
