"""A Stable Diffusion 1.5 of one million parameters: same classes, same noise schedule, ten digits.

    x_t = sqrt(abar_t) x1 + sqrt(1 - abar_t) eps,      loss = mean (unet(x_t, t, text) - eps)^2

with SD 1.5's `abar` (1,000 steps, scaled linear) and `t` stratified over the batch. The text encoder learns along, and
`text` is what the pipeline's own `encode_prompt` returns: training and use cannot drift apart.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from .batches import LatentBatches
from .data import Digits
from .loop import fit
from .text import clip_text_config, clip_tokenizer
from .vae import load_vae

__all__ = ["build_sd15", "sd15_loss", "train_sd15"]


def build_sd15(vae_folder: Path) -> StableDiffusionPipeline:
    """The untrained pipeline with SD 1.5's scheduler."""
    tokenizer = clip_tokenizer(16)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    return StableDiffusionPipeline(
        vae=load_vae(vae_folder),
        text_encoder=CLIPTextModel(clip_text_config(tokenizer, width=32, layers=2, heads=2, projection=32)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15_loss(pipeline: StableDiffusionPipeline, x1: Tensor, prompts: list[str]) -> Tensor:
    """The mean squared error of `eps`, each sample at its own time."""
    text, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    t = ((torch.arange(len(x1)) + torch.rand(len(x1))) * (1000 / len(x1))).long()
    abar_t: Tensor = pipeline.scheduler.alphas_cumprod[t][:, None, None, None]
    eps = torch.randn_like(x1)
    x_t = abar_t.sqrt() * x1 + (1 - abar_t).sqrt() * eps
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
        eps_hat: Tensor = pipeline.unet(x_t, t, text).sample
    return (eps_hat.float() - eps).square().mean()


def train_sd15(
    digits: Digits, vae_folder: Path, steps: int = 7000, seed: int = 0
) -> tuple[StableDiffusionPipeline, dict[str, float]]:
    """Train the U-Net and the text encoder; return the pipeline, in eval mode, and its losses."""
    torch.manual_seed(seed)
    pipeline = build_sd15(vae_folder)
    batches = LatentBatches(pipeline.vae, digits)
    figures = fit(
        [pipeline.unet, pipeline.text_encoder],
        lambda: sd15_loss(pipeline, *batches.draw(64)),
        steps=steps,
        lr=1.5e-3,
        name="sd15",
    )
    held_out = LatentBatches(pipeline.vae, digits, copies=0, held_out=True)
    with torch.no_grad():
        losses = [sd15_loss(pipeline, *held_out.draw(250, empty=0.0)) for _ in range(8)]
    figures["held_out_loss"] = torch.stack(losses).mean().item()
    return pipeline, figures
