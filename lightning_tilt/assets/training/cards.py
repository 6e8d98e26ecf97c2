"""Judging the finished folders as they lie on the disk, and writing down what was found."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import nn
from transformers import CLIPModel

from ...models.digit_cnn import DigitCNN
from ..prompts import DIGIT_NAMES, TEMPLATES
from .judge import draw, read_as_asked, varied_prompts
from .page import save_page
from .save import parameters, recall, remember, size_mb, write_card

__all__ = ["judge_pipeline", "write_cards_and_page", "write_classifier_card", "write_clip_card"]

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusion3Pipeline
# (key, what the card calls it, steps, ODE, how many samples)
SETTINGS = (
    ("ancestral_20", "20 exact ancestral (eta = 1) steps", 20, False, 1000),
    ("ode_20", "20 steps of the ODE", 20, True, 1000),
    ("ancestral_16", "16 ancestral steps", 16, False, 500),
    ("ancestral_12", "12 ancestral steps", 12, False, 500),
)


def judge_pipeline(pipeline: Pipeline, classifier: DigitCNN, name: str = "") -> dict[str, float]:
    """The share of samples without guidance, over all templates, that are read as asked."""
    figures = {}
    for key, _, steps, ode, count in SETTINGS:
        prompts = varied_prompts(count)
        figures[key] = read_as_asked(classifier, draw(pipeline, prompts, steps, ode), prompts)
        print(f"{name} {key}: {figures[key]:.4f}", flush=True)
    return figures


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _training(figures: dict[str, float], loss: str) -> list[tuple[str, str]]:
    return [
        (f"training loss ({loss}), mean of the last 500 steps", f"{figures['loss']:.4f}"),
        ("training time, CPU minutes of one core", f"{figures['cpu_seconds'] / 60:.0f}"),
    ]


def write_classifier_card(out: Path, scratch: Path, seed: int) -> None:
    """The classifier's README."""
    folder, figures = out / "digit-classifier", recall(scratch, "classifier")
    rows = [
        ("parameters", f"{parameters([DigitCNN.from_pretrained(folder)]):,}"),
        ("held-out accuracy (500 digits)", _percent(figures["held_out_accuracy"])),
        ("held-out accuracy, as the autoencoder rebuilds them", _percent(figures["held_out_accuracy_rebuilt"])),
        *_training(figures, "cross entropy, label smoothing .02, augmented"),
    ]
    about = "A smooth classifier of 32 x 32 images of digits in [0, 1], made to be a differentiable reward."
    use = 'DigitCNN.from_pretrained(folder("digit-classifier"))  # logits (B, 10) of images (B, 3, H, W)'
    write_card(folder, "digit-classifier", about, use, rows, seed, "classifier")


def write_clip_card(out: Path, scratch: Path, seed: int) -> None:
    """The CLIP's README."""
    folder, figures = out / "digits-clip", recall(scratch, "clip")
    rows = [
        ("parameters", f"{parameters([CLIPModel.from_pretrained(folder, dtype=torch.float32)]):,}"),
        ("held-out zero-shot accuracy (500 digits)", _percent(figures["held_out_zero_shot"])),
        *_training(figures, "contrastive, all pairs of one class are positive"),
    ]
    about = "A tiny CLIP of 32 x 32 images (16 patches) and prompts of at most 16 tokens that name a digit."
    use = 'CLIPModel.from_pretrained(folder("digits-clip"), dtype=torch.float32)'
    write_card(folder, "digits-clip", about, use, rows, seed, "clip")


def _pipeline_card(folder: Path, pipeline: Pipeline, scratch: Path, seed: int, kind: str, use: str) -> None:
    figures, vae = recall(scratch, kind), recall(scratch / "vae", "figures")
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    rows = [(f"parameters: {name}", f"{parameters([part]):,}") for name, part in networks.items()]
    rows += [(f"read as asked: {label}, {n} samples", _percent(figures[key])) for key, label, _, _, n in SETTINGS]
    if "without_t5" in figures:
        rows.append(("read as asked: 20 ancestral steps, `text_encoder_3=None`", _percent(figures["without_t5"])))
    rows += [
        ("held-out loss (noise or velocity, mean square)", f"{figures['held_out_loss']:.4f}"),
        *_training(figures, "the same, batch 64"),
        ("autoencoder: held-out mean squared error in [-1, 1]", f"{vae['held_out_mse']:.4f}"),
        ("size on the disk", f"{size_mb(folder):.1f} MB"),
    ]
    about = (
        "A very small latent diffusion model with the classes and the noise schedule of its big relative. It draws\n"
        f"handwritten digits ({DIGIT_NAMES[0]} to {DIGIT_NAMES[9]}, or 0 to 9; {len(TEMPLATES)} templates, any case)\n"
        "as 32 x 32 images from 4 x 8 x 8 latents. Read as asked: by `digit-classifier`, without guidance."
    )
    write_card(folder, folder.name, about, use, rows, seed, kind)


def write_cards_and_page(out: Path, scratch: Path, seed: int) -> None:
    """Judge both pipelines, write their READMEs and `samples.png`."""
    classifier = DigitCNN.from_pretrained(out / "digit-classifier")
    sd15 = StableDiffusionPipeline.from_pretrained(out / "digits-sd15").to(torch.float32)
    sd3 = StableDiffusion3Pipeline.from_pretrained(out / "digits-sd3").to(torch.float32)
    blocks = []
    for kind, pipeline in (("sd15", sd15), ("sd3", sd3)):
        remember(scratch, kind, judge_pipeline(pipeline, classifier, kind))
        blocks.append(draw(pipeline, varied_prompts(100)))
    sd3_without = StableDiffusion3Pipeline.from_pretrained(
        out / "digits-sd3", text_encoder_3=None, tokenizer_3=None
    ).to(torch.float32)
    prompts = varied_prompts(500)
    remember(scratch, "sd3", {"without_t5": read_as_asked(classifier, draw(sd3_without, prompts), prompts)})
    use = 'StableDiffusion{}Pipeline.from_pretrained(folder("{}")).to(torch.float32)'
    _pipeline_card(out / "digits-sd15", sd15, scratch, seed, "sd15", use.format("", "digits-sd15"))
    _pipeline_card(out / "digits-sd3", sd3, scratch, seed, "sd3", use.format("3", "digits-sd3"))
    save_page(blocks, out / "samples.png")
