"""Stable Diffusion's first family (2112.10752; SD 1.5 and its kin): a UNet, one CLIP text encoder, a VP process.

    X_t = alpha_t X_1 + sqrt(1 - alpha_t^2) eps,      UNet(x, n, c)  ->  eps_hat   or   alpha_t eps_hat - beta_t x1_hat

`n` is the integer timestep, N - 1 at pure noise and 0 next to the data; what the UNet predicts is read from the
scheduler's configuration.
"""

from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lightning_tilt.models.latent_diffusion import LatentDiffusion
from lightning_tilt.process import PredictionType, Spacing, VariancePreserving

__all__ = ["StableDiffusion"]


class StableDiffusion(LatentDiffusion):
    """`stable-diffusion-v1-5/stable-diffusion-v1-5` and every folder of its layout, epsilon or v-prediction.

    Args:
        path: folder that diffusers' `save_pretrained` wrote, or a name on the Hub.
        zero_terminal_snr: rescale the noise levels so that the first is pure noise and the memoryless chain tilts
            without bias; for v-prediction models.  None follows the scheduler's configuration.
        spacing: which of the scheduler's timesteps a grid takes; "leading" misses the noisiest.
        **kwargs: see `LatentDiffusion`.

    Raises:
        ValueError: if the scheduler's betas or prediction type are unknown, or the rescaled process starts at pure
            noise and the network predicts epsilon, which says nothing about the data there.
    """

    sources: ClassVar[tuple[str, ...]] = ("rombach2021high",)
    pipeline_class = "StableDiffusionPipeline"
    denoiser = "unet"
    attention_projections = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoders = ("text_encoder",)

    def __init__(
        self,
        path: str | Path,
        *,
        zero_terminal_snr: bool | None = None,
        spacing: Spacing = "trailing",
        **kwargs: Any,
    ) -> None:
        super().__init__(path, without=(), **kwargs)
        config = self.pipeline.scheduler.config
        try:
            self.process = VariancePreserving.from_scheduler(
                config, spacing=spacing, zero_terminal_snr=zero_terminal_snr
            )
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from None
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(f"{str(path)!r}: unknown prediction type {self.prediction_type!r} in its scheduler")
        if self.prediction_type == "epsilon" and self.process.is_memoryless_start:
            raise ValueError(
                f"{str(path)!r} predicts epsilon, which says nothing about the data at pure noise: "
                "zero_terminal_snr needs a v-prediction model"
            )

    def _encode_alone(self, prompt: str, device: torch.device) -> dict[str, Tensor]:
        embeddings, _ = self.pipeline.encode_prompt([prompt], device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings}
