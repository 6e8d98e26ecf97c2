"""Short fits of committed configs, in this process and on one thread, for sections that count or time them."""

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.utils.logging import disable_progress_bar
from lightning import Callback

from lightning_tilt.cli import TiltCLI
from lightning_tilt.estimate.tracking import AllocationTracker

__all__ = ["DEMO", "ROOT", "Bytes", "CpuClock", "cpu_seconds", "fit", "held"]

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs/digits/sd15_adjoint_matching.yaml"


class CpuClock(Callback):
    """CPU seconds of every update of this process, which other work on the machine changes little."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, *args: Any) -> None:
        """Start."""
        self._last = cpu_seconds()

    def on_train_batch_end(self, *args: Any) -> None:
        """Close an update."""
        now = cpu_seconds()
        self.seconds.append(now - self._last)
        self._last = now


class Bytes(Callback):
    """The most bytes of tensors that the last update made and held at once, and what was there between updates.

    The model is a diffusers pipeline.

    Attributes:
        peak: bytes made inside of the update, its gradients among them.
        held: bytes of all weights and of the optimiser's state.
    """

    peak = held = 0

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self._tracker = AllocationTracker()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Come before the sampler, whose rollout is a part of the update."""
        trainer.callbacks.remove(self)
        trainer.callbacks.insert(0, self)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to look, in the last update."""
        if trainer.global_step == self.updates - 1:
            self._tracker.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Read off."""
        if trainer.global_step == self.updates:
            self._tracker.__exit__(None, None, None)
            parts = pl_module.predictor.pipeline.components.values()
            networks = [p for p in (*parts, *pl_module.predictor.sharded_networks()) if isinstance(p, torch.nn.Module)]
            self.peak, self.held = self._tracker.peak, held(networks, trainer.optimizers[0])


def held(modules: Sequence[torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the weights of modules, frozen ones included, and of the optimiser's state, each storage once."""
    tensors = [
        t for m in modules for part in m.modules() for t in (*part._parameters.values(), *part._buffers.values())
    ]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def cpu_seconds() -> float:
    """Of this process."""
    times = os.times()
    return times.user + times.system


def fit(config: Path | dict[str, Any], callbacks: Sequence[Callback] = (), flags: Sequence[str] = ()) -> Any:
    """Fit a config as the command line does, quietly, in no folder of its own; the command line's object.

    Args:
        config: a file, or its content.
        callbacks: in the place of the config's own; the sampler stays.
        flags: as typed after `lightning-tilt fit`.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config, dict):
            file = Path(folder) / "config.yaml"
            file.write_text(yaml.safe_dump(config, sort_keys=False))
        else:
            file = config
        given = [
            "--config", str(file), "--trainer.callbacks", "[]", "--trainer.logger", "false",
            "--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false",
            "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu",
            "--trainer.default_root_dir", folder, *flags,
        ]  # fmt: skip
        cli: Any = TiltCLI(given, run=False)
        cli.trainer.callbacks += callbacks
        cli.trainer.fit(cli.model, cli.datamodule)
    return cli
