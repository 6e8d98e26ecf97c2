"""Adjoint Matching (2409.08861), exact in the discrete chain.

The chain's mean is m_k, the base's m_base,k, their std std_k; u_k = (m_k - m_base,k) / std_k is the control.  On a path
X drawn without gradient from the current model, the **lean adjoint** runs backwards through the base alone:

    a_K = -lam grad r(X_K),        a_k = J[m_base,k](X_k)^T a_{k+1}            one VJP of the base's mean a step

    L = 1/N sum_n  1/J sum_k  1/2 | u_k(X_k) + std_k a_{k+1} |^2

The target of step k is a_{k+1}, the adjoint at the state the step leads to.  (With a_k, one VJP too many, the fixed
point is biased by the base's contraction of that step: on a narrow Gaussian .0812 where .1009 is true.)

At the fixed point u_k(x) = -std_k E[a_{k+1} | X_k = x]: the control that minimises KL(P_theta | P*) among the kernels
with the base's std.  No path weights are needed.  What they cost nothing to give, though, is taken: the sweep meets the
base's mean at every state, so with all steps supervised the log path weights, and with them ESS and log Z, come free.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from lightning_tilt.chain import Chain, evaluating, slices
from lightning_tilt.identities.lean_adjoint import lean_adjoint
from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.losses.pair_controls import PairControls, Pairs
from lightning_tilt.noise import keyed_choice
from lightning_tilt.trajectory import Trajectory

__all__ = ["AdjointMatching", "StepWeight", "adjoint_matching_terms"]

StepWeight = Literal["control", "epsilon", "uniform"]
"""What a step's term is multiplied by: 1, `epsilon`: |change of eps_hat|^2, `uniform`: 1/std^2."""


def adjoint_matching_terms(u: Tensor, std: Tensor, adjoint: Tensor) -> Tensor:
    """The terms `1/2 | u_k + std_k a_{k+1} |^2` of P (sample, step) pairs.

    Args:
        u: controls, (P, *shape).
        std: standard deviations, broadcastable, e.g. (P, 1, ...).
        adjoint: a_{k+1}, (P, *shape).

    Returns:
        (P,)
    """
    return 0.5 * ((u + std * adjoint) ** 2).flatten(1).sum(1)


