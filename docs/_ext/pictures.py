"""The pictures of the losses: made by hand with `make docs-pictures`, committed, shown by the pages.

    python docs/_ext/pictures.py                     all of them
    python docs/_ext/pictures.py cmcd_kl variances   some

A loss's picture is its configuration under `configs/toy/` at its own seed, with this panel in place of its report:
samples of the tuned model, by the chain that the report judges, on contours of the exact tilt.  `variances` draws how
far four targets lie from their mean over t, from closed forms.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_tilt import RectifiedFlow
from lightning_tilt.callbacks import DensityPicture
from lightning_tilt.callbacks.density_picture import MASSES, mass_levels
from lightning_tilt.callbacks.mixture_variances import mixture_variances
from lightning_tilt.callbacks.pictures import EXACT, TUNED, tidy
from lightning_tilt.callbacks.truth import truth_of
from lightning_tilt.interfaces import find_sampler
from lightning_tilt.models import the_mixture
from lightning_tilt.transition import Transition

__all__ = ["Panel", "draw_variances", "fit"]

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs" / "pictures"
TOYS = sorted(path.stem for path in (ROOT / "configs/toy").glob("*.yaml"))
CORNERS = (-4.0, 3.2), (-3.6, 3.6)
"""What every panel shows of the plane, so that panels can be compared."""


class Panel(DensityPicture):
    """One small panel in place of two large ones.

    Args:
        steps: of the chain that is drawn from, as the report's; None: as many as in training.
        transition: its kernel; None: that of training.
    """

    def __init__(self, steps: int | None = None, transition: Transition | None = None) -> None:
        super().__init__()
        self.steps, self.transition = steps, transition

    def look(self, host: Any) -> tuple[dict[str, Any], Figure]:
        """Samples of the tuned model on the 50, 80, 95 and 99 % contours of the exact tilt."""
        sampler = find_sampler(host).variant(self.steps, self.transition)
        path = sampler.rollout(host, torch.zeros(1), stream="report", number=0, samples_per_condition=self.samples)
        truth = truth_of(host.predictor, host.reward, host.current_lam())
        assert truth is not None
        x, y = (torch.linspace(*ends, 160) for ends in CORNERS)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        with torch.no_grad():
            energy = truth.energy(grid).double()
        p = torch.exp(energy.min() - energy).reshape(160, 160)
        figure = Figure(figsize=(2.0, 2.0), layout="constrained")
        axis = figure.subplots()
        points = path.end.float().cpu()
        axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=3, alpha=0.4, color=TUNED, lw=0)
        axis.contour(x.numpy(), y.numpy(), p.numpy(), sorted(mass_levels(p, MASSES)), colors=EXACT, linewidths=0.8)
        axis.set(xlim=CORNERS[0], ylim=CORNERS[1], aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
        axis.tick_params(labelsize=6)
        axis.set_xlabel("$x_1$", fontsize=7, labelpad=1)
        axis.set_ylabel("$x_2$", fontsize=7, labelpad=-2)
        tidy(axis)
        return {}, figure


def draw_variances(path: Path) -> None:
    """The law of |y - s*|^2 of four targets over t, on the mixture of configs/toy: mean, and median to 95 %."""
    mixture, reward = the_mixture()
    times = torch.linspace(-6, 6, 25, dtype=torch.float64).sigmoid()
    found = mixture_variances(mixture, reward, 1.0, RectifiedFlow(), times)
    figure = Figure(figsize=(9.0, 3.5), layout="constrained")
    means, laws = figure.subplots(1, 2, sharex=True, sharey=True)
    t = times.numpy()
    shown = (
        ("target", "target (TSM): $1/\\alpha^2$ at the noise", "#7f8c99", ":"),
        ("conditional", "conditional (CSM): $1/\\beta^2$ at the data", "#7f8c99", "--"),
        ("novel", "novel (NSM), Adjoint Sampling", EXACT, "-."),
        ("adjoint", "Adjoint Matching", TUNED, "-"),
    )
    for name, label, colour, line in shown:
        mean, se, median, q95 = (v.numpy() for v in found[name])
        factor = np.exp(2 * se / mean)
        means.plot(t, mean, color=colour, ls=line, lw=1.5, label=label)
        means.fill_between(t, mean / factor, mean * factor, color=colour, alpha=0.3, lw=0)
        laws.plot(t, median, color=colour, ls=line, lw=1.5)
        if name in ("novel", "adjoint"):
            hatch = "" if name == "novel" else "////"
            laws.fill_between(t, median, q95, fc=(*to_rgb(colour), 0.18), ec=(*to_rgb(colour), 0.5), hatch=hatch, lw=0)
    for axis, title in ((means, "mean, the variance, with two standard errors"), (laws, "median, band to 95 %")):
        axis.set(xscale="logit", yscale="log", xlabel="t (0: noise, 1: data)")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([0.01, 0.1, 0.5, 0.9, 0.99], ["0.01", "0.1", "0.5", "0.9", "0.99"])
        axis.minorticks_off()
        tidy(axis)
    means.set_ylabel("|y - s*($X_t$)|²")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def fit(name: str, folder: Path) -> None:
    """One run, in a process of its own."""
    config = yaml.safe_load((ROOT / f"configs/toy/{name}.yaml").read_text())
    trainer = config["trainer"]
    (report,) = (c["init_args"] for c in trainer["callbacks"] if c["class_path"] == "TiltReport")
    judged = {key: value for key, value in report.items() if key in ("steps", "transition")}
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"] not in ("TiltReport", "ModelCheckpoint")]
    trainer["callbacks"].append({"class_path": "pictures.Panel", "init_args": judged})
    trainer["default_root_dir"] = str(folder)
    (folder / "config_of_picture.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lightning_tilt", "fit", "--config", str(folder / "config_of_picture.yaml")]
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def _small(path: Path) -> None:
    """The same picture with a palette: a quarter of the bytes."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").quantize(48).save(path, optimize=True)


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["variances", *TOYS])
    for name in parser.parse_args().names:
        target = FOLDER / f"{name}.png"
        if name == "variances":
            draw_variances(target)
        else:
            with tempfile.TemporaryDirectory() as folder:
                fit(name, Path(folder))
                target.write_bytes((Path(folder) / "density.png").read_bytes())
        _small(target)
        print(target.relative_to(ROOT), target.stat().st_size // 1000, "kB", flush=True)


if __name__ == "__main__":
    main()
