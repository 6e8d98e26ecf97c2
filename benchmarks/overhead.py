"""Wall time of an update over the sum of its bare network calls, in one run: what the package itself costs.

    python benchmarks/overhead.py [--config configs/digits/sd15_adjoint_matching.yaml] [--updates 6]

Every call of the denoiser, its backward passes (to the input in the adjoint sweep, to the adapters in the loss) and the
decoding of the reward are timed where they happen: forwards by hooks around the network, backwards as the time spent
inside autograd.  The rest - kernels, noise, bookkeeping, Lightning, the optimiser - is overhead.
"""

import argparse
import time
from collections import defaultdict
from typing import Any

import torch
from lightning import Callback

from lightning_tilt.cli import TiltCLI

__all__ = ["Stopwatch", "main"]


class Stopwatch(Callback):
    """Times network calls inside updates, and the updates themselves; the first update warms up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.updates = 0
        self._depth = 0

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
        predictor.network.forward = self.timed("forward", predictor.network.forward)
        predictor.decode = self.timed("decode", predictor.decode)
        torch.autograd.grad = self.timed("vjp", torch.autograd.grad)
        torch.Tensor.backward = self.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Close an update; start to count after the first."""
        now = time.perf_counter()
        if self.updates == 0:
            self.seconds.clear()
        else:
            self.seconds["update"] += now - self._last
        self._last, self.updates = now, self.updates + 1


def main() -> None:
    """Run a few updates and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="configs/digits/sd15_adjoint_matching.yaml")
    parser.add_argument("--updates", type=int, default=6, help="updates that are timed, after one to warm up")
    args = parser.parse_args()
    cli = TiltCLI(["--config", args.config, "--trainer.callbacks", "[]", "--trainer.logger", "false"], run=False)
    watch = Stopwatch()
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit_loop.epoch_loop.max_steps = args.updates + 1
    cli.trainer.fit(cli.model, cli.datamodule)
    update = watch.seconds.pop("update") / args.updates
    for name, value in sorted(watch.seconds.items()):
        print(f"{name:10s} {value / args.updates:7.3f} s an update")
    bare = sum(watch.seconds.values()) / args.updates
    print(f"{'update':10s} {update:7.3f} s; bare network calls {bare:.3f} s; ratio {update / bare:.3f}")


if __name__ == "__main__":
    main()
