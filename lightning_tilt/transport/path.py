"""A path of marginals from the base's noise to its tilt: which r_t, and what is known of it at a state.

    pi_t ~ p_t exp(r_t),    r = 0 at t_0,   r = lam r at t_1        t_0, t_1: first and last noisy time of a chain

    state     r_t(x) = c(tau) lam r(x)                     tau = (t - t_0)/(t_1 - t_0)
    x1_hat    r_t(x) = c(tau) lam r(x1_hat(x, t))          the base's own prediction of the end

    c         linear tau,   quadratic tau^2,   smooth tau^2 (3 - 2 tau),   or any function with c(0) = 0, c(1) = 1

`state` costs no gradient of the network, but asks the reward about noisy states; `x1_hat` asks it about clean ones, at
the price of a VJP through the base.  Gradients in x and in t come from one backward pass; that in t needs a base whose
time is continuous where the path goes through its prediction.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_tilt.condition import Condition
from lightning_tilt.process import Prediction

__all__ = ["SCHEDULES", "Look", "MarginalPath", "PathKind", "PathSchedule"]

PathKind = Literal["state", "x1_hat"]
"""What the reward is asked about on the way."""

PathSchedule = Literal["linear", "quadratic", "smooth"]
"""How the reward comes in with the time."""

SCHEDULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda tau: tau,
    "quadratic": lambda tau: tau**2,
    "smooth": lambda tau: tau**2 * (3 - 2 * tau),
}
"""c(tau) by its name."""


class Look(NamedTuple):
    """What a path says of B states.

    Attributes:
        prediction: the base's x1_hat and eps_hat there.
        value: r_t(x), (B,).
        gradient: grad r_t(x), (B, *shape).
        rate: d_t r_t(x), (B,); None where it was not asked for.
    """

    prediction: Prediction
    value: Tensor
    gradient: Tensor
    rate: Tensor | None


@dataclass(frozen=True)
class MarginalPath:
    """`r_t` as an object.

    Args:
        reward: r of states and their conditions, decoded if need be: (B, *shape) to (B,), differentiable.
        lam: the multiplier.
        kind: "state" or "x1_hat".
        schedule: c, by name or as a function of tau in [0, 1] (float64, differentiable).
        start: t_0.
        end: t_1.

    Raises:
        ValueError: for an unknown kind or schedule, and for a schedule that does not lead from 0 to 1.

    Example:
        >>> path = MarginalPath(lambda x, condition: x.sum(1), lam=2.0, schedule="quadratic")
        >>> x, t = torch.ones(1, 3), torch.tensor([0.5], dtype=torch.float64)
        >>> path.value(x, t, Condition({}, None, 1), x1_hat=x)
        tensor([1.5000])
    """

    reward: Callable[[Tensor, Condition], Tensor]
    lam: float
    kind: PathKind = "state"
    schedule: PathSchedule | Callable[[Tensor], Tensor] = "linear"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(PathKind):
            raise ValueError(f"the kind of a path is one of {get_args(PathKind)}, not {self.kind!r}")
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise ValueError(f"the schedule of a path is one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        first, last = self.level(torch.tensor([self.start, self.end], dtype=torch.float64)).tolist()
        if abs(first) > 1e-9 or abs(last - 1) > 1e-9:
            raise ValueError(f"a schedule leads from c(0) = 0 to c(1) = 1, and this one from {first:.3g} to {last:.3g}")

    def level(self, t: Tensor) -> Tensor:
        """`c(tau)` at the times t, any shape, float64."""
        c = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return c((t.double() - self.start) / (self.end - self.start))

    def value(self, x: Tensor, t: Tensor, condition: Condition, x1_hat: Tensor) -> Tensor:
        """`r_t(x)`, with the gradient of whatever carries one: (B,).

        Args:
            x: states, (B, *shape).
            t: their times, (B,), float64.
            condition: B conditions.
            x1_hat: the base's prediction at x; read by the kind "x1_hat" alone.
        """
        asked = x if self.kind == "state" else x1_hat
        return self.lam * self.level(t).to(x) * self.reward(asked, condition)

    def look(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        predict: Callable[[Tensor, Tensor, Condition], Prediction],
        *,
        rate: bool = False,
        create_graph: bool = False,
    ) -> Look:
        """The base's prediction, and `r_t` with its gradients, from one evaluation of the base.

        Gradients are had here in spite of `no_grad` and inference mode around.

        Args:
            x: states, (B, *shape).
            t: their times, (B,), float64.
            condition: B conditions.
            predict: the base.
            rate: bring d_t r_t too.
            create_graph: let gradients flow through everything that is returned, back to x.
        """
        with torch.inference_mode(False), torch.enable_grad():
            if not (create_graph and x.requires_grad):
                x, condition = x.detach().clone().requires_grad_(), _usable(condition)
            t = t.detach().clone().requires_grad_(rate)
            with torch.set_grad_enabled(create_graph or self.kind == "x1_hat"):
                prediction = predict(x, t, condition)
            value = self.value(x, t, condition, prediction.x1_hat)
            gradient, *rates = torch.autograd.grad(
                value.sum(), (x, t) if rate else (x,), create_graph=create_graph, materialize_grads=True
            )
        d_t = rates[0].to(x) if rate else None
        if create_graph:
            return Look(prediction, value, gradient, d_t)
        return Look(Prediction(prediction.x1_hat.detach(), prediction.eps_hat.detach()), value.detach(), gradient, d_t)


def _usable(condition: Condition) -> Condition:
    """The same conditions, free of tensors of inference mode, which no backward pass may see."""
    tensors = {name: v.clone() if v.is_inference() else v for name, v in condition.tensors.items()}
    return Condition(tensors, condition.prompts, condition.size)
