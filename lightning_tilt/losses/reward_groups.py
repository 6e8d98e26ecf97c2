"""Rewards by groups: what a sample's reward is compared with, where a loss has no gradient of it.

    group       the samples of one prompt, on all processes; all samples where there are no prompts
    c_i         mean of v_j over the *other* good samples j of sample i's group

The mean of the others is independent of X_i.  With the mean of all n, sample i is compared with itself to the part 1/n,
and every covariance that is regressed on shrinks by 1 - 1/n: a quarter of the tilt, with four samples a prompt.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_tilt.interfaces.groups import prompt_groups, together
from lightning_tilt.trajectory import Trajectory

if TYPE_CHECKING:
    from lightning_tilt.interfaces import Loss

__all__ = ["RewardGroups", "group_means", "group_sums"]


def group_sums(good: Tensor, group: Tensor, values: Tensor | None = None) -> Tensor:
    """Sums over the good samples of each group: of values, or of ones, their number.

    Args:
        good: 1 or 0, (N,).
        group: numbers of the groups 0 .. G - 1, (N,).
        values: (N,).

    Returns:
        (G,)
    """
    terms = good if values is None else values * good
    return terms.new_zeros(int(group.max()) + 1).index_add(0, group, terms)


def group_means(values: Tensor, good: Tensor, group: Tensor, others: bool) -> Tensor:
    """For each sample the mean over the good samples of its group, with or without the sample itself.

    Args:
        values: (N,).
        good: 1 or 0, (N,).
        group: numbers of the groups 0 .. G - 1, (N,).
        others: leave the sample itself out. One that has no others is compared with itself.

    Returns:
        (N,)

    Example:
        >>> v, group = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 1])
        >>> group_means(v, torch.ones(4), group, others=True).tolist()
        [4.0, 3.5, 1.5, 5.0]
    """
    own = good if others else torch.zeros_like(good)
    n = group_sums(good, group)[group] - own
    sums = group_sums(good, group, values)[group] - own * values
    return torch.where(n > 0, sums / n.clamp(min=1), values)


@dataclass(frozen=True)
class RewardGroups:
    """The rewards of a rollout with the groups that they are compared in.

    Attributes:
        reward: r(X_1), (n,), float64, of all processes.
        good: 1, or 0 for a sample that is left out, (n,), float64.
        group: numbers of the groups, (n,).
        mine: where the samples of this process are among them.
    """

    reward: Tensor
    good: Tensor
    group: Tensor
    mine: slice

    @classmethod
    def of(cls, loss: "Loss", trajectory: Trajectory) -> "RewardGroups":
        """The groups of a fresh rollout.

        Raises:
            ValueError: if a prompt has a single sample, which there is nothing to compare with.
        """
        reward, good = together(loss, torch.stack([trajectory.reward.double(), trajectory.weight.double()]))[0]
        groups = cls(reward, good, *prompt_groups(loss, trajectory))
        if int(groups.group.bincount().min()) < 2:
            raise ValueError(
                f"{type(loss).__name__} compares the samples of a prompt with each other, and one prompt has a single "
                "sample: sampler.samples_per_condition of at least 2"
            )
        return groups

    def means(self, values: Tensor, others: bool = True) -> Tensor:
        """`group_means` of values (n,): (n,)."""
        return group_means(values, self.good, self.group, others)

    def ess(self, h: float) -> Tensor:
        """The sum over groups of the ESS of exp(h r), as a fraction of the group, and the number of groups: (2,)."""
        member = (self.group == torch.arange(int(self.group.max()) + 1).to(self.group)[:, None]) & (self.good > 0)
        member = member[member.any(1)]
        log_w = torch.where(member, h * self.reward, -torch.inf)
        log_ess = 2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)
        return torch.stack([(log_ess.exp() / member.sum(1)).sum(), self.good.new_tensor(len(member))])
