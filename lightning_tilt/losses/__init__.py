"""Losses: one method a file, first the pure function, then its mixin."""

from lightning_tilt.losses.adjoint_matching import AdjointMatching
from lightning_tilt.losses.adjoint_sampling import AdjointSampling
from lightning_tilt.losses.cmcd import CMCD
from lightning_tilt.losses.cross_entropy import CrossEntropy
from lightning_tilt.losses.efficient_adjoint_matching import EfficientAdjointMatching
from lightning_tilt.losses.grpo import GRPO
from lightning_tilt.losses.log_variance import LogVariance, TrajectoryBalance
from lightning_tilt.losses.nets import NETS
from lightning_tilt.losses.reinforce import Reinforce
from lightning_tilt.losses.reinforce_adjoint_matching import ExactReinforceAdjointMatching, ReinforceAdjointMatching
from lightning_tilt.losses.relative_entropy import RelativeEntropy
from lightning_tilt.losses.score_matching import (
    ConditionalScoreMatching,
    MixedScoreMatching,
    NovelScoreMatching,
    TargetScoreMatching,
)
from lightning_tilt.losses.targets import adjoint_matching_target, end_point_target
from lightning_tilt.losses.tilt_matching import TiltMatching

__all__ = [
    "CMCD",
    "GRPO",
    "NETS",
    "AdjointMatching",
    "AdjointSampling",
    "ConditionalScoreMatching",
    "CrossEntropy",
    "EfficientAdjointMatching",
    "ExactReinforceAdjointMatching",
    "LogVariance",
    "MixedScoreMatching",
    "NovelScoreMatching",
    "Reinforce",
    "ReinforceAdjointMatching",
    "RelativeEntropy",
    "TargetScoreMatching",
    "TiltMatching",
    "TrajectoryBalance",
    "adjoint_matching_target",
    "end_point_target",
]
