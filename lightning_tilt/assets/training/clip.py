"""A tiny CLIP: digit images and the prompts that name them, pulled together.

    S_ij = exp(s) <image_i, text_j> / (|image_i| |text_j|)
    loss = (CE(S, Q) + CE(S^T, Q^T)) / 2,      Q_ij = 1[digit_i = digit_j] / number of such j

A batch holds every class several times, so CLIP's one-hot targets would push equal digits apart: the targets are spread
evenly over all pairs of one class. Zero-shot reading takes the largest mean cosine over the class's prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from ..prompts import prompts_of
from .batches import ask
from .classifier import augment
from .data import Digits
from .loop import fit
from .text import clip_text_config, clip_tokenizer

__all__ = ["PREPROCESSOR", "build_clip", "class_embeddings", "save_preprocessor", "train_clip", "zero_shot_accuracy"]

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}
"""The `preprocessor_config.json` of the CLIP of digits."""


def build_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """A vision tower of 16 patches and a text tower of 16 tokens, projected to 32 dimensions."""
    tokenizer = clip_tokenizer(16)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    text = clip_text_config(tokenizer, width=32, layers=2, heads=2, projection=32)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    return CLIPModel(config), tokenizer


def _pixels(images: Tensor) -> Tensor:
    mean, std = torch.tensor(PREPROCESSOR["image_mean"]), torch.tensor(PREPROCESSOR["image_std"])
    return (images - mean[:, None, None]) / std[:, None, None]


def _tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> dict[str, Tensor]:
    encoded = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@torch.no_grad()
def class_embeddings(model: CLIPModel, tokenizer: CLIPTokenizer) -> Tensor:
    """For each digit the mean of its prompts' unit embeddings: (10, projection_dim)."""
    means = []
    for digit in range(10):
        pooled = model.text_model(**_tokens(tokenizer, prompts_of(digit))).pooler_output
        means.append(torch.nn.functional.normalize(model.text_projection(pooled), dim=-1).mean(0))
    return torch.stack(means)


@torch.no_grad()
def zero_shot_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, labels: Tensor) -> float:
    """The share of images in [0, 1] whose nearest class embedding is their label's."""
    features: Tensor = model.visual_projection(model.vision_model(_pixels(images)).pooler_output)
    read = (features @ class_embeddings(model, tokenizer).T).argmax(1)
    return (read == labels).float().mean().item()


def save_preprocessor(folder: Path) -> None:
    """Write the keys that every CLIPImageProcessor reads, without building one (the fast one needs torchvision)."""
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def train_clip(digits: Digits, steps: int = 2000, seed: int = 0) -> tuple[CLIPModel, CLIPTokenizer, dict[str, float]]:
    """Train both towers from scratch; return them with the training figures."""
    torch.manual_seed(seed)
    model, tokenizer = build_clip()
    x = (digits.images + 1) / 2

    def loss() -> Tensor:
        index = torch.randint(len(x), (128,))
        y = digits.labels[index]
        out = model(**_tokens(tokenizer, ask(y, empty=0.0)), pixel_values=_pixels(augment(x[index])))
        same = (y[:, None] == y[None, :]).float()
        q = same / same.sum(1, keepdim=True)
        logits: Tensor = out.logits_per_image
        return -(q * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2

    figures = fit([model], loss, steps=steps, lr=2e-3, warmup=200, weight_decay=0.05, decay=0.998, name="clip")
    return model, tokenizer, figures
