"""Controlled Monte Carlo diffusions for tilting (2307.01050; 2605.00229): two processes made each other's reversal.

Along a path of marginals pi_t ~ p_t exp(r_t) the forward process P starts in the base's noise, its reversal Q in p*;
both are moved by the same learned transport w (`lightning_tilt.transport`; the tilting form is derived there and in
`identities.marginals`).  With Gaussian kernels F, B, and the base's F0, B0,

    W = log dP/dQ - log Z = sum_k ( log F/F0 (X_{k+1} | X_k) - log B/B0 (X_k | X_{k+1}) ) - lam r(X_K)

    kl             E_P[W] + log Z = KL(P | Q)         through the path, simulated again from the recorded noise
    log_variance   Var(W)                             on detached paths, whoever drew them; prompt by prompt

Where w is exact W is the constant -log Z on every path as h -> 0, for any sigma.  At finite K both are right to
O(1/K): B0 is the base's reversal to first order only.

**One look a state.**  W is a sum over states, not steps: at X_k the transport enters F_k and B_{k-1}, so that

    T_k(w_k) = log F/F0 (X_{k+1} | X_k) - log B/B0 (X_{k-1} | X_k),       W = sum_{k < K} T_k - lam r(X_K)

is one evaluation of the model, one of the base and one reward gradient.

**Memory.**  The gradient of the variance, 2/(n - 1) sum_i (W_i - mean W) grad W_i, asks for W before any of its terms'
gradients.  Each micro-batch of states is checkpointed, so that only numbers stay and the backward pass is the second
of the two; `kl` does the same with every step.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from lightning_tilt.evaluations import slices
from lightning_tilt.identities import kernel_log_ratio
from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.losses.log_variance import log_variance_terms
from lightning_tilt.losses.pair_controls import Pairs
from lightning_tilt.losses.reward_groups import RewardGroups, group_sums
from lightning_tilt.losses.transport import TransportLoss
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transport import Fields, TransportChain

__all__ = ["CMCD", "CMCDObjective", "state_terms"]

CMCDObjective = Literal["log_variance", "kl"]
"""Which divergence between forward and backward process is minimised."""


def state_terms(
    chain: TransportChain, f: Fields, w: Tensor, x: Tensor, k: Tensor, before: Tensor, after: Tensor
) -> Tensor:
    """`T_k`: what the transport at X_k has to do with the steps on both of its sides, (P,).

    Args:
        chain: the kernels.
        f: the base's fields at the states.
        w: the transport there, (P, *shape).
        x: states X_k, (P, *shape).
        k: their steps, (P,), k < K; the first has no step before it, the last none with noise after it.
        before: X_{k-1}; anything where k = 0.
        after: X_{k+1}.
    """
    leaving = kernel_log_ratio(*chain.forward(f, w, x, k), after)
    returning = kernel_log_ratio(*chain.backward(f, w, x, k), before)
    k = k.to(x.device)
    return torch.where(k < chain.steps - 1, leaving, 0.0) - torch.where(k > 0, returning, 0.0)


class CMCD(TransportLoss):
    """CMCD as a mixin: `class MyTilt(CMCD, TiltModule)`.

    Consistent as K grows, for any bounded noise; the weights have a bias of O(1/K). Needs the gradient of the reward at
    every state of a path, and no memoryless transitions. A pair costs the model, the base and a reward gradient in the
    rollout and again in the loss: 4 forwards and a backward, 1 more if checkpointed; "kl" also differentiates through
    base and reward gradient, so the reward must be twice differentiable.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        objective: "log_variance" needs no gradient through the path and may be off policy; "kl" is on policy.
        args: as `TransportLoss`, and passed on to the host.
        kwargs: as `TransportLoss`, and passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("vargas2023transport", "domingoenrich2026unified")

    def __init__(
        self, *args: Any, lam: float | LamSchedule = 1.0, objective: CMCDObjective = "log_variance", **kwargs: Any
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if objective not in get_args(CMCDObjective):
            raise ValueError(f"objective is one of {get_args(CMCDObjective)}, not {objective!r}")
        self.objective: CMCDObjective = objective

    @property
    def variant(self) -> str | None:
        """The objective."""
        return self.objective

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """The unbiased variance of W within a prompt, or its mean; a mean over good samples."""
        chain = self.transport_chain(trajectory.lam)
        good = self.mean_good(trajectory.weight)
        if self.objective == "kl":
            some = trajectory[trajectory.weight > 0]  # a bad sample cannot be simulated again
            parts = [self._simulated(chain, some[i]) for i in slices(len(some), self.loss_micro_batch)]
            W = torch.cat([some.reward[:0], *parts])
            return W.sum() / good, self._figures(some, -W)
        W = self._recorded(chain, trajectory)
        groups = RewardGroups.of(self, replace(trajectory, reward=W.detach()))
        mean, n = groups.means(groups.reward, others=False), group_sums(groups.good, groups.group)[groups.group]
        terms = log_variance_terms(W, mean[groups.mine].to(W), n[groups.mine].to(W))
        return (trajectory.weight * terms).sum() / good, self._figures(trajectory, -W)

    def _recorded(self, chain: TransportChain, trajectory: Trajectory) -> Tensor:
        """W of the current model on recorded paths, with gradient to the model alone, (N,)."""
        W = -trajectory.lam * trajectory.reward
        for pairs in self.pairs(trajectory, torch.arange(chain.steps)):
            W = W.index_add(0, pairs.n.to(W.device), self._terms(chain, trajectory, pairs))
        return W

    def _terms(self, chain: TransportChain, trajectory: Trajectory, pairs: Pairs) -> Tensor:
        t, f = self._fields(chain, trajectory, pairs)
        scale, k = self.sampler.guidance_scale, pairs.k
        before, after = trajectory.states[(k - 1).clamp(min=0), pairs.n], trajectory.states[k + 1, pairs.n]

        def terms(x: Tensor) -> Tensor:
            w = chain.transport(self.predictor, t, pairs.condition, scale, f.v)(x)
            return state_terms(chain, f, w, x, k, before, after)

        self._count(chain, len(k))
        return cast(Tensor, self._run(terms, pairs.x))

    def _simulated(self, chain: TransportChain, trajectory: Trajectory) -> Tensor:
        """W of paths simulated again from the recorded noise, with gradient through the path, (N,)."""
        condition, scale = trajectory.condition[trajectory.index], self.sampler.guidance_scale
        W, last = torch.zeros_like(trajectory.reward), chain.steps - 1
        x = trajectory.states[0].detach().requires_grad_()
        before = x
        for k in range(chain.steps):

            def step(before: Tensor, x: Tensor, k: int = k) -> tuple[Tensor, Tensor]:
                t, i = chain.times(k, x), torch.full((len(x),), k)
                f = chain.fields(self.predictor, x, t, condition, scale, create_graph=True)
                w = chain.transport(self.predictor, t, condition, scale, f.v)(x)
                after = f.prediction.x1_hat
                if k < last:
                    after = chain.forward(f, w, x, i)[0].sample(trajectory.noise[k])
                return after, state_terms(chain, f, w, x, i, before, after)

            self._count(chain, len(x))
            after, terms = self._run(step, before, x)
            W, before, x = W + terms, x, after
        return W - trajectory.lam * self._score(x, condition)
