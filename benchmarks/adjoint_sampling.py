"""Adjoint Sampling: supervised pairs a second, and what a pair costs in energies and network evaluations.

    python benchmarks/adjoint_sampling.py [--updates 240] [configs/densities/NAME.yaml ...]

Each config is fitted twice in one process, on one thread: as it is, and on policy without a buffer, with as many fresh
samples an update as the buffer gave before.  What matters is the ratio of the two: a buffer makes one simulation and
one gradient of the energy serve many updates.  Energies of a guide, one a network call, are counted too; seconds are
those of the updates, without building the command line.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from lightning import Callback

from lightning_tilt.cli import TiltCLI
from lightning_tilt.interfaces import find_sampler

ROOT = Path(__file__).resolve().parent.parent
__all__ = ["main", "measure"]


class Clock(Callback):
    """Seconds from the first update to the last."""

    seconds = 0.0

    def on_train_start(self, *args: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.start


def on_policy(config: Path) -> list[str]:
    """Flags that draw every update's samples afresh."""
    samples = yaml.safe_load(config.read_text())["sampler"]["replay_samples"]
    return [
        "--sampler.rollout_every", "1", "--sampler.buffer_size", "1", "--sampler.replay_samples", "null",
        "--data.samples", str(samples),
    ]  # fmt: skip


def measure(config: Path, updates: int, args: list[str]) -> dict[str, float]:
    """Fit so many updates and read clock and counters."""
    with tempfile.TemporaryDirectory() as folder:
        given = [
            "fit", "--config", str(config), "--trainer.default_root_dir", folder, "--trainer.max_steps", str(updates),
            "--trainer.callbacks", "[]", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_checkpointing", "false", "--trainer.accelerator", "cpu", *args,
        ]  # fmt: skip
        clock = Clock()
        with patched(clock):
            cli: Any = TiltCLI(given)
    counted = find_sampler(cli.model).evaluations
    return {
        "pairs/s": counted.pairs / clock.seconds,
        "pairs": counted.pairs / updates,
        "energies": counted.reward / counted.pairs,
        "forwards": counted.forwards_per_pair,
    }


@contextmanager
def patched(clock: Clock) -> Iterator[None]:
    """The clock among the callbacks of the next Trainer."""
    made = TiltCLI.instantiate_trainer

    def with_clock(self: TiltCLI, **kwargs: Any) -> Any:
        trainer = made(self, **kwargs)
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        return trainer

    TiltCLI.instantiate_trainer = with_clock  # type: ignore[method-assign]
    try:
        yield
    finally:
        TiltCLI.instantiate_trainer = made  # type: ignore[method-assign]


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [ROOT / f"configs/densities/{name}_adjoint_sampling.yaml" for name in ("double_well4", "gmm40", "phi4")]
    parser.add_argument("configs", nargs="*", type=Path, default=default)
    parser.add_argument("--updates", type=int, default=240)
    args = parser.parse_args()
    print(
        "config                                 samples    pairs/s  pairs an update  energies  forwards (a pair)  ratio"
    )
    for config in args.configs:
        replayed = measure(config, args.updates, [])
        fresh = measure(config, max(args.updates // 20, 4), on_policy(config))
        for name, found in (("replayed", replayed), ("fresh", fresh)):
            figures = (
                f"{found['pairs/s']:9.0f}  {found['pairs']:15.0f}  {found['energies']:8.3f}  {found['forwards']:17.1f}"
            )
            gain = f"  {found['pairs/s'] / fresh['pairs/s']:5.1f}" if name == "replayed" else ""
            print(f"{config.stem:38s} {name:8s} {figures}{gain}", flush=True)


if __name__ == "__main__":
    main()
