"""The package against a plain transcription of the published algorithm, on the same digits network.

    python benchmarks/published.py [--updates 2] [--rounds 5] [--samples 4]

Supervised pairs a CPU second, network forwards a pair, and bytes of tensors: `published_algorithm.py` with 4 of its 50
steps supervised and with 20 (10 drawn, the last 10), the package with the same 4 and with all of them.  They take
turns, and a ratio is the median of those of the rounds: a machine that is shared runs faster one minute than the next.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from published_algorithm import PublishedAdjointMatching
from results import markdown, parser, publish, span
from short_fits import ROOT, Bytes, CpuClock, cpu_seconds, fit, held

from lightning_tilt.assets import folder
from lightning_tilt.data import read_prompts
from lightning_tilt.estimate.tracking import AllocationTracker
from lightning_tilt.interfaces import find_sampler
from lightning_tilt.rewards import Ink

__all__ = ["main", "package", "published"]

LAM = 50.0
"""The demo's."""
Found = dict[str, float]


def published(
    steps: int, supervised: int, last: int, in_one_call: bool, samples: int, updates: int, bytes_too: bool
) -> Found:
    """The transcription: one update to warm up, some that are timed, one whose bytes are counted, which is slow."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    prompts = read_prompts(ROOT / "configs/digits/prompts.txt")[: samples // 4]
    batch = [prompt for prompt in prompts for _ in range(4)]
    plain = PublishedAdjointMatching(
        str(folder("digits-sd15")), Ink().score, LAM, steps=steps, supervised=supervised, last=last,
        in_one_call=in_one_call, lr=3e-4,
    )  # fmt: skip
    calls = [0]
    for network in (plain.base, plain.tuned):
        network.register_forward_hook(lambda _, given, __: calls.__setitem__(0, calls[0] + len(given[0])))
    plain.update(batch)
    start, calls[0], pairs = cpu_seconds(), 0, 0
    for _ in range(updates):
        pairs += plain.update(batch)
    seconds = cpu_seconds() - start
    # Beside the forwards that the hooks have seen: a VJP for each swept state, two for each backward pass.
    network_evaluations = calls[0] + updates * samples * steps + 2 * pairs
    with AllocationTracker() as tracker:
        if bytes_too:
            plain.update(batch)
    parts = [plain.base, plain.tuned, plain.pipeline.vae, plain.pipeline.text_encoder]
    return {
        "pairs": pairs / updates, "pairs/s": pairs / seconds, "forwards": network_evaluations / pairs,
        "forwards/s": network_evaluations / seconds, "held": held(parts, plain.optimizer), "peak": tracker.peak,
    }  # fmt: skip


class Meter(CpuClock):
    """Supervised pairs and network evaluations of the updates that are timed, which are those after the first."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.updates = updates

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Close an update."""
        super().on_train_batch_end(trainer, pl_module, *args)
        counted = find_sampler(pl_module).evaluations
        if len(self.seconds) == 1:
            self._first = counted.pairs, counted.network
        if len(self.seconds) == self.updates + 1:
            self.pairs, self.network = counted.pairs - self._first[0], counted.network - self._first[1]


def package(
    config: str,
    steps: int,
    supervised: int | str,
    checkpoint: bool,
    samples: int,
    updates: int,
    bytes_too: bool,
    in_one_call: int = 4,
) -> Found:
    """The same of a config of the digits, so many steps in one call of the loss."""
    flags = {
        "sampler.steps": steps, "sampler.rollout_micro_batch": samples, "data.batch_size": samples // 4,
        "model.supervised_steps": supervised, "model.checkpoint": str(checkpoint).lower(),
        "model.adjoint_micro_batch": samples, "model.loss_micro_batch": samples * in_one_call,
        "trainer.max_steps": updates + 1 + bytes_too, "trainer.gradient_clip_val": 1.0,
    }  # fmt: skip
    meter, size = Meter(updates), Bytes(updates + 2)
    fit(
        ROOT / f"configs/digits/{config}.yaml", [meter, *([size] if bytes_too else [])],
        [text for name, value in flags.items() for text in (f"--{name}", str(value))],
    )  # fmt: skip
    seconds = sum(meter.seconds[1 : updates + 1])
    return {
        "pairs": meter.pairs / updates, "pairs/s": meter.pairs / seconds, "forwards": meter.network / meter.pairs,
        "forwards/s": meter.network / seconds, "held": size.held, "peak": size.peak,
    }  # fmt: skip


def main() -> None:
    """Measure all, and write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--updates", type=int, default=2, help="that are timed, a round")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--samples", type=int, default=4)
    args = arguments.parse_args()
    steps, updates, rounds, n = (12, 1, 1, 4) if args.quick else (50, args.updates, args.rounds, args.samples)
    many, last = min(20, steps), min(10, steps - 4)
    cases: dict[str, Callable[[bool], Found]] = {
        "published algorithm, 4 steps drawn": lambda b: published(steps, 4, 0, True, n, updates, b),
        "the same, step by step": lambda b: published(steps, 4, 0, False, n, updates, b),
        "published algorithm, 10 drawn and the last 10": lambda b: published(steps, many, last, True, n, updates, b),
        "these, step by step": lambda b: published(steps, many, last, False, n, updates, b),
        "package, all weights, 4 steps drawn": lambda b: package("sd15_full", steps, 4, False, n, updates, b),
        "package, all weights, all steps": lambda b: package("sd15_full", steps, "all", False, n, updates, b),
        "the same, checkpointed": lambda b: package("sd15_full", steps, "all", True, n, updates, b),
        "package, adapters, all steps, checkpointed": lambda b: package(
            "sd15_adjoint_matching", steps, "all", True, n, updates, b
        ),
    }
    found = [{name: case(i == 0) for name, case in cases.items()} for i in range(rounds)]
    first = next(iter(cases))

    def ratio(name: str, figure: str) -> str:
        return span([turn[name][figure] / turn[first][figure] for turn in found], ".2f", median)

    rows = [
        [
            name, f"{f['pairs']:.0f}", f"{f['forwards']:.1f}", ratio(name, "pairs/s"), ratio(name, "forwards/s"),
            f"{f['held'] / 1e6:.1f}", f"{f['peak'] / 1e6:.1f}",
            f"{(f['held'] + f['peak']) / (found[0][first]['held'] + found[0][first]['peak']):.2f}",
        ]
        for name, f in found[0].items()
    ]  # fmt: skip
    header = [
        "Adjoint Matching", "pairs an update", "forwards a pair", "**pairs/s**", "forwards/s", "MB held",
        "MB in passing", "**memory**",
    ]  # fmt: skip
    text = (
        f"{n} paths of {steps} steps, `Ink`, float32, network calls of {n} samples, the loss's of four steps but "
        "where it says step by step, and of all 20 for the third line. `published_algorithm.py` is written "
        "from 2409.08861 and what its authors' code does: a second network, all weights trained, images decoded in the "
        "rollout, the whole path swept whatever is supervised. **pairs/s** (a CPU second), forwards/s and **memory** "
        f"are in those of its first line, times as the median of {rounds} rounds, in brackets the least and the "
        "greatest. Held are weights, frozen ones too, and the optimiser's state; in passing is the most that an update "
        "makes, bytes of tensors both. Checkpointed means that the loss's micro-batches are recomputed in its backward "
        "pass: memory of one for a forward a pair more. Calls are small here, and so is what a second network holds "
        "beside what an update makes. Pairs of a path are correlated: twice the pairs are not twice the knowledge, and "
        "what they are worth is not measured here."
    )
    publish("published", "Against the published algorithm", [text, markdown(header, rows)], args)


if __name__ == "__main__":
    main()
