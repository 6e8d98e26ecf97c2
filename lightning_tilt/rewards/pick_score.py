"""PickScore: which of two images people pick for a prompt (arXiv 2305.01569), by a CLIP trained on choices.

    r(x, prompt) = exp(s) cos(f(x), g(prompt)),      P(x is picked over y) = sigmoid(r(x) - r(y))

The CLIP (arXiv 2103.00020) is a ViT-H/14; s is its own logit scale, exp(s) = 100: values are about 20 to 22, and one
unit is a choice of 73 : 27.  A multiplier `lam` therefore counts in units of log odds.
"""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from lightning_tilt.frozen import Frozen
from lightning_tilt.rewards.clip_tower import CLIPTower, load_clip, load_tokenizer
from lightning_tilt.rewards.network import NetworkDtype, network_dtype

__all__ = ["PickScore"]


class PickScore(CLIPTower):
    """Log odds of human choice, up to a constant of the prompt.

    Args:
        path: folder or Hub name of the network, in transformers' layout with its tokenizer and preprocessor.
        antialias: filter before shrinking an image, as the image library of the training pipeline did.
        micro_batch: images scored at a time; None: all of them.
        dtype: of the network.
        sha256: what its `model.safetensors` must hash to; None: no check.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        FileNotFoundError: if there is no network at `path`, or the Hub cannot be reached.
        ValueError: if it lacks weights, or its checksum is another.
    """

    sources: ClassVar[tuple[str, ...]] = ("kirstain2023pick", "radford2021learning")

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        antialias: bool = True,
        *,
        micro_batch: int | None = None,
        dtype: NetworkDtype = "float32",
        sha256: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch=micro_batch, **kwargs)
        mend = "give the name on the Hub, or a folder with its model, tokenizer and preprocessor files"
        network, preprocess = load_clip("PickScore", path, network_dtype(dtype), sha256, mend)
        self.network, self.preprocess = Frozen(network), replace(preprocess, antialias=antialias)
        self.tokenizer = load_tokenizer("PickScore", path)

    def score_chunk(self, images: Tensor, g: Tensor) -> Tensor:
        """`exp(s) cos`: images (b, 3, H, W), the prompts' embeddings (b, D) -> (b,)."""
        model: Any = self.network.module
        s: Tensor = model.logit_scale.to(g)
        f = self.embed_images(images)
        return s.exp() * (f * g).sum(1)
