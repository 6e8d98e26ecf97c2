"""Calls of networks: in evaluation mode, in micro-batches, and counted.

Evaluations are counted in forwards of one sample: a forward is 1, its VJP to the input 1 more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

__all__ = ["Evaluations", "evaluating", "slices"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; every submodule's own mode is restored afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def slices(total: int, size: int | None) -> Iterator[slice]:
    """Cut `range(total)` into slices of at most `size` (None: one slice)."""
    if size is not None and size < 1:
        raise ValueError(f"a micro-batch holds at least one sample, not {size}; null means all at once")
    size = size or max(total, 1)
    return (slice(i, min(i + size, total)) for i in range(0, total, size))


@dataclass
class Evaluations:
    """Network evaluations, in forwards of one sample.

    Attributes:
        forward: forward passes, with or without gradient.
        vjp: products of a vector with the Jacobian to the input (one forward each).
        backward: backward passes to the parameters, in forwards: 2 for a full network, 1 for adapters; what a network
            recomputes inside (gradient checkpointing of its own) is not seen from here.
        pairs: supervised (sample, step) pairs that a loss has seen.
        reward: scores of one sample, with or without their gradient; of a density, its energy evaluations.
    """

    forward: int = 0
    vjp: int = 0
    backward: int = 0
    pairs: int = 0
    reward: int = 0

    @property
    def network(self) -> int:
        """Forwards, VJPs and backwards together."""
        return self.forward + self.vjp + self.backward

    @property
    def forwards_per_pair(self) -> float:
        """What one supervised pair cost, everything counted."""
        return self.network / max(self.pairs, 1)

    def as_dict(self) -> dict[str, float | int]:
        """All of it, as reports and checkpoints have it."""
        return {**self.__dict__, "forwards_per_pair": self.forwards_per_pair}
