"""Pictures of a run: before and after, the curves, the reward's distribution."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import IO, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from ..loggers import read_metrics

__all__ = [
    "BASE", "EXACT", "HISTOGRAMS", "TUNED", "before_after", "curves", "image_grid", "reward_histogram",
    "reward_histograms", "tidy",
]  # fmt: skip

BASE, TUNED, EXACT = "#7f8c99", "#c8553d", "#2b6777"
"""Colours of base, tuned model and exact tilt in all pictures."""

HISTOGRAMS: dict[str, dict[str, Any]] = {
    "base": {"histtype": "stepfilled", "color": BASE, "alpha": 0.45},
    "tuned": {"histtype": "stepfilled", "facecolor": "none", "edgecolor": TUNED, "hatch": "////", "lw": 1.4},
    "exact": {"histtype": "step", "color": EXACT, "lw": 2.0},
}
"""How histograms on one axis are drawn: full, hatched and a thick line, which are told apart without colour as well."""


def before_after(
    path: str | Path, prompts: Sequence[str | None], base: Sequence[Tensor], tuned: Sequence[Tensor]
) -> None:
    """Draw samples of base and tuned model from the same noise, side by side; states as points.

    Args:
        path: the PNG to write.
        prompts: one a row.
        base: for each prompt samples of the base, (n, 3, H, W) in [0, 1], or states (n, d).
        tuned: the same of the tuned model.
    """
    if base[0].ndim != 4:
        return _scatter(path, torch.cat(list(base)), torch.cat(list(tuned)))
    gap = torch.ones(3, base[0].shape[2], max(2, base[0].shape[3] // 4))
    rows = [torch.cat([*b, gap, *t], -1) for b, t in zip(base, tuned, strict=True)]
    inches, (height, width) = 0.62, rows[0].shape[1:]
    figure = Figure(figsize=(1.6 + inches * width / height, 0.3 + inches * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, row, prompt in zip(axes, rows, prompts, strict=True):
        axis.imshow(row.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(_label(prompt), rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
        axis.spines[:].set_visible(False)
    tuned_title = "tuned, from the same noise" if len(base[0]) > 2 else "tuned"
    for place, name in ((0.25, "base"), (0.75, tuned_title)):
        axes[0].text(place, 1.08, name, transform=axes[0].transAxes, ha="center", va="bottom", fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a prompt may be in any script
        figure.savefig(path, dpi=150)
    return None


def _label(prompt: str | None) -> str:
    """A prompt as the label of a row: at most three lines, nothing that draws otherwise than as a character."""
    text = "".join(c if c.isprintable() else " " for c in prompt or "")
    return "\n".join(wrap(text, 26, max_lines=3, placeholder=" ..."))


def image_grid(path: str | Path, images: Tensor, columns: int, gap: int = 2) -> None:
    """Write images (n, 3, H, W) in [0, 1] as one PNG, row by row, pixel for pixel.

    Args:
        path: the PNG to write.
        images: (n, 3, H, W).
        columns: images in a row.
        gap: white pixels between two images.
    """
    n, _, height, width = images.shape
    rows = -(-n // columns)
    page = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images.float().clamp(0, 1)):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        page[:, y : y + height, x : x + width] = image
    imsave(path, page.permute(1, 2, 0).contiguous().numpy())


def reward_histogram(path: str | Path, base: Sequence[Tensor], tuned: Sequence[Tensor], lam: float) -> None:
    """Draw the rewards of base and tuned samples, and the exact tilt by reweighting, on one axis.

    Args:
        path: the PNG to write.
        base: for each prompt the rewards of base samples, (n,).
        tuned: the same of tuned samples.
        lam: multiplier of the tilt.
    """
    everything = torch.cat([*base, *tuned])
    low, high = torch.quantile(everything[:100_000], torch.tensor([0.002, 0.998], dtype=everything.dtype)).tolist()
    if low == high:  # a constant reward
        low, high = low - 0.5, high + 0.5
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    reward_histograms(axis, base, tuned, lam, torch.linspace(low, high, 41))
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.savefig(path, dpi=150)


def reward_histograms(axis: Axes, base: Sequence[Tensor], tuned: Sequence[Tensor], lam: float, edges: Tensor) -> None:
    """Draw the three histograms of `reward_histogram` on an axis of your own.

    Args:
        axis: where to draw.
        base: for each prompt the rewards of base samples, (n,).
        tuned: the same of tuned samples.
        lam: multiplier of the tilt.
        edges: of the bins, (bins + 1,).
    """
    rewards, bins = torch.cat(list(base)).numpy(), edges.tolist()
    weights = torch.cat([torch.softmax(lam * r, 0) for r in base]).numpy()
    axis.hist(rewards, bins, density=True, label="base", **HISTOGRAMS["base"])
    axis.hist(torch.cat(list(tuned)).numpy(), bins, density=True, label="tuned", **HISTOGRAMS["tuned"])
    exact = HISTOGRAMS["exact"] | {"label": "exact tilt (base, reweighted)"}
    axis.hist(rewards, bins, weights=weights, density=True, **exact)
    axis.set_xlabel("reward")
    axis.set_ylabel("density")
    tidy(axis)


def curves(path: str | Path | IO[bytes], metrics: str | Path, report: dict[str, Any]) -> bool:
    """Draw reward, ESS and loss over the updates.

    Args:
        path: the PNG to write.
        metrics: the run's metrics.csv.
        report: the run's report: its base and exact rewards, where it has them, are drawn as lines.

    Returns:
        Whether there was anything to draw.
    """
    columns = read_metrics(metrics)
    panels = [c for c in ("train/reward", "train/ess", "train/loss") if any(v == v for v in columns.get(c, []))]
    figure = Figure(figsize=(4.2 * max(len(panels), 1), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        points = [(s, v) for s, v in zip(columns["step"], columns[name], strict=True) if v == v]
        axis.plot(*zip(*points, strict=True), color=TUNED, lw=1.2)
        axis.set_title(name.removeprefix("train/"), fontsize=10)
        axis.set_xlabel("update")
        tidy(axis)
        if name == "train/reward":
            for key, colour in (("reward_base", BASE), ("reward_exact", EXACT)):
                if key not in report:
                    continue
                axis.axhline(report[key]["mean"], color=colour, lw=1.2, ls="--", label=key.removeprefix("reward_"))
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8, loc="lower right")
        elif name == "train/ess":
            axis.set_ylim(0, 1.02)
        elif min(v for _, v in points) > 0:
            axis.set_yscale("log")
    figure.savefig(path, dpi=150, format="png")
    return bool(panels)


def _scatter(path: str | Path, base: Tensor, tuned: Tensor) -> None:
    """The first two coordinates of base and tuned states; of states on the line, and of pair distances, histograms."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axis, points, name, colour in zip(
        figure.subplots(1, 2, sharex=True, sharey=True), (base, tuned), ("base", "tuned"), (BASE, TUNED), strict=True
    ):
        if points.ndim == 3:  # particles (n, N, d)
            pairs = torch.cat([torch.pdist(x) for x in points[:1000]])
            axis.hist(pairs.numpy(), 60, density=True, color=colour, alpha=0.6)
            axis.set_xlabel("distance of two particles")
        elif points.shape[1] == 1:
            axis.hist(points[:, 0].numpy(), 60, density=True, color=colour, alpha=0.6)
        else:
            axis.scatter(points[:5000, 0].numpy(), points[:5000, 1].numpy(), s=3, alpha=0.35, color=colour, lw=0)
            axis.set_aspect("equal")
        axis.set_title(f"{name}, from the same noise", fontsize=10)
        tidy(axis)
    figure.savefig(path, dpi=150)


def tidy(axis: Axes) -> None:
    """Take the upper and the right line away."""
    axis.spines[["top", "right"]].set_visible(False)
