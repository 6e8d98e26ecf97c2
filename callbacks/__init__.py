"""Callbacks: the trajectory sampler that every loss shares, and what watches, draws and reports."""

from .progress import TiltProgressBar
from .report import TiltReport
from .sampler import TrajectorySampler

__all__ = ["TiltProgressBar", "TiltReport", "TrajectorySampler"]
