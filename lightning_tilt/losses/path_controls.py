"""The two numbers of a step that all losses on whole recorded paths are made of.

A path X was drawn without gradient by a law v: the current model, or an older one.  At every step with std_k > 0

    xi_k = (X_{k+1} - m_base,k(X_k))/std_k          the path's innovation as the base sees it: recomputed from the path
    u_k  = (m_k(X_k) - m_base,k(X_k))/std_k         the control, with gradient

    l_k = u_k . xi_k - |u_k|^2/2  = log N(X_{k+1}; m_k, std_k^2) - log N(X_{k+1}; m_base,k, std_k^2)
    q_k = |u_k|^2/2               = KL( N(m_k, std_k^2) | N(m_base,k, std_k^2) )

so that sum_k l_k = log dP_theta/dP_base of the path, whoever drew it (on policy xi_k = u_k + z_k, and l_k is the
familiar u_k . z_k + |u_k|^2/2).  Those of v itself follow from its noise z_k, without a network (its control is
xi_k - z_k):

    l_k^v = (|xi_k|^2 - |z_k|^2)/2            q_k^v = |xi_k - z_k|^2/2

**Groups.**  Every prompt has a Z of its own, so samples are compared within their prompt's group, over all processes; a
density is one group.  Steps of std = 0 are the base's: they have no density and no term.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from lightning_tilt.chain import Chain, evaluating
from lightning_tilt.interfaces import Loss
from lightning_tilt.interfaces.groups import prompt_groups, together
from lightning_tilt.interfaces.sampler import Sampler
from lightning_tilt.losses.pair_controls import PairControls, Pairs
from lightning_tilt.trajectory import Trajectory

__all__ = ["Pairs", "PathControls", "StepTerms", "check_last_step", "rollout_terms", "step_terms"]


@dataclass(frozen=True)
class StepTerms:
    """The log ratio `l_k` and the KL `q_k` of each step with noise, (J, N) or, of single pairs, (P,)."""

    log_ratio: Tensor
    kl: Tensor


def step_terms(u: Tensor, xi: Tensor) -> StepTerms:
    """`l = u . xi - |u|^2/2` and `q = |u|^2/2` of P pairs.

    Args:
        u: controls, (P, *shape).
        xi: innovations against the base, (P, *shape).
    """
    kl = 0.5 * (u**2).flatten(1).sum(1)
    return StepTerms((u * xi).flatten(1).sum(1) - kl, kl)


def rollout_terms(xi: Tensor, z: Tensor) -> StepTerms:
    """The same of the law that drew the path, `u^v = xi - z`.

    Args:
        xi: innovations against the base, (J, N, *shape).
        z: the rollout's noise at these steps, (J, N, *shape).
    """
    return StepTerms(0.5 * (xi**2 - z**2).flatten(2).sum(2), 0.5 * ((xi - z) ** 2).flatten(2).sum(2))


def check_last_step(loss: Loss, sampler: Sampler) -> None:
    """Refuse a chain whose step of std = 0 is made by the tuned model: its path law has no density against the base's.

    Raises:
        ValueError: naming the sampler's parameter.
    """
    chain = sampler.chain(loss, count=False)
    if not sampler.weighted and len(chain.noisy_steps) < chain.steps:
        raise ValueError(
            f"{type(loss).__name__} compares path laws, and a step of std = 0 that the tuned model makes has no "
            "density: sampler.base_last_step: true"
        )


class PathControls(PairControls):
    """Base of the losses on whole recorded paths: all steps with noise, guidance as the sampler's for both models.

    Costs 1 forward of the base and 1 forward and backward of the model a pair (1 more forward if checkpointed); the
    path weights, and with them ESS and log Z, are free.

    Traits:
        compares: samples are compared within their group, which must have two at least.
    """

    needs_reward_gradient: ClassVar[bool] = False
    needs_memoryless: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    def _check_fit(self, sampler: Sampler) -> None:
        super()._check_fit(sampler)
        check_last_step(self, sampler)

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """The base's means at all steps with noise, once, and the path weights that follow from them."""
        if self.compares:
            self._check_groups(trajectory)
        chain, scale = self.sampler.chain(self), self.sampler.guidance_scale
        steps = chain.noisy_steps
        path = replace(trajectory, supervised=torch.tensor(steps))
        means = []
        with torch.no_grad(), evaluating(self.predictor), self.predictor.base() as base:
            for pairs in self.pairs(path):
                output = chain.output(base, pairs.x, pairs.k, pairs.condition, scale)
                means.append(chain.kernel(base, output, pairs.x, pairs.k).mean)
        base_mean = torch.cat(means).reshape(len(steps), *trajectory.states.shape[1:])
        log_ratio = chain.log_ratio(path, lambda x, k: base_mean[steps.index(k)])
        return replace(path, base_mean=base_mean, log_w=path.lam * path.reward - log_ratio)

    def model_terms(self, chain: Chain, trajectory: Trajectory) -> StepTerms:
        """`l_k` and `q_k` of the current model on the recorded paths, with gradient, (J, N) each."""
        xi, _ = self._innovations(chain, trajectory)
        parts = []
        for pairs in self.pairs(trajectory):
            mine = xi[pairs.j, pairs.n]

            def terms(u: Tensor, std: Tensor, mine: Tensor = mine) -> tuple[Tensor, Tensor]:
                step = step_terms(u, mine)
                return step.log_ratio, step.kl

            base_mean = cast(Tensor, trajectory.base_mean)[pairs.j, pairs.n]
            parts.append(self.at_pairs(chain, pairs, base_mean, self.sampler.guidance_scale, terms))
        chain.evaluations.pairs += xi.shape[0] * xi.shape[1]
        log_ratio, kl = (torch.cat(part).reshape(xi.shape[:2]) for part in zip(*parts, strict=True))
        return StepTerms(log_ratio, kl)

    def drawn_terms(self, chain: Chain, trajectory: Trajectory) -> StepTerms:
        """`l_k^v` and `q_k^v` of the model that drew the paths, (J, N) each; 0 for samples that are left out."""
        terms, good = rollout_terms(*self._innovations(chain, trajectory)), trajectory.weight > 0
        return StepTerms(terms.log_ratio.where(good, 0.0), terms.kl.where(good, 0.0))

    def group_means(self, trajectory: Trajectory, values: Tensor) -> tuple[Tensor, Tensor]:
        """For each sample the mean of its group's good samples, and how many these are.

        Args:
            trajectory: whose samples.
            values: (..., N), without gradient.

        Returns:
            (..., N) and (N,).
        """
        weight = trajectory.weight
        group, mine = prompt_groups(self, trajectory)
        everywhere, _ = together(self, torch.cat([(values * weight).reshape(-1, len(weight)), weight[None].to(values)]))
        sums = everywhere.new_zeros(len(everywhere), int(group.max()) + 1).index_add(-1, group, everywhere)
        means, n, own = sums[:-1] / sums[-1].clamp(min=1), sums[-1], group[mine]
        return means[:, own].reshape(values.shape), n[own].to(weight)

    def centred(self, trajectory: Trajectory, values: Tensor) -> Tensor:
        """`values` (..., N) minus the mean of the group's other good samples (leave one out), without gradient."""
        mean, n = self.group_means(trajectory, values)
        return (values - mean) * (n / (n - 1).clamp(min=1))

    def _innovations(self, chain: Chain, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """xi_k against the base, and the rollout's z_k, at all steps with noise: (J, N, *shape) each."""
        k, base_mean = cast(Tensor, trajectory.supervised), cast(Tensor, trajectory.base_mean)
        std = chain.stds[k].to(base_mean).reshape(-1, *(1,) * (base_mean.ndim - 1))
        return (trajectory.states[k + 1] - base_mean) / std, trajectory.noise[k]

    def _check_groups(self, trajectory: Trajectory) -> None:
        smallest = int(prompt_groups(self, trajectory)[0].bincount().min())
        if trajectory.prompts is not None and smallest < 2:
            raise ValueError(
                f"{type(self).__name__} compares the samples of a prompt, and there is one alone: "
                "sampler.samples_per_condition of at least 2"
            )
        if smallest < 2:
            raise ValueError(
                f"{type(self).__name__} compares samples, and the batch holds one: data.samples of 2 or more"
            )
