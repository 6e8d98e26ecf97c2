"""Which digit is it? A small smooth classifier of images, made to be differentiated.

    DigitCNN : images in [0, 1], (B, 3, H, W)  ->  logits (B, 10),      p(digit | image) = softmax(logits)

GELU in place of ReLU, average in place of maximum pooling and no batch statistics: the logits are smooth functions of
the pixels, and each image's logits depend on that image alone. The trained weights are embedded:

    from lightning_tilt.assets import folder
    classifier = DigitCNN.from_pretrained(folder("digit-classifier"))
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

__all__ = ["DigitCNN"]


class DigitCNN(nn.Module):
    """Four convolutions and a linear layer; `channels` are the widths of the convolutions.

    >>> import torch
    >>> DigitCNN(channels=(8, 8, 8, 8))(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    size = 32

    def __init__(self, channels: tuple[int, int, int, int] = (24, 32, 64, 96), classes: int = 10) -> None:
        super().__init__()
        self.config = {"channels": list(channels), "classes": classes}
        c0, c1, c2, c3 = channels
        self.features = nn.Sequential(
            nn.Conv2d(3, c0, 3, padding=1),
            nn.GELU(),
            *self._block(c0, c1),
            *self._block(c1, c2),
            *self._block(c2, c3),
        )
        self.head = nn.Linear(c3, classes)

    @staticmethod
    def _block(wide: int, wider: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(wide, wider, 3, padding=1), nn.GroupNorm(8, wider), nn.GELU(), nn.AvgPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in [0, 1]; other sizes than 32 x 32 are interpolated (antialiased) first."""
        if images.shape[-2:] != (self.size, self.size):
            images = interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        features: Tensor = self.features(2 * images - 1)
        logits: Tensor = self.head(features.mean((-2, -1)))
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, the weights in the precision that they have."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.state_dict(), Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DigitCNN:
        """The network of a folder, in float32 and eval mode."""
        network = cls(**json.loads((Path(folder) / "config.json").read_text()))
        network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return network.eval()
