"""Ready tasks, one line a loss: the mixin first, the host second."""

from lightning_tilt.losses import AdjointMatching
from lightning_tilt.module import TiltModule

__all__ = ["AdjointMatchingTask"]


class AdjointMatchingTask(AdjointMatching, TiltModule):
    """Adjoint Matching of any predictor on any differentiable reward."""
