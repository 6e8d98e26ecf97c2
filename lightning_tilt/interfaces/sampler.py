"""What a loss and a host may ask of the sampler, whichever callback it is."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning_tilt.trajectory import Trajectory

if TYPE_CHECKING:
    from lightning_tilt.chain import Chain, Evaluations
    from lightning_tilt.noise import Stream

__all__ = ["Sampler"]


class Sampler(ABC):
    """Rolls the current model out; the only place where training draws samples.

    Attributes:
        seed: the key of all its draws.
        guidance_scale: classifier-free guidance of the rollout.
        samples_per_condition: samples drawn for each condition of a batch.
        memoryless: whether the transitions are the memoryless ones.
        evaluations: network evaluations of training so far.
        weighted: whether the base makes the steps of std = 0, so that path weights mean something.
    """

    seed: int
    guidance_scale: float
    samples_per_condition: int
    memoryless: bool
    weighted: bool
    evaluations: "Evaluations"

    @property
    @abstractmethod
    def trajectory(self) -> Trajectory:
        """The rollout that the current batch trains on."""

    @abstractmethod
    def chain(self, host: Any, count: bool = True) -> "Chain":
        """The chain of the host's process on this sampler's grid; `count` its evaluations as training's."""

    @abstractmethod
    def rollout(
        self,
        host: Any,
        batch: Any,
        *,
        stream: "Stream",
        number: int,
        reward_gradient: bool = False,
        base: bool = False,
        samples_per_condition: int | None = None,
    ) -> Trajectory:
        """Roll out the current model (or its base) on a batch of prompts and score the end points once."""
