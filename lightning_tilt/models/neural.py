"""A small network on top of any base: the model of the toy problems.

    x1_hat(x, t) = x1_hat_base(x, t) + beta_t^2 f(x, t)

The optimal tilt moves `x1_hat` by `beta^2/alpha grad log h`, and `grad log h` is of order `alpha` at the noisy end: the
factor `beta^2` leaves to `f` a function of order one at all times.  `f` is 0 at the start, so tuning begins exactly at
the base.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Condition, Predictor, Prompts
from lightning_tilt.process import expand

__all__ = ["NeuralTilt"]


class NeuralTilt(Predictor):
    """`x1_hat` of a frozen base plus `beta^2` times an MLP (SiLU, Fourier features of t), which is 0 at the start.

    Args:
        base: the model to tune; any prediction type.  It is frozen and held once, outside the checkpoint.
        hidden: width of the hidden layers.
        layers: number of hidden layers.
        frequencies: number of frequencies in the features `cos(pi j t), sin(pi j t)` of the time.
    """

    backward_cost = 2

    def __init__(self, base: Predictor, hidden: int = 128, layers: int = 3, frequencies: int = 6) -> None:
        super().__init__()
        self._base = Frozen(base)
        self.process = base.process
        self.prediction_type = "sample"
        self.state_shape = base.state_shape
        self.frequencies = frequencies
        size = math.prod(self.state_shape)
        widths = [size + 1 + 2 * frequencies, *[hidden] * layers]
        blocks = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(widths)]
        self.hidden = nn.Sequential(*blocks)
        self.last = nn.Linear(widths[-1], size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def f(self, x: Tensor, t: Tensor) -> Tensor:
        """The network alone: states (B, ...) and times (B,) to (B, ...), in its own dtype."""
        dtype = self.last.weight.dtype
        phase = math.pi * t.double()[:, None] * torch.arange(1, self.frequencies + 1, device=t.device)
        features = torch.cat([t.double()[:, None], phase.cos(), phase.sin()], 1).to(dtype)
        out: Tensor = self.last(self.hidden(torch.cat([x.flatten(1).to(dtype), features], 1)))
        return out.reshape(x.shape)

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """`x1_hat` at the states (B, *state_shape) and times (B,)."""
        base = self._base.module
        x1_hat = base.process.interpret(base.predict(x, t, condition), base.prediction_type, x, t).x1_hat
        return x1_hat + expand(self.process.beta(t.double()) ** 2, x) * self.f(x, t).to(x.dtype)

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        """The frozen base."""
        yield self._base.module

    def encode(self, prompts: Prompts, size: int) -> Condition:
        """As the base does."""
        return self._base.module.encode(prompts, size)

    def decode(self, x: Tensor) -> Tensor:
        """As the base does."""
        return self._base.module.decode(x)
