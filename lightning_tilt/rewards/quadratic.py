"""Rewards whose tilt of a Gaussian is a Gaussian: linear and quadratic functions of the state.

    r(x) = k + b.x - x'A x/2,    lam r tilts N(m, C) into a Gaussian of precision C^-1 + lam A

With them every quantity of a tilted Gaussian mixture is known in closed form (`GaussianMixture.tilt`), so they are the
rewards of tests, and of toy configs with a known answer.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tilt.interfaces import Prompts, Reward

__all__ = ["ConjugateReward", "LinearReward", "QuadraticReward"]


class ConjugateReward(Reward):
    """A reward `k + b.x - x'A x/2` of states of dimension d."""

    @abstractmethod
    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """`A` (d, d) symmetric, `b` (d,) and `k` (), in float64."""


class QuadraticReward(ConjugateReward):
    """`r(x) = -(x - c)' A (x - c)/2`.

    Args:
        A: (d, d), symmetric; a negative eigenvalue is legal as long as the tilted law exists.
        c: (d,), where the reward is largest.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if the shapes disagree or `A` is not symmetric.

    Example:
        >>> reward = QuadraticReward([[1.0, 0.0], [0.0, 2.0]], [0.0, 1.0])
        >>> reward.score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), None).tolist()
        [-1.5, -1.0]
    """

    A: Tensor
    c: Tensor

    def __init__(self, A: Sequence[Sequence[float]] | Tensor, c: Sequence[float] | Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Copies: a tensor of the caller that changes later must not change the reward.
        matrix, centre = (
            torch.as_tensor(A, dtype=torch.float64).clone(),
            torch.as_tensor(c, dtype=torch.float64).clone(),
        )
        if centre.ndim != 1 or matrix.shape != (len(centre), len(centre)):
            raise ValueError(f"A must be (d, d) and c (d,), not {tuple(matrix.shape)} and {tuple(centre.shape)}")
        if not torch.equal(matrix, matrix.mT):
            raise ValueError("A must be symmetric: use (A + A')/2, which gives the same reward")
        self.register_buffer("A", matrix, persistent=False)
        self.register_buffer("c", centre, persistent=False)

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """`-(x - c)' A (x - c)/2` of the states, (B, d) or any shape of d numbers a sample: (B,)."""
        x = images.flatten(1) - self.c.to(images)
        return -((x @ self.A.to(images)) * x).sum(1) / 2

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """`A`, `A c` and `-c'A c/2`."""
        return self.A, self.A @ self.c, -(self.c @ self.A @ self.c) / 2


class LinearReward(ConjugateReward):
    """`r(x) = b.x`.

    Args:
        b: (d,), the gradient of the reward.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if `b` is no vector.

    Example:
        >>> LinearReward([1.0, -2.0]).score(torch.tensor([[3.0, 1.0]]), None).tolist()
        [1.0]
    """

    b: Tensor

    def __init__(self, b: Sequence[float] | Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        vector = torch.as_tensor(b, dtype=torch.float64).clone()
        if vector.ndim != 1:
            raise ValueError(f"b must be a vector (d,), not of shape {tuple(vector.shape)}")
        self.register_buffer("b", vector, persistent=False)

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """`b.x` of the states, (B,)."""
        return images.flatten(1) @ self.b.to(images)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """0, `b` and 0."""
        d = len(self.b)
        return self.b.new_zeros(d, d), self.b, self.b.new_zeros(())
