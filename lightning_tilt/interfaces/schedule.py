"""The multiplier of the reward over the updates of a fit."""

from dataclasses import dataclass

__all__ = ["LamSchedule"]


@dataclass(frozen=True)
class LamSchedule:
    """A multiplier that grows linearly to its value.

    Args:
        lam: the value reached, in units of one over the reward.
        warmup: optimiser updates until it is reached.
        start: the fraction of `lam` at the first update.

    Example:
        >>> [LamSchedule(lam=4.0, warmup=4)(step) for step in (0, 2, 9)]
        [0.0, 2.0, 4.0]
    """

    lam: float
    warmup: int = 0
    start: float = 0.0

    def __call__(self, step: int) -> float:
        """The multiplier at an optimiser step."""
        if step >= self.warmup:
            return self.lam
        return self.lam * (self.start + (1 - self.start) * step / self.warmup)
