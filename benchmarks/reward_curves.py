"""Reward against network forwards on the digits: one figure, every loss, the same budget.

    python benchmarks/reward_curves.py [names ...] [--budget 16000]

Each loss of `digits_losses.py` tunes the demo's LoRA until it has spent so many network forwards, at a constant rate,
with 24 paths an update.  At every quarter of the budget the memoryless chain of 16 steps is judged: the mean reward of
its samples minus that of the base's from the same noise, in parts of the way to the exact tilt, which reweighted base
samples give.  What a loss asks of the sampler (an ODE of ten steps, eight samples a prompt) is in `digits_losses.py`.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from digits_losses import END_POINTS, LOSSES, config
from lightning import Callback
from results import FILE, markdown, parser, publish
from short_fits import ROOT, fit
from torch import Tensor

from lightning_tilt.data import read_prompts
from lightning_tilt.identities import Estimate, expectation, mean, stratified
from lightning_tilt.interfaces import find_sampler
from lightning_tilt.transition import DDIM

__all__ = ["Judge", "main"]

PROMPTS = read_prompts(ROOT / "configs/digits/report_prompts.txt")
Points = list[tuple[int, float, float]]


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


class Judge(Callback):
    """Looks at the tuned model at every quarter of the budget, and ends the fit when it is spent.

    Attributes:
        points: (forwards spent, mean gain in reward, its standard error).
        way: mean reward of base and exact tilt; the first loss has them measured for all.
    """

    def __init__(self, budget: int, samples: int, base_samples: int, way: tuple[Estimate, Estimate] | None) -> None:
        self.budget, self.samples, self.base_samples, self.way = budget, samples, base_samples, way
        self.points: Points = []
        self._next = 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Judge the base."""
        self._base = judged_rewards(pl_module, self.samples, base=True)
        if self.way is None:
            self.way = the_way(pl_module, self.base_samples)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Judge, where another quarter has been spent."""
        spent = find_sampler(pl_module).evaluations.network
        if spent >= self._next * self.budget / 4:
            self._judge(pl_module, spent)
            self._next = int(4 * spent / self.budget) + 1
        if spent >= self.budget:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Judge what a loss that ends by itself has made."""
        spent = find_sampler(pl_module).evaluations.network
        if not self.points or self.points[-1][0] < spent:
            self._judge(pl_module, spent)

    def _judge(self, host: Any, spent: int) -> None:
        gain = judged_rewards(host, self.samples) - self._base
        se = float((gain.var(1) / gain.shape[1]).mean() / len(gain)) ** 0.5
        self.points.append((spent, float(gain.mean()), se))


def tuned(name: str, judge: Judge) -> Any:
    """Tune by one loss until the judge ends it."""
    made = config(name, updates=10**6)
    del made["model"]["init_args"]["lr_scheduler"]
    each = made["sampler"]["samples_per_condition"]
    made["data"]["init_args"]["batch_size"] = 24 // each
    return fit(made, [judge])


def draw(file: Path, curves: dict[str, Points], way: tuple[Estimate, Estimate]) -> None:
    """Parts of the way against forwards: paths on the left, end points on the right."""
    whole = way[1].mean - way[0].mean
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    colours = plt.get_cmap("tab10")
    for axis, title, family in (
        (axes[0], "losses on the steps of paths", [n for n in curves if n not in END_POINTS]),
        (axes[1], "losses on noised end points", [n for n in curves if n in END_POINTS]),
    ):
        for i, name in enumerate(family):
            x, gain, se = zip((0, 0.0, 0.0), *curves[name], strict=True)
            y, bars = [g / whole for g in gain], [s / whole for s in se]
            axis.errorbar(x, y, bars, color=colours(i), marker="o", ms=3, capsize=2, label=name.replace("_", " "))
        axis.axhline(1, color="black", lw=0.8, ls="--")
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=title, xlabel="network forwards, all counted")
        if family:
            axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    axes[0].set_ylabel("mean reward: base 0, exact tilt 1")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def row(name: str, points: Points, budget: int, whole: float, updates: int) -> list[str]:
    """A line of the table: the way at each quarter."""
    columns, last = [""] * 4, 0  # an update that spends more than a quarter passes over some, a loss may end early
    for spent, gain, se in points:
        last = min(max(int(4 * spent / budget), last + 1), 4)
        columns[last - 1] = f"{gain / whole:.0%} +- {se / whole:.0%}"
    return [name, "end points" if name in END_POINTS else "paths", *columns, str(updates)]


def main() -> None:
    """Tune by each loss, and write table and figure."""
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", default=list(LOSSES), metavar="names", help=", ".join(LOSSES))
    arguments.add_argument("--budget", type=int, default=16_000, help="network forwards of each loss")
    args = arguments.parse_args()
    budget, samples, base_samples = (500, 2, 2) if args.quick else (args.budget, 8, 384)
    figure, curves = (args.out or FILE).with_name("reward_curves.png"), dict[str, Points]()
    rows, way = [], None
    for name in args.names:
        judge = Judge(budget, samples, base_samples, way)
        cli = tuned(name, judge)
        way, curves[name] = judge.way, judge.points
        assert way is not None
        whole = way[1].mean - way[0].mean
        rows.append(row(name, judge.points, budget, whole, cli.trainer.global_step))
        print(" | ".join(rows[-1]), flush=True)
        if args.out is not None or not args.quick:
            draw(figure, curves, way)
    assert way is not None
    text = (
        f"Each loss tunes the demo's LoRA towards `Ink` with 24 paths an update, at a constant rate, until it has "
        f"spent {budget:,} network forwards. At each quarter: how far of the way from base ({way[0].mean:.4f} +- "
        f"{way[0].se:.4f}) to exact tilt ({way[1].mean:.4f} +- {way[1].se:.4f}) the mean reward of the memoryless "
        f"chain of 16 steps has gone, {samples} samples of each of {len(PROMPTS)} prompts, less the base's from the "
        "same noise. More than 100 % is not better: the tilt is what was asked for. Rates of learning are the first "
        "that were tried (`digits_losses.py`), the same for a family; a loss can do better than here."
    )
    header = ["loss", "looks at", *(f"{budget * i // 4:,}" for i in range(1, 5)), "updates"]
    picture = f"![Reward against network forwards]({figure.name})"
    note = (
        "On policy `grpo` with the exact penalty makes the updates of "
        "`reinforce`; Tilt Matching ends where its last level is reached. Efficient Adjoint Matching and target, novel "
        "and mixed score matching read the base's score at the end points, and latents have no gentle one: its noise "
        "hides the reward. AdjointSampling, CMCD, NETS and TrajectoryBalance sample densities."
    )
    publish("reward_curves", "Reward against forwards", [text, picture, markdown(header, rows), note], args)


if __name__ == "__main__":
    main()
