"""Callbacks: the trajectory sampler that every loss shares, and what watches, draws and reports."""

from .export import ExportWeights
from .predictions import PredictionWriter
from .progress import TiltProgressBar
from .report import TiltReport
from .sampler import TrajectorySampler

__all__ = ["ExportWeights", "PredictionWriter", "TiltProgressBar", "TiltReport", "TrajectorySampler"]
