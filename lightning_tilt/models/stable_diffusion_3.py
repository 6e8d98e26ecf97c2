"""Stable Diffusion 3 and 3.5 (2403.03206): a transformer, two CLIP text encoders and T5, a rectified flow.

    X_t = t X_1 + (1 - t) eps,      velocity  X_1 - eps  =  - transformer(x, 1000 (1 - t), c)

diffusers' flow models count from data to noise, so their output is the negative of our velocity.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_tilt.interfaces import Condition
from lightning_tilt.models.latent_diffusion import LatentDiffusion
from lightning_tilt.process import RectifiedFlow

__all__ = ["StableDiffusion3"]


class StableDiffusion3(LatentDiffusion):
    """`stabilityai/stable-diffusion-3-medium-diffusers`, 3.5, and every folder of their layout.

    Args:
        path: folder that diffusers' `save_pretrained` wrote, or a name on the Hub.
        shift: of the time grid towards noise, 1 is uniform; None follows the scheduler's configuration.
        text_encoder_3: load T5; without it (most of the memory) diffusers puts zeros in its place.
        max_sequence_length: tokens of T5, or of the zeros in its place; None is 256, or less if its tokenizer says so.
        **kwargs: see `LatentDiffusion`.

    Raises:
        ValueError: if the scheduler is none of flow matching.
    """

    sources: ClassVar[tuple[str, ...]] = ("esser2024scaling",)
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    attention_projections = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def __init__(
        self,
        path: str | Path,
        *,
        shift: float | None = None,
        text_encoder_3: bool = True,
        max_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, without=() if text_encoder_3 else ("text_encoder_3",), **kwargs)
        config = self.pipeline.scheduler.config
        if "shift" not in config:
            raise ValueError(
                f"{str(path)!r} has the scheduler {type(self.pipeline.scheduler).__name__}, which is none of flow "
                "matching; name FlowMatchEulerDiscreteScheduler in its model_index.json"
            )
        self.process = RectifiedFlow(config["shift"] if shift is None else shift)
        self.prediction_type = "velocity"
        tokenizer = self.pipeline.tokenizer_3
        longest = 256 if tokenizer is None else min(256, tokenizer.model_max_length)
        self._max_sequence_length = longest if max_sequence_length is None else max_sequence_length
        self.embeddings.identity["max_sequence_length"] = self._max_sequence_length

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity `alpha' x1_hat + beta' eps_hat`; see `Predictor.predict`."""
        return -super().predict(x, t, condition)

    def _encode_alone(self, prompt: str, device: torch.device) -> dict[str, Tensor]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            [prompt],
            [prompt],
            [prompt],
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
