"""Maximise one reward under a bound on the mean of another, by a multiplier that is learnt.

    max E[r] - KL/lam   subject to   E[c] >= c_0          Lagrangian    r_mu(x) = r(x) + mu (c(x) - c_0),   mu >= 0

For a given mu the optimum is the tilt by lam r_mu.  The dual function D(mu) = log Z_mu/lam is convex with the slope
D'(mu) = E_mu[c] - c_0, so the multiplier goes down it (dual ascent, since the mean of c follows mu),

    mu <- max(0, mu + step (c_0 - mean c))                once a fresh training rollout

with the mean over the good samples of all processes.  Where it settles either mu = 0 and the bound holds by itself, or
E[c] = c_0.  Since mu (c - c_0) has mean 0 there, the mean of r_mu is that of r.  For a Gaussian base N(m, C) and
r = b.x, c = a.x the multiplier is known: E_mu[c] = a.m + lam a'C(b + mu a).

`step` is in units of r over c^2.  D is curved by lam Var_mu[c], so a step above 2/(lam Var[c]) cannot settle even if
the model follows at once; a model that follows over tens of updates wants far less.  A bound that the model cannot
reach lets mu grow for ever: give it a `limit`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.rewards.combined import Combined

__all__ = ["Constraint"]


class Constraint(Combined):
    """`r + mu (c - c_0)`; mu is a buffer, so that a checkpoint holds it and a resumed run goes on with it.

    Logged are `train/constraint_objective` and `train/constraint_value`, the means of r and c over the last fresh
    rollout, and `train/constraint_multiplier`, the mu that it was scored with.  Validation and reports use mu as it is
    and leave it alone.

    Args:
        reward: r, what is maximised.
        constraint: c, whose mean is bounded below; to bound it above, give the negative of both.
        at_least: c_0.
        step: how far mu moves for a mean of c that is off by 1.
        start: the mu of the first rollout.
        limit: the largest mu.

    Raises:
        ValueError: for a bound that is not finite, a step that is not positive, or a start outside of [0, limit].

    Example:
        >>> from lightning_tilt.rewards import LinearReward
        >>> both = Constraint(LinearReward([1.0, 0.0]), LinearReward([0.0, 1.0]), at_least=0.5, step=2.0)
        >>> logged = both.learn({"constraint_value": torch.tensor(0.25)})
        >>> float(logged["constraint_multiplier"]), float(both.multiplier)
        (0.0, 0.5)
        >>> both.score(torch.tensor([[1.0, 1.0]]), None).tolist()
        [1.25]
    """

    multiplier: Tensor

    def __init__(
        self,
        reward: Reward,
        constraint: Reward,
        at_least: float,
        step: float = 0.1,
        start: float = 0.0,
        limit: float = math.inf,
    ) -> None:
        super().__init__({"constraint_objective": reward, "constraint_value": constraint})
        if not math.isfinite(at_least):
            raise ValueError(f"Constraint: at_least is a finite number, not {at_least}")
        if not 0 < step < math.inf:
            raise ValueError(f"Constraint: step is a positive number, not {step}")
        if not (0 <= start <= limit and math.isfinite(start)):
            raise ValueError(f"Constraint: start is between 0 and limit {limit}, not {start}")
        self.at_least, self.step, self.limit = at_least, step, limit
        self.register_buffer("multiplier", torch.tensor(float(start), dtype=torch.float64))

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Always: mu does."""
        return True

    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
        """The Lagrangian, r and c; see `Reward.measure`."""
        (r, c), figures = self.ask(images, prompts)
        total = r + self.multiplier.to(r) * (c - self.at_least)
        return total, {"constraint_objective": r.detach(), "constraint_value": c.detach()} | figures

    def learn(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step of dual ascent.

        Args:
            means: of r and c over the good samples of all processes, and of what the parts told.

        Returns:
            The multiplier before the step, and what the parts return.
        """
        before = self.multiplier.clone()
        violation = self.at_least - means["constraint_value"].to(before)
        # In place: the buffer stays the one that optimisers, DDP and a checkpoint know.
        with torch.no_grad():
            self.multiplier.add_(self.step * violation).clamp_(0.0, self.limit)
        return {"constraint_multiplier": before} | super().learn(means)
