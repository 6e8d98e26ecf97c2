"""How an update of the demo grows with steps, samples and processes.

    python benchmarks/growth.py

CPU seconds, network forwards and bytes of tensors of an update, in those of the smallest.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from lightning import Callback
from results import markdown, parser, publish
from short_fits import DEMO, ROOT, Bytes, CpuClock, fit

from lightning_tilt.data import read_prompts
from lightning_tilt.interfaces import find_sampler

__all__ = ["WriteOut", "main", "measure", "processes"]

PROMPTS = read_prompts(ROOT / "configs/digits/prompts.txt")[:8]
"""As many as make whole batches of every size, so that an update is never of fewer samples."""


class WriteOut(Callback):
    """Leave what a process has measured in a file of its own."""

    def __init__(self, folder: Path, clock: CpuClock) -> None:
        self.folder, self.clock = folder, clock

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write."""
        found = {"seconds": self.clock.seconds, "forwards": find_sampler(pl_module).evaluations.network}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def flags(steps: int, samples: int, updates: int) -> list[str]:
    """Of the demo, with four samples a prompt, and micro-batches that do not grow."""
    return [
        "--sampler.steps", str(steps), "--data.prompts", json.dumps(PROMPTS), "--data.batch_size", str(samples // 4),
        "--sampler.rollout_micro_batch", "8",
        "--model.adjoint_micro_batch", "8", "--model.loss_micro_batch", "8", "--trainer.max_steps", str(updates),
        "--model.checkpoint", "true", "--sampler.reward_micro_batch", "8",
    ]  # fmt: skip


def measure(steps: int, samples: int, updates: int) -> tuple[float, float, float]:
    """CPU seconds and forwards of an update, and the bytes that it makes."""
    clock, size = CpuClock(), Bytes(updates + 2)
    cli = fit(DEMO, [clock, size], flags(steps, samples, updates + 2))
    counted = find_sampler(cli.model).evaluations
    assert counted.pairs == (updates + 2) * samples * (steps - 1), "a batch was not whole"
    forwards = counted.network / (updates + 2)
    return sum(clock.seconds[1:-1]) / updates, forwards, float(size.peak)


def processes(count: int, steps: int, samples: int, updates: int) -> tuple[float, float]:
    """CPU seconds of an update in the slowest process, and forwards of all, with so many samples in each."""
    with tempfile.TemporaryDirectory() as folder:
        clock = CpuClock()
        strategy = ["--trainer.strategy", "ddp_spawn", "--trainer.devices", str(count)]
        fit(DEMO, [clock, WriteOut(Path(folder), clock)], [*flags(steps, samples, updates + 1), *strategy])
        found = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    assert len(found) == count
    seconds = max(sum(f["seconds"][1:]) / updates for f in found)
    return seconds, sum(f["forwards"] for f in found) / (updates + 1)


def main() -> None:
    """Measure and write the tables."""
    args = parser(__doc__).parse_args()
    updates, steps, samples = (1, [3, 6], [8, 16]) if args.quick else (2, [8, 16, 32], [8, 16, 32])
    rows = []
    for name, grid in (("steps", [(k, samples[0]) for k in steps]), ("samples", [(steps[0], n) for n in samples])):
        found = [measure(k, n, updates) for k, n in grid]
        for (k, n), values in zip(grid, found, strict=True):
            ratios = [value / first for value, first in zip(values, found[0], strict=True)]
            rows.append([f"{k if name == 'steps' else n} {name}", *(f"{r:.2f}" for r in ratios)])
    spread = [(count, processes(count, steps[0], samples[0], updates)) for count in (1, 2)]
    base = spread[0][1]
    for count, (seconds, forwards) in spread:
        name = f"{count} process{'es' if count > 1 else ''} of {samples[0]} samples"
        rows.append([name, f"{seconds / base[0]:.2f}", f"{forwards / base[1]:.2f}", "-"])
    text = (
        "An update of the demo (Adjoint Matching, LoRA, all steps supervised), checkpointed, in micro-batches of 8, at "
        f"{samples[0]} samples where steps grow and {steps[0]} steps where samples do; each block in its first line. "
        "Bytes are of tensors that an update makes: those of one micro-batch, and the paths. Processes are `ddp`'s "
        "with gloo, their seconds those of the busier one, forwards those of all."
    )
    publish("growth", "Growth", [text, markdown(["", "CPU seconds", "forwards", "bytes"], rows)], args)


if __name__ == "__main__":
    main()
