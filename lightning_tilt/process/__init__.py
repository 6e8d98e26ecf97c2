"""The interpolant `X_t = alpha_t X_1 + beta_t eps` and every conversion between predictions: the one exchange office.

    t = 0  noise           alpha small, beta 1
    t = 1  data            alpha = 1,   beta = 0

`Process` holds the conversions; `VariancePreserving` (DDPM, SD 1.5), `RectifiedFlow` (SD 3) and `Cosine` say what
`alpha_t` and `beta_t` are.  `Driftless` is a bridge from a point instead: beta is 0 at both ends.  Imports torch alone.
"""

from lightning_tilt.process.base import PREDICTION_TYPES, Prediction, PredictionType, Process, expand
from lightning_tilt.process.driftless import Driftless
from lightning_tilt.process.flows import Cosine, RectifiedFlow
from lightning_tilt.process.variance_preserving import BETA_SCHEDULES, Spacing, VariancePreserving

__all__ = [
    "BETA_SCHEDULES",
    "PREDICTION_TYPES",
    "Cosine",
    "Driftless",
    "Prediction",
    "PredictionType",
    "Process",
    "RectifiedFlow",
    "Spacing",
    "VariancePreserving",
    "expand",
]
