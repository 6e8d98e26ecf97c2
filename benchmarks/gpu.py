"""Seconds an update, forwards a second, share of the peak, and memory, at real size with random weights on a GPU.

    python benchmarks/gpu.py [--cases sd15 sd3 sd3_1024] [--tuning lora full] [--compile off default]

Adjoint Matching towards `Ink` (whose cost is nothing), bfloat16, gradient checkpointing, micro-batches of four; the
first update warms up and compiles.  The share of the peak counts every forward, product with a vector, backward and
recomputation of the denoiser, and no decoding.  The table goes into benchmarks/RESULTS.md.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from full_size import forward_flops
from lightning import Callback
from random_weights import FullSizeRun
from results import FILE, markdown, write_section

__all__ = ["CASES", "main"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", {}),
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", {"height": 512, "width": 512}),
    "sd3_1024": ("stabilityai/stable-diffusion-3-medium-diffusers", {"height": 1024, "width": 1024}),
}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bfloat16, by a part of the card's name."""


class _Clock(Callback):
    """Seconds of every update."""

    def __init__(self, cuda: bool) -> None:
        self.seconds: list[float] = []
        self.cuda = cuda

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last = self._now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now


def _measure(name: str, path: str, options: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """One row of the table."""
    cuda = args.device == "cuda"
    full = options["tuning"] == "full"
    run = FullSizeRun(
        path, args.device, steps=args.steps, samples=args.samples, micro_batch=min(4, args.samples),
        precision="bf16-mixed" if full else "32-true", guidance=args.guidance, dtype="bfloat16",
        gradient_checkpointing=True, **options,
    )  # fmt: skip
    found, clock = run.estimate(), _Clock(cuda)
    flops = forward_flops(found.settings)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run.fit(args.updates + 1, clock)
    seconds = sum(clock.seconds[1:]) / args.updates
    evaluations = found.forwards["total"]
    rate = (evaluations + found.forwards["recomputed"]) * flops / seconds / 1e12
    peak = args.peak_tflops or next(
        (v for k, v in PEAK_TFLOPS.items() if cuda and k in torch.cuda.get_device_name()), 0
    )
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if cuda else "-"
    foretold = (found.peak() - (10**9 if cuda else 0)) / 1e9
    return [
        name, "all weights" if full else "adapters", options["compile"], f"{seconds:.3f}",
        f"{evaluations / seconds:.2f}", f"{100 * rate / peak:.3f}%" if peak else "-", memory, f"{foretold:.2f}",
    ]  # fmt: skip


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--path", help="a folder in the place of the cases")
    parser.add_argument("--tuning", nargs="*", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--compile", nargs="*", default=None, help="modes; on a GPU: off default")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--updates", type=int, default=2, help="that are timed, after one to warm up")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--peak_tflops", type=float, help="of the card, where its name is not known")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu --path FOLDER runs a small model")
    modes = args.compile or (["off", "default"] if args.device == "cuda" else ["off"])
    cases = {name: CASES[name] for name in args.cases} if args.path is None else {Path(args.path).name: (args.path, {})}
    rows = []
    for name, (path, size) in cases.items():
        for tuning in args.tuning:
            for mode in modes:
                rows.append(_measure(name, path, {**size, "tuning": tuning, "compile": mode}, args))
                print(" ".join(rows[-1]), flush=True)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    text = (
        f"`python benchmarks/gpu.py` on one {card}, torch {torch.__version__}: {args.steps} steps, {args.samples} "
        "paths an update, random weights, bfloat16. Memory is what tensors took at most, beside the estimate."
    )
    header = ["model", "trained", "compile", "s an update", "forwards/s", "of peak", "GB", "GB estimated"]
    write_section("gpu", "## On a GPU\n\n" + text + "\n\n" + markdown(header, rows), args.out)


if __name__ == "__main__":
    main()
