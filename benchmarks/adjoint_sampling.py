"""Adjoint Sampling: updates a second, and what an update costs in energies and network evaluations.

    python benchmarks/adjoint_sampling.py [--updates 240] [configs/densities/NAME.yaml ...]

Each config is fitted twice in one process, as it is and on policy without a buffer (`rollout_every: 1`, no
`replay_samples`), on one thread.  What matters is the ratio of the two: a buffer makes one simulation and one gradient
of the energy serve many updates.  Energies of a guide, one a network call, are counted too.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lightning_tilt.cli import TiltCLI
from lightning_tilt.interfaces import find_sampler

ROOT = Path(__file__).resolve().parent.parent
ON_POLICY = ["--sampler.rollout_every", "1", "--sampler.buffer_size", "1", "--sampler.replay_samples", "null"]

__all__ = ["main", "measure"]


def measure(config: Path, updates: int, args: list[str]) -> dict[str, float]:
    """Fit so many updates and read the counters back."""
    with tempfile.TemporaryDirectory() as folder:
        given = [
            "fit", "--config", str(config), "--trainer.default_root_dir", folder, "--trainer.max_steps", str(updates),
            "--trainer.callbacks", "[]", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_checkpointing", "false", *args,
        ]  # fmt: skip
        start = time.perf_counter()
        cli: Any = TiltCLI(given)
        seconds = time.perf_counter() - start
    counted = find_sampler(cli.model).evaluations
    return {
        "updates/s": updates / seconds,
        "energies": counted.reward / updates,
        "forwards": counted.network / updates,
        "pairs": counted.pairs / updates,
    }


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = sorted((ROOT / "configs/densities").glob("*_adjoint_sampling.yaml"))
    parser.add_argument("configs", nargs="*", type=Path, default=default)
    parser.add_argument("--updates", type=int, default=240)
    args = parser.parse_args()
    print(
        "config                                 policy     updates/s  energies  forwards  pairs  (an update)  speed-up"
    )
    for config in args.configs:
        replayed = measure(config, args.updates, [])
        fresh = measure(config, max(args.updates // 20, 4), ON_POLICY)
        for name, found in (("replayed", replayed), ("on policy", fresh)):
            figures = (
                f"{found['updates/s']:10.2f}  {found['energies']:8.1f}  {found['forwards']:8.0f}  {found['pairs']:5.0f}"
            )
            gain = f"{'':15s}{found['updates/s'] / fresh['updates/s']:6.1f}" if name == "replayed" else ""
            print(f"{config.stem:38s} {name:10s} {figures}{gain}", flush=True)


if __name__ == "__main__":
    main()
