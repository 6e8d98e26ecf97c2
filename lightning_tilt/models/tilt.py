"""What every small network on top of a frozen base shares: the form of its prediction, and what it leaves to the base.

    x1_hat(x, t) = x1_hat_base(x, t) + gain_t f(x, t)

The optimal tilt moves `x1_hat` by `beta^2/alpha grad log h`, and `grad log h` is of order `alpha` at the noisy end: the
gain leaves to `f` a function of order one at all times,

    gain = V_t/unit,    V_t = posterior_variance(t, m)    of a Gaussian base N(mu, I/m)
                        V_t = beta^2                      of any other base

with `unit` the length in which states are measured: a network sees x/unit, and a change of units changes nothing.  Of a
Gaussian base f/unit is E*[lam grad r(X_1) | X_t].
With a `guide`, a reward whose gradient is cheap, x1_hat is also moved along that gradient (`Guide`).
Both moves are 0 at the start, so that tuning begins exactly at the base.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Condition, Predictor, Prompts, Reward
from lightning_tilt.models.gaussian_base import GaussianBase
from lightning_tilt.models.guide import Guide
from lightning_tilt.process import expand

__all__ = ["TiltOfBase"]


class TiltOfBase(Predictor):
    """`x1_hat` of a frozen base plus `gain_t f(x, t)`; a subclass gives `f`, which is 0 at the start.

    Args:
        base: the model to tune; any prediction type.  It is frozen and held once, outside the checkpoint.
        input_scale: the unit of length of the states: `f` is given states that were divided by it.
        guide: the reward whose gradient at the base's prediction helps; None: none does.
        guide_reach: the longest move that the guide asks for, before its gate, in standard deviations of what the base
            leaves open: of a sample; of a particle or a site in networks for those.

    Raises:
        ValueError: if `input_scale` or `guide_reach` is not positive.
        TypeError: if the guide has no gradient, or reads prompts.
    """

    backward_cost = 2

    def __init__(
        self,
        base: Predictor,
        input_scale: float = 1.0,
        guide: Reward | None = None,
        guide_reach: float = 3.0,
    ) -> None:
        super().__init__()
        if not 0 < input_scale < math.inf:
            raise ValueError(f"input_scale must be positive, not {input_scale}")
        self._base = Frozen(base)
        self.process = base.process
        self.prediction_type = "sample"
        self.state_shape = base.state_shape
        self.input_scale = input_scale
        self.guide = None if guide is None else Guide(guide, guide_reach, self.vector_dims)
        self.reward_cost = base.reward_cost
        if self.guide is not None:
            self.guide.bind(self)
            self.reward_cost += 1

    @classmethod
    def sources_with(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """With a guide, what the guide is from too; made, it is a part that says so itself."""
        return (*cls.sources, *(Guide.sources if arguments.get("guide") is not None else ()))

    @property
    def vector_dims(self) -> tuple[int, ...]:
        """The dimensions of states (B, *shape) that make one vector, whose length the guide softens."""
        return tuple(range(1, 1 + len(self.state_shape)))

    @abstractmethod
    def f(self, x: Tensor, t: Tensor) -> Tensor:
        """The network alone: states in units of `input_scale` (B, ...) and times (B,) to (B, ...), in its own dtype."""

    def gain(self, t: Tensor) -> Tensor:
        """What multiplies `f` at the times t (B,): (B,), float64."""
        return self.variance(t) / self.input_scale

    def variance(self, t: Tensor) -> Tensor:
        """V_t: of X_1 given X_t under a Gaussian base, beta^2 for any other, at the times t (B,): (B,), float64."""
        base, t = self._base.module, t.double()
        if isinstance(base, GaussianBase):
            return self.process.posterior_variance(t, base.precision)
        return self.process.beta(t) ** 2

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """`x1_hat` at the states (B, *state_shape) and times (B,)."""
        base = self._base.module
        x1_hat = base.process.interpret(base.predict(x, t, condition), base.prediction_type, x, t).x1_hat
        f = self.f(x / self.input_scale, t).to(x.dtype)
        move = expand(self.gain(t), x) * f
        if self.guide is not None:
            move = move + self.guide(x1_hat, t, self.variance(t), base.decode)
        return x1_hat + self.project(move)

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

    def project(self, noise: Tensor) -> Tensor:
        """As the base does: the tilt lives on the subspace of its base."""
        return self._base.module.project(noise)
