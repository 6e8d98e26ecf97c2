"""Wall time of an update over the sum of its bare network calls, in one run: what the package itself costs.

    python benchmarks/overhead.py [configs/digits/sd15_adjoint_matching.yaml ...] [--updates 4]

Every call of the denoiser, its backward passes (to the input in the adjoint sweep, to the weights in the loss) and the
decoding of the reward are timed where they happen: forwards by a wrapper around the network, backwards as the time
spent inside autograd.  The rest - kernels, noise, bookkeeping, Lightning, the optimiser - is overhead.  Both are
clocked in the same seconds of the same process, so a busy machine slows both alike.
"""

import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning import Callback
from results import markdown, parser, publish
from short_fits import ROOT, fit

__all__ = ["Stopwatch", "main", "measure"]

CONFIGS = [
    ROOT / f"configs/digits/{name}.yaml" for name in ("sd15_adjoint_matching", "sd15_full", "sd3_adjoint_matching")
]
PARTS = ["forward", "vjp", "backward", "decode"]


class Stopwatch(Callback):
    """Times network calls inside updates, and the updates themselves; the first update warms up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.updates = 0
        self._depth = 0
        self._patches = ExitStack()

    def timed(self, name: str, function: Any) -> Any:
        """Wrap a function; calls inside of a timed call are not counted twice."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds[name] += time.perf_counter() - start

        return call

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap the denoiser, the decoder, and autograd."""
        predictor = pl_module.predictor
        networks = predictor.sharded_networks()
        for name, owner, attribute in (
            *(("forward", network, "forward") for network in networks), ("decode", predictor, "decode"),
            ("vjp", torch.autograd, "grad"), ("backward", torch.Tensor, "backward"),
        ):  # fmt: skip
            self._patches.enter_context(patch.object(owner, attribute, self.timed(name, getattr(owner, attribute))))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave everything as it was."""
        self._patches.close()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Close an update; start to count after the first."""
        now = time.perf_counter()
        if self.updates == 0:
            self.seconds.clear()
        else:
            self.seconds["update"] += now - self._last
        self._last, self.updates = now, self.updates + 1


def measure(config: Path, updates: int, flags: list[str]) -> dict[str, float]:
    """Seconds of an update and of its parts."""
    watch = Stopwatch()
    fit(config, [watch], ["--trainer.max_steps", str(updates + 1), *flags])
    return {name: value / updates for name, value in watch.seconds.items()}


def main() -> None:
    """Time what the command line names, and write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("configs", nargs="*", type=Path, default=CONFIGS)
    arguments.add_argument("--updates", type=int, default=4, help="that are timed, after one to warm up")
    args = arguments.parse_args()
    samples = ["--data.batch_size", "1", "--sampler.steps", "3"] if args.quick else ["--data.batch_size", "4"]
    rows = []
    for config in args.configs:
        found = measure(config, 1 if args.quick else args.updates, samples)
        bare = sum(found[part] for part in PARTS)
        shares = (f"{found[part] / bare:.0%}" for part in PARTS)
        rows.append([config.stem, *shares, f"**{found['update'] / bare:.3f}**"])
        print(" | ".join(rows[-1]), flush=True)
    text = (
        "The digits' networks are small, so what the package does beside them weighs more than at real size. The "
        "demo's configs with 16 paths an update, on one thread; wall time of both, in the same seconds. Shares are "
        "those of the bare calls; what autograd does for the package's own few operations counts as theirs."
    )
    header = ["config", *(f"{part} of the calls" for part in PARTS), "**an update over its bare calls**"]
    publish("overhead", "An update over its bare network calls", [text, markdown(header, rows)], args)


if __name__ == "__main__":
    main()
