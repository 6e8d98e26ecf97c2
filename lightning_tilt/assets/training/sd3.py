"""A Stable Diffusion 3 of 1.5 million parameters: MMDiT over 64 latent tokens, three text encoders, rectified flow.

    x_s = (1 - s) x1 + s eps,      loss = mean (transformer(x_s, 1000 s, text, pooled) - (eps - x1))^2

with `s = sigmoid(LOGIT_SCALE * n)`, n normal and stratified over the batch. `text` and `pooled` are what the pipeline's
own `encode_prompt` returns; in a fifth of the batch the T5 half of `text` is zero, as diffusers feeds it when the
pipeline is loaded with `text_encoder_3=None`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from .batches import LatentBatches
from .data import Digits
from .loop import fit
from .text import clip_text_config, clip_tokenizer, t5_encoder, t5_tokenizer
from .vae import load_vae

__all__ = ["LENGTH", "build_sd3", "sd3_loss", "train_sd3"]

LENGTH = 12
"""Tokens of a prompt, for all three text encoders."""

LOGIT_SCALE = 1.2
WITHOUT_T5 = 0.2


def build_sd3(vae_folder: Path, layers: int = 4, heads: int = 3, head_dim: int = 32) -> StableDiffusion3Pipeline:
    """The untrained pipeline; `joint_attention_dim` is T5's width and the sum of the two CLIP widths."""
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(LENGTH), clip_tokenizer(LENGTH), t5_tokenizer(LENGTH)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=load_vae(vae_folder, "sd3"),
        text_encoder=CLIPTextModelWithProjection(clip_text_config(tokenizer, 32, layers=2, heads=2, projection=32)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(tokenizer_2, 32, layers=2, heads=2, projection=32)),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5_encoder(tokenizer_3, width=64, layers=2, heads=2),
        tokenizer_3=tokenizer_3,
    )


def sd3_loss(pipeline: StableDiffusion3Pipeline, x1: Tensor, prompts: list[str], without_t5: float) -> Tensor:
    """The mean squared error of the velocity, each sample at its own time; T5 is silent for a share `without_t5`."""
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, "cpu", do_classifier_free_guidance=False, max_sequence_length=LENGTH
    )
    keep = (torch.rand(len(x1), 1, 1) >= without_t5).to(text.dtype)
    text = torch.cat([text[:, :LENGTH], text[:, LENGTH:] * keep], dim=1)
    quantile = ((torch.arange(len(x1)) + torch.rand(len(x1))) / len(x1)).clamp(1e-4, 1 - 1e-4)
    s = torch.sigmoid(LOGIT_SCALE * torch.special.ndtri(quantile))
    eps = torch.randn_like(x1)
    x_s = (1 - s)[:, None, None, None] * x1 + s[:, None, None, None] * eps
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
        v: Tensor = pipeline.transformer(x_s, text, pooled, 1000 * s).sample
    return (v.float() - (eps - x1)).square().mean()


def train_sd3(
    digits: Digits, vae_folder: Path, steps: int = 6500, seed: int = 0
) -> tuple[StableDiffusion3Pipeline, dict[str, float]]:
    """Train the transformer and the three text encoders; return the pipeline, in eval mode, and its losses."""
    torch.manual_seed(seed)
    pipeline = build_sd3(vae_folder)
    batches = LatentBatches(pipeline.vae, digits)
    trained = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    figures = fit(
        trained, lambda: sd3_loss(pipeline, *batches.draw(64), WITHOUT_T5), steps=steps, lr=2e-3, warmup=200, name="sd3"
    )
    held_out = LatentBatches(pipeline.vae, digits, copies=0, held_out=True)
    with torch.no_grad():
        losses = [sd3_loss(pipeline, *held_out.draw(250, empty=0.0), 0.0) for _ in range(8)]
    figures["held_out_loss"] = torch.stack(losses).mean().item()
    return pipeline, figures
