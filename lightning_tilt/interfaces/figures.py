"""What is logged of every rollout: reward, and, where the paths carry weights, ESS and log Z.

Each prompt has its own Z, so weights are compared prompt by prompt and the figures are means over prompts.  With few
paths a prompt ESS is biased upwards (it cannot fall below one over their number) and log Z downwards: running
indicators, not estimates.
"""

import torch
from torch import Tensor

from lightning_tilt.identities import ess, log_partition
from lightning_tilt.trajectory import Trajectory

__all__ = ["rollout_figures"]


def rollout_figures(trajectory: Trajectory, good: Tensor) -> dict[str, Tensor]:
    """Mean reward with its standard error, lam, and ESS and log Z of the good samples.

    Args:
        trajectory: a rollout; samples of weight 0 are left out.
        good: the number of good samples that sums are divided by, a mean over the processes.
    """
    kept = trajectory.weight > 0
    reward = trajectory.reward[kept]
    figures = {
        "reward": trajectory.reward.sum() / good.clamp(min=1),
        "lam": torch.tensor(trajectory.lam),
    }
    if len(reward) > 1:
        figures["reward_se"] = reward.std() / len(reward) ** 0.5
    if trajectory.log_w is None or len(reward) == 0:
        return figures
    index = trajectory.index.to(kept.device)
    group = torch.zeros_like(index) if trajectory.prompts is None else index
    weights = [trajectory.log_w[kept & (group == g)] for g in group[kept].unique()]
    figures["ess"] = torch.tensor([ess(w) for w in weights]).mean()
    figures["log_z"] = torch.tensor([log_partition(w).mean for w in weights]).mean()
    return figures
