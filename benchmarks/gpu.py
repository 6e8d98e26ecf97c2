"""Seconds an update, TFLOP/s, and memory, at real size with random weights on a GPU.

    python benchmarks/gpu.py [--cases sd15 sd3 sd3_1024] [--tuning lora full] [--compile off default]

Adjoint Matching towards `Ink`, whose own cost is nothing beside the VAE's decoder, which its images and their gradient
ask for; bfloat16, gradient checkpointing, micro-batches of four; the first update warms up and compiles.  TFLOP count
every forward, product with a vector and backward of the denoiser, and no decoding; the share of the card's peak counts
what is recomputed too.  Each row is measured in a process of its own and written when it is there.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from full_size import forward_flops
from lightning import Callback
from random_weights import FullSizeRun
from results import markdown, parser, publish

__all__ = ["CASES", "main"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", {}),
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", {"height": 512, "width": 512}),
    "sd3_1024": ("stabilityai/stable-diffusion-3-medium-diffusers", {"height": 1024, "width": 1024}),
}
PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0,
}  # fmt: skip
"""Dense bfloat16, by a part of the card's name; the first that fits."""
HEADER = [
    "model", "trained", "compile", "s an update", "least", "most", "the first", "forwards/s", "TFLOP/s",
    "of peak, recomputed too", "GB", "GB estimated",
]  # fmt: skip


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
    cuda, full = args.device == "cuda", options["tuning"] == "full"
    begin = [name, "all weights" if full else "adapters", options["compile"]]
    torch.manual_seed(0)
    run = FullSizeRun(
        path, args.device, steps=args.steps, samples=args.samples, micro_batch=min(4, args.samples),
        precision="bf16-mixed" if full else "32-true", guidance=args.guidance, dtype="bfloat16",
        gradient_checkpointing=True, **options,
    )  # fmt: skip
    found, clock = run.estimate(), _Clock(cuda)
    foretold = f"{(found.peak() - (10**9 if cuda else 0)) / 1e9:.2f}"
    flops = forward_flops(found.settings)
    try:
        run.fit(args.updates + 1, clock)
    except torch.cuda.OutOfMemoryError:
        return [*begin, *["-"] * 7, "out of memory", foretold]
    first, *seconds = clock.seconds
    needed = found.forwards["total"]
    done = (needed + found.forwards["recomputed"]) * flops / median(seconds) / 1e12
    peak = _peak(args) if cuda or args.peak_tflops else None
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if cuda else "-"
    return [
        *begin, *(f"{value:.3f}" for value in (median(seconds), min(seconds), max(seconds), first)),
        f"{needed / median(seconds):.2f}", f"{needed * flops / median(seconds) / 1e12:.3g}",
        "-" if peak is None else f"{100 * done / peak:.3g}%", memory, foretold,
    ]  # fmt: skip


def _peak(args: argparse.Namespace) -> float | None:
    """TFLOP/s that the card can do at most, if they are known."""
    if args.peak_tflops:
        return float(args.peak_tflops)
    card = torch.cuda.get_device_name()
    return next((value for name, value in PEAK_TFLOPS.items() if name in card), None)


def main() -> None:
    """Measure and write the table."""
    arguments = parser(__doc__, quick=False)
    arguments.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    arguments.add_argument("--path", help="a folder in the place of the cases")
    arguments.add_argument("--tuning", nargs="*", default=["lora", "full"], choices=["lora", "full"])
    arguments.add_argument("--compile", nargs="*", default=None, help="modes; on a GPU: off default")
    arguments.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--updates", type=int, default=5, help="that are timed, after one to warm up")
    arguments.add_argument("--guidance", type=float, default=1.0)
    arguments.add_argument("--peak_tflops", type=float, help="of the card, where its name is not known")
    args = arguments.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu --path FOLDER runs a small model")
    modes = args.compile or (["off", "default"] if args.device == "cuda" else ["off"])
    cases = {name: CASES[name] for name in args.cases} if args.path is None else {Path(args.path).name: (args.path, {})}
    cuda = args.device == "cuda"
    card, peak = (torch.cuda.get_device_name(), _peak(args)) if cuda else ("CPU", args.peak_tflops)
    text = (
        f"One {card}" + (f", {peak:g} TFLOP/s at most" if peak else "") + f": {args.steps} steps, {args.samples} paths "
        f"an update, random weights, bfloat16; the median of {args.updates} updates, the least and the most, and the "
        "first, which compiles. Memory is what tensors took at most, beside the estimate."
    )
    rows: list[list[str]] = []
    for name, (path, size) in cases.items():
        for options in ({**size, "tuning": tuning, "compile": mode} for tuning in args.tuning for mode in modes):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                rows.append(alone.submit(_measure, name, path, options, args).result())
            publish("gpu", "On a GPU", [text, markdown(HEADER, rows)], args)


if __name__ == "__main__":
    main()
