"""`Resumable`: what makes a fit that was killed go on as if nothing had happened.

    update n  |  batch fetched, rollout, loss, backward  |  update n + 1
              ^ the boundary: all that a checkpoint holds is of this moment

What changes only at an update (parameters, optimiser, schedulers, EMA) is saved as it is.  What changes between two
updates - the loops and the place in the data, the sampler's counters and buffer, random states, what a loss has learnt
- is remembered at the boundary, and a checkpoint that is written later, in mid-rollout or amid accumulated gradients,
gets those: the batches in hand count as not fetched, and the run that goes on makes them again.

Processes have states of their own (buffer, random states, evaluations): the checkpoint has all of them, and deals
the buffer out again where their number has changed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..checkpoints import AtomicCheckpointIO
from ..interfaces import Loss, Sampler
from .buffer import ReplayBuffer, dealt
from .home import carry_names_over, keep_last_newest
from .leaving import Departure
from .owed import epoch_over, rows_come_again, validate, validation_due
from .place import check_place, finished_epochs, plateaus, watched_by
from .processes import collected, distributed
from .random_states import random_states, set_random_states
from .surroundings import network_context

__all__ = ["Resumable"]


@dataclass(frozen=True)
class _Boundary:
    """What has changed since the last update, as it was then."""

    step: int
    loops: dict[str, Any]
    sampler: dict[str, Any]
    random: dict[str, Any]
    buffers: dict[str, Tensor]
    carried: dict[str, Any]


class Resumable(Sampler, Callback):
    """The part of a sampler that survives: state of the last update, signals, checkpoints that are whole.

    A subclass moves the counters, and calls `super()` in its hooks.

    Attributes:
        exact_resume: refuse to go on from a checkpoint where that cannot be exact.
    """

    exact_resume: bool
    _given_seed: int | None
    _buffer: ReplayBuffer

    def __init__(self) -> None:
        super().__init__()
        self.batches, self._rollouts, self._since = 0, 0, 0
        self.departure = Departure()
        self._boundary: _Boundary | None = None
        self._after_batch: dict[str, Any] | None = None
        self._beyond = False  # whether a batch has begun since
        self._validating = False
        self._due = False  # whether the last update has still to be validated
        self._stage = "fit"
        self._pending = False  # whether schedulers that watch a metric have still to step for the last batch
        self._loops: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None  # what a checkpoint brought for this process

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: seed, counters, evaluations, and the rollouts that will be used again."""
        due = self._since >= self.rollout_every and self.buffer_size == 1  # the next batch makes a new one
        return {
            "batches": self.batches, "rollouts": self._rollouts, "since": self._since, "seed": self.seed,
            "evaluations": asdict(self.evaluations), "samples_per_condition": self.samples_per_condition,
            "buffer": self._buffer.state_dict() if self.replays and not due else [], "skipped": self.skipped,
            "reward_figures": self.reward_figures,  # logged until the next rollout
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the streams, counters and buffer of a checkpoint."""
        if missing := [k for k in self.state_dict() if k not in state_dict]:
            raise ValueError(f"the checkpoint is damaged: the sampler's state in it has no {' and no '.join(missing)}")
        if self._given_seed not in (None, state_dict["seed"]):
            rank_zero_warn(f"sampler.seed {self._given_seed} is not the checkpoint's: the samples will differ")
        elif self._given_seed is None:
            self._given_seed = self.seed = state_dict["seed"]
        counters = (state_dict[k] for k in ("batches", "rollouts", "since", "skipped"))
        self.batches, self._rollouts, self._since, self.skipped = counters
        if self._stage != "fit":  # what only looks at a model draws from no buffer
            self.evaluations.__dict__.update(state_dict["evaluations"])
            return
        self.reward_figures = state_dict["reward_figures"]
        own = self._own_part(state_dict)
        self.evaluations.__dict__.update(own["evaluations"])
        self._buffer.load_state_dict(own["buffer"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checkpoints of this Trainer are written whole and read as plain data."""
        self._stage = stage
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep where the loops were: until a batch is done, Lightning's own counters are between two epochs."""
        if self._stage == "fit":
            self._loops = deepcopy(checkpoint["loops"]["fit_loop"])
            carry_names_over(trainer, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a fresh rollout, or go on with what a checkpoint has just brought; listen to signals."""
        if self._resumed is None:
            self._buffer.clear()
        else:
            check_place(trainer, self.exact_resume)
            self._buffer.to(trainer.strategy.root_device)
            epochs = trainer.fit_loop.epoch_loop
            if epochs.batch_progress.total.ready == 0:
                epochs.restarting = False  # nothing was trained yet, and Lightning would count a batch for it
                epochs.reset_restart_stage()
            if self._resumed["random"] is not None:
                set_random_states(self._resumed["random"], trainer.strategy.root_device)
            for config, value in zip(plateaus(trainer), self._resumed["watched"], strict=False):
                epochs.scheduler_progress.increment_ready()
                config.scheduler.step(value)
                epochs.scheduler_progress.increment_completed()
            rows_come_again(trainer)
        if trainer.ckpt_path is not None:
            keep_last_newest(trainer)
        self._due = self._resumed is not None and self._resumed["due"]
        self._remember(trainer, pl_module, None if self._resumed is None else self._loops)
        self._resumed = self._loops = None
        self.departure.watch(trainer)
        if self._due:
            self._after_batch = random_states(trainer.strategy.root_device)
            validate(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the state is beyond the boundary."""
        self._beyond, self._pending = True, False
        self.departure.look(before_batch=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An update has been made, unless gradients are still accumulated."""
        self._pending = True
        self._after_batch = random_states(trainer.strategy.root_device)
        if not trainer.fit_loop._should_accumulate():
            self._due = validation_due(trainer)
            self._remember(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is saved in mid-validation is the state before it: a resumed run begins it anew."""
        self._validating = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training draws what it would have drawn without this validation, which a resumed run may not repeat."""
        self._validating, self._due = False, self._due and (self._beyond or trainer.sanity_checking)
        if self._after_batch is not None and not trainer.sanity_checking:
            set_random_states(self._after_batch, trainer.strategy.root_device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All schedulers have stepped."""
        self._pending = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows only reports: one process may still be told to leave, several end at once."""
        self.departure.over = True
        if distributed():
            self.departure.unwatch(default=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self.departure.unwatch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more, and forget the state of the last update."""
        self.departure.unwatch()
        self._boundary, self._after_batch, self._beyond, self._validating = None, None, False, False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The state of the last update, and that of every process."""
        own, random = self.state_dict(), random_states(trainer.strategy.root_device)
        at = self._boundary
        if (self._beyond or self._validating) and at is not None and at.step == trainer.global_step:
            own, random = at.sampler, at.random
            checkpoint["loops"]["fit_loop"] = at.loops
            checkpoint["state_dict"].update({k: v for k, v in at.buffers.items() if k in checkpoint["state_dict"]})
            checkpoint["loss"] = at.carried
        elif at is not None and at.step == trainer.global_step and epoch_over(checkpoint["loops"]["fit_loop"]):
            checkpoint["loops"]["fit_loop"] = at.loops
        finished_epochs(checkpoint["loops"]["fit_loop"])
        watched = watched_by(trainer) if self._pending else []
        shared = self.replay_samples is not None  # then all processes have the same buffer
        buffer = [] if shared and trainer.global_rank > 0 else own["buffer"]
        ranks = collected({"random": random, "buffer": buffer, "evaluations": own["evaluations"]})
        owed = {"watched": watched, "due": self._due}
        checkpoint["callbacks"][self.state_key] = {**own, "buffer": [], "ranks": ranks, "shared": shared, **owed}

    def _own_part(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint's state is for this process.

        Raises:
            ValueError: if the buffer cannot be dealt out to as many processes as there are now.
        """
        ranks = state.get("ranks", [])
        world, rank = (dist.get_world_size(), dist.get_rank()) if distributed() else (1, 0)
        as_before = len(ranks) == world
        owed = {"watched": state.get("watched", []), "due": state.get("due", False)}
        self._resumed = {"random": ranks[rank]["random"] if as_before else None, **owed}
        if not ranks:
            return state
        counts = ranks[rank]["evaluations"] if as_before else {name: 0 for name in state["evaluations"]}
        if not as_before:
            rank_zero_warn(
                f"the checkpoint is of {len(ranks)} processes and this run has {world}: samples are the same, the "
                "global random states of torch, numpy and Python are not"
            )
            if rank == 0:
                counts = {name: sum(part["evaluations"][name] for part in ranks) for name in counts}
        parts = [part["buffer"] for part in (ranks[:1] if state["shared"] else ranks)]
        holders, mine = (1, 0) if self.replay_samples is not None else (world, rank)
        as_held = len(parts) == holders
        buffer = parts[mine] if as_held else dealt(parts, state["samples_per_condition"], holders, mine)
        return {**state, "buffer": buffer, "evaluations": counts}

    def _context(self, host: Any) -> Callable[[], AbstractContextManager[Any]]:
        """Entered around network calls: the Trainer's precision, after a look at what signals ask for."""
        precision, look = network_context(host), self.departure.look

        def enter() -> AbstractContextManager[Any]:
            look()
            return precision()

        return enter

    def _remember(self, trainer: Trainer, pl_module: LightningModule, loops: dict[str, Any] | None = None) -> None:
        """This moment is the boundary; `loops`: where a checkpoint says that it is."""
        self._beyond = False
        # The predictor's buffers are its base's, and of its parameters only updates move any.
        own = (b for b in pl_module.named_buffers() if not b[0].startswith("predictor."))
        self._boundary = _Boundary(
            step=trainer.global_step,
            loops=loops or trainer.fit_loop.state_dict(),
            sampler=self.state_dict(),
            random=random_states(trainer.strategy.root_device),
            buffers={name: buffer.detach().clone() for name, buffer in own},
            carried=pl_module.carried() if isinstance(pl_module, Loss) else {},
        )
