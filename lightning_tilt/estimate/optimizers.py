"""What an optimiser needs: the optimiser itself is tried on small parameters, with random gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from lightning_tilt.estimate.tracking import AllocationTracker, tensor_bytes

__all__ = ["OptimizerCost", "optimizer_cost"]

_MOST_STEPS, _STEADY = 400, 10


@dataclass(frozen=True)
class OptimizerCost:
    """Of one optimiser, in units of its parameters' bytes.

    Attributes:
        state: what it keeps from step to step.
        passing: what a step holds beside it.
        closures: how often a step asks for the loss and its gradient, at most.
    """

    state: float
    passing: float
    closures: int


def optimizer_cost(kind: Any, arguments: dict[str, Any]) -> OptimizerCost:
    """Make steps until the state grows no more (L-BFGS fills its history), and look at one.

    As Lightning does, every step is given a closure: most optimisers call it once, L-BFGS for each of its iterations.

    Args:
        kind: class of the optimiser.
        arguments: beside the parameters.

    Raises:
        ValueError: if it cannot be made with these arguments, or its step fails.
    """
    try:
        return _tried(kind, arguments)
    except Exception as error:  # other people's code fails in its own ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the optimiser {kind.__name__} fails on a small trial, so that its memory is not known: {reason}"
        ) from error


def _tried(kind: Any, arguments: dict[str, Any]) -> OptimizerCost:
    parameters = [nn.Parameter(torch.zeros(64, 64)) for _ in range(4)]
    gradients = [torch.zeros_like(p) for p in parameters]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    optimizer = _made(kind, parameters, arguments)
    closure = _Closure(gradients)
    with AllocationTracker([*parameters, *gradients]) as tracker:
        size, steady, most, asked = -1, 0, 1, 0
        for _ in range(_MOST_STEPS):
            optimizer.step(closure)
            most, asked = max(most, closure.calls - asked), closure.calls
            before, size = size, tensor_bytes(_state(optimizer))
            steady = steady + 1 if size == before else 0
            if steady == _STEADY:
                break
        held = tracker.peak = tracker.live
        optimizer.step(closure)
    whole = tensor_bytes(parameters)
    return OptimizerCost(size / whole, (tracker.peak - held) / whole, most)


def _made(kind: Any, parameters: list[nn.Parameter], arguments: dict[str, Any]) -> Any:
    options = {n: v for n, v in arguments.items() if n not in ("foreach", "fused")}
    try:
        return kind(parameters, **options, foreach=True)  # what it does on a GPU
    except TypeError:
        return kind(parameters, **options)


def _state(optimizer: Any) -> list[Tensor]:
    return [t for t in tree_iter(list(optimizer.state.values())) if isinstance(t, Tensor) and t.numel() > 1]


class _Closure:
    """Random gradients under a loss that falls, made in place; no minimum is ever reached, so no step ends early."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self.calls, self._gradients, self._loss = 0, gradients, torch.zeros(())
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            for gradient in self._gradients:
                gradient.normal_(generator=self._generator)
            return self._loss.sub_(1)
