"""Interpolants in continuous time that start at pure noise: rectified flow (SD 3) and the cosine schedule.

    RectifiedFlow   alpha = t               beta = 1 - t
    Cosine          alpha = sin(pi t / 2)   beta = S cos(pi t / 2)      S = 1, or the scale of a density

Both have alpha = 0 at t = 0, so their memoryless chains tilt the base without a bias from the initial value.
"""

import math

import torch
from torch import Tensor

from lightning_tilt.process.base import Process

__all__ = ["Cosine", "RectifiedFlow"]


def _uniform(steps: int) -> Tensor:
    """Noise levels `1 - k/K`, k = 0 .. K, in float64."""
    if steps < 1:
        raise ValueError(f"a chain needs at least 1 step, not {steps}")
    return 1 - torch.arange(steps + 1, dtype=torch.float64) / steps


class RectifiedFlow(Process):
    """`X_t = t X_1 + (1 - t) eps` (2209.03003; SD 3: 2403.03206).

    Args:
        shift: shapes the grid alone, never the process.  A uniform noise level `q = 1 - k/K` becomes
            `shift q / (1 + (shift - 1) q)` (2403.03206, equation 23), and `t` is one minus that.  SD 3 uses 3.
    """

    def __init__(self, shift: float = 1.0) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, not {shift}")
        self.shift = shift

    def __repr__(self) -> str:
        return f"RectifiedFlow(shift={self.shift})"

    def alpha(self, t: Tensor) -> Tensor:
        """`t`."""
        return t

    def beta(self, t: Tensor) -> Tensor:
        """`1 - t`."""
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        """-1."""
        return -torch.ones_like(t)

    def grid(self, steps: int) -> Tensor:
        """Shifted times, (steps + 1,) float64, from 0 to 1."""
        q = _uniform(steps)
        return 1 - self.shift * q / (1 + (self.shift - 1) * q)

    def timestep(self, t: Tensor) -> Tensor:
        """`1000 (1 - t)`, as SD 3 counts."""
        return 1000 * (1 - t)


class Cosine(Process):
    """`X_t = sin(pi t/2) X_1 + cos(pi t/2) S eps`: variance preserving, smooth, and exactly noise at t = 0.

    Args:
        noise_scale: S, the standard deviation of the noise, and of X_0, in units of the states; of data of about that
            size the marginals keep their width all the way, as a path of densities wants.

    Raises:
        ValueError: if `noise_scale` is not positive.
    """

    def __init__(self, noise_scale: float = 1.0) -> None:
        if not 0 < noise_scale < math.inf:
            raise ValueError(f"noise_scale must be positive, not {noise_scale}")
        self.noise_scale = noise_scale

    def __repr__(self) -> str:
        return "Cosine()" if self.noise_scale == 1 else f"Cosine(noise_scale={self.noise_scale})"

    def alpha(self, t: Tensor) -> Tensor:
        """`sin(pi t/2)`."""
        return torch.sin(math.pi / 2 * t)

    def beta(self, t: Tensor) -> Tensor:
        """`S cos(pi t/2)`, written as a sine so that it is exactly 0 at t = 1."""
        return self.noise_scale * torch.sin(math.pi / 2 * (1 - t))

    def d_alpha(self, t: Tensor) -> Tensor:
        """`pi/2 beta/S`."""
        return math.pi / 2 / self.noise_scale * self.beta(t)

    def d_beta(self, t: Tensor) -> Tensor:
        """`-S pi/2 alpha`."""
        return -self.noise_scale * math.pi / 2 * self.alpha(t)

    def grid(self, steps: int) -> Tensor:
        """Uniform times, (steps + 1,) float64, from 0 to 1."""
        return 1 - _uniform(steps)

    def initial(self, noise: Tensor) -> Tensor:
        """`S eps`."""
        return self.noise_scale * noise

    def timestep(self, t: Tensor) -> Tensor:
        """`1000 (1 - t)`, the convention of flow models."""
        return 1000 * (1 - t)
