"""What the trained models draw, and how a classifier reads it.

The exact ancestral ("eta = 1") step is the same for both families once the prediction is an `x1_hat`. With the
interpolant `x_t = alpha_t x1 + beta_t eps`, from a noisier `t` to a cleaner `s`:

    ratio = alpha_t / alpha_s,     std^2 = beta_s^2 (1 - ratio^2 beta_s^2 / beta_t^2)
    eps_hat = (x_t - alpha_t x1_hat) / beta_t
    x_s = alpha_s x1_hat + sqrt(beta_s^2 - std^2) eps_hat + std * noise

At pure noise `ratio = 0`, so `x_s = alpha_s x1_hat + beta_s noise`; the last step goes to `alpha_s = 1, beta_s = 0`.
With `std = 0` throughout it is the step of the ODE (DDIM; for a straight path: Euler). Grids are the families' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor

from ...models.digit_cnn import DigitCNN
from ..prompts import digit_of, prompts_of
from .vae import decode

__all__ = ["ancestral_step", "draw", "draw_sd3", "draw_sd15", "read_as_asked", "varied_prompts"]


def varied_prompts(count: int) -> list[str]:
    """`count` prompts: every digit equally often, the templates in turn."""
    return [prompts_of(i % 10)[(i // 10) % len(prompts_of(i % 10))] for i in range(count)]


def ancestral_step(
    x_t: Tensor, x1_hat: Tensor, alpha_t: float, beta_t: float, alpha_s: float, beta_s: float, noise: Tensor | None
) -> Tensor:
    """One step of the page's equations; the deterministic one if `noise` is None."""
    ratio = alpha_t / alpha_s
    variance = beta_s**2 * max(0.0, 1 - (ratio * beta_s / beta_t) ** 2) if noise is not None else 0.0
    eps_hat = (x_t - alpha_t * x1_hat) / beta_t
    x_s = alpha_s * x1_hat + math.sqrt(beta_s**2 - variance) * eps_hat
    return x_s if noise is None else x_s + math.sqrt(variance) * noise


def _simulate(
    predict: Callable[[Tensor, int], Tensor], alphas: list[float], betas: list[float], count: int, ode: bool, seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 8, 8, generator=generator)
    for k in range(len(alphas) - 1):
        noise = None if ode else torch.randn(x.shape, generator=generator)
        x = ancestral_step(x, predict(x, k), alphas[k], betas[k], alphas[k + 1], betas[k + 1], noise)
    return x


@torch.no_grad()
def draw_sd15(
    pipeline: StableDiffusionPipeline, prompts: list[str], steps: int = 20, ode: bool = False, seed: int = 0
) -> Tensor:
    """Images in [0, 1] without guidance, on the pipeline's own time steps."""
    pipeline.scheduler.set_timesteps(steps)
    times = [int(t) for t in pipeline.scheduler.timesteps]
    abar = [float(pipeline.scheduler.alphas_cumprod[t]) for t in times] + [1.0]
    alphas, betas = [math.sqrt(a) for a in abar], [math.sqrt(1 - a) for a in abar]
    text, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)

    def predict(x: Tensor, k: int) -> Tensor:
        eps_hat: Tensor = pipeline.unet(x, times[k], text).sample
        return (x - betas[k] * eps_hat) / alphas[k]

    latents = _simulate(predict, alphas, betas, len(prompts), ode, seed)
    return (decode(pipeline.vae, latents) + 1) / 2


@torch.no_grad()
def draw_sd3(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], steps: int = 20, ode: bool = False, seed: int = 0
) -> Tensor:
    """Images in [0, 1] without guidance, on the pipeline's own shifted grid."""
    pipeline.scheduler.set_timesteps(steps)
    sigmas = [float(s) for s in pipeline.scheduler.sigmas]
    alphas = [1 - s for s in sigmas]
    length = pipeline.tokenizer.model_max_length
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, "cpu", do_classifier_free_guidance=False, max_sequence_length=length
    )

    def predict(x: Tensor, k: int) -> Tensor:
        t = torch.full((len(x),), 1000 * sigmas[k])
        v: Tensor = pipeline.transformer(x, text, pooled, t).sample
        return x - sigmas[k] * v

    latents = _simulate(predict, alphas, sigmas, len(prompts), ode, seed)
    return (decode(pipeline.vae, latents) + 1) / 2


def draw(
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline,
    prompts: list[str],
    steps: int = 20,
    ode: bool = False,
    seed: int = 0,
    chunk: int = 250,
) -> Tensor:
    """Draw with either family, `chunk` prompts at a time."""
    parts = [prompts[i : i + chunk] for i in range(0, len(prompts), chunk)]
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return torch.cat([draw_sd3(pipeline, part, steps, ode, seed + i) for i, part in enumerate(parts)])
    return torch.cat([draw_sd15(pipeline, part, steps, ode, seed + i) for i, part in enumerate(parts)])


@torch.no_grad()
def read_as_asked(classifier: DigitCNN, images: Tensor, prompts: list[str]) -> float:
    """The share of images that the classifier reads as the digit of their prompt."""
    read = torch.cat([classifier(part).argmax(1) for part in images.split(250)])
    asked = torch.tensor([-1 if (digit := digit_of(prompt)) is None else digit for prompt in prompts])
    return (read == asked).float().mean().item()
