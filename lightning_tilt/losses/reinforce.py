"""REINFORCE on the Gaussian transitions, with the exact reward to go (Williams 1992; KL-regularised control).

The objective is J = E_theta[ lam r(X_K) - sum_k q_k ], q_k = |u_k|^2/2 the KL of a step: the negative relative entropy
of the path law to P*, up to log Z.  Its gradient, with nothing but values of r:

    A_k    = lam r(X_K) - sum_{j>k} q_j - b_k                 what the noise of step k leads to: reward, and KL to come
    grad J = E[ sum_k A_k grad l_k - grad q_k ]               grad l_k = z_k . grad u_k on policy: the step's score

The q_j of the past and present do not depend on z_k and are left out of A_k; q_k itself is differentiated directly.
b_k is the mean of the group's *other* samples (leave one out), so that A_k stays unbiased for any group size.

To leave the sum over j > k out is the usual mistake: see `grpo`.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_tilt.losses.path_controls import PathControls
from lightning_tilt.trajectory import Trajectory

__all__ = ["Reinforce", "reinforce_terms", "reward_to_go"]


def reward_to_go(gain: Tensor, kl: Tensor) -> Tensor:
    """`gain - sum_{j>k} q_j`, without baseline.

    Args:
        gain: lam r, (N,).
        kl: q_k of the rollout, (J, N).

    Returns:
        (J, N)
    """
    after = kl.flip(0).cumsum(0).flip(0) - kl
    return gain - after


def reinforce_terms(advantage: Tensor, log_ratio: Tensor, kl: Tensor) -> Tensor:
    """`sum_k (-A_k l_k + q_k)`, whose gradient is -grad J: (N,).

    Args:
        advantage: A_k, (J, N), without gradient.
        log_ratio: l_k with gradient, (J, N).
        kl: q_k with gradient, (J, N).
    """
    return (kl - advantage * log_ratio).sum(0)


class Reinforce(PathControls):
    """The exact policy gradient of `lam r` minus the KL to the base.

    Consistent on policy (replayed paths would need ratios: `GRPO`). Needs memoryless transitions, at least two samples
    a prompt, no reward gradient. Costs 2 forwards and 1 backward a pair beside the rollout, 1 forward more if
    checkpointed. Noisier than the log-variance: only the group's mean is subtracted.
    """

    sources: ClassVar[tuple[str, ...]] = ("williams1992simple",)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples of a surrogate whose gradient is the policy's; its value means nothing."""
        chain, weight = self.sampler.chain(self), trajectory.weight
        good = self.mean_good(weight)
        drawn = self.drawn_terms(chain, trajectory)
        advantage = self.centred(trajectory, reward_to_go(trajectory.lam * trajectory.reward, drawn.kl))
        steps = self.model_terms(chain, trajectory)
        terms = reinforce_terms(advantage, steps.log_ratio, steps.kl)
        logged = {"kl": (weight * drawn.kl.sum(0)).sum() / good, "advantage_max": torch.abs(advantage).max()}
        return (weight * terms).sum() / good, logged
