"""What an image tower is shown: resize, crop, normalise, in tensor operations with a gradient.

    resize     the shortest edge to `size`, bicubic, antialiased     (h, w) -> (h, w) size / min(h, w), cut to integers
               or the longest one                                    (h, w) -> (h, w) size / max(h, w), rounded
    pad        the longest edge resized: zeros around it, up to a square of `size`
    crop       the centre, `crop` = (height, width)
    normalise  (x - mean) / std, channel by channel

Images are in [0, 1] (a `rescale_factor` of 1/255 is taken as done).  The image library that usually does this rounds to
256 levels and clips what bicubic overshoots; both have no useful gradient and are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

__all__ = ["CLIP_MEAN", "CLIP_STD", "ImagePreprocessing"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of the images that CLIP was trained on, by channel."""

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on, by channel."""

# The numbers of `resample` are those of the Python imaging library.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class ImagePreprocessing:
    """How images become an image tower's pixels.

    Attributes:
        size: edge after resizing, or (height, width) exactly; None: no resizing.
        crop: (height, width) of the centre crop; None: no crop.
        mean: one number a channel.
        std: one number a channel.
        resample: "bicubic" or "bilinear".
        antialias: filter before shrinking, as image libraries do.
        fit: which edge an integer `size` is: the "shortest", or the "longest", after which zeros fill the square.
        odd: where the centre lies if an odd number of rows is cropped: half of it rounded "down", as in transformers,
            or to the nearest "even" number, as in torchvision.

    Example:
        >>> preprocess = ImagePreprocessing(size=224, crop=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> preprocess(torch.rand(1, 3, 300, 401)).shape
        torch.Size([1, 3, 224, 224])
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str = "bicubic"
    antialias: bool = True
    fit: Literal["shortest", "longest"] = "shortest"
    odd: Literal["down", "even"] = "down"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], antialias: bool = True) -> "ImagePreprocessing":
        """Read the content of a `preprocessor_config.json`.

        Args:
            config: its keys; those of both older (`size: 224`) and newer (`size: {shortest_edge: 224}`) files.
            antialias: filter before shrinking.

        Raises:
            ValueError: if the file lacks a key, or asks for a resampling other than bilinear or bicubic.
        """
        try:
            size = _edge_or_pair(config["size"]) if config.get("do_resize", True) else None
            crop = _pair(config["crop_size"]) if config.get("do_center_crop", False) else None
            normalise = config.get("do_normalize", True)
            mean, std = (
                tuple(float(value) for value in config[key]) if normalise else (number,) * 3
                for key, number in (("image_mean", 0.0), ("image_std", 1.0))
            )
        except KeyError as error:
            raise ValueError(f"preprocessor_config.json has no {error}; restore it") from None
        except (TypeError, ValueError, AttributeError):
            raise ValueError("preprocessor_config.json holds no names with sizes and means; restore it") from None
        resample = config.get("resample", 3)
        if resample not in _RESAMPLE:
            raise ValueError(
                f"preprocessor_config.json has resample {resample!r}; known are 2 (bilinear) and 3 (bicubic)"
            )
        return cls(
            size=size,
            crop=crop,
            mean=mean,
            std=std,
            resample=_RESAMPLE[resample],
            antialias=antialias,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), any H and W -> (B, 3, height, width) as the tower wants them."""
        x = self._crop(self._pad(self._resize(images)))
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std

    def _resize(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if self.size is None:
            return x
        if not isinstance(self.size, int):
            target = self.size
        elif self.fit == "shortest":
            target = (self.size * h // min(h, w), self.size * w // min(h, w))
        else:
            scale = self.size / max(h, w)
            target = (max(1, round(h * scale)), max(1, round(w * scale)))
        if target == (h, w):
            return x
        return interpolate(x, target, mode=self.resample, align_corners=False, antialias=self.antialias)

    def _pad(self, x: Tensor) -> Tensor:
        if self.fit == "shortest" or not isinstance(self.size, int):
            return x
        below, right = self.size - x.shape[-2], self.size - x.shape[-1]
        # A left-over row or column goes to the bottom or the right.
        return pad(x, (right // 2, right - right // 2, below // 2, below - below // 2))

    def _crop(self, x: Tensor) -> Tensor:
        if self.crop is None:
            return x
        (h, w), (height, width) = x.shape[-2:], self.crop
        if h < height or w < width:
            raise ValueError(
                f"images of {h} x {w} pixels are smaller than their crop, {height} x {width}; resize first"
            )
        # Python rounds halves to the even neighbour.
        top, left = (m // 2 if self.odd == "down" else round(m / 2) for m in (h - height, w - width))
        return x[..., top : top + height, left : left + width]


def _pair(size: int | Mapping[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _edge_or_pair(size: int | Mapping[str, int]) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    return size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
