"""`TrajectorySampler`: the one place where training draws samples.

Before each training batch it rolls the current model out on the batch's prompts, scores the end points once, and lets
the loss add what it needs (Adjoint Matching: the adjoint sweep).  `training_step` then only reads the `Trajectory`.

    batch of B prompts  ->  N = B x samples_per_condition paths of K steps  ->  r, grad r  ->  Trajectory

A step with std = 0 (the last one of most grids) is made by the base, for the tuned model and the base alike, so that
the path weights have a meaning: then E[w] = Z.
"""

import time
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from ..chain import Chain, Evaluations, evaluating, slices
from ..interfaces import BadPolicy, Loss, Predictor
from ..noise import Stream, keyed_normal
from ..trajectory import Trajectory
from ..transition import DDIM, Transition
from .bad_samples import BadSamples
from .buffer import ReplayBuffer, everybodys
from .cited_steps import CitedSteps
from .resumable import Resumable
from .scoring import score_end_points
from .surroundings import check_counts, device_and_dtype, global_numbers, global_seed, prompts_of

__all__ = ["TrajectorySampler"]


class TrajectorySampler(Resumable, CitedSteps):
    """Roll the current model out on each training batch.

    On policy by default. With `rollout_every: n` a rollout is due at every n-th batch alone; the batches between draw
    from the last `buffer_size` rollouts, and their own prompts are not used. With `replay_samples` every batch trains
    on so many end points of the whole buffer (losses that read end points alone).

    Args:
        steps: transitions of a path (K).
        samples_per_condition: paths drawn for each prompt of a batch.
        guidance_scale: classifier-free guidance of the rollout; 1 is none.
        transition: the kernel family; default `DDIM(ddim_eta=1.0)`, the exact memoryless step.
        rollout_every: batches from one fresh rollout to the next; 1 is on policy.
        buffer_size: fresh rollouts that are kept for the batches between.
        passes: batches that train on one rollout before it leaves the buffer; None: until newer ones push it out. A
            fresh rollout is made early when none is left.
        replay_samples: samples that each batch, of each process, draws from the whole buffer, which then every process
            has of all of them; None: a batch trains on one rollout.
        rollout_micro_batch: samples in one network call of the rollout; None: all at once.
        reward_micro_batch: samples decoded and scored at once; None: all at once.
        on_bad_reward: what to do when a reward, its gradient, an adjoint or the loss is not finite: `stop` raises on
            all processes and names step, rank and prompt; `skip` leaves those samples, or that update, out.
        base_last_step: let the base make a step of std = 0, as path weights and adjoints ask for; False lets the
            tuned model make it (a different law, without weights).
        seed: key of all draws; None takes the one of `seed_everything`, or 0.
        exact_resume: refuse to go on from a checkpoint where that cannot be exact: it lacks a state, prompts or batches
                are others, the loader does not know its place; False warns and begins that anew.
    """

    def __init__(
        self,
        steps: int = 20,
        samples_per_condition: int = 4,
        guidance_scale: float = 1.0,
        transition: Transition | None = None,
        rollout_every: int = 1,
        buffer_size: int = 1,
        passes: int | None = None,
        replay_samples: int | None = None,
        rollout_micro_batch: int | None = None,
        reward_micro_batch: int | None = None,
        on_bad_reward: BadPolicy = "stop",
        base_last_step: bool = True,
        seed: int | None = None,
        exact_resume: bool = True,
    ) -> None:
        super().__init__()
        check_counts(
            steps=steps, samples_per_condition=samples_per_condition, rollout_every=rollout_every, passes=passes,
            buffer_size=buffer_size, replay_samples=replay_samples, rollout_micro_batch=rollout_micro_batch,
            reward_micro_batch=reward_micro_batch,
        )  # fmt: skip
        if passes is not None and replay_samples is not None:
            raise ValueError("sampler.passes counts batches of one rollout; replay_samples goes by buffer_size")
        self.steps = steps
        self.samples_per_condition = samples_per_condition
        self.guidance_scale = guidance_scale
        self.transition = transition or DDIM()
        self.rollout_every = rollout_every
        self.buffer_size = buffer_size
        self.replay_samples = replay_samples
        self.rollout_micro_batch = rollout_micro_batch
        self.reward_micro_batch = reward_micro_batch
        self.skipped = 0
        self.base_last_step = base_last_step
        self.exact_resume = exact_resume
        self._given_seed = seed
        self.seed = global_seed() if seed is None else seed
        self.evaluations = Evaluations()
        self.seconds, self.reward_figures = dict[str, float](), dict[str, Tensor]()
        self._bad = BadSamples(on_bad_reward)
        self._buffer = ReplayBuffer(buffer_size, passes)
        self._trajectory: Trajectory | None = None

    @property
    def on_bad_reward(self) -> BadPolicy:
        """What becomes of numbers that are not finite: "stop" or "skip"."""
        return self._bad.policy

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
        grid = host.process.grid(self.steps)
        chain = Chain(host.process, self.transition, grid, evaluations, self._context(host))
        return host.on_chain(chain) if isinstance(host, Loss) else chain

    def variant(self, steps: int | None = None, transition: Transition | None = None) -> "TrajectorySampler":
        """This sampler with other steps or transitions, for rollouts that are looked at."""
        other = copy(self)
        other.steps, other.transition = steps or self.steps, transition or self.transition
        other.base_last_step = self.base_last_step or transition is not None  # an ODE's rollout has no base step
        return other

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the global seed, which may have been set since this callback was made."""
        super().setup(trainer, pl_module, stage)
        if self._given_seed is None:
            self.seed = global_seed()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the rollout of this batch if one is due, else draw one from the buffer."""
        if not isinstance(pl_module, Loss):
            name = type(pl_module).__name__
            raise TypeError(f"TrajectorySampler serves a loss, and {name} is none: class Mine(AdjointMatching, {name})")
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.seconds = {}
        if len(self._buffer) == 0 or self._since >= self.rollout_every:
            fresh, keep = self._fresh(pl_module, batch), self._bad.good > 0
            if keep and self.replay_samples is not None:
                fresh = everybodys(fresh, self.samples_per_condition)
            self._trajectory = self._buffer.add(fresh, keep)
            self._since = 0
        elif self.replay_samples is None:
            self._trajectory = self._buffer.draw(self.seed, self.batches)
        if self.replay_samples is not None and len(self._buffer) > 0:
            self._trajectory = self._buffer.draw_samples(
                self.seed, self.batches, self.replay_samples, trainer.world_size, trainer.global_rank
            )
        self.batches, self._since = self.batches + 1, self._since + 1

    def _fresh(self, loss: Loss, batch: Any) -> Trajectory:
        """A new rollout of the current model, with what the loss adds to it."""
        start, bad = time.perf_counter(), list[str]()
        gradient = loss.needs_reward_gradient
        path = self.rollout(loss, batch, stream="train", number=self._rollouts, reward_gradient=gradient, bad=bad)
        self._rollouts += 1
        middle = time.perf_counter()
        path = loss.prepare(replace(path, lam=loss.current_lam()))
        path, self.reward_figures = self._bad.prepared(loss, path if loss.needs_path else path.ends(), bad)
        self.seconds = {"rollout": middle - start, "adjoint": time.perf_counter() - middle}
        return path

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
        world: tuple[int, int] | None = None,
        bad: list[str] | None = None,
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
            world: how many processes share the rollout, and the number of this one; None: the Trainer's.
            bad: takes what is said of samples that are not finite, and the caller judges; None: judged here.

        Returns:
            The trajectory of len(batch) x samples_per_condition samples, those of a prompt side by side.
        """
        predictor: Predictor = host.predictor
        prompts, size = prompts_of(batch)
        each = samples_per_condition or self.samples_per_condition
        index = torch.arange(size).repeat_interleave(each)
        sample = global_numbers(host, size, each, world)
        chain = self.chain(host, count=stream == "train")
        device, dtype = device_and_dtype(host)
        # Validation runs inside of the precision plugin's context, training rollouts do not: leave it here, and let the
        # chain enter it around network calls alone.
        with torch.autocast(device.type, enabled=False), evaluating(predictor), torch.no_grad():
            condition = predictor.encode(prompts, size).to(device)
            cuts = list(slices(len(index), self.rollout_micro_batch))
            self.departure.together(len(cuts), stream == "train")
            chunks = [
                chain.rollout(
                    predictor,
                    condition[index[i]],
                    self._draw(stream, number, sample[i], predictor).to(device, dtype),
                    scale=self.guidance_scale,
                    base=base,
                    base_last_step=self.base_last_step,
                )
                for i in cuts
            ]
            self.departure.apart()
        states, noise = (torch.cat(parts, 1) for parts in zip(*chunks, strict=True))
        trajectory = Trajectory(
            chain.t, states, noise, condition, index, torch.tensor(sample),
            reward=states.new_zeros(len(index)), lam=0.0, rollout=number, weight=states.new_ones(len(index)),
        )  # fmt: skip
        with torch.autocast(device.type, enabled=False):
            trajectory = score_end_points(host, trajectory, reward_gradient, self.reward_micro_batch)
        chain.evaluations.reward += len(trajectory)
        return self._bad.scored(host, trajectory, stream, bad)

    def _draw(self, stream: Stream, number: int, sample: list[int], predictor: Predictor) -> Tensor:
        """X_0 and z_0 ... z_{K-1}: (K + 1, n, *shape)."""
        noise = keyed_normal(self.seed, stream, number, sample, (self.steps + 1, *predictor.state_shape))
        return predictor.project(noise.transpose(0, 1))
