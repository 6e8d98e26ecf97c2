"""HPSv2Package: the scorer of the `hpsv2` package itself (arXiv 2306.09341), a CLIP (arXiv 2103.00020), as a judge.

    r(x, prompt) = hpsv2.img_score.score(x as an image of 256 levels, prompt)

It has no gradient.  For comparing with published tables, and with `HPSv2`, which gives the same cosine with a gradient:
what differs is the rounding to 256 levels.  The package reads its network's weights from disk at each call; here that
is one call for each different prompt of a batch.  It needs the extra `hpsv2`, which brings torchvision along.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.rewards.checks import one_prompt_an_image, optional
from lightning_tilt.rewards.weights import check_sha256, find_file

__all__ = ["HPSv2Package"]

_REPOSITORY = "xswu/HPSv2"
_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class HPSv2Package(Reward):
    """The hpsv2 package's own score; values are those of `HPSv2`.

    Args:
        version: of the weights.
        path: the checkpoint in the package's format, or a folder that has it; None: the Hub.
        sha256: what the checkpoint must hash to; None: no check.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ModuleNotFoundError: without the extra `hpsv2`, or without the vocabulary that its wheel lacks.
        FileNotFoundError: if there is no checkpoint, or the Hub cannot be reached.
        ValueError: if `version` is unknown, or the checksum is another.
    """

    sources: ClassVar[tuple[str, ...]] = ("wu2023human", "radford2021learning")
    is_differentiable = False
    needs_prompts = True

    def __init__(
        self,
        version: Literal["2.1", "2.0"] | float = "2.1",
        path: str | None = None,
        *,
        sha256: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.version = str(version)  # a number where a YAML does not quote it
        if self.version not in _FILES:
            raise ValueError(f"HPSv2Package has the versions {' and '.join(_FILES)}, not {self.version!r}")
        _scorer()
        self.file = find_file("HPSv2Package", path or _REPOSITORY, _FILES[self.version], as_named=True)
        check_sha256("HPSv2Package", self.file, sha256)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """The package's scores.

        Args:
            images: in [0, 1], (B, 3, H, W); what is outside is clipped.
            prompts: B strings.

        Returns:
            (B,), in the dtype of the images, without a gradient.

        Raises:
            ValueError: if there is not one prompt an image.
        """
        asked = one_prompt_an_image("HPSv2Package", images, prompts)
        pictures = [_picture(x) for x in images]
        scores = torch.empty(len(images), dtype=torch.float64)
        for prompt in dict.fromkeys(asked):
            rows = [i for i, other in enumerate(asked) if other == prompt]
            told = _scorer().score(
                [pictures[i] for i in rows], prompt, cp=str(self.file), hps_version=f"v{self.version}"
            )
            scores[rows] = torch.tensor([float(r) for r in told], dtype=torch.float64)
        return scores.to(images)


def _scorer() -> Any:
    try:
        return optional("HPSv2Package", "hpsv2.img_score", "hpsv2")
    except FileNotFoundError as error:
        raise ModuleNotFoundError(
            f"HPSv2Package: the installed hpsv2 lacks its vocabulary {error.filename!r}; copy "
            "bpe_simple_vocab_16e6.txt.gz there, which open_clip_torch has in its folder"
        ) from None


def _picture(image: Tensor) -> Any:
    """A PIL image of 256 levels."""
    from PIL import Image

    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.cpu().numpy())
