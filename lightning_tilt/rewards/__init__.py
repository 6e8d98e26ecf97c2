"""Rewards: r(x), one number a sample, differentiable in the images, and a torchmetrics `Metric` that averages it.

    score : images in [0, 1] (B, 3, H, W), prompts (B strings, or None)  ->  r (B,)

The host decodes latents before it asks; a density's reward is given the states themselves.  An own reward is a subclass
of `Reward` with one method, in any file that can be imported.  `WeightedSum`, `Clamped`, `Constraint` and `Smoothed`
are made of other rewards, and of each other.
"""

from lightning_tilt.interfaces import Reward
from lightning_tilt.rewards.aesthetic_score import AestheticScore
from lightning_tilt.rewards.clamped import Clamped
from lightning_tilt.rewards.clip_score import CLIPScore
from lightning_tilt.rewards.constraint import Constraint
from lightning_tilt.rewards.digit_classifier import DigitAccuracy, DigitClassifier
from lightning_tilt.rewards.hpsv2 import HPSv2
from lightning_tilt.rewards.hpsv2_package import HPSv2Package
from lightning_tilt.rewards.image_reward import ImageReward
from lightning_tilt.rewards.ink import Ink
from lightning_tilt.rewards.jpeg import JPEGCompressibility
from lightning_tilt.rewards.open_clip_score import OpenCLIPScore
from lightning_tilt.rewards.pick_score import PickScore
from lightning_tilt.rewards.quadratic import LinearReward, QuadraticReward
from lightning_tilt.rewards.smoothed import Smoothed
from lightning_tilt.rewards.weighted_sum import WeightedSum

__all__ = [
    "AestheticScore",
    "CLIPScore",
    "Clamped",
    "Constraint",
    "DigitAccuracy",
    "DigitClassifier",
    "HPSv2",
    "HPSv2Package",
    "ImageReward",
    "Ink",
    "JPEGCompressibility",
    "LinearReward",
    "OpenCLIPScore",
    "PickScore",
    "QuadraticReward",
    "Reward",
    "Smoothed",
    "WeightedSum",
]
