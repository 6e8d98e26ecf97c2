"""Ready tasks, one line a loss: the mixin first, the host second."""

from lightning_tilt.losses import (
    GRPO,
    AdjointMatching,
    AdjointSampling,
    ConditionalScoreMatching,
    CrossEntropy,
    EfficientAdjointMatching,
    LogVariance,
    MixedScoreMatching,
    NovelScoreMatching,
    Reinforce,
    RelativeEntropy,
    TargetScoreMatching,
    TrajectoryBalance,
)
from lightning_tilt.module import TiltModule

__all__ = [
    "AdjointMatchingTask",
    "AdjointSamplingTask",
    "ConditionalScoreMatchingTask",
    "CrossEntropyTask",
    "EfficientAdjointMatchingTask",
    "GRPOTask",
    "LogVarianceTask",
    "MixedScoreMatchingTask",
    "NovelScoreMatchingTask",
    "ReinforceTask",
    "RelativeEntropyTask",
    "TargetScoreMatchingTask",
    "TrajectoryBalanceTask",
]


class AdjointMatchingTask(AdjointMatching, TiltModule):
    """Adjoint Matching of any predictor on any differentiable reward."""


class CrossEntropyTask(CrossEntropy, TiltModule):
    """Cross-entropy on weighted paths; no reward gradient."""


class GRPOTask(GRPO, TiltModule):
    """Group-relative policy optimisation; no reward gradient."""


class LogVarianceTask(LogVariance, TiltModule):
    """The variance of the log path weight, prompt by prompt; no reward gradient."""


class ReinforceTask(Reinforce, TiltModule):
    """The exact policy gradient; no reward gradient."""


class RelativeEntropyTask(RelativeEntropy, TiltModule):
    """KL(P_theta | P*) by gradients through the path; truncated, DRaFT-k and ReFL."""


class TrajectoryBalanceTask(TrajectoryBalance, TiltModule):
    """Trajectory balance with a learned log Z; densities, no reward gradient."""


class AdjointSamplingTask(AdjointSampling, TiltModule):
    """Adjoint Sampling of an unnormalised density, from a Gaussian base."""


class EfficientAdjointMatchingTask(EfficientAdjointMatching, TiltModule):
    """Efficient Adjoint Matching: noised end points of a few-step rollout, no adjoint sweep."""


class ConditionalScoreMatchingTask(ConditionalScoreMatching, TiltModule):
    """Denoising score matching on samples with path weights; no reward gradient."""


class MixedScoreMatchingTask(MixedScoreMatching, TiltModule):
    """The mix of conditional and target score matching that has the least variance."""


class NovelScoreMatchingTask(NovelScoreMatching, TiltModule):
    """Novel score matching on noised end points."""


class TargetScoreMatchingTask(TargetScoreMatching, TiltModule):
    """Target score matching on noised end points."""
