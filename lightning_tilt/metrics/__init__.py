"""Metrics of samples and weights, as torchmetrics, and the pure functions under them."""

from lightning_tilt.metrics.diversity import PairwiseDiversity, pairwise_diversity
from lightning_tilt.metrics.mean import MeanWithError
from lightning_tilt.metrics.particles import (
    SymmetricWasserstein2,
    squared_symmetric_distances,
    squared_symmetric_wasserstein2,
)
from lightning_tilt.metrics.reference import noise_floor
from lightning_tilt.metrics.wasserstein import (
    EnergyWasserstein,
    Wasserstein2,
    sliced_wasserstein2,
    squared_sliced_wasserstein2,
    squared_wasserstein2,
    squared_wasserstein2_1d,
    wasserstein2,
)
from lightning_tilt.metrics.weights import EffectiveSampleSize, LogPartition, forward_ess

__all__ = [
    "EffectiveSampleSize",
    "EnergyWasserstein",
    "LogPartition",
    "MeanWithError",
    "PairwiseDiversity",
    "SymmetricWasserstein2",
    "Wasserstein2",
    "forward_ess",
    "noise_floor",
    "pairwise_diversity",
    "sliced_wasserstein2",
    "squared_sliced_wasserstein2",
    "squared_symmetric_distances",
    "squared_symmetric_wasserstein2",
    "squared_wasserstein2",
    "squared_wasserstein2_1d",
    "wasserstein2",
]
