"""Callbacks: the trajectory sampler that every loss shares, and what watches, averages, draws and reports."""

from .adjoint_norm import AdjointNorm
from .density_picture import DensityPicture
from .ema import ExponentialMovingAverage
from .encode_prompts import EncodePrompts
from .ess_curves import EssCurves
from .evaluation import Evaluation
from .export import ExportWeights
from .predictions import PredictionWriter
from .progress import TiltProgressBar
from .report import TiltReport
from .sampler import TrajectorySampler
from .steered import SteeredSampler
from .target_variance import TargetVariance
from .work_histograms import WorkHistograms

__all__ = [
    "AdjointNorm",
    "DensityPicture",
    "EncodePrompts",
    "EssCurves",
    "Evaluation",
    "ExponentialMovingAverage",
    "ExportWeights",
    "PredictionWriter",
    "SteeredSampler",
    "TargetVariance",
    "TiltProgressBar",
    "TiltReport",
    "TrajectorySampler",
    "WorkHistograms",
]
