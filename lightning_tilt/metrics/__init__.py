"""Metrics of samples, as torchmetrics."""

from lightning_tilt.metrics.diversity import PairwiseDiversity, pairwise_diversity
from lightning_tilt.metrics.mean import MeanWithError

__all__ = ["MeanWithError", "PairwiseDiversity", "pairwise_diversity"]