class AdjointMatching(PairControls):
    """Adjoint Matching as a mixin: `class MyTilt(AdjointMatching, TiltModule)`.

    Consistent on policy; needs the reward's gradient and memoryless transitions; no path weights.

    **Guidance.** Consistent (the default: the sampler's scale everywhere) tilts the guided base; grounded, but adjoints
    grow with the scale. Guidance in the rollout alone (`adjoint_guidance=1, control_guidance=1`) is what published
    recipes do: good in practice, not grounded, since the states do not come from the controlled process. Scale 1
    everywhere tilts the unguided base: grounded. Other combinations are not.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        supervised_steps: steps of each path that the loss looks at: an integer, or "all". Drawn before the sweep, the
            same for all samples of a rollout; the mean over them is an unbiased estimate of the mean over all. With an
            integer there is no ESS and no log Z: not every step meets the base.
        last_steps: steps next to the data that are always among them (the published recipe: 10 drawn and the last
            10); they then weigh more than in the mean over all.
        step_weight: what a step's term is multiplied by. A positive factor a step leaves the fixed point of a model
            that can represent it where it is; for a model that cannot, it says which steps matter. "control" (1) makes
            the loss the KL between path laws; "epsilon" (|change of eps_hat|^2) weighs late, clean steps less, as the
            base's own training did; "uniform" (1/std^2, the error of grad log h) weighs them more.
        loss_cap: terms whose continuous-time value `|u/sqrt(h) + sigma a|^2` exceeds `loss_cap lam^2` are left out
            (published: 1.6); None keeps all. Biased: it cuts the largest adjoints.
        adjoint_guidance: guidance of the base in the adjoint sweep; None: the sampler's.
        control_guidance: guidance of both models in the control; None: the sampler's.
        adjoint_micro_batch: samples swept at once; None: all.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("domingoenrich2024adjoint",)
    needs_reward_gradient: ClassVar[bool] = True
    needs_memoryless: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        supervised_steps: int | Literal["all"] = "all",
        last_steps: int = 0,
        step_weight: StepWeight = "control",
        loss_cap: float | None = None,
        adjoint_guidance: float | None = None,
        control_guidance: float | None = None,
        adjoint_micro_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if supervised_steps != "all" and not (isinstance(supervised_steps, int) and supervised_steps >= 1):
            raise ValueError(f"supervised_steps must be 'all' or at least 1, not {supervised_steps!r}")
        if last_steps < 0 or (last_steps > 0 and supervised_steps == "all"):
            raise ValueError(f"last_steps: {last_steps} adds to an integer supervised_steps; 'all' has them already")
        if step_weight not in get_args(StepWeight):
            raise ValueError(f"step_weight is one of {get_args(StepWeight)}, not {step_weight!r}")
        self.supervised_steps = supervised_steps
        self.last_steps = last_steps
        self.step_weight = step_weight
        self.loss_cap = loss_cap
        self.adjoint_guidance = adjoint_guidance
        self.control_guidance = control_guidance
        self.adjoint_micro_batch = adjoint_micro_batch

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """Sweep the lean adjoint through the base, and weigh the paths where the sweep met all of their steps."""
        assert trajectory.reward_gradient is not None
        chain, rollout_scale = self.sampler.chain(self), self.sampler.guidance_scale
        scale = rollout_scale if self.adjoint_guidance is None else self.adjoint_guidance
        steps = self._draw_steps(trajectory, chain)
        terminal = -trajectory.lam * trajectory.reward_gradient
        with evaluating(self.predictor), self.predictor.base() as base:
            swept = [
                lean_adjoint(
                    chain.mean(base, trajectory.condition[trajectory.index[i]], scale),
                    trajectory.states[:, i],
                    terminal[i],
                    steps,
                )
                for i in slices(len(trajectory), self.adjoint_micro_batch)
            ]
        adjoint, base_mean = (torch.cat(parts, 1) for parts in zip(*swept, strict=True))
        chain.evaluations.vjp += len(trajectory) * (chain.steps - 1 - steps[0]) * (1 if scale == 1 else 2)
        supervised = torch.tensor(steps)  # like all indices on the CPU, where the grid of times is too
        swept_trajectory = replace(trajectory, supervised=supervised, adjoint=adjoint, base_mean=base_mean)
        if scale != rollout_scale or steps != chain.noisy_steps or not self.sampler.weighted:
            return swept_trajectory
        # Every step has met the base's mean: the path weights are free.
        log_ratio = chain.log_ratio(trajectory, lambda x, k: base_mean[steps.index(k)])
        return replace(swept_trajectory, log_w=trajectory.lam * trajectory.reward - log_ratio)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples and supervised steps of the (weighted, capped) terms."""
        assert trajectory.supervised is not None and trajectory.adjoint is not None
        chain = self.sampler.chain(self)
        samples, steps = len(trajectory), trajectory.supervised
        factors = self._step_factors(chain, steps, trajectory.lam).to(trajectory.states)
        good = self.mean_good(trajectory.weight)
        total, capped, control_norm, largest = trajectory.states.new_zeros(4).unbind()
        for pairs in self.pairs(trajectory):
            j, n = pairs.j, pairs.n
            terms, norms = self._terms(chain, trajectory, pairs)
            dropped = terms.detach() > factors[j, 1]
            total = total + (terms.where(~dropped, 0.0) * factors[j, 0] * trajectory.weight[n]).sum()
            capped = capped + dropped.sum()
            control_norm = control_norm + norms.sum()
            largest = torch.maximum(largest, terms.detach().max())
        chain.evaluations.pairs += samples * len(steps)
        logged = {
            "term_max": largest,
            "control_norm": control_norm / (samples * len(steps)),
            "adjoint_norm_noise": _mean_norm(trajectory.adjoint[0]),
            "adjoint_norm_data": trajectory.lam * _mean_norm(cast(Tensor, trajectory.reward_gradient)),
        }
        if self.loss_cap is not None:
            logged["capped_fraction"] = capped / (samples * len(steps))
        return total / (good * len(steps)), logged

    def _terms(self, chain: Chain, trajectory: Trajectory, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The terms of the pairs and the norms |u|, (P,)."""
        assert trajectory.adjoint is not None
        adjoint = trajectory.adjoint[pairs.j, pairs.n]
        scale = self.sampler.guidance_scale if self.control_guidance is None else self.control_guidance

        def terms(u: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
            return adjoint_matching_terms(u, std, adjoint), u.detach().flatten(1).norm(dim=1)

        return self.at_pairs(chain, pairs, self._control_base_mean(chain, trajectory, pairs, scale), scale, terms)

    def _control_base_mean(self, chain: Chain, trajectory: Trajectory, pairs: Pairs, scale: float) -> Tensor:
        """The base's mean under the control's guidance: the sweep's where that had the same guidance."""
        assert trajectory.base_mean is not None
        swept = self.sampler.guidance_scale if self.adjoint_guidance is None else self.adjoint_guidance
        if swept == scale:
            return trajectory.base_mean[pairs.j, pairs.n]
        with torch.no_grad(), evaluating(self.predictor), self.predictor.base() as base:
            output = chain.output(base, pairs.x, pairs.k, pairs.condition, scale)
            return chain.kernel(base, output, pairs.x, pairs.k).mean

    def _draw_steps(self, trajectory: Trajectory, chain: Chain) -> list[int]:
        """The supervised steps of this rollout: never one of std = 0."""
        noisy = chain.noisy_steps
        if self.supervised_steps == "all":
            return noisy
        last = noisy[len(noisy) - min(self.last_steps, len(noisy)) :]
        others = noisy[: len(noisy) - len(last)]
        size = min(self.supervised_steps, len(others))
        return keyed_choice(self.sampler.seed, "steps", trajectory.rollout, others, size) + last

    def _step_factors(self, chain: Chain, steps: Tensor, lam: float) -> Tensor:
        """For each supervised step the factor of its terms, and the largest term that is kept: (J, 2)."""
        std, h = chain.stds[steps], (chain.t[1:] - chain.t[:-1])[steps]
        factor = {
            "control": torch.ones_like(std),
            "epsilon": (std / chain.eps_coefficients[steps]) ** 2,
            "uniform": 1 / std**2,
        }[self.step_weight]
        # 1/2 |u + std a|^2 = h/2 |u/sqrt(h) + sigma a|^2, the bracket being the published term.
        cap = torch.full_like(std, torch.inf) if self.loss_cap is None else h / 2 * self.loss_cap * lam**2
        return torch.stack([factor, cap], 1)


def _mean_norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1).mean()
    return norm
