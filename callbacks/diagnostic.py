"""What diagnostics share: when they look, from which paths, and that training does not notice.

A diagnostic rolls the current model out with random numbers of its own (the same ones at every look, so that two looks
differ by the model alone), in evaluation mode, uncounted, and writes `<name>.json` and `<name>.png` into the run's
folder; loggers that take pictures get the picture too.  All processes compute, since the network of a sharded model is
called together; rank zero writes what it found on its own prompts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor

from ..chain import evaluating
from ..interfaces import Loss, find_sampler
from ..interfaces.not_finite import judge_together
from ..run_folder import set_aside, write_json
from ..trajectory import Trajectory
from .processes import moved
from .surroundings import prompts_of

__all__ = ["Diagnostic", "log_figure", "per_prompt", "undisturbed"]

LOOK = 1 << 20
"""The first rollout of the stream "report" that diagnostics draw: a report numbers its prompts from 0."""


class Diagnostic(Callback, ABC):
    """A callback that looks at the current model when a fit ends, and on the way if asked to.

    A subclass gives `name` and `look`.

    Args:
        samples: paths of a look, divided among the prompts.
        every_n_updates: look after so many updates as well; None: at the end of the fit alone. Earlier looks are kept
            as `<name>.1.json`, `<name>.2.json`, ...
        prompts: what to look at; None: the prompts of the latest training batch, or a density.
        micro_batch: samples in one network call of what a look adds to a rollout; None: all.
    """

    name: ClassVar[str]

    def __init__(
        self,
        samples: int,
        every_n_updates: int | None = None,
        prompts: list[str] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        for key, value in (("samples", samples), ("every_n_updates", every_n_updates), ("micro_batch", micro_batch)):
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}: {key} must be at least 1, not {value}")
        self.samples = samples
        self.every_n_updates = every_n_updates
        self.prompts = prompts
        self.micro_batch = micro_batch
        self._batch: Any = None
        self._step = 0

    @abstractmethod
    def look(self, host: Any) -> tuple[dict[str, Any], Figure]:
        """The numbers, as JSON takes them, and their picture."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that is no loss."""
        if not isinstance(pl_module, Loss):
            raise TypeError(f"{type(self).__name__} looks at a loss, and {type(pl_module).__name__} is none")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the update that the fit starts at."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the prompts, and look if it is time."""
        self._batch = batch
        step, due = trainer.global_step, self.every_n_updates
        if due is not None and step != self._step and step % due == 0 and step != trainer.max_steps:
            self._look(trainer, pl_module)
        self._step = step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the trained model."""
        with moved(pl_module, trainer.strategy.root_device):
            self._look(trainer, pl_module)

    def paths(
        self, host: Any, number: int = 0, *, samples: int | None = None, base: bool = False, gradient: bool = False
    ) -> Trajectory:
        """A scored rollout of this diagnostic's own noise, at the current multiplier.

        Args:
            host: the module.
            number: of the rollout among those of a look.
            samples: how many paths, divided among the prompts; None: `self.samples`.
            base: of the base instead of the current model.
            gradient: bring the gradient of the reward at the end points.
        """
        found = self.prompts if self._batch is None else self.prompts or prompts_of(self._batch)[0]
        batch: Any = torch.zeros(1) if found is None else found
        each = max((samples or self.samples) // len(batch), 1)
        sampler, bad = find_sampler(host), list[str]()
        path = sampler.rollout(
            host, batch, stream="report", number=LOOK + number, base=base, reward_gradient=gradient,
            samples_per_condition=each, world=(1, 0), bad=bad,
        )  # fmt: skip
        judge_together(host, sampler.on_bad_reward, bad)  # each process looks at prompts of its own
        path = replace(path, lam=host.current_lam())
        return path[path.weight > 0]

    def _look(self, trainer: Trainer, host: Any) -> None:
        with undisturbed(host):
            numbers, figure = self.look(host)
        self._write(trainer, {"update": trainer.global_step} | numbers, figure)

    @rank_zero_only
    def _write(self, trainer: Trainer, numbers: dict[str, Any], figure: Figure) -> None:
        folder = Path(trainer.default_root_dir)
        write_json(folder / f"{self.name}.json", numbers)
        picture = folder / f"{self.name}.png"
        set_aside(picture)
        figure.savefig(picture, dpi=150)
        log_figure(trainer.loggers, self.name, figure, picture, trainer.global_step)
        rank_zero_info(f"{type(self).__name__}: {picture}")


@contextmanager
def undisturbed(host: Any) -> Iterator[None]:
    """Nothing that training reads is other after the block than it was before.

    Modes, torch's generators, the counts of evaluations, and the attributes of the module itself: a loss may keep what
    its `prepare` has seen (Tilt Matching its level).
    """
    counts, attributes = find_sampler(host).evaluations.__dict__, host.__dict__
    saved, kept = dict(counts), dict(attributes)
    with isolate_rng(), evaluating(host):
        try:
            yield
        finally:
            counts.update(saved)
    attributes.update(kept)


def log_figure(loggers: list[Logger], name: str, figure: Figure, path: str | Path, step: int) -> None:
    """Give a figure to the loggers that take pictures: TensorBoard and Weights & Biases.

    Args:
        loggers: of the Trainer; others are passed over.
        name: of the picture, under `diagnostics/`.
        figure: what TensorBoard is given.
        path: its file, which Weights & Biases is given.
        step: the update.
    """
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(f"diagnostics/{name}", figure, step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(f"diagnostics/{name}", [str(path)], step=step)


def per_prompt(path: Trajectory) -> list[Tensor]:
    """The samples of each prompt, as integers on the CPU; of a density one group."""
    if path.prompts is None:
        return [torch.arange(len(path))]
    return [(path.index == g).nonzero().flatten() for g in path.index.unique()]
