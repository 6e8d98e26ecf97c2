"""A convolutional network on top of any base of states on a periodic lattice, in one dimension or two.

Sites s, channels h_s, one number x_s a site; convolutions wrap around, so that with `site_features` = 0 a shift of the
field shifts the output:

    h   = A * (x, e)                       e_s: learned features of the site
    h  <- h + B_l * SiLU(h + U_l tau(t))   l = 1 .. layers, tau: features of the time
    f   = C h                              C = 0 at the start

With a `kernel` of 1 every site is on its own and shares the network with the others, told apart by its features alone:
the network of a density that is a product over its coordinates.
"""

import torch
from torch import Tensor, nn

from lightning_tilt.interfaces import Predictor, Reward
from lightning_tilt.models.guide import time_features
from lightning_tilt.models.tilt import TiltOfBase

__all__ = ["LatticeTilt"]


class LatticeTilt(TiltOfBase):
    """`x1_hat` of a frozen base plus the gain of `TiltOfBase` times a convolutional network, 0 at the start.

    Args:
        base: the model to tune, of states (L,) or (L, M).  It is frozen and held once, outside the checkpoint.
        kernel: sites that a convolution sees in each direction, odd.
        hidden: channels.
        layers: residual convolutions.
        site_features: learned channels that tell the sites apart; 0: the network commutes with shifts.
        frequencies: number of frequencies in the features `cos(pi j t), sin(pi j t)` of the time.
        input_scale: the unit of length of the states.
        guide: see `TiltOfBase`.
        guide_reach: see `TiltOfBase`.

    Raises:
        ValueError: for states of other dimensions, and a kernel that is even or wider than the lattice.
    """

    def __init__(
        self,
        base: Predictor,
        kernel: int = 3,
        hidden: int = 32,
        layers: int = 3,
        site_features: int = 0,
        frequencies: int = 6,
        input_scale: float = 1.0,
        guide: Reward | None = None,
        guide_reach: float = 3.0,
    ) -> None:
        super().__init__(base, input_scale, guide, guide_reach)
        shape = self.state_shape
        if len(shape) not in (1, 2):
            raise ValueError(f"LatticeTilt works on states (L,) or (L, M), not {shape}")
        if kernel < 1 or kernel % 2 == 0 or kernel > min(shape):
            raise ValueError(f"kernel is odd and at most the lattice's {min(shape)} sites wide, not {kernel}")
        conv: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv1d if len(shape) == 1 else nn.Conv2d
        around = {"kernel_size": kernel, "padding": kernel // 2, "padding_mode": "circular"}
        self.frequencies = frequencies
        self.sites = nn.Parameter(torch.randn(site_features, *shape)) if site_features else None
        self.first = conv(1 + site_features, hidden, **around)  # type: ignore[arg-type]
        self.convolutions = nn.ModuleList(conv(hidden, hidden, **around) for _ in range(layers))  # type: ignore[arg-type]
        self.times = nn.ModuleList(nn.Linear(1 + 2 * frequencies, hidden) for _ in range(layers))
        self.last = conv(hidden, 1, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    @property
    def vector_dims(self) -> tuple[int, ...]:
        """None: every site is on its own."""
        return ()

    def f(self, x: Tensor, t: Tensor) -> Tensor:
        """The network alone: states in units of `input_scale` (B, *shape), times (B,), to (B, *shape), in its dtype."""
        h = x.to(self.last.weight.dtype)[:, None]
        if self.sites is not None:
            h = torch.cat([h, self.sites.expand(len(x), *self.sites.shape)], 1)
        h, tau = self.first(h), time_features(t, self.frequencies).to(h)
        for convolution, times in zip(self.convolutions, self.times, strict=True):
            shift = times(tau).reshape(len(x), -1, *(1,) * (x.ndim - 1))
            h = h + convolution(nn.functional.silu(h + shift))
        out: Tensor = self.last(h)[:, 0]
        return out
