"""How a run leaves when it is told to: SIGTERM, Ctrl-C, and SLURM's signal before a job ends.

A handler only takes a note.  Where the state is known - between two network calls of a rollout, and before each batch -
the run looks at its notes.  Several processes look together, at the same call of the same batch, and leave together:
a signal that reaches one of them reaches all.

What a signal asks for:

    SIGTERM, SIGINT             save the state after the last update and exit with 128 + the signal's number
    SLURM's requeue signal      Lightning's own answer (save, requeue the job), given here instead of in mid-step

A second SIGINT is a KeyboardInterrupt as ever.
"""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ..checkpoints import last_checkpoint

__all__ = ["Departure", "Preempted"]


class Preempted(SIGTERMException):
    """The run was told to stop and has saved its state; as a SystemExit it carries the exit status."""


class Departure:
    """Signals of a fit, noted by their handlers and obeyed where the state is known.

    Attributes:
        over: whether the last update is done: what is still running only reports.
    """

    def __init__(self) -> None:
        self.over = False
        self._noted = 0
        self._requeue = 0
        self._previous: dict[int, Any] = {}
        self._trainer: Trainer | None = None
        self._together = False

    def watch(self, trainer: Trainer) -> None:
        """Take over from Lightning's handlers for the length of a fit; only a main thread can."""
        # A signal that came before, during the sanity check, was noted by Lightning.
        self._trainer, self._noted = trainer, int(signal.SIGTERM) if trainer.received_sigterm else 0
        self.over = False
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return
        environment = trainer._accelerator_connector.cluster_environment
        watched = [signal.SIGTERM, signal.SIGINT]
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._requeue = int(environment.requeue_signal)
            watched.append(environment.requeue_signal)
        self._previous = {int(number): signal.getsignal(number) for number in watched}
        for number in watched:
            signal.signal(number, self._note)

    def unwatch(self, default: bool = False) -> None:
        """Give the handlers back; `default`: let a SIGTERM end the process at once from here on."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:  # Lightning may have given the handlers back already
                signal.signal(number, signal.SIG_DFL if default and number == signal.SIGTERM else handler)
        self._previous, self._trainer, self._noted = {}, None, 0

    def together(self, calls: int, training: bool) -> None:
        """Several processes begin a rollout: look at each of its calls, if all of them make as many.

        Args:
            calls: what the number of this process's network calls depends on.
            training: whether all processes make this rollout: what only reports or validates is not interrupted.
        """
        if self._trainer is None or not training or not _several():
            return
        own = torch.tensor([calls, -calls], device=self._trainer.strategy.root_device)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        self._together = int(own[0]) == -int(own[1])

    def apart(self) -> None:
        """The end of what `together` began."""
        self._together = False

    def look(self, before_batch: bool = False) -> None:
        """Obey what was noted.

        Args:
            before_batch: all processes are here, whatever they do between.

        Raises:
            Preempted: once the state is saved.
        """
        trainer = self._trainer
        if trainer is None or (_several() and not (self._together or before_batch)):
            return
        noted = self._noted
        if _several():
            flag = torch.tensor(noted, device=trainer.strategy.root_device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            noted = int(flag)
        if noted == 0:
            return
        self._noted = 0
        if noted == self._requeue:
            handler: Callable[[int, FrameType | None], None] = self._previous[noted]
            handler(noted, None)
        else:
            self._leave(trainer, noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted == number:
            raise KeyboardInterrupt
        # All processes obey the largest: to leave comes before a requeue, which has saved the same state already.
        self._noted = number if number != self._requeue or self._noted == 0 else self._noted

    def _leave(self, trainer: Trainer, number: int) -> None:
        path, step, name = last_checkpoint(trainer), trainer.global_step, signal.Signals(number).name
        how = "nothing was saved, since this Trainer keeps no checkpoints"
        if path is not None:
            if not self._saved_already(trainer):
                trainer.save_checkpoint(path, weights_only=False)
            how = f"go on with the same command and --ckpt_path {path}"
        if trainer.is_global_zero:
            apart = "" if sys.stderr.isatty() else "\n"  # a progress bar that is not on a terminal leaves its line open
            sys.stderr.write(f"{apart}lightning-tilt: stopped by {name} after update {step}; {how}\n")
        # A child of Lightning's own launcher that ends with another status than 0 has the others killed.
        environment = trainer._accelerator_connector.cluster_environment
        child = isinstance(environment, LightningEnvironment) and not trainer.is_global_zero
        raise Preempted(0 if child else 128 + number)

    def _saved_already(self, trainer: Trainer) -> bool:
        """Whether training is over and its last state is in a checkpoint."""
        callback = trainer.checkpoint_callback
        return (
            self.over
            and isinstance(callback, ModelCheckpoint)
            and callback._last_global_step_saved == trainer.global_step
        )


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
