"""Noise that is bounded where the memoryless one is not: `sigma` a number or a function of time.

mean = x + h (v + sigma^2/2 s)      std = sigma sqrt(h)      h = s - t          for s < 1
mean = x1_hat                       std = 0                                     for s = 1, where s is infinite
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_tilt.identities import forward_drift
from lightning_tilt.process import Prediction, Process, expand
from lightning_tilt.transition import Gaussian, Transition

__all__ = ["BoundedNoise"]


class BoundedNoise(Transition):
    """Euler-Maruyama steps with bounded noise; a step to t = 1 is deterministic, `x1_hat`.

    Args:
        sigma: the noise, a number, or a function of t (any shape, float64).

    Raises:
        ValueError: for a number that is not positive.
    """

    memoryless: bool = False

    def __init__(self, sigma: float | Callable[[Tensor], Tensor] = 1.0) -> None:
        if not callable(sigma) and not sigma > 0:
            raise ValueError(f"sigma must be positive, not {sigma}: without noise paths have no weights")
        self.noise = sigma

    def __repr__(self) -> str:
        return f"BoundedNoise(sigma={self.noise!r})"

    def sigma(self, t: Tensor) -> Tensor:
        """The noise at the times t."""
        return self.noise(t.double()) if callable(self.noise) else torch.full_like(t, self.noise, dtype=torch.float64)

    def __call__(self, process: Process, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Gaussian:
        """See `Transition`."""
        t, s = t.double(), s.double()
        sigma, h, last = self.sigma(t), s - t, s == 1
        drift = forward_drift(process.velocity(prediction, t), process.score(prediction, t), expand(sigma, x))
        mean = torch.where(expand(last, x).bool(), prediction.x1_hat, x + expand(h, x) * drift)
        return Gaussian(mean, expand(torch.where(last, 0.0, sigma * h.sqrt()), x))
