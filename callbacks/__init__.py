"""Callbacks: the trajectory sampler that every loss shares, and what watches, averages, draws and reports."""

from .ema import ExponentialMovingAverage
from .export import ExportWeights
from .predictions import PredictionWriter
from .progress import TiltProgressBar
from .report import TiltReport
from .sampler import TrajectorySampler

__all__ = [
    "ExponentialMovingAverage",
    "ExportWeights",
    "PredictionWriter",
    "TiltProgressBar",
    "TiltReport",
    "TrajectorySampler",
]
