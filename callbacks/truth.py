"""What is known of a density, and how far samples are from it.

The truth is a `Density`, or a Gaussian-mixture base tilted by a conjugate reward: both have an energy E and reference
samples, often a log normaliser.  Beside each distance stands its noise floor: truth against truth, at the same N.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chain import Chain
from ..interfaces import Predictor, Reward
from ..metrics import noise_floor, sliced_wasserstein2, squared_symmetric_wasserstein2, squared_wasserstein2_1d
from ..models import GaussianMixturePredictor
from ..rewards.density import Density
from ..rewards.quadratic import ConjugateReward
from ..transition import Brownian, ExactGaussian

__all__ = ["Truth", "density_figures", "distances", "truth_of"]

MOST = 10_000
"""Samples that distances are computed from, at most."""

MOST_SYSTEMS = 1000
"""The same for distances up to permutations and rotations, in numbers of a quadratic cost."""


@dataclass(frozen=True)
class Truth:
    """What is known of a density.

    Attributes:
        energy: `x (n, *shape) -> E(x) (n,)`, up to a constant.
        log_z: log of the normaliser, None where it is not known.
        reference: `(n, seed) -> samples (n, *shape)`, or None where none can be made.
        particles: (n, d) where labels, rotations and shifts do not matter.
        figures: what else a density says of samples, by name.
    """

    energy: Callable[[Tensor], Tensor]
    log_z: float | None
    reference: Callable[[int, int], Tensor | None]
    particles: tuple[int, int] | None = None
    figures: Callable[[Tensor], dict[str, float]] = lambda x: {}


def truth_of(predictor: Predictor, reward: Reward, lam: float) -> Truth | None:
    """The truth that a model and a reward name, if there is one in closed form.

    Args:
        predictor: whose base is tilted.
        reward: what tilts it.
        lam: the multiplier.
    """
    if isinstance(reward, Density):
        return Truth(reward.energy, reward.log_z, reward.reference, reward.particles, reward.figures)
    with predictor.base() as base:
        if not (isinstance(base, GaussianMixturePredictor) and isinstance(reward, ConjugateReward)):
            return None
        tilted, log_z = base.mixture.tilt(reward, lam)

    def reference(n: int, seed: int) -> Tensor:
        return tilted.sample(n, torch.Generator().manual_seed(seed)).float()

    return Truth(lambda x: -tilted.log_prob(x.double()), float(log_z), reference)


@torch.no_grad()
def distances(truth: Truth, x: Tensor, seed: int, repeats: int = 3) -> dict[str, Any]:
    """Distances of samples from the truth, each `{value, floor, n}`.

    Args:
        truth: what is known.
        x: samples, (n, *shape), on the CPU.
        seed: of the reference samples.
        repeats: pairs of truth against truth that a floor is the mean of.

    Returns:
        `sliced_w2`, `energy_w2` (unsquared), for particles `symmetric_w2` in place of the sliced one, and what the
        density itself says of the samples; no distances where there are no reference samples.
    """
    found: dict[str, Any] = dict(truth.figures(x))
    reference = truth.reference(max(4 * min(len(x), MOST), 2), seed)
    if reference is None:
        return found
    most = min(len(x), len(reference) // 2, MOST)

    def energy_w2(a: Tensor, b: Tensor) -> Tensor:
        return squared_wasserstein2_1d(truth.energy(a), truth.energy(b)).sqrt()

    def symmetric_w2(a: Tensor, b: Tensor) -> Tensor:
        return squared_symmetric_wasserstein2(a, b).sqrt()

    def sliced_w2(a: Tensor, b: Tensor) -> Tensor:
        return sliced_wasserstein2(a, b)

    kinds = {"energy_w2": energy_w2}
    if truth.particles is None:
        kinds["sliced_w2"] = sliced_w2
    elif truth.particles[0] <= 5:
        kinds["symmetric_w2"] = symmetric_w2
    for name, distance in kinds.items():
        n = min(most, MOST_SYSTEMS) if name == "symmetric_w2" else most
        floor = noise_floor(distance, reference, n, repeats, seed)
        found[name] = {"value": float(distance(x[:n], reference[:n])), "floor": floor.mean, "n": n}
    return found


def density_figures(truth: Truth, report: dict[str, Any], chain: Chain, x: Tensor, seed: int) -> dict[str, Any]:
    """What a report says of a density beside the rewards: log Z against what it should be, and distances.

    Of the control form, `exact` is log Z of the chain's own law: that of the density where the base's chain is exact,
    else the estimate from base samples, whose standard error stands beside it.

    Args:
        truth: what is known.
        report: the report so far: its `log_z` and `log_z_base` are read.
        chain: what was judged.
        x: samples of the tuned model, (n, *shape).
        seed: of the reference samples.
    """
    found = distances(truth, x, seed)
    if report["log_z"] is None:
        return found
    exact, exact_se = None, None
    if chain.control_form:
        if isinstance(chain.transition, ExactGaussian | Brownian):
            exact = truth.log_z
        else:
            exact, exact_se = report["log_z_base"]["mean"], report["log_z_base"]["se"]
    return found | {
        "log_z": {**report["log_z"], "exact": exact, "exact_se": exact_se, "continuous": truth.log_z},
    }
