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

__all__ = ["FOLDERS", "folder", "locate"]

_PACKAGE = Path(__file__).parents[1]

FOLDERS = ("digits-sd15", "digits-sd3", "digits-clip", "digit-classifier")
"""What is embedded: two text-to-image models, a CLIP of digits, a classifier."""


def folder(name: str) -> Path:
    """The path of an embedded model, for any `from_pretrained`.

    >>> folder("digits-sd15").name
    'digits-sd15'
    """
    if name not in FOLDERS:
        raise ValueError(f"No embedded model is called {name!r}; there are {', '.join(FOLDERS)}.")
    return Path(__file__).parent / name


def locate(path: str | Path) -> Path:
    """Where a path leads: below the working directory, or, where nothing is there, to what comes with the package.

    The package answers to the names that its files have in the repository, `configs/...` and
    `lightning_tilt/assets/...`: configurations name prompts and models by them, and hold in any folder.

    Args:
        path: a path, or a name on the Hub, which stays as it is; `~` is the home.

    Raises:
        RuntimeError: for the home of a user that is not there.

    Example:
        >>> locate("configs/digits/prompts.txt").is_file(), str(locate("openai/clip-vit-large-patch14"))
        (True, 'openai/clip-vit-large-patch14')
    """
    here = Path(path).expanduser()
    if here.parts[:1] == ("configs",):
        inside = _PACKAGE / here
    elif here.parts[:2] == ("lightning_tilt", "assets"):
        inside = _PACKAGE.joinpath(*here.parts[1:])
    else:
        return here
    return here if here.exists() or not inside.exists() else inside
