"""How small the image is as a JPEG file: a reward without a gradient.

    r(x) = - size of the encoded file in kB  (1 kB = 1000 bytes)

The compressibility of arXiv 2305.13301, where quality is 95 too.  Smooth, empty images are rewarded.  The size depends
a little on the version of the encoder, and much on that of the image: photographs of 512 x 512 have some -100 kB,
digits of 32 x 32 about -1 kB, most of which is the file's header.
"""

from io import BytesIO
from typing import ClassVar

import torch
from torch import Tensor

from lightning_tilt.interfaces import Prompts, Reward

__all__ = ["JPEGCompressibility"]


class JPEGCompressibility(Reward):
    """Negative size in kB of the image as a JPEG file; it reads no prompt.

    Without a gradient, so for losses that need none: Tilt Matching, Reinforce Adjoint Matching, log-variance,
    trajectory balance, cross-entropy, Reinforce, GRPO, and the score-matching losses that weigh samples.

    Args:
        quality: of the encoder, 1 to 100.

    Raises:
        ValueError: for another quality.

    Example:
        >>> noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> JPEGCompressibility().score(torch.cat([noise, 0 * noise]), None).diff().item() > 1
        True
    """

    sources: ClassVar[tuple[str, ...]] = ("black2023training",)
    is_differentiable = False
    has_skeleton = True

    def __init__(self, quality: int = 95) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEGCompressibility: quality is between 1 and 100, not {quality}")
        self.quality = quality

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Prompts = None) -> Tensor:
        """Negative sizes.

        Args:
            images: in [0, 1], (B, 3, H, W), or (B, 1, H, W) for grey ones; rounded to 8 bits.
            prompts: not read.

        Returns:
            (B,), in the dtype of the images; NaN where an image is not finite.

        Raises:
            ValueError: for anything that is no image.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"JPEGCompressibility needs images (B, 3, H, W), not {tuple(images.shape)}")
        sizes = [self._size(image) for image in images.float().cpu()]
        return torch.tensor(sizes, device=images.device).to(images.dtype)

    def _size(self, image: Tensor) -> float:
        from PIL import Image

        if not bool(image.isfinite().all()):
            return float("nan")  # 8 bits have no NaN: the file would look like one of a good sample
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        file = BytesIO()
        Image.fromarray((pixels[..., 0] if image.shape[0] == 1 else pixels).numpy()).save(
            file, format="JPEG", quality=self.quality
        )
        return -file.tell() / 1000
