"""What a loss and a host may ask of the sampler, whichever callback it is."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning import Callback, LightningModule
from torch import Tensor

from lightning_tilt.interfaces.not_finite import BadPolicy
from lightning_tilt.trajectory import Trajectory

if TYPE_CHECKING:
    from lightning_tilt.chain import Chain, Evaluations
    from lightning_tilt.noise import Stream
    from lightning_tilt.transition import Transition

__all__ = ["Evaluator", "Sampler", "find_sampler"]


class Evaluator:
    """A callback that samples base and tuned model on the batches of a test, so that the host need not.

    It logs `test/reward`, `test/reward_se` and `test/diversity`, as the host would.
    """


class Sampler(ABC):
    """Rolls the current model out; the only place where training draws samples.

    Attributes:
        seed: the key of all its draws.
        batches: training batches so far, the current one included; restored by a checkpoint.
        buffer_size: rollouts that are kept for the batches between two fresh ones.
        rollout_every: batches from one fresh rollout to the next.
        replay_samples: samples of each process that a batch draws from a buffer of rollouts; None: it is one rollout.
        guidance_scale: classifier-free guidance of the rollout.
        samples_per_condition: samples drawn for each condition of a batch.
        skipped: updates of training that were not made, for want of a good sample or of a finite gradient.
        reward_figures: what the last fresh rollout says of the parts of its reward, by name.
        seconds: wall time of the parts of the current batch's rollout, by name.
        rollout_micro_batch: samples in one network call of a rollout; None: all.
        reward_micro_batch: samples decoded and scored at once; None: all.
        evaluations: network evaluations of training so far.
        exact_resume: refuse to go on from a checkpoint where that cannot be exact.
    """

    seed: int
    batches: int
    buffer_size: int
    rollout_every: int
    replay_samples: int | None
    guidance_scale: float
    samples_per_condition: int
    rollout_micro_batch: int | None
    reward_micro_batch: int | None
    evaluations: "Evaluations"
    exact_resume: bool
    seconds: dict[str, float]
    skipped: int
    reward_figures: dict[str, Tensor]

    @property
    @abstractmethod
    def on_bad_reward(self) -> BadPolicy:
        """What becomes of numbers that are not finite: "stop" or "skip"."""

    @property
    @abstractmethod
    def memoryless(self) -> bool:
        """Whether the transitions are the memoryless ones."""

    @property
    @abstractmethod
    def weighted(self) -> bool:
        """Whether the base makes the steps of std = 0, so that path weights mean something."""

    @property
    def replays(self) -> bool:
        """Whether batches train on rollouts of older models."""
        return self.rollout_every > 1 or self.replay_samples is not None

    @property
    @abstractmethod
    def trajectory(self) -> Trajectory:
        """The rollout that the current batch trains on."""

    @abstractmethod
    def chain(self, host: Any, count: bool = True) -> "Chain":
        """The chain of the host's process on this sampler's grid; `count` its evaluations as training's."""

    @abstractmethod
    def variant(self, steps: int | None = None, transition: "Transition | None" = None) -> "Sampler":
        """This sampler with other steps or transitions, for rollouts that are looked at; it keeps no buffer."""

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
        world: tuple[int, int] | None = None,
        bad: list[str] | None = None,
    ) -> Trajectory:
        """Roll out the current model (or its base) on a batch of prompts and score the end points once.

        `bad` takes what is said of samples that are not finite, where the caller judges (`judge_together`): a process
        that raised in its rollout would leave the others waiting. None: the policy is applied here.
        """


def find_sampler(host: LightningModule) -> Sampler:
    """The one sampler among the callbacks of the host's Trainer.

    Raises:
        RuntimeError: if there is none, or several.
    """
    callbacks: list[Callback] = host.trainer.callbacks  # type: ignore[attr-defined]
    samplers = [c for c in callbacks if isinstance(c, Sampler)]
    if len(samplers) != 1:
        raise RuntimeError(
            f"{type(host).__name__} needs one TrajectorySampler among the Trainer's callbacks and found "
            f"{len(samplers)}: Trainer(callbacks=[lightning_tilt.TrajectorySampler(...)])"
        )
    return samplers[0]
