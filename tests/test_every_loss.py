"""Every ready task: a Gaussian in ten dimensions moves towards its exact tilt; traits, config and report agree.

A new loss takes one entry in `CASES`; a task without one fails here.
"""

from typing import Any

import pytest
import torch
import yaml
from command import CONFIGS
from repository import ROOT
from toys import fit

import lightning_tilt.tasks
from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.interfaces import Loss, Reward
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt
from lightning_tilt.models.transport import NeuralTransport
from lightning_tilt.rewards import QuadraticReward
from lightning_tilt.rewards.density import Density
from lightning_tilt.transition import DDIM, ExactGaussian

D, C, A = 10, 1.0, 0.25
ODE = {"transition": DDIM(0.0), "base_last_step": False}


class Tilted(Density):
    """N(0, I) tilted by -A |x - C|^2/2, as an unnormalised density."""

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return (x**2).sum(1) / 2 + A * ((x - C) ** 2).sum(1) / 2


# task: (arguments of the loss, of the sampler, updates)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "AdjointMatchingTask": ({"checkpoint": False}, {}, 40),
    "AdjointSamplingTask": ({}, {"transition": ExactGaussian()}, 60),
    "CMCDTask": ({"objective": "log_variance"}, {}, 40),
    "ConditionalScoreMatchingTask": ({}, {}, 80),
    "CrossEntropyTask": ({}, {}, 60),
    "EfficientAdjointMatchingTask": ({}, ODE, 60),
    "ExactReinforceAdjointMatchingTask": ({}, ODE, 80),
    "GRPOTask": ({}, {}, 60),
    "LogVarianceTask": ({}, {}, 60),
    "MixedScoreMatchingTask": ({}, {}, 60),
    "NETSTask": ({"divergence": "hutchinson", "supervised_steps": 4}, {}, 60),
    "NovelScoreMatchingTask": ({}, {}, 60),
    "ReinforceAdjointMatchingTask": ({}, ODE, 80),
    "ReinforceTask": ({}, {}, 60),
    "RelativeEntropyTask": ({}, {}, 40),
    "TargetScoreMatchingTask": ({}, {}, 60),
    "TiltMatchingTask": ({"variant": "explicit", "level_ess": 0.8}, {**ODE, "rollout_every": 20}, 160),
    "TrajectoryBalanceTask": ({}, {}, 60),
}


def predictor(name: str) -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden": 32, "layers": 2}
    if name == "AdjointSamplingTask":
        return NeuralTilt(GaussianBase([D]), **size)
    base = GaussianMixturePredictor([1.0], torch.zeros(1, D), torch.eye(D)[None])
    return {"CMCDTask": NeuralTransport, "NETSTask": NeuralTransport}.get(name, NeuralTilt)(base, **size)


def reward(name: str) -> Reward:
    if name == "AdjointSamplingTask":
        return Tilted()
    return QuadraticReward((A * torch.eye(D)).tolist(), [C] * D)


def test_every_task_has_a_case_and_a_config() -> None:
    assert set(CASES) == set(lightning_tilt.tasks.__all__)
    configured = {yaml.safe_load((ROOT / path).read_text())["model"]["class_path"].split(".")[-1] for path in CONFIGS}
    assert set(CASES) <= configured


@pytest.mark.parametrize("name", CASES)
def test_a_gaussian_in_ten_dimensions_moves_towards_its_tilt(name: str) -> None:
    """The exact tilt has mean A C/(1 + A) a coordinate; after so few updates the model is well on the way to it."""
    loss, settings, updates = CASES[name]
    module = getattr(lightning_tilt.tasks, name)(
        predictor(name), reward(name), optimizer=lambda p: torch.optim.Adam(p, lr=5e-3), lam=1.0, **loss
    )
    sampler = TrajectorySampler(**({"steps": 16, "samples_per_condition": 1, "seed": 0} | settings))
    fit(module, sampler, [torch.zeros(256)] * updates)
    path = sampler.rollout(module, torch.zeros(2000), stream="report", number=0)
    mean, exact = float(path.end.mean()), A * C / (1 + A)
    error = 4 / (2000 * D) ** 0.5
    assert 0.4 * exact - error < mean < 1.25 * exact + error


@pytest.mark.parametrize("name", CASES)
def test_traits_are_declared(name: str) -> None:
    task: type[Loss] = getattr(lightning_tilt.tasks, name)
    assert isinstance(task.needs_reward_gradient, bool) and isinstance(task.needs_memoryless, bool)
    assert isinstance(task.on_policy, bool) and isinstance(task.needs_path, bool) and isinstance(task.needs_noise, bool)
    assert task.bias is None or len(task.bias) > 20, "a sentence"
    documentation = task.__mro__[1].__doc__ or ""
    assert "onsistent" in documentation or "iased" in documentation, "says whether it is consistent or biased"
