"""The autoencoder that both diffusion models share: (3, 32, 32) in [-1, 1]  <->  (4, 8, 8).

    loss = mean (decode(z) - x)^2 + KL_WEIGHT * KL(q(z|x) || N(0, 1)),   z ~ q(z|x)

with the KL summed over the 256 latent numbers. The two model families scale the same latents differently:

    SD 1.5:  x1 = z * scaling_factor                     scaling_factor = .5 / sqrt(mean z^2)
    SD 3:    x1 = (z - shift_factor) * scaling_factor    shift_factor = mean z,  scaling_factor = 1 / std z

SD 1.5's betas end at alpha = .068, not at 0: the first state of a chain still knows a little of the data, and no
control can tilt what it knows.  What varies most in these small latents (the brightness of a whole digit, say) varies
20 times as much as a single number: at unit scale a tenth of its variance is decided by the first state, as for a
Gaussian of variance v, alpha^2 v / (alpha^2 v + beta^2); at half scale it is a fortieth.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .data import Digits, shift
from .loop import fit

__all__ = ["KL_WEIGHT", "build_vae", "decode", "encode", "load_vae", "train_vae"]

KL_WEIGHT = 1e-3 / 256
"""Of the latents' KL to N(0, I) beside the error of a pixel."""

SD15_STD = 0.5


def build_vae() -> AutoencoderKL:
    """Two halvings, 4 latent channels, 242,327 parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, chunk: int = 250) -> Tensor:
    """The posterior's means of `images`, unscaled."""
    return torch.cat([vae.encode(x).latent_dist.mode() for x in images.split(chunk)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, chunk: int = 250) -> Tensor:
    """Images in [-1, 1] of *scaled* latents, as either kind of pipeline decodes them."""
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return torch.cat([vae.decode(part).sample for part in z.split(chunk)]).clamp(-1, 1)


def train_vae(digits: Digits, cache: Path, steps: int = 800, seed: int = 0) -> AutoencoderKL:
    """Train, measure the latents' moments, and keep a float32 copy in `cache` for the models that are built on it."""
    torch.manual_seed(seed)
    vae = build_vae()

    def loss() -> Tensor:
        x = shift(digits.images[torch.randint(len(digits.images), (64,))], 2)
        posterior = vae.encode(x).latent_dist
        x_hat: Tensor = vae.decode(posterior.sample()).sample
        kl: Tensor = posterior.kl()
        return (x_hat - x).square().mean() + KL_WEIGHT * kl.mean()

    figures = fit([vae], loss, steps=steps, lr=2e-3, decay=0.99, name="vae")
    z = encode(vae, digits.images)
    with torch.no_grad():
        x = digits.held_out_images
        error = (vae.decode(encode(vae, x)).sample - x).square().mean()
    vae.register_to_config(scaling_factor=round(1 / z.square().mean().sqrt().item(), 4), shift_factor=None)
    print(f"vae: held-out mse {error:.5f}, latents mean {z.mean():.3f} std {z.std():.3f}", flush=True)
    vae.save_pretrained(cache)
    figures |= {"mean": z.mean().item(), "std": z.std().item(), "held_out_mse": error.item()}
    (cache / "figures.json").write_text(json.dumps(figures))
    return vae


def load_vae(cache: Path, kind: str = "sd15") -> AutoencoderKL:
    """The trained autoencoder with the scaling of one family, frozen and in eval mode."""
    if not (cache / "config.json").exists():
        raise FileNotFoundError(f"No autoencoder in {cache}: run `python -m lightning_tilt.assets.training vae` first.")
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(cache).eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="autoencoder")  # not where it lay while this machine trained it
    if kind == "sd15":
        vae.register_to_config(scaling_factor=round(SD15_STD * vae.config.scaling_factor, 4))
    if kind == "sd3":
        moments = json.loads((cache / "figures.json").read_text())
        vae.register_to_config(scaling_factor=round(1 / moments["std"], 4), shift_factor=round(moments["mean"], 4))
    return vae
