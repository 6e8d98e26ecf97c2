"""A multilayer perceptron on top of any base: the model of the toy problems."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_tilt.interfaces import Predictor, Reward
from lightning_tilt.models.guide import time_features
from lightning_tilt.models.tilt import TiltOfBase

__all__ = ["NeuralTilt"]


class NeuralTilt(TiltOfBase):
    """`x1_hat` of a frozen base plus a gain times an MLP (SiLU, Fourier features of t), which is 0 at the start.

    Args:
        base: the model to tune; any prediction type.  It is frozen and held once, outside the checkpoint.
        hidden: width of the hidden layers.
        layers: number of hidden layers.
        frequencies: number of frequencies in the features `cos(pi j t), sin(pi j t)` of the time.
        input_scale: the unit of length of the states (40 for modes that lie on +-40): the network sees x/input_scale,
            and moves `x1_hat` in this unit.
        guide: see `TiltOfBase`.
        guide_reach: see `TiltOfBase`.
    """

    def __init__(
        self,
        base: Predictor,
        hidden: int = 128,
        layers: int = 3,
        frequencies: int = 6,
        input_scale: float = 1.0,
        guide: Reward | None = None,
        guide_reach: float = 3.0,
    ) -> None:
        super().__init__(base, input_scale, guide, guide_reach)
        self.frequencies = frequencies
        size = math.prod(self.state_shape)
        widths = [size + 1 + 2 * frequencies, *[hidden] * layers]
        blocks = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(widths)]
        self.hidden = nn.Sequential(*blocks)
        self.last = nn.Linear(widths[-1], size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def f(self, x: Tensor, t: Tensor) -> Tensor:
        """The network alone: states in units of `input_scale` (B, ...) and times (B,) to (B, ...), in its own dtype."""
        dtype = self.last.weight.dtype
        features = time_features(t, self.frequencies).to(dtype)
        out: Tensor = self.last(self.hidden(torch.cat([x.flatten(1).to(dtype), features], 1)))
        return out.reshape(x.shape)
