"""Ready tasks, one line a loss: the mixin first, the host second."""

from lightning_tilt.losses import (
    CMCD,
    GRPO,
    NETS,
    AdjointMatching,
    AdjointSampling,
    ConditionalScoreMatching,
    CrossEntropy,
    EfficientAdjointMatching,
    ExactReinforceAdjointMatching,
    LogVariance,
    MixedScoreMatching,
    NovelScoreMatching,
    Reinforce,
    ReinforceAdjointMatching,
    RelativeEntropy,
    TargetScoreMatching,
    TiltMatching,
    TrajectoryBalance,
)
from lightning_tilt.module import TiltModule

__all__ = [
    "AdjointMatchingTask",
    "AdjointSamplingTask",
    "CMCDTask",
    "ConditionalScoreMatchingTask",
    "CrossEntropyTask",
    "EfficientAdjointMatchingTask",
    "ExactReinforceAdjointMatchingTask",
    "GRPOTask",
    "LogVarianceTask",
    "MixedScoreMatchingTask",
    "NETSTask",
    "NovelScoreMatchingTask",
    "ReinforceAdjointMatchingTask",
    "ReinforceTask",
    "RelativeEntropyTask",
    "TargetScoreMatchingTask",
    "TiltMatchingTask",
    "TrajectoryBalanceTask",
]


class AdjointMatchingTask(AdjointMatching, TiltModule):
    """Adjoint Matching of any predictor on any differentiable reward."""


class CMCDTask(CMCD, TiltModule):
    """Controlled Monte Carlo diffusions: a transport, with any bounded noise."""


class CrossEntropyTask(CrossEntropy, TiltModule):
    """Cross-entropy on weighted paths; no reward gradient."""


class ExactReinforceAdjointMatchingTask(ExactReinforceAdjointMatching, TiltModule):
    """Reinforce Adjoint Matching's sibling whose fixed point is the tilt; no reward gradient, experimental."""


class GRPOTask(GRPO, TiltModule):
    """Group-relative policy optimisation; no reward gradient."""


class LogVarianceTask(LogVariance, TiltModule):
    """The variance of the log path weight, prompt by prompt; no reward gradient."""


class NETSTask(NETS, TiltModule):
    """Nonequilibrium transport sampling: the continuity equation, or action matching."""


class ReinforceTask(Reinforce, TiltModule):
    """The exact policy gradient; no reward gradient."""


class ReinforceAdjointMatchingTask(ReinforceAdjointMatching, TiltModule):
    """Regression on noised end points to first order in lam; no reward gradient."""


class RelativeEntropyTask(RelativeEntropy, TiltModule):
    """KL(P_theta | P*) by gradients through the path; truncated, DRaFT-k and ReFL."""


class TiltMatchingTask(TiltMatching, TiltModule):
    """Regressions on noised end points, level by level of the multiplier; no reward gradient."""


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
