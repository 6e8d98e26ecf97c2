"""Faults that a run brings upon itself at a chosen moment: the callback `Kill`, and a reward that draws numbers.

A run that is told to `wait` is killed from outside, by the clock.
"""

import os
import random
import signal
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

import lightning_tilt.checkpoints as checkpoints
from lightning_tilt.chain import Chain
from lightning_tilt.interfaces import Prompts
from lightning_tilt.rewards import Ink, QuadraticReward

__all__ = ["Kill", "RestlessInk", "RestlessQuadratic"]


def _restless(reward: Tensor) -> Tensor:
    noise = torch.rand(len(reward)) + torch.from_numpy(np.random.rand(len(reward))).float() + random.random()
    return reward * (1 + 0.01 * noise.to(reward))


class RestlessQuadratic(QuadraticReward):
    """Draws from every global generator."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return _restless(super().score(images, prompts))


class RestlessInk(Ink):
    """The same of pictures."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return _restless(super().score(images, prompts))


class Kill(lightning.Callback):
    """Send this process a signal at the n-th visit of a place.

    Args:
        place: "rollout" (a network call of the chain), "backward", "update" (within the optimiser's step, half of the
            parameters moved), "write" (a checkpoint is half written), "rename" (written, not renamed).
        visit: which visit.
        number: of the signal.
    """

    def __init__(self, place: str, visit: int, number: int = signal.SIGKILL) -> None:
        self.place, self.left, self.number = place, visit, number

    def visit(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.place == "rollout":
            call = Chain._call

            def visited(*args: Any) -> Tensor:
                self.visit()
                return call(*args)

            Chain._call = visited  # type: ignore[method-assign]
        elif self.place == "update":
            parameters = trainer.optimizers[0].param_groups[0]["params"]
            step = trainer.optimizers[0].step

            def half(closure: Any = None) -> Any:
                result = step(closure)
                if self.left == 1:
                    with torch.no_grad():
                        for p in parameters[: len(parameters) // 2]:
                            p.add_(1.0)
                self.visit()
                return result

            if self.number == signal.SIGKILL:
                trainer.optimizers[0].step = half  # type: ignore[method-assign]
        elif self.place == "write":
            save = torch.save

            def cut(content: Any, file: Any) -> None:
                save(content, file)
                file.truncate(file.tell() // 2)
                file.flush()
                self.visit()
                file.seek(0)
                save(content, file)

            checkpoints.torch.save = cut  # type: ignore[attr-defined]
        elif self.place == "rename":
            replace = os.replace

            def renamed(*args: Any) -> None:
                self.visit()
                replace(*args)

            checkpoints.os.replace = renamed  # type: ignore[attr-defined]

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.place == "backward":
            self.visit()

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.place == "update" and self.number != signal.SIGKILL:
            self.visit()
