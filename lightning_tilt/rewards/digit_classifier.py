"""Does the image show the digit that the prompt asks for?

    r(x, prompt) = log p(digit(prompt) | x),      p = softmax of a classifier's logits

The classifier was trained apart from the models it judges, on real digits; its figures stand on its model card.
"""

import json

import torch
from torch import Tensor, nn

from lightning_tilt.assets import folder, locate
from lightning_tilt.condition import quoted
from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.interfaces.skeleton import skeleton_device
from lightning_tilt.rewards.checks import mend_missing, one_prompt_an_image

__all__ = ["DigitAccuracy", "DigitClassifier"]


class DigitClassifier(Reward):
    """Log-probability, in nats (at most 0), of the digit that the prompt names, as a word or as a numeral.

    Args:
        path: folder of a trained `DigitCNN`; None: the embedded one.

    Raises:
        FileNotFoundError: if there is no such folder.
    """

    needs_prompts = True
    has_skeleton = True

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.network: Frozen[nn.Module] = Frozen(_load(path))

    def log_probabilities(self, images: Tensor) -> Tensor:
        """`log p(digit | image)` of images in [0, 1], (B, 3, H, W): (B, 10), in the dtype of the images."""
        dtype = next(self.network.module.parameters()).dtype
        logits: Tensor = self.network(images.to(dtype))
        return logits.log_softmax(1).to(images.dtype)

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """`log p` of each prompt's digit.

        Args:
            images: in [0, 1], (B, 3, H, W).
            prompts: B strings that name one digit each.

        Returns:
            (B,), in the dtype of the images.

        Raises:
            ValueError: if there is not one prompt an image, or if a prompt names no digit, or several.
        """
        asked = self.digits(one_prompt_an_image("DigitClassifier", images, prompts))
        digits = torch.tensor(asked, device=images.device)
        return self.log_probabilities(images).gather(1, digits[:, None]).squeeze(1)

    def score_blank(self, images: Tensor) -> Tensor:
        """As `score` of prompts that name a 0."""
        return self.log_probabilities(images)[:, 0]

    @staticmethod
    def digits(prompts: list[str]) -> list[int]:
        """The digit that each prompt asks for.

        Raises:
            ValueError: if a prompt names no digit, or several.

        Example:
            >>> DigitClassifier.digits(["a handwritten seven", "3"])
            [7, 3]
        """
        from lightning_tilt.assets.prompts import digit_of

        found = []
        for prompt in prompts:
            digit = digit_of(prompt)
            if digit is None:
                raise ValueError(
                    f"DigitClassifier cannot tell which digit the prompt {quoted(prompt)} asks for; "
                    "name exactly one, as in 'a handwritten seven' or 'the digit 7'"
                )
            found.append(digit)
        return found


class DigitAccuracy(DigitClassifier):
    """1 where the classifier reads the digit that the prompt names, else 0: a judge without a gradient.

    Args:
        path: folder of a trained `DigitCNN`; None: the embedded one.
    """

    is_differentiable = False

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """Whether each prompt's digit is the most probable one, (B,), in the dtype of the images."""
        asked = self.digits(one_prompt_an_image("DigitAccuracy", images, prompts))
        read = self.log_probabilities(images).argmax(1)
        return (read == torch.tensor(asked, device=images.device)).to(images.dtype)

    @torch.no_grad()
    def score_blank(self, images: Tensor) -> Tensor:
        """As the classifier's, without a gradient."""
        return super().score_blank(images)


def _load(path: str | None) -> nn.Module:
    from lightning_tilt.models.digit_cnn import DigitCNN

    home = folder("digit-classifier") if path is None else locate(path)
    if not (home / "config.json").is_file():
        mend = mend_missing(path, "a folder that DigitCNN.save_pretrained wrote")
        raise FileNotFoundError(f"DigitClassifier found no network in {str(home)!r}; {mend}")
    if (device := skeleton_device()) is not None:
        with device:
            return DigitCNN(**json.loads((home / "config.json").read_text())).eval()
    network: nn.Module = DigitCNN.from_pretrained(str(home))
    return network.float()
