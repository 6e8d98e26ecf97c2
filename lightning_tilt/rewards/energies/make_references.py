"""Make the reference samples of the particle densities: `python -m lightning_tilt.rewards.energies.make_references`.

Each sample is the end of a chain of its own, so samples are independent of each other.  Half of the chains of a density
start crowded and half scattered: where both halves end with the same mean energy, the start is forgotten.  Printed are
the acceptance rate, the step size h, split R-hat and integrated autocorrelation tau of the energy over the kept half of
the run, its mean and standard deviation at the end, and the difference of the halves' means in standard errors.  Of
chains that mix R-hat is about sqrt(1 + 2 tau / kept steps).  About five minutes on one core for all; seeds are fixed.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_tilt.rewards.energies.double_well import DoubleWell4
from lightning_tilt.rewards.energies.lennard_jones import LennardJones13, LennardJones55
from lightning_tilt.rewards.energies.mala import (
    integrated_autocorrelation,
    mala,
    relaxed,
    split_r_hat,
    tuned_step_size,
)
from lightning_tilt.rewards.energies.particles import ParticleDensity, remove_mean

__all__ = ["RECIPES", "Recipe", "main", "make"]


@dataclass(frozen=True)
class Recipe:
    """How the reference of a density is made.

    Attributes:
        density: whose.
        chains: how many, an even number; as many samples are kept.
        steps: of each chain, after the warm-up in which the step size is tuned.
        rate: the step size to begin with.
        crowded: standard deviation of the first half's positions before they are relaxed.
        scattered: the same of the second half.
        dtype: of the file.
    """

    density: type[ParticleDensity]
    chains: int
    steps: int
    rate: float
    crowded: float
    scattered: float
    dtype: torch.dtype


# float16 moves a coordinate by 2e-4, which is less than a hundredth of a Lennard-Jones step's noise.
RECIPES = {
    "dw4": Recipe(DoubleWell4, 4000, 6000, 5e-3, 0.5, 4.0, torch.float32),
    "lj13": Recipe(LennardJones13, 2000, 10000, 1e-3, 0.5, 2.0, torch.float16),
    "lj55": Recipe(LennardJones55, 200, 12000, 3e-4, 0.8, 2.0, torch.float16),
}
"""Chains, their length and their step for each density that is simulated."""


def make(recipe: Recipe, folder: Path, seed: int = 0) -> str:
    """Run the chains, write the file into `folder`, and return the line of diagnostics."""
    density, started = recipe.density(), time.process_time()
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([recipe.crowded, recipe.scattered]).repeat_interleave(recipe.chains // 2)
    x = spread[:, None, None] * torch.randn(recipe.chains, *density.particles, generator=generator)
    x = relaxed(density.energy, remove_mean(x), 300, recipe.rate, 0.1)
    x, h = tuned_step_size(density.energy, x, recipe.rate, generator, remove_mean)
    run = mala(density.energy, x, recipe.steps, h, generator, remove_mean)
    x, kept = remove_mean(run.x), run.energies[recipe.steps // 2 :]
    save_file({"x": x.to(recipe.dtype).contiguous()}, folder / density.reference_file)
    first, second = kept[-1].double().chunk(2)
    z = (first.mean() - second.mean()) / (first.var() / len(first) + second.var() / len(second)).sqrt()
    return (
        f"{recipe.density.__name__}: {recipe.chains} chains of {recipe.steps} steps, h {h:.2e}, "
        f"acceptance {run.acceptance:.3f}, R-hat {split_r_hat(kept):.4f}, tau {integrated_autocorrelation(kept):.0f}, "
        f"energy {kept[-1].mean():.3f} +- {kept[-1].std() / len(x) ** 0.5:.3f}, sd {kept[-1].std():.3f}, "
        f"crowded - scattered {z:.1f} s.e., {time.process_time() - started:.0f} s"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Write the files of the densities that are named, by default of all."""
    parser = argparse.ArgumentParser(description="Make the reference samples of the particle densities.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the files go")
    given = parser.parse_args(args)
    for name in given.names or RECIPES:
        if name not in RECIPES:
            parser.error(f"there is no density {name!r}; there are {', '.join(RECIPES)}")
        print(make(RECIPES[name], given.folder), flush=True)


if __name__ == "__main__":
    main()
