"""Trained networks that travel with the package: two text-to-digit diffusion models and two readers of digits.

| folder             | what it is                          | loads with                                               |
| ------------------ | ----------------------------------- | -------------------------------------------------------- |
| `digits-sd15`      | a Stable Diffusion 1.5, very small  | `diffusers.StableDiffusionPipeline`                      |
| `digits-sd3`       | a Stable Diffusion 3, very small    | `diffusers.StableDiffusion3Pipeline`                     |
| `digits-clip`      | a CLIP                              | `transformers.CLIPModel`, `transformers.CLIPTokenizer`   |
| `digit-classifier` | a smooth classifier                 | `lightning_tilt.models.digit_cnn.DigitCNN`               |

Weights are float16 on the disk; say `.to(torch.float32)` after loading for work on a CPU.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDERS", "folder"]

FOLDERS = ("digits-sd15", "digits-sd3", "digits-clip", "digit-classifier")


def folder(name: str) -> Path:
    """The path of an embedded model, for any `from_pretrained`.

    >>> folder("digits-sd15").name
    'digits-sd15'
    """
    if name not in FOLDERS:
        raise ValueError(f"No embedded model is called {name!r}; there are {', '.join(FOLDERS)}.")
    return Path(__file__).parent / name
