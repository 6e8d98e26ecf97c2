"""`DensityPicture`: end points of base and tuned model against the exact density.

    two dimensions      contours of p* ~ exp(-E), with samples on top
    particles           energies, and distances of all pairs, against reference samples
    anything else       the first coordinates, one by one, against reference samples (marginals)

Contours hold the most likely 50, 80, 95 and 99 % of the mass: levels of exp(-E) summed over the picture's grid.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .diagnostic import Diagnostic
from .pictures import BASE, EXACT, HISTOGRAMS, TUNED, tidy
from .truth import Truth, truth_of

__all__ = ["DensityPicture", "mass_levels"]

GRID = 160
MASSES = (0.99, 0.95, 0.8, 0.5)
MARGINALS = 4
COLOURS = (("base", BASE), ("tuned", TUNED))


class DensityPicture(Diagnostic):
    """Draw samples beside the density: `density.png`, with means and spreads in `density.json`.

    A look costs `samples` paths of the base and of the current model each. It is for densities, and for mixtures whose
    tilt is known.

    Args:
        samples: end points of either model.
        every_n_updates: see `Diagnostic`.
        micro_batch: see `Diagnostic`.
    """

    name: ClassVar[str] = "density"

    def __init__(self, samples: int = 2000, every_n_updates: int | None = None, micro_batch: int | None = None) -> None:
        super().__init__(samples, every_n_updates, None, micro_batch)

    def look(self, host: Any) -> tuple[dict[str, Any], Figure]:
        """Means, spreads and energies of all samples, and their picture."""
        path = self.paths(host)
        truth = None if path.prompts is not None else truth_of(host.predictor, host.reward, path.lam)
        if truth is None:
            raise TypeError(
                f"DensityPicture draws a density, and the tilt by {type(host.reward).__name__} is none in closed form: "
                "remove the callback; TiltReport shows what there is"
            )
        sets = {"base": self.paths(host, base=True).end, "tuned": path.end}
        reference = truth.reference(self.samples, 0)
        if reference is not None:
            sets["exact"] = reference[: self.samples]
        sets = {name: x.float().cpu() for name, x in sets.items()}
        numbers = {name: summary(truth, x) for name, x in sets.items()}
        if truth.particles is not None:
            return numbers, draw_particles(truth, sets)
        return numbers, draw_plane(truth, sets) if path.end[0].numel() == 2 else draw_marginals(sets)


def mass_levels(p: Tensor, masses: Sequence[float]) -> list[float]:
    """The levels of a density on an even grid above which it has these fractions of its mass.

    Example:
        >>> mass_levels(torch.tensor([0.1, 0.2, 0.3, 0.4]), [0.4, 0.9])
        [0.4000000059604645, 0.20000000298023224]
    """
    ordered, _ = p.flatten().sort(descending=True)
    total = ordered.cumsum(0) / ordered.sum()
    at = torch.searchsorted(total, torch.tensor(masses, dtype=total.dtype) - 1e-6).clamp(max=len(ordered) - 1)
    return [float(v) for v in ordered[at]]


def summary(truth: Truth, x: Tensor) -> dict[str, Any]:
    """Mean energy with its spread, and of up to 16 numbers a state their means and spreads."""
    energy, flat = truth.energy(x).double(), x.flatten(1).double()
    found: dict[str, Any] = {"n": len(x), "energy": float(energy.mean()), "energy_std": float(energy.std())}
    return found | ({"mean": flat.mean(0).tolist(), "std": flat.std(0).tolist()} if flat.shape[1] <= 16 else {})


def draw_plane(truth: Truth, sets: dict[str, Tensor]) -> Figure:
    """Samples in the plane on contours of the density.

    Args:
        truth: the density.
        sets: "base", "tuned" and, where there are any, "exact" samples, (n, 2).
    """
    points = torch.cat(list(sets.values())).flatten(1)
    low, high = (torch.quantile(points[:100_000], q, 0) for q in (0.002, 0.998))
    margin = 0.12 * (high - low)
    x, y = (torch.linspace(float((low - margin)[i]), float((high + margin)[i]), GRID) for i in range(2))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    with torch.no_grad():
        energy = truth.energy(grid).double()
    p = torch.exp(energy.min() - energy).reshape(GRID, GRID)
    levels = sorted(set(mass_levels(p, MASSES)))
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    for axis, (name, colour) in zip(figure.subplots(1, 2, sharex=True, sharey=True), COLOURS, strict=True):
        some = sets[name].flatten(1)[:3000]
        axis.scatter(some[:, 0].numpy(), some[:, 1].numpy(), s=4, alpha=0.35, color=colour, lw=0)
        axis.contour(x.numpy(), y.numpy(), p.numpy(), levels, colors=EXACT, linewidths=0.9)
        axis.set_title(f"{name}; lines: 50, 80, 95, 99 % of the tilted density", fontsize=9)
        axis.set_xlabel("$x_1$")
        axis.set_xlim(float(x[0]), float(x[-1]))
        axis.set_ylim(float(y[0]), float(y[-1]))
        axis.set_aspect("equal")
        tidy(axis)
    figure.axes[0].set_ylabel("$x_2$")
    return figure


def draw_particles(truth: Truth, sets: dict[str, Tensor]) -> Figure:
    """Histograms of energies, and of the distances of all pairs.

    Args:
        truth: the density.
        sets: samples (n, particles, d) by name.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    with torch.no_grad():
        _histograms(left, {name: truth.energy(x) for name, x in sets.items()}, "energy", tails=True)
    _histograms(right, {name: _pair_distances(x) for name, x in sets.items()}, "distance of two particles")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside upper center", ncols=3)
    return figure


