"""Exponential tilting of diffusion and flow models: p*(x) = p_base(x) exp(lam r(x)) / Z.

A model that samples `p_base`, a reward `r` and a multiplier `lam` name the target `p*`.  `TiltModule` hosts the model,
a mixin from `lightning_tilt.losses` says how it learns, `TrajectorySampler` simulates it:

    class MyTilt(AdjointMatching, TiltModule): ...

Importing this package is light; each name below is loaded when it is first used.
"""

from difflib import get_close_matches
from importlib import import_module
from sys import modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_tilt.callbacks import TrajectorySampler as TrajectorySampler
    from lightning_tilt.frozen import Frozen as Frozen
    from lightning_tilt.interfaces import Condition as Condition
    from lightning_tilt.interfaces import Predictor as Predictor
    from lightning_tilt.interfaces import Reward as Reward
    from lightning_tilt.losses import AdjointMatching as AdjointMatching
    from lightning_tilt.module import TiltModule as TiltModule
    from lightning_tilt.process import Cosine as Cosine
    from lightning_tilt.process import Driftless as Driftless
    from lightning_tilt.process import Process as Process
    from lightning_tilt.process import RectifiedFlow as RectifiedFlow
    from lightning_tilt.process import VariancePreserving as VariancePreserving
    from lightning_tilt.references import citation as citation
    from lightning_tilt.trajectory import Trajectory as Trajectory
    from lightning_tilt.transition import DDIM as DDIM
    from lightning_tilt.transition import Brownian as Brownian
    from lightning_tilt.transition import EulerMaruyama as EulerMaruyama
    from lightning_tilt.transition import ExactGaussian as ExactGaussian
    from lightning_tilt.transition import Transition as Transition

__version__ = "0.1.0"
"""Of the package; pyproject.toml reads it here."""

_HOMES = {
    "AdjointMatching": "lightning_tilt.losses",
    "Brownian": "lightning_tilt.transition",
    "Condition": "lightning_tilt.interfaces",
    "Cosine": "lightning_tilt.process",
    "DDIM": "lightning_tilt.transition",
    "Driftless": "lightning_tilt.process",
    "EulerMaruyama": "lightning_tilt.transition",
    "ExactGaussian": "lightning_tilt.transition",
    "Frozen": "lightning_tilt.frozen",
    "Predictor": "lightning_tilt.interfaces",
    "Process": "lightning_tilt.process",
    "RectifiedFlow": "lightning_tilt.process",
    "Reward": "lightning_tilt.interfaces",
    "TiltModule": "lightning_tilt.module",
    "Trajectory": "lightning_tilt.trajectory",
    "TrajectorySampler": "lightning_tilt.callbacks",
    "Transition": "lightning_tilt.transition",
    "VariancePreserving": "lightning_tilt.process",
    "citation": "lightning_tilt.references",
}

__all__ = [
    "DDIM",
    "AdjointMatching",
    "Brownian",
    "Condition",
    "Cosine",
    "Driftless",
    "EulerMaruyama",
    "ExactGaussian",
    "Frozen",
    "Predictor",
    "Process",
    "RectifiedFlow",
    "Reward",
    "TiltModule",
    "Trajectory",
    "TrajectorySampler",
    "Transition",
    "VariancePreserving",
    "__version__",
    "citation",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home at first use (PEP 562)."""
    if name not in _HOMES:
        near = get_close_matches(name, __all__, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'lightning_tilt' has no attribute {name!r}{hint}", name=name)
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "lightning.pytorch" in modules:  # whoever has it already may name a strategy next; else TiltModule registers them
    import_module("lightning_tilt.strategies")
