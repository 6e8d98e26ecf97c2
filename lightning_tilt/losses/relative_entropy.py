"""Relative entropy KL(P_theta | P*), differentiated through the path; its truncations are DRaFT-k and ReFL.

    L = E_theta[ sum_k |u_k(X_k)|^2/2 - lam r(X_K) ] = KL(P_theta | P*) - log Z

Recorded paths are simulated again, from their X_0 and noise z, now with gradient:

    X_{k+1} = m_k(X_k) + std_k z_k,     u_k = (m_k(X_k) - m_base,k(X_k))/std_k,     the base makes a step of std = 0

(the terms u_k . z_k of the log ratio have mean zero under every theta and are left out).  The reward was differentiated
once, by the sampler, at the same end points; lam * stop_gradient(grad r) . X_K has the same gradient as lam r(X_K).

**Truncation** to the last k steps with noise starts at the recorded state before them: the steps before feel neither
reward nor penalty, but what the shared network does to them.  k steps: DRaFT-k (2309.17400); one: ReFL (2304.05977),
with the last step for its drawn one.  Biased: the law at the first of the k steps stays as it is, and cannot be made
up for.

**Memory.**  A step is checkpointed: states of all steps stay, and the activations of one step of one micro-batch.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_tilt.chain import Chain, evaluating, slices
from lightning_tilt.interfaces import LamSchedule, Loss
from lightning_tilt.interfaces.figures import rollout_figures
from lightning_tilt.interfaces.sampler import Sampler
from lightning_tilt.losses.path_controls import check_last_step, step_terms
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import control

__all__ = ["RelativeEntropy", "relative_entropy_terms"]


def relative_entropy_terms(kl: Tensor, end: Tensor, gradient: Tensor, gain: Tensor) -> Tensor:
    """`sum_k q_k - lam r`, with the gradient of r at X_K given: (N,).

    Args:
        kl: sum_k q_k with gradient, (N,).
        end: X_K with gradient, (N, *shape).
        gradient: lam grad r(X_K), (N, *shape), without gradient.
        gain: lam r(X_K), (N,), without gradient.
    """
    along = (gradient * end).flatten(1).sum(1)
    return kl - gain - (along - along.detach())


class RelativeEntropy(Loss):
    """The relative entropy of the path law to the tilted one, by gradients through the path.

    Consistent on policy (the recorded reward gradient is that of the paths that are simulated again); biased where
    truncated. Needs the reward's gradient and memoryless transitions. Gradients flow through both branches of a guided
    model, since the path does. Costs, a pair: 2 forwards (model and base), 1 backward of the model to its parameters,
    1 VJP of the base; 2 forwards more if checkpointed. ESS and log Z are free where no step is cut.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        last_steps: steps with noise, next to the data, that the gradient flows through; None: all. Biased otherwise.
        loss_micro_batch: samples that are simulated at once; None: all. Values and gradients do not depend on it.
        checkpoint: recompute each step in the backward pass, for 1 more forward of model and base.
        args: passed on to the host.
        kwargs: passed on to the host.

    Raises:
        ValueError: for `last_steps` below 1.
    """

    sources: ClassVar[tuple[str, ...]] = ("clark2023directly", "xu2023imagereward")
    needs_reward_gradient: ClassVar[bool] = True
    needs_memoryless: ClassVar[bool] = True
    bias: ClassVar[str | None] = (
        "with last_steps an integer, the steps before them feel neither reward nor penalty; without, there is none"
    )

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        last_steps: int | None = None,
        loss_micro_batch: int | None = None,
        checkpoint: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if last_steps is not None and last_steps < 1:
            raise ValueError(f"last_steps must be at least 1, or null for all, not {last_steps}")
        self.last_steps = last_steps
        self.loss_micro_batch = loss_micro_batch
        self.checkpoint = checkpoint

    def _check_fit(self, sampler: Sampler) -> None:
        super()._check_fit(sampler)
        check_last_step(self, sampler)

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """Nothing: the path is simulated again at each update."""
        return trajectory

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples; `kl` is the mean of sum_k |u_k|^2/2 over the steps looked at."""
        assert trajectory.reward_gradient is not None
        chain, weight, lam = self.sampler.chain(self), trajectory.weight, trajectory.lam
        good = self.mean_good(weight)
        cuts = slices(len(trajectory), self.loss_micro_batch)
        parts = [self._simulate(chain, trajectory[i]) for i in cuts]
        log_ratio, kl, end = (torch.cat(part) for part in zip(*parts, strict=True))
        terms = relative_entropy_terms(kl, end, lam * trajectory.reward_gradient, lam * trajectory.reward)
        logged = {"kl": (weight * kl.detach()).sum() / good}
        if self._first(chain) == chain.noisy_steps[0]:
            weighed = replace(trajectory, log_w=lam * trajectory.reward - log_ratio.detach())
            logged |= rollout_figures(self, weighed, good)
        return (weight * terms).sum() / good, logged

    def _first(self, chain: Chain) -> int:
        """The first step that is simulated with gradient."""
        noisy = chain.noisy_steps
        return noisy[0 if self.last_steps is None else max(len(noisy) - self.last_steps, 0)]

    def _simulate(self, chain: Chain, trajectory: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
        """`sum_k l_k` and `sum_k q_k` (n,), and X_K (n, *shape), of some samples, with gradient."""
        first, stds = self._first(chain), chain.stds.tolist()
        keep = trajectory.weight.reshape(-1, *(1,) * (trajectory.end.ndim - 1))
        x, zero = trajectory.states[first], torch.zeros_like(trajectory.reward)
        log_ratio, kl = zero, zero
        branches = 1 if self.sampler.guidance_scale == 1 else 2
        for k in range(first, chain.steps):
            z = trajectory.noise[k] * keep  # a sample that is left out is a path that stays finite
            step = self._base_step if stds[k] == 0 else self._step
            if self.checkpoint:
                x, step_ratio, step_kl = checkpoint(step, chain, trajectory, k, x, z, use_reentrant=False)
            else:
                x, step_ratio, step_kl = step(chain, trajectory, k, x, z)
            log_ratio, kl = log_ratio + step_ratio.detach(), kl + step_kl
            chain.evaluations.vjp += len(x) * branches * (k > first)
            chain.evaluations.backward += len(x) * branches * self.predictor.backward_cost * (stds[k] > 0)
        chain.evaluations.pairs += len(trajectory) * sum(std > 0 for std in stds[first:])
        return log_ratio, kl, x

    def _step(self, chain: Chain, path: Trajectory, k: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X_{k+1}, l_k and q_k from X_k, as the model makes them."""
        std, condition, scale = chain.stds[k].to(x), path.condition[path.index], self.sampler.guidance_scale
        with evaluating(self.predictor), self.predictor.base() as base:
            base_mean = chain.mean(base, condition, scale)(x, k)
        with evaluating(self.predictor):
            mean = chain.mean(self.predictor, condition, scale)(x, k)
        u = control(mean, base_mean, std)
        terms = step_terms(u, u + z)
        return mean + std * z, terms.log_ratio, terms.kl

    def _base_step(self, chain: Chain, path: Trajectory, k: int, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a step of std = 0, which the base makes."""
        with evaluating(self.predictor), self.predictor.base() as base:
            mean = chain.mean(base, path.condition[path.index], self.sampler.guidance_scale)(x, k)
        zero = torch.zeros_like(path.reward)
        return mean, zero, zero