def draw_marginals(sets: dict[str, Tensor]) -> Figure:
    """Histograms of the first coordinates.

    Args:
        sets: samples (n, *shape) by name.
    """
    flat = {name: x.flatten(1) for name, x in sets.items()}
    shown = min(flat["tuned"].shape[1], MARGINALS)
    figure = Figure(figsize=(3.2 * shown + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, shown, squeeze=False)[0]
    for i, axis in enumerate(axes):
        _histograms(axis, {name: x[:, i] for name, x in flat.items()}, f"$x_{{{i + 1}}}$")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside upper center", ncols=3)
    return figure


def _histograms(axis: Axes, values: dict[str, Tensor], label: str, tails: bool = False) -> None:
    """Histograms of several samples on one axis.

    Energies have long `tails`, and those of a base have no end: the reference then sets the width, and what of the
    others is to the right of it is said in numbers.
    """
    set_width = ["exact"] if tails and "exact" in values else ["tuned"] if tails else list(values)
    wide = torch.cat([values[name].float() for name in set_width])
    low, high = torch.quantile(wide[torch.isfinite(wide)][:100_000], torch.tensor([0.005, 0.995])).tolist()
    if tails:
        low, high = low - 0.3 * (high - low), high + 1.5 * (high - low)
        right = [f"{name} {float((values[name] > high).float().mean()):.0%}" for name, _ in COLOURS]
        axis.set_title("to the right of this: " + ", ".join(right), fontsize=9)
    bins = torch.linspace(low, high if high > low else low + 1, 61).tolist()
    for name, _ in COLOURS:
        inside = values[name].float()
        weights = torch.full_like(inside, 1 / (len(inside) * (bins[1] - bins[0])))  # those outside count as well
        axis.hist(inside.numpy(), bins, weights=weights.numpy(), label=name, **HISTOGRAMS[name])
    if "exact" in values:
        axis.hist(values["exact"].float().numpy(), bins, density=True, label="reference", **HISTOGRAMS["exact"])
    axis.set_xlabel(label)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    tidy(axis)


def _pair_distances(x: Tensor) -> Tensor:
    """Distances of all pairs within each system (n, particles, d), in one row."""
    i, j = torch.triu_indices(x.shape[1], x.shape[1], 1)
    distances: Tensor = torch.linalg.vector_norm(x[:500, i] - x[:500, j], dim=-1)
    return distances.flatten()
