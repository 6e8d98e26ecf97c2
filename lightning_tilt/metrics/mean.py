"""A mean with its standard error."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanWithError"]


class MeanWithError(Metric):
    """Mean of independent numbers and its standard error, as {"mean", "se"}.

    Example:
        >>> metric = MeanWithError()
        >>> metric.update(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> {k: round(float(v), 4) for k, v in metric.compute().items()}
        {'mean': 2.5, 'se': 0.6455}
    """

    is_differentiable = False
    full_state_update = False

    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moments", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values (n,)."""
        values = values.detach().double()
        self.moments += torch.stack([torch.ones_like(values).sum(), values.sum(), (values**2).sum()])

    def compute(self) -> dict[str, Tensor]:
        """Mean and standard error of all values."""
        n, total, squares = self.moments
        mean = total / n
        variance = (squares / n - mean**2).clamp(min=0) * n / (n - 1) if n > 1 else torch.tensor(math.nan)
        return {"mean": mean.float(), "se": (variance / n).sqrt().float()}
