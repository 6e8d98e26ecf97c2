"""The digit classifier: trained on what it will be shown, real digits and the autoencoder's reconstructions, augmented.

    loss = cross entropy(DigitCNN(augment(x)), label),   label smoothing .02

`augment` turns by up to 15 degrees, scales by up to 15 %, shifts by up to 3 pixels, blurs, and adds noise: a reward's
gradient is only as good as the classifier is smooth around the images that a sampler visits.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, pad

from ...models.digit_cnn import DigitCNN
from .data import Digits
from .loop import fit
from .vae import encode, load_vae

__all__ = ["accuracy", "augment", "judge_classifier", "train_classifier"]


def augment(x: Tensor) -> Tensor:
    """Move, turn, blur and disturb images in [0, 1], each differently."""
    n = len(x)
    angle = (2 * torch.rand(n) - 1) * math.radians(15)
    scale = 1 + 0.15 * (2 * torch.rand(n) - 1)
    move = (2 * torch.rand(n, 2) - 1) * 3 / 16
    c, s = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([c, -s, move[:, 0]], 1), torch.stack([s, c, move[:, 1]], 1)], 1)
    x = grid_sample(x, affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    blurred = avg_pool2d(pad(x, (1, 1, 1, 1)), 3, stride=1)
    x = torch.lerp(x, blurred, torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5))
    noise = 0.1 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)
    return (x + noise).clamp(0, 1)


@torch.no_grad()
def accuracy(classifier: DigitCNN, images: Tensor, labels: Tensor) -> float:
    """The share of images in [0, 1] that the classifier reads as labelled."""
    read = torch.cat([classifier(part).argmax(1) for part in images.split(250)])
    return (read == labels).float().mean().item()


def _rebuild(vae: AutoencoderKL, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([vae.decode(z).sample for z in encode(vae, x).split(250)]).clamp(-1, 1)


def judge_classifier(classifier: DigitCNN, digits: Digits, vae_folder: Path) -> dict[str, float]:
    """Held-out accuracy on the digits themselves and as the autoencoder rebuilds them."""
    x, y = digits.held_out_images, digits.held_out_labels
    rebuilt = _rebuild(load_vae(vae_folder), x)
    return {
        "held_out_accuracy": accuracy(classifier, (x + 1) / 2, y),
        "held_out_accuracy_rebuilt": accuracy(classifier, (rebuilt + 1) / 2, y),
    }


def train_classifier(
    digits: Digits, vae_folder: Path, steps: int = 2500, seed: int = 0
) -> tuple[DigitCNN, dict[str, float]]:
    """Train on pixels and reconstructions in equal parts; return the network and its training figures."""
    torch.manual_seed(seed)
    x = (torch.cat([digits.images, _rebuild(load_vae(vae_folder), digits.images)]) + 1) / 2
    y = digits.labels.repeat(2)
    classifier = DigitCNN()

    def loss() -> Tensor:
        index = torch.randint(len(y), (96,))
        return cross_entropy(classifier(augment(x[index])), y[index], label_smoothing=0.02)

    figures = fit([classifier], loss, steps=steps, lr=3e-3, weight_decay=0.01, decay=0.998, name="classifier")
    return classifier, figures
