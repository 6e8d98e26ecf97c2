"""Reward against network forwards on the digits: one figure, every loss, the same budget, three seeds.

    python benchmarks/reward_curves.py [names ...] [--budget 32000] [--seeds 0 1 2] [--jobs 2]

Each loss of `digits_losses.py` tunes the demo's LoRA until it has spent so many network forwards, with 24 paths an
update, its learning rate falling linearly to a tenth at the end of the budget, as the demo's does; Tilt Matching ends
before, where it reaches its last level.  At every eighth of
the budget the memoryless chain of 16 steps is judged: the mean reward of its samples minus that of the base's from the
same noise, in parts of the way to the exact tilt, which reweighted base samples give.  What a loss asks of the sampler
(an ODE of ten steps, eight samples a prompt) is in `digits_losses.py`.
"""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean as average
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from digits_losses import LOSSES, config, looks_at
from lightning import Callback
from results import FILE, markdown, parser, publish, span
from short_fits import ROOT, fit
from torch import Tensor

from lightning_tilt.data import read_prompts
from lightning_tilt.identities import Estimate, expectation, mean, stratified
from lightning_tilt.interfaces import find_sampler
from lightning_tilt.transition import DDIM

__all__ = ["Judge", "main"]

PROMPTS = read_prompts(ROOT / "configs/digits/report_prompts.txt")
PARTS = 8
MARKS = ("o", "s", "^", "v", "D", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")


class Curve(NamedTuple):
    """What a fit was seen to reach: forwards spent and gain in mean reward, each time it was judged."""

    spent: list[int]
    gain: list[float]
    updates: int


def judged_rewards(host: Any, samples: int, base: bool = False) -> Tensor:
    """Rewards of the memoryless chain of 16 steps, (prompts, samples)."""
    sampler = find_sampler(host).variant(16, DDIM())
    path = sampler.rollout(host, PROMPTS, stream="report", number=0, base=base, samples_per_condition=samples)
    return path.reward.double().cpu().reshape(len(PROMPTS), samples)


def the_way(host: Any, samples: int) -> tuple[Estimate, Estimate]:
    """Mean reward of the base and of the exact tilt, from so many base samples a prompt: those of the demo's report.

    With few samples a prompt the reweighted mean is biased towards the base.
    """
    sampler, lam = find_sampler(host).variant(16, DDIM()), host.lam.lam
    base, exact = [], []
    for number, prompt in enumerate(PROMPTS):
        path = sampler.rollout(
            host, [prompt], stream="report", number=number, base=True, samples_per_condition=samples, world=(1, 0)
        )
        rewards = path.reward.double().cpu()
        base.append(mean(rewards))
        exact.append(expectation(rewards, lam * rewards))
    return stratified(base), stratified(exact)


class Ruler(Callback):
    """Measures the way, and lets no update be made."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure."""
        self.way = the_way(pl_module, self.samples)
        trainer.should_stop = True


class Judge(Callback):
    """Looks at the tuned model at every eighth of the budget, and ends the fit when it is spent.

    Attributes:
        curve: what was seen.
    """

    def __init__(self, budget: int, samples: int) -> None:
        self.budget, self.samples = budget, samples
        self.curve = Curve([0], [0.0], 0)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Judge the base."""
        self._base = judged_rewards(pl_module, self.samples, base=True).mean()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Judge, where another part has been spent, and let the rate fall."""
        spent = find_sampler(pl_module).evaluations.network
        if spent * PARTS // self.budget > self.curve.spent[-1] * PARTS // self.budget:
            self._judge(pl_module, spent)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group.setdefault("whole_lr", group["lr"]) * (1 - 0.9 * min(spent / self.budget, 1.0))
        if spent >= self.budget:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Judge what a loss that ends by itself has made."""
        spent = find_sampler(pl_module).evaluations.network
        if self.curve.spent[-1] < spent:
            self._judge(pl_module, spent)
        self.curve = self.curve._replace(updates=trainer.global_step)

    def _judge(self, host: Any, spent: int) -> None:
        self.curve.spent.append(spent)
        self.curve.gain.append(float(judged_rewards(host, self.samples).mean() - self._base))


def tune(name: str, callback: Callback, seed: int = 0) -> None:
    """Tune by one loss until the callback ends it."""
    made = config(name, updates=10**6)
    del made["model"]["init_args"]["lr_scheduler"]
    made["data"]["init_args"]["batch_size"] = 24 // made["sampler"]["samples_per_condition"]
    fit(made, [callback], ["--seed_everything", str(seed)])


def curve(name: str, seed: int, budget: int, samples: int) -> Curve:
    """One loss at one seed."""
    judge = Judge(budget, samples)
    tune(name, judge, seed)
    return judge.curve


def draw(file: Path, curves: dict[str, list[Curve]], whole: float) -> None:
    """Parts of the way against forwards, mean and range of the seeds: paths on the left, end points on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4), sharex=True, sharey=True, layout="constrained")
    for axis, title, made_of in (
        (axes[0], "losses on the steps of paths", "paths"),
        (axes[1], "losses on noised end points", "end points"),
    ):
        family = [name for name in curves if looks_at(LOSSES[name][0]) == made_of]
        for i, name in enumerate(family):
            x = [average(at) / 1000 for at in _together([c.spent for c in curves[name]])]
            ways = [[gain / whole for gain in at] for at in _together([c.gain for c in curves[name]])]
            y = [average(at) for at in ways]
            style: Any = {
                "color": plt.get_cmap("tab10")(i),
                "ls": DASHES[i % 4],
                "marker": MARKS[i],
                "ms": 5,
                "lw": 1.4,
            }
            axis.plot(x, y, label=name.replace("_", " "), **style)
            axis.fill_between(x, [min(at) for at in ways], [max(at) for at in ways], color=style["color"], alpha=0.1)
        axis.axhline(1, color="black", lw=0.8, ls="--")
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=title, xlabel="network forwards, all counted (thousands)")
        if family:
            axis.legend(
                fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, handlelength=4
            )
    axes[0].set_ylabel("mean reward: base 0, exact tilt 1")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _together(seeds: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """What the seeds had each time they were judged; one that has ended keeps what it had."""
    most = max(map(len, seeds))
    return list(zip(*([*one, *[one[-1]] * (most - len(one))] for one in seeds), strict=True))


def row(name: str, seeds: Sequence[Curve], budget: int, whole: float) -> list[str]:
    """A line of the table: the way at three quarters and at the end, mean of the seeds, the least and the greatest."""
    columns = []
    for quarter in range(1, 4):
        ways = [
            next((gain / whole for at, gain in zip(c.spent, c.gain, strict=True) if at >= quarter * budget / 4), None)
            for c in seeds
        ]
        there = [way for way in ways if way is not None]
        columns.append(span(there, ".0%") if len(there) == len(seeds) else "")
    end = span([c.gain[-1] / whole for c in seeds], ".0%")
    counted = [_ends([round(c.spent[-1] / 1000) for c in seeds]), _ends([c.updates for c in seeds])]
    return [name, looks_at(LOSSES[name][0]), *columns, end, *counted]


def _ends(counts: Sequence[int]) -> str:
    return " - ".join(str(count) for count in sorted({min(counts), max(counts)}))


def main() -> None:
    """Tune by each loss and seed, and write table and figure."""
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", default=list(LOSSES), metavar="names", help=", ".join(LOSSES))
    arguments.add_argument("--budget", type=int, default=32_000, help="network forwards of each loss")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="fits at a time, one thread each")
    args = arguments.parse_args()
    budget, samples, base_samples, seeds = (500, 2, 2, [0]) if args.quick else (args.budget, 8, 384, args.seeds)
    ruler = Ruler(base_samples)
    tune("adjoint_matching", ruler)
    base, exact = ruler.way
    whole = exact.mean - base.mean
    curves: dict[str, list[Curve]] = {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        started = {name: [pool.submit(curve, name, seed, budget, samples) for seed in seeds] for name in args.names}
        for name, runs in started.items():
            curves[name] = [run.result() for run in runs]
            print(" | ".join(row(name, curves[name], budget, whole)), flush=True)
            if args.out is not None or not args.quick:
                draw((args.out or FILE).with_name("reward_curves.png"), curves, whole)
    text = (
        f"Each loss tunes the demo's LoRA towards `Ink` with 24 paths an update until it has spent {budget:,} network "
        "forwards, its learning rate falling to a tenth of the first then. How far of the way from base "
        f"({base.mean:.4f} +- {base.se:.4f}) to exact tilt ({exact.mean:.4f} +- {exact.se:.4f}) the mean reward of the "
        f"memoryless chain of 16 steps has gone, {samples} samples of each of {len(PROMPTS)} prompts, less the base's "
        f"from the same noise: the mean of seeds {', '.join(map(str, seeds))}, in brackets the least and the greatest. "
        "A column is judged after the update that spent its last forward; the way itself is known to "
        f"{(base.se**2 + exact.se**2) ** 0.5 / whole:.0%}. More than 100 % is not better: the tilt is what was asked "
        "for, and the mean alone does not say that it was met. First rates are those of `digits_losses.py`, the same "
        "for a family; a loss can do better than here."
    )
    header = ["loss", "looks at", *(f"{budget * i // 4:,}" for i in range(1, 4)), "end", "1,000 forwards", "updates"]
    rows = [row(name, curves[name], budget, whole) for name in args.names]
    note = (
        "Tilt Matching ends where its last level is reached, so its rate has hardly fallen. Efficient Adjoint Matching "
        "and target, novel and mixed score matching read the base's score at the end points, and latents have no "
        "gentle one: its noise hides the reward. AdjointSampling, CMCD, NETS and TrajectoryBalance sample densities."
    )
    picture = "![Reward against network forwards](reward_curves.png)"
    made_with = f"seeds {' '.join(map(str, seeds))}"
    publish("reward_curves", "Reward against forwards", [text, picture, markdown(header, rows), note], args, made_with)


if __name__ == "__main__":
    main()
