"""How much ink: the mean brightness of an image.

    r(x) = mean over channels and pixels of x,      grad r = 1 / (3 H W) everywhere

White ink on black paper, as the digits are.  The simplest reward that sees the decoded image, and linear in it.
"""

from torch import Tensor

from lightning_tilt.interfaces import Prompts, Reward

__all__ = ["Ink"]


class Ink(Reward):
    """Mean brightness, in [0, 1] for images in [0, 1]; it reads no prompt.

    Example:
        >>> import torch
        >>> Ink().score(torch.tensor([0.0, 0.25]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8), None)
        tensor([0.0000, 0.2500])
    """

    has_skeleton = True

    def score(self, images: Tensor, prompts: Prompts = None) -> Tensor:
        """The mean over channels and pixels of images (B, C, H, W): (B,)."""
        return images.flatten(1).mean(1)
