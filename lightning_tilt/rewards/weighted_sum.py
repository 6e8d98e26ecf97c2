"""The weighted sum of rewards.

    r(x) = sum_i w_i r_i(x),        grad r = sum_i w_i grad r_i

Its tilt is that by the product of the parts' tilts, exp(lam r) = prod_i exp(lam w_i r_i).  Rewards have conventions of
their own (a cosine of .3 beside a log-probability of -5): look at `train/reward_<name>`, the mean of each part, before
trusting a weight.  A weight below 0 asks for less of a part.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.rewards.combined import Combined, distinct_names

__all__ = ["WeightedSum"]


class WeightedSum(Combined):
    """`sum_i w_i r_i`; the mean of every part is logged as `train/reward_<its class>`.

    Args:
        rewards: the parts, one or more.
        weights: one number a part; None: 1 each.

    Raises:
        ValueError: if there are no parts, not as many weights as parts, or a weight that is not finite.

    Example:
        >>> from lightning_tilt.rewards import LinearReward
        >>> total = WeightedSum([LinearReward([1.0]), LinearReward([3.0])], [2.0, -1.0])
        >>> total.score(torch.tensor([[1.0], [2.0]]), None).tolist()
        [-1.0, -2.0]
    """

    def __init__(self, rewards: list[Reward], weights: Sequence[float] | None = None) -> None:
        if len(rewards) == 0:
            raise ValueError("WeightedSum needs at least one reward")
        weights = [1.0] * len(rewards) if weights is None else [float(w) for w in weights]
        if len(weights) != len(rewards):
            raise ValueError(f"WeightedSum needs one weight a reward: {len(rewards)} rewards, {len(weights)} weights")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"WeightedSum: weights are finite numbers, not {weights}")
        super().__init__({f"reward_{name}": part for name, part in zip(distinct_names(rewards), rewards, strict=True)})
        self.weights = weights

    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and every part; see `Reward.measure`."""
        rewards, figures = self.ask(images, prompts)
        total = sum((w * r for w, r in zip(self.weights, rewards, strict=True)), torch.zeros_like(rewards[0]))
        return total, dict(zip(self.names, (r.detach() for r in rewards), strict=True)) | figures
