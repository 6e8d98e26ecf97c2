"""Diversity: the mean distance of two samples of the same prompt.

    D = 2 / (n (n - 1)) sum_{i<j} | f_i - f_j |

with f the features of n samples: an embedding, pixels, or the states of a density.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["PairwiseDiversity", "pairwise_diversity"]


def pairwise_diversity(features: Tensor) -> Tensor:
    """Mean pairwise distance of the rows of `features` (n, ...), flattened; NaN for fewer than two.

    Example:
        >>> pairwise_diversity(torch.tensor([[0.0], [3.0], [3.0]]))
        tensor(2.)
    """
    return torch.pdist(features.flatten(1)).mean()


class PairwiseDiversity(Metric):
    """Mean of `pairwise_diversity` over groups: each `update` brings the samples of one prompt.

    Example:
        >>> metric = PairwiseDiversity()
        >>> metric.update(torch.tensor([[0.0], [1.0]]))
        >>> metric.update(torch.tensor([[0.0], [3.0]]))
        >>> metric.compute()
        tensor(2.)
    """

    is_differentiable = True
    higher_is_better = True
    full_state_update = False

    total: Tensor
    groups: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("groups", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add the features (n, ...) of the samples of one prompt."""
        self.total = self.total + pairwise_diversity(features)
        self.groups += 1

    def compute(self) -> Tensor:
        """The mean over prompts."""
        return self.total / self.groups
