"""Runs at real size with random weights: what they cost does not depend on what the weights are."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.data import PromptDataModule
from lightning_tilt.estimate import Estimate, Settings, estimate
from lightning_tilt.estimate.phases import condition_shapes
from lightning_tilt.interfaces.skeleton import without_weights
from lightning_tilt.models import LatentDiffusion, StableDiffusion, StableDiffusion3
from lightning_tilt.rewards import Ink
from lightning_tilt.tasks import AdjointMatchingTask

__all__ = ["PROMPTS", "FullSizeRun", "random_predictor"]

PROMPTS = ["a red fox asleep in fresh snow"]


def random_predictor(path: str, folder: Path, device: str, **options: Any) -> LatentDiffusion:
    """A predictor of the configuration at `path` with random weights, and random embeddings of the prompts."""
    kind = StableDiffusion if "stable-diffusion-v1" in path or "sd15" in path else StableDiffusion3
    with without_weights(device):
        predictor = kind(path, embeddings=str(folder), without_encoders=True, **options)
    for prompt in ("", *PROMPTS):
        told = {name: torch.randn(shape) for name, shape in condition_shapes(predictor).items()}
        predictor.embeddings.add(prompt, predictor._encoder_dtype, told)
    return predictor


class FullSizeRun:
    """Adjoint Matching of a random model towards `Ink`.

    Args:
        path: folder or known Hub name.
        device: "cpu" or "cuda".
        steps: transitions of a path.
        samples: paths of a rollout.
        micro_batch: samples in every network call.
        precision: the Trainer's.
        guidance: scale of guidance.
        options: of the predictor.
    """

    def __init__(
        self, path: str, device: str, *, steps: int, samples: int, micro_batch: int, precision: str = "32-true",
        guidance: float = 1.0, **options: Any,
    ) -> None:  # fmt: skip
        self._folder = tempfile.TemporaryDirectory()
        self.path, self.device, self.precision, self.options = path, device, precision, options
        self.sampling = {
            "steps": steps, "samples_per_condition": samples, "guidance_scale": guidance,
            "rollout_micro_batch": micro_batch, "reward_micro_batch": 1,
        }  # fmt: skip
        self.matching = {"adjoint_micro_batch": micro_batch, "loss_micro_batch": micro_batch}

    def estimate(self) -> Estimate:
        """What the run should need."""
        predictor = {"class_path": "lightning_tilt.models.StableDiffusion", "init_args": {"path": self.path}}
        if "stable-diffusion-v1" not in self.path and "sd15" not in self.path:
            predictor["class_path"] += "3"  # type: ignore[operator]
        predictor["init_args"] |= {**self.options, "without_encoders": True, "embeddings": self._folder.name}  # type: ignore[operator]
        arguments = {
            **self.matching, "predictor": predictor, "supervised_steps": "all", "last_steps": 0, "reward": {},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
        }  # fmt: skip
        config = {
            "model": {"class_path": "lightning_tilt.tasks.AdjointMatchingTask", "init_args": arguments},
            "data": {"init_args": {"prompts": PROMPTS, "batch_size": 1}},
            "sampler": self.sampling,
            "trainer": {"accelerator": self.device, "precision": self.precision},
        }
        return estimate(Settings.from_config(config))

    def fit(self, updates: int, *callbacks: Any) -> Any:
        """Run so many updates and return the module."""
        predictor = random_predictor(self.path, Path(self._folder.name), self.device, **self.options)

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=1e-4)

        module = AdjointMatchingTask(predictor=predictor, reward=Ink(), optimizer=optimizer, **self.matching)
        trainer = Trainer(
            accelerator="gpu" if self.device == "cuda" else "cpu", devices=1, max_steps=updates, logger=False,
            precision=self.precision, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[TrajectorySampler(**self.sampling), *callbacks],
        )  # fmt: skip
        trainer.fit(module, PromptDataModule(PROMPTS, batch_size=1))
        return module
