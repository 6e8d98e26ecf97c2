"""Sequential Monte Carlo in the chain: who is kept, and what log Z comes of it.

move         x_{k+1} = m_k + std_k (u_k + z_k)           log w -= psi_k + u_k . z_k + |u_k|^2/2
arrive       log w += psi_{k+1}
resample     where ESS(w) < threshold: particles by their weights, then all log w = log mean w

Sources: the twisted diffusion sampler 2306.17775, Feynman-Kac steering 2501.06848; SMC: Del Moral, Doucet, Jasra 2006.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.evaluations import evaluating, slices
from lightning_tilt.identities import Estimate, Resampling, ess_rows, log_partition, resample, stratified
from lightning_tilt.interfaces.cited import Cited
from lightning_tilt.interfaces.predictor import Predictor
from lightning_tilt.interfaces.reward import Reward
from lightning_tilt.steering.twist import Twist, Twisted
from lightning_tilt.transition import path_log_ratio

__all__ = ["SMC", "Steered"]


@dataclass(frozen=True)
class Steered:
    """What a run left: C prompts of P particles, N = C P, those of one prompt together.

    Attributes:
        end: X_K, (N, *shape).
        log_w: log weights of the end points, (N,), float64; within a prompt they are comparable across replicates;
            -inf where the reward is not finite.
        log_z: log E_base[exp(lam r)], the mean over prompts; its `n` counts replicates, 0 without a good particle.
        ess: of each replicate on arrival at k = 1 .. K, before it is resampled, as a fraction, (K, C, replicates).
        resampled: which were resampled there, (K, C, replicates), bool; never at K.
        reward: r(X_K), (N,).
        index: the prompt of each particle, (N,), integer.
        ancestor: which particle at k = 0 each descends from, (N,), integer; the fewer they are, the more are cousins.
    """

    end: Tensor
    log_w: Tensor
    log_z: Estimate
    ess: Tensor
    resampled: Tensor
    reward: Tensor
    index: Tensor
    ancestor: Tensor


@dataclass(frozen=True)
class SMC(Cited):
    """Sequential Monte Carlo steering: particles, when they are resampled, and what moves them.

    Args:
        particles: particles for each prompt, all replicates together.
        replicates: independent runs that the particles are split into; their spread gives log Z its standard error,
            which is itself a rough number from a few of them: 16 and more where it matters.
        resample_below: resample a replicate whose effective sample size falls under this fraction; 0: never.
        kind: how resampling draws, "systematic" or "stratified".
        twist: "x1_hat" judges a particle by the reward of the predicted end point, "state" by that of the state
            itself, "none" not before the end.
        power: how early the twist counts: it is multiplied by t^power; 0: in full from the first step on.
        guided: move particles along the twist's gradient; needs a differentiable reward.
        proposal: whose mean moves them, the "base"'s or the "tuned" model's; the weights refer to the base.
        scale: classifier-free guidance of the model; 1: none.
        micro_batch: particles in one network call; null: all.

    Raises:
        ValueError: if a number is out of range, a name unknown, or "none" is to guide.
    """

    sources: ClassVar[tuple[str, ...]] = ("wu2023practical", "singhal2025general", "delmoral2006sequential")
    particles: int = 64
    replicates: int = 4
    resample_below: float = 0.5
    kind: Resampling = "systematic"
    twist: Twist = "x1_hat"
    power: float = 1.0
    guided: bool = False
    proposal: Literal["base", "tuned"] = "base"
    scale: float = 1.0
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if self.replicates < 1 or self.particles < 1 or self.particles % self.replicates:
            raise ValueError(
                f"{self.particles} particles cannot be split into {self.replicates} equal replicates: particles must "
                "be a positive multiple of replicates"
            )
        if not 0 <= self.resample_below <= 1:
            raise ValueError(f"resample_below is a fraction of the particles in [0, 1], not {self.resample_below}")
        if self.power < 0:
            raise ValueError(f"power must not be negative, not {self.power}")
        for name, known in (("kind", Resampling), ("twist", Twist), ("proposal", Literal["base", "tuned"])):
            if self.__dict__[name] not in get_args(known):
                raise ValueError(f"unknown {name} {self.__dict__[name]!r}; known are {', '.join(get_args(known))}")
        if self.guided and self.twist == "none":
            raise ValueError("guided: true follows the gradient of the twist, and twist: none has none: use x1_hat")

    @torch.no_grad()
    def run(
        self,
        chain: Chain,
        predictor: Predictor,
        reward: Reward,
        condition: Condition,
        noise: Tensor,
        lam: float,
        *,
        uniforms: Tensor,
        bad: list[str] | None = None,
    ) -> Steered:
        """Steer C times `particles` particles through the chain.

        Args:
            chain: the chain of the model; it need not be memoryless.
            predictor: the model.
            reward: what is maximised.
            condition: the C conditions.
            noise: X_0 and z_0 ... z_{K-1}, (K + 1, C particles, *shape), the particles of a condition together.
            lam: the multiplier.
            uniforms: numbers in [0, 1) that resampling reads, (K, C particles), one row a step.
            bad: takes what is said of rewards and gradients that are not finite, and the particles go on: on the way
                such a number counts as 0, which is a twist too; at the end such a particle has weight 0.

        Raises:
            ValueError: if `noise` or `uniforms` have another shape, or a reward without gradient is to guide.
            FloatingPointError: without `bad`, if a reward or its gradient is not finite, naming step and prompts.
        """
        self._check(chain, reward, condition, noise, uniforms)
        index = torch.arange(len(condition)).repeat_interleave(self.particles)
        twisted = Twisted(
            chain, predictor, reward, condition[index], lam, self.twist, self.power, self.guided,
            self.proposal == "tuned", self.scale, self.micro_batch, None if bad is None else {},
        )  # fmt: skip
        x = chain.process.initial(noise[0])
        log_w = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        ancestor = torch.arange(len(x), device=x.device)
        history: list[tuple[Tensor, Tensor]] = []
        stds = chain.stds
        with evaluating(predictor):
            for k in range(chain.steps):
                psi, mean, u = twisted.look(x, k)
                if k > 0:
                    log_w = log_w + psi
                    fractions = self._fractions(log_w)
                    # Without a twist nothing has been judged yet, and there is nothing to resample by.
                    low = (fractions < self.resample_below) & (self.twist != "none")
                    history.append((fractions, low))
                    kept, log_w = self._resampled(log_w, low, uniforms[k])
                    psi, mean, u, ancestor = psi[kept], mean[kept], u[kept], ancestor[kept]
                std, z = stds[k].to(x), noise[k + 1]
                x = mean + std * (u + z)
                log_w = log_w - psi - path_log_ratio(u, z).double()
            r = torch.cat([twisted.score(x[i], chain.steps, i) for i in slices(len(x), self.micro_batch)])
        if bad is not None:
            bad += (twisted.told or {}).values()
        log_w = torch.where(r.isfinite(), log_w + lam * r.double(), -math.inf)
        fractions = self._fractions(log_w)
        history.append((fractions, torch.zeros_like(fractions, dtype=torch.bool)))
        shape = (chain.steps, len(condition), self.replicates)
        seen, resampled = (torch.stack(part).view(shape) for part in zip(*history, strict=True))
        return Steered(x, log_w, self._log_z(log_w), seen, resampled, r, index, ancestor)

    @property
    def _size(self) -> int:
        """Particles of one replicate."""
        return self.particles // self.replicates

    def _fractions(self, log_w: Tensor) -> Tensor:
        """The ESS of each replicate, (C replicates,); 0 without a particle of positive weight."""
        return ess_rows(log_w.view(-1, self._size)).nan_to_num(0.0)

    def _resampled(self, log_w: Tensor, low: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the particles that are kept, and their log weights; replicates that are not low keep all."""
        rows, uniforms = log_w.view(-1, self._size).clone(), uniforms.reshape(-1, self._size)
        kept = torch.arange(log_w.numel(), device=log_w.device).view_as(rows).clone()
        for g in low.nonzero().flatten().tolist():
            kept[g] = kept[g][resample(rows[g], self.kind, uniforms=uniforms[g])]
            rows[g] = _log_mean(rows[g])
        return kept.flatten(), rows.flatten()

    def _log_z(self, log_w: Tensor) -> Estimate:
        """From each prompt's replicates, (C, replicates) unbiased Z; prompts without a good particle are left out."""
        z = _log_mean(log_w.view(-1, self.replicates, self._size))
        known = [log_partition(replicates) for replicates in z[z.isfinite().any(1)]]
        return stratified(known) if known else Estimate(math.nan, math.nan, 0)

    def _check(self, chain: Chain, reward: Reward, condition: Condition, noise: Tensor, uniforms: Tensor) -> None:
        n = len(condition) * self.particles
        for name, tensor, rows in (("noise", noise, chain.steps + 1), ("uniforms", uniforms, chain.steps)):
            if tensor.shape[:2] != (rows, n):
                raise ValueError(
                    f"{chain.steps} steps of {len(condition)} conditions with {self.particles} particles each need "
                    f"{name} of shape ({rows}, {n}, ...), not {tuple(tensor.shape)}"
                )
        if self.guided and not reward.is_differentiable:
            raise ValueError(f"{type(reward).__name__} has no gradient to guide by: use guided: false")
        if self.guided and torch.is_inference_mode_enabled():
            raise ValueError("guided steering needs gradients: set the Trainer's inference_mode: false")


def _log_mean(log_w: Tensor) -> Tensor:
    """Log mean exp over the last dimension."""
    return log_w.logsumexp(-1) - math.log(log_w.shape[-1])
