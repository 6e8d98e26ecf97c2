"""The twist: what it says of states, and how it moves them.

psi_k = t_k^power lam r(decode(x1_hat(x, t_k)))   or   ... r(decode(x))   or   0            psi_0 = 0,   psi_K = lam r
u_k   = std_k t_{k+1}^power lam grad r  +  (m_tuned - m_base)/std_k                    0 where not asked for
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.evaluations import slices
from lightning_tilt.interfaces.not_finite import named
from lightning_tilt.interfaces.predictor import Predictor
from lightning_tilt.interfaces.reward import Reward
from lightning_tilt.transition import control

__all__ = ["Twist", "Twisted"]

Twist = Literal["x1_hat", "state", "none"]
"""What says early how promising a particle is."""


@dataclass(frozen=True)
class Twisted:
    """A chain under a twist.

    Attributes:
        chain: the base's and the tuned model's kernels.
        predictor: the model.
        reward: what is maximised.
        condition: the condition of each of the N particles.
        lam: the multiplier.
        twist: what the reward is asked about before the end.
        power: psi is multiplied by t^power.
        guided: move along the twist's gradient.
        tuned: move by the tuned model's mean in place of the base's.
        scale: classifier-free guidance.
        micro_batch: particles in one network call; None: all.
        told: takes what is said of numbers that are not finite, once of the same prompts; None: they are an error.
    """

    chain: Chain
    predictor: Predictor
    reward: Reward
    condition: Condition
    lam: float
    twist: Twist
    power: float
    guided: bool
    tuned: bool
    scale: float
    micro_batch: int | None
    told: dict[str, str] | None = None

    def look(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """psi_k (N,), the base's mean and the control u of F (N, *shape) at the states of step k."""
        parts = zip(*self._looks(x, k), strict=True)
        psi, mean, u = (torch.cat(part) for part in parts)
        return psi, mean, u

    def _looks(self, x: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        std = self.chain.stds[k].to(x)
        noisy = bool(std > 0)
        for i in slices(len(x), self.micro_batch):
            mean, r, gradient = self._base(x[i], k, i, guided=self.guided and noisy)
            u = std * self.lam * self._level(k + 1) * gradient
            if self.tuned and noisy:
                tuned = self.chain.mean(self.predictor, self._condition(i), self.scale)(x[i], k)
                u = u + control(tuned, mean, std)
            yield self.lam * self._level(k) * r.double(), mean, u

    def _base(self, x: Tensor, k: int, i: slice, guided: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The base's mean, and the reward that the twist sees with its gradient, 0 where it is not asked for."""
        chain, condition, twist = self.chain, self._condition(i), self.twist
        x = x.detach().requires_grad_(guided)
        with self.predictor.base() as base:
            with torch.set_grad_enabled(guided and twist == "x1_hat"):
                output = chain.output(base, x, k, condition, self.scale, unconditional_gradient=True)
                t = chain.t[k].to(x.device).expand(len(x))
                x1_hat = chain.process.interpret(output, base.prediction_type, x, t).x1_hat
            mean = chain.kernel(base, output.detach(), x.detach(), k).mean
        if not guided and (twist == "none" or self._level(k) == 0):
            return mean, x.new_zeros(len(x)), torch.zeros_like(x)
        with torch.set_grad_enabled(guided):
            r = self.score(x1_hat if twist == "x1_hat" else x, k, i)
        psi, good = torch.where(r.isfinite(), r, 0.0).detach(), r.isfinite()
        if not guided:
            return mean, psi, torch.zeros_like(x)
        if twist == "x1_hat":
            chain.evaluations.vjp += len(x) * (1 if self.scale == 1.0 else 2)
        (gradient,) = torch.autograd.grad(r, x, torch.ones_like(r), materialize_grads=True)
        # Where the reward itself is bad that has been said.
        good = good & self._finite(torch.where(good, gradient.flatten(1).sum(1), 0.0), k, i, "gradient of the reward")
        gradient = torch.where(good.view(-1, *(1,) * (x.ndim - 1)), gradient, 0.0)
        return mean, psi, self.predictor.project(gradient)

    def score(self, x: Tensor, k: int, i: slice) -> Tensor:
        """The rewards of decoded states, (B,), checked; what is not finite has been told."""
        prompts = self.condition.prompts
        r = self.reward.score(self.predictor.decode(x), None if prompts is None else prompts[i])
        self.chain.evaluations.reward += len(x)
        if r.shape != (len(x),):
            raise ValueError(
                f"{type(self.reward).__name__}.score returned shape {tuple(r.shape)} for {len(x)} samples; it should "
                f"be ({len(x)},): one number a sample"
            )
        if x.requires_grad and torch.is_grad_enabled() and not r.requires_grad:
            raise TypeError(
                f"{type(self.reward).__name__}.score has no gradient although is_differentiable is True: remove "
                "no_grad, detach or numpy from it, or set is_differentiable = False"
            )
        self._finite(r.detach(), k, i, "reward")
        return r

    def _finite(self, values: Tensor, k: int, i: slice, what: str) -> Tensor:
        """Which values are finite, (B,); the others are an error, or told of."""
        finite, prompts = torch.isfinite(values), self.condition.prompts
        bad = [(i.start or 0) + j for j in (~finite).nonzero().flatten().tolist()]
        if bad:
            who = named(bad, prompts)
            message = (
                f"the {what} {type(self.reward).__name__} is not finite for {len(bad)} of {len(values)} particles at "
                f"step {k} of {self.chain.steps} ({who})"
            )
            if self.told is None:
                raise FloatingPointError(f"{message}: steering weighs by it; mend the reward")
            self.told.setdefault(f"{what} {who if prompts else ''}", message)
        return finite

    def _level(self, k: int) -> float:
        """The factor of lam r in psi_k: 0 at the start, 1 at the end."""
        if k == 0 or k == self.chain.steps:
            return float(k > 0)
        return 0.0 if self.twist == "none" else float(self.chain.t[k]) ** self.power

    def _condition(self, i: slice) -> Condition:
        return self.condition[torch.arange(self.condition.size)[i]]
