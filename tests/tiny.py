"""Random pipelines of a few thousand weights in the very layout of SD 1.5 and SD 3, and their tokenizers."""

from pathlib import Path
from typing import Any

import torch

from lightning_tilt.interfaces import Condition
from lightning_tilt.models import LatentDiffusion

PROMPTS = ["a seven", "", "b"]
LENGTH = 8
"""Tokens of every text encoder."""


def clip_tokenizer() -> Any:
    """Bytes, each also as the last of a word, and the two specials; no merges."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> Any:
    """Single letters."""
    from transformers import T5Tokenizer

    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0} | {c: -3.0 for c in "abcdefghijklmnopqrstuvwxyz"}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=LENGTH)


def clip_encoder(projected: bool) -> Any:
    """A CLIP text tower of width 16."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def small_decoder(folder: Path, latent_channels: int = 4) -> Any:
    """A small autoencoder with random weights, for 16 x 16 images, saved in a folder."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    made = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), upsampling_scaling_factor=2, latent_channels=latent_channels,
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def vae(**config: Any) -> Any:
    """4 latent channels, 16 x 16 images, 8 x 8 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        **config,
    )


def unet() -> Any:
    """Two levels, cross attention in the lower one."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def transformer() -> Any:
    """Two blocks of two heads, patches of one latent pixel."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )


def save_sd15(folder: Path, **scheduler: Any) -> Path:
    """Write a tiny pipeline of SD 1.5's kind; keywords change its scheduler."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    StableDiffusionPipeline(
        vae=vae(scaling_factor=0.9),
        text_encoder=clip_encoder(projected=False),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=PNDMScheduler(**{**betas, "steps_offset": 1, "skip_prk_steps": True, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_sd3(folder: Path) -> Path:
    """Write a tiny pipeline of SD 3's kind, all three text encoders present."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    StableDiffusion3Pipeline(
        vae=vae(scaling_factor=0.9, shift_factor=0.1),
        text_encoder=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizer,
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def plain(family: str, folder: Path, **kwargs: Any) -> Any:
    """The pipeline as a user of diffusers alone has it."""
    import diffusers

    kind = {"sd15": "StableDiffusionPipeline", "sd3": "StableDiffusion3Pipeline"}[family]
    options = {"safety_checker": None, "requires_safety_checker": False} if family == "sd15" else {}
    return getattr(diffusers, kind).from_pretrained(folder, **options, **kwargs)


def bare(family: str, pipeline: Any, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The prediction by a direct call of diffusers' network."""
    if family == "sd15":
        steps = torch.tensor([round(1000 * (1 - float(time))) - 1 for time in t])
        return pipeline.unet(x, steps, condition.tensors["encoder_hidden_states"]).sample
    told = {"encoder_hidden_states": condition.tensors["encoder_hidden_states"]}
    told["pooled_projections"] = condition.tensors["pooled_projections"]
    return -pipeline.transformer(x, timestep=1000 * (1 - t.float()), **told).sample


def batch(predictor: LatentDiffusion) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    x = torch.randn(3, *predictor.state_shape)
    return x, predictor.process.grid(4)[[0, 1, 3]], predictor.encode(PROMPTS, 3)


def kick(predictor: LatentDiffusion) -> None:
    """Move the trained weights away from the base."""
    with torch.no_grad():
        for parameter in predictor.trained_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
