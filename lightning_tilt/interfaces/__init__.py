"""The nouns that callbacks, losses, models and rewards share.

This is the lowest room beside the mathematics: everybody may import it, it imports nobody else's room.
"""

from lightning_tilt.condition import Condition, Prompts
from lightning_tilt.interfaces.cited import Cited, sources_of, sources_of_run
from lightning_tilt.interfaces.loss import Loss
from lightning_tilt.interfaces.not_finite import BadPolicy
from lightning_tilt.interfaces.predictor import ExportablePredictor, KnownLaw, Predictor
from lightning_tilt.interfaces.reward import ImageEmbedding, Reward
from lightning_tilt.interfaces.sampler import Evaluator, Sampler, find_sampler
from lightning_tilt.interfaces.schedule import LamSchedule

__all__ = [
    "BadPolicy",
    "Cited",
    "Condition",
    "Evaluator",
    "ExportablePredictor",
    "ImageEmbedding",
    "KnownLaw",
    "LamSchedule",
    "Loss",
    "Predictor",
    "Prompts",
    "Reward",
    "Sampler",
    "find_sampler",
    "sources_of",
    "sources_of_run",
]
