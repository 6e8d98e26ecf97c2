"""A reward of which there can be enough: its value is held between two bounds.

    hard, softness 0:    r' = min(max(r, a), b)                                      dr'/dr = 1 inside, 0 outside
    soft, softness s:    r' = a + s log(1 + e^{(r - a)/s}) - s log(1 + e^{(r - b)/s})
                         dr'/dr = sigmoid((r - a)/s) - sigmoid((r - b)/s)

The soft one is the hard one smoothed over a length s of the reward.  Its slope is above 0 everywhere: near 1 inside,
about 1/2 at a bound, and falling as e^{-|r - bound|/s} outside, so that a sample beyond a bound still knows the way
back.  Both bounds are limits that it never passes.  What it is off by is largest at a bound: s log 2.

A bound above keeps a run from driving one reward ever further (`max`), a bound below keeps rare, very bad samples
from ruling the gradient (`min`: a log-probability of -50).
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.rewards.combined import Combined

__all__ = ["Clamped"]


class Clamped(Combined):
    """A reward held between `min` and `max`; the share beyond them is logged as `train/clamped`.

    Args:
        reward: what is held.
        min: the bound below; None: there is none.
        max: the bound above; None: there is none.
        softness: the length, in units of the reward, over which the slope falls off at a bound; 0: at once.

    Raises:
        ValueError: if there is no bound, if they are in the wrong order or not finite, or for a softness below 0.

    Example:
        >>> from lightning_tilt.rewards import LinearReward
        >>> Clamped(LinearReward([1.0]), min=-1.0, max=1.0).score(torch.tensor([[-3.0], [0.5], [2.0]]), None).tolist()
        [-1.0, 0.5, 1.0]
    """

    def __init__(
        self, reward: Reward, min: float | None = None, max: float | None = None, softness: float = 0.0
    ) -> None:
        super().__init__({"reward_unclamped": reward})
        bounds = [b for b in (min, max) if b is not None]
        if not bounds or not all(map(math.isfinite, bounds)):
            raise ValueError(f"Clamped needs a bound that is a finite number: min {min}, max {max}")
        if min is not None and max is not None and not min < max:
            raise ValueError(f"Clamped: min {min} must be below max {max}")
        if not 0 <= softness < math.inf:
            raise ValueError(f"Clamped: softness is a length of the reward and at least 0, not {softness}")
        self.min, self.max, self.softness = min, max, softness

    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
        """The held reward, the reward itself, and 1 where that is beyond a bound; see `Reward.measure`."""
        (r,), figures = self.ask(images, prompts)
        s, a, b = self.softness, self.min, self.max
        if s == 0:
            held = r.clamp(a, b)
        else:
            above_b = 0.0 if b is None else s * softplus((r - b) / s)
            held = (r if a is None else a + s * softplus((r - a) / s)) - above_b
        beyond = torch.zeros_like(r, dtype=torch.bool)
        for bound, outside in ((a, r.lt), (b, r.gt)):
            beyond = beyond if bound is None else beyond | outside(bound)
        return held, {"reward_unclamped": r.detach(), "clamped": beyond.to(r)} | figures
