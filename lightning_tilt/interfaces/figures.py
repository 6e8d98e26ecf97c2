"""What is logged of every rollout: reward, and, where the paths carry weights, ESS and log Z.

Each prompt has its own Z, so weights are compared prompt by prompt and the figures are means over prompts.  With few
paths a prompt ESS is biased upwards (it cannot fall below one over their number) and log Z downwards: running
indicators, not estimates.  They are those of the samples of all processes.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_tilt.identities import ess, log_partition
from lightning_tilt.interfaces.groups import prompt_groups, together
from lightning_tilt.trajectory import Trajectory

__all__ = ["rollout_figures"]


def rollout_figures(host: Any, trajectory: Trajectory, good: Tensor) -> dict[str, Tensor]:
    """Mean reward with its standard error, lam, and ESS and log Z of the good samples; all processes must ask.

    Args:
        host: whose Trainer knows the processes.
        trajectory: a rollout; samples of weight 0 are left out.
        good: the number of good samples that sums are divided by, a mean over the processes.
    """
    rows = [trajectory.weight, trajectory.reward]
    rows += [] if trajectory.log_w is None else [trajectory.log_w.detach()]
    weight, every_reward, *log_w = together(host, torch.stack([row.double() for row in rows]))[0]
    kept = weight > 0
    reward = every_reward[kept]
    figures = {
        "reward": trajectory.reward.sum() / good.clamp(min=1e-6),  # a mean over processes: it may be below 1
        "lam": torch.tensor(trajectory.lam),
    }
    if len(reward) > 1:
        figures["reward_se"] = reward.std() / len(reward) ** 0.5
    if not log_w or len(reward) == 0:
        return figures
    group, _ = prompt_groups(host, trajectory)
    weights = [log_w[0][kept & (group == g)] for g in group[kept].unique()]
    figures["ess"] = torch.tensor([ess(w) for w in weights]).mean()
    figures["log_z"] = torch.tensor([log_partition(w).mean for w in weights]).mean()
    return figures
