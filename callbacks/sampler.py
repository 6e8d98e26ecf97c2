"""`TrajectorySampler`: the one place where training draws samples.

Before each training batch it rolls the current model out on the batch's prompts, scores the end points once, and lets
the loss add what it needs (Adjoint Matching: the adjoint sweep).  `training_step` then only reads the `Trajectory`.

    batch of B prompts  ->  N = B x samples_per_condition paths of K steps  ->  r, grad r  ->  Trajectory

A step with std = 0 (the last one of most grids) is made by the base, for the tuned model and the base alike, so that
the path weights have a meaning: then E[w] = Z.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ..chain import Chain, Evaluations, slices
from ..condition import Prompts
from ..interfaces import Loss, Predictor, Sampler
from ..noise import Stream, keyed_normal
from ..trajectory import Trajectory
from ..transition import DDIM, Transition
from .scoring import score_end_points, without_bad

__all__ = ["TrajectorySampler", "prompts_of"]


class TrajectorySampler(Sampler, Callback):
    """Roll the current model out on each training batch.

    Args:
        steps: transitions of a path (K).
        samples_per_condition: paths drawn for each prompt of a batch.
        guidance_scale: classifier-free guidance of the rollout; 1 is none.
        transition: the kernel family; default `DDIM(ddim_eta=1.0)`, the exact memoryless step.
        rollout_every: training batches that share one rollout; 1 is on policy.
        rollout_micro_batch: samples in one network call of the rollout; None: all at once.
        reward_micro_batch: samples decoded and scored at once; None: all at once.
        on_bad_reward: what to do when a reward or its gradient is not finite: `stop` raises and names step and
            prompt; `skip` warns, and gives those samples weight 0.
        base_last_step: let the base make a step of std = 0, as path weights and adjoints ask for; False lets the
            tuned model make it (a different law, without weights).
        seed: key of all draws; None takes the one of `seed_everything`, or 0.
    """

    def __init__(
        self,
        steps: int = 20,
        samples_per_condition: int = 4,
        guidance_scale: float = 1.0,
        transition: Transition | None = None,
        rollout_every: int = 1,
        rollout_micro_batch: int | None = None,
        reward_micro_batch: int | None = None,
        on_bad_reward: Literal["stop", "skip"] = "stop",
        base_last_step: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("steps", steps), ("samples_per_condition", samples_per_condition)):
            if value < 1:
                raise ValueError(f"sampler.{name} must be at least 1, not {value}")
        if rollout_every < 1:
            raise ValueError(f"sampler.rollout_every must be at least 1, not {rollout_every}")
        self.steps = steps
        self.samples_per_condition = samples_per_condition
        self.guidance_scale = guidance_scale
        self.transition = transition or DDIM()
        self.rollout_every = rollout_every
        self.rollout_micro_batch = rollout_micro_batch
        self.reward_micro_batch = reward_micro_batch
        self.on_bad_reward = on_bad_reward
        self.base_last_step = base_last_step
        self.seed = seed if seed is not None else _global_seed()
        self.evaluations = Evaluations()
        self._batches = 0
        self._trajectory: Trajectory | None = None

    @property
    def memoryless(self) -> bool:
        """Whether the transitions are the memoryless ones."""
        return self.transition.memoryless

    @property
    def weighted(self) -> bool:
        """Whether path weights mean something: the base makes the steps of std = 0."""
        return self.base_last_step

    @property
    def trajectory(self) -> Trajectory:
        """The rollout that the current batch trains on."""
        if self._trajectory is None:
            raise RuntimeError("there is no rollout yet: TrajectorySampler makes one at the start of a training batch")
        return self._trajectory

    def chain(self, host: Any, count: bool = True) -> Chain:
        """The chain of the host's process on this sampler's grid; network calls run in the Trainer's precision."""
        evaluations = self.evaluations if count else Evaluations()
        return Chain(host.process, self.transition, host.process.grid(self.steps), evaluations, _network_context(host))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the rollout of this batch, if one is due."""
        if not isinstance(pl_module, Loss):
            raise TypeError(
                f"TrajectorySampler serves a loss, and {type(pl_module).__name__} is none: "
                f"class Mine(AdjointMatching, {type(pl_module).__name__})"
            )
        if self._batches % self.rollout_every == 0:
            trajectory = self.rollout(
                pl_module,
                batch,
                stream="train",
                number=self._batches // self.rollout_every,
                reward_gradient=pl_module.needs_reward_gradient,
            )
            self._trajectory = pl_module.prepare(replace(trajectory, lam=pl_module.current_lam()))
        self._batches += 1

    def rollout(
        self,
        host: Any,
        batch: Any,
        *,
        stream: Stream,
        number: int,
        reward_gradient: bool = False,
        base: bool = False,
        samples_per_condition: int | None = None,
    ) -> Trajectory:
        """Roll out the host's current model, or its base, on a batch and score the end points once.

        Args:
            host: what offers `predictor`, `process`, `reward`.
            batch: prompts (list of strings, or a mapping with "prompt"), or a tensor whose length is the number of
                unconditional draws.
            stream: which stream of random numbers to draw from.
            number: number of the rollout in that stream.
            reward_gradient: bring the gradient of the reward at the end points too.
            base: roll out the base instead.
            samples_per_condition: paths for each prompt; None takes the sampler's.

        Returns:
            The trajectory of len(batch) x samples_per_condition samples, those of a prompt side by side.
        """
        predictor: Predictor = host.predictor
        prompts, size = prompts_of(batch)
        each = samples_per_condition or self.samples_per_condition
        index = torch.arange(size).repeat_interleave(each)
        sample = _global_numbers(host, size, each)
        chain = self.chain(host, count=stream == "train")
        device, dtype = _device_and_dtype(host)
        was_training = predictor.training
        predictor.eval()
        try:
            with torch.no_grad():
                condition = predictor.encode(prompts, size).to(device)
                chunks = [
                    chain.rollout(
                        predictor,
                        condition[index[i]],
                        self._draw(stream, number, sample[i], predictor).to(device, dtype),
                        scale=self.guidance_scale,
                        base=base,
                        base_last_step=self.base_last_step,
                    )
                    for i in slices(len(index), self.rollout_micro_batch)
                ]
        finally:
            predictor.train(was_training)
        states, noise = (torch.cat(parts, 1) for parts in zip(*chunks, strict=True))
        trajectory = Trajectory(
            t=chain.t,
            states=states,
            noise=noise,
            condition=condition,
            index=index.to(device),
            sample=torch.tensor(sample, device=device),
            reward=states.new_zeros(len(index)),
            lam=0.0,
            rollout=number,
            weight=states.new_ones(len(index)),
        )
        trajectory = score_end_points(host, trajectory, reward_gradient, self.reward_micro_batch)
        return without_bad(trajectory, stream, self.on_bad_reward)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: how many batches were seen, evaluations, the rollout still in use."""
        counts = {k: v for k, v in self.evaluations.as_dict().items() if k != "forwards_per_pair"}
        return {"batches": self._batches, "evaluations": counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the streams and counters of a checkpoint."""
        self._batches = state_dict["batches"]
        # A rollout is not saved: what was left of a shared one is skipped, and the next batch makes its own.
        self._batches += -self._batches % self.rollout_every
        self.evaluations.__dict__.update(state_dict["evaluations"])

    def _draw(self, stream: Stream, number: int, sample: list[int], predictor: Predictor) -> Tensor:
        """X_0 and z_0 ... z_{K-1}: (K + 1, n, *shape)."""
        return keyed_normal(self.seed, stream, number, sample, (self.steps + 1, *predictor.state_shape)).transpose(0, 1)


def prompts_of(batch: Any) -> tuple[Prompts, int]:
    """Read the prompts of a user's batch.

    Args:
        batch: a sequence of strings; a mapping with the key "prompt" or "prompts"; or a tensor, whose length is the
            number of unconditional draws.

    Returns:
        The prompts (None without) and their number.
    """
    if isinstance(batch, Tensor):
        return None, len(batch)
    if isinstance(batch, dict):
        for key in ("prompt", "prompts"):
            if key in batch:
                return prompts_of(batch[key])
    if isinstance(batch, (list, tuple)) and all(isinstance(p, str) for p in batch) and len(batch) > 0:
        return list(batch), len(batch)
    raise TypeError(
        f"a batch is a list of prompts, a mapping with 'prompt', or a tensor of draws, not {type(batch).__name__}"
    )


def _global_numbers(host: Any, size: int, each: int) -> list[int]:
    """Numbers of this process's samples among all: Lightning deals a batch's conditions out to the ranks in turn."""
    world, rank = _world(host)
    return [(i * world + rank) * each + j for i in range(size) for j in range(each)]


def _world(host: Any) -> tuple[int, int]:
    trainer = host._trainer
    return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)


def _network_context(host: Any) -> Callable[[], AbstractContextManager[Any]]:
    """The precision plugin's context: Lightning does not enter it outside of the training step."""
    trainer = host._trainer
    return nullcontext if trainer is None else trainer.precision_plugin.forward_context


def _device_and_dtype(host: Any) -> tuple[torch.device, torch.dtype]:
    """Device of the host; states are float32, or float64 for a float64 host, whatever the network's dtype."""
    return host.device, torch.float64 if host.dtype == torch.float64 else torch.float32


def _global_seed() -> int:
    """The seed that `seed_everything` left behind, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
