"""CLIPScore: how well an image fits its prompt, by any CLIP (arXiv 2103.00020) that transformers can load.

    r(x, prompt) = scale * cos(f(x), g(prompt)),      f, g the two towers' projected embeddings

The published CLIPScore (arXiv 2104.08718) is 2.5 max(cos, 0), many tables print 100 cos, the logits that CLIP was
trained with are exp(s) cos.  Here `scale` is 1: a plain cosine, about .27 for good images under ViT-L/14, without the
max, whose gradient vanishes just where it is needed.  A multiplier `lam` only has a meaning together with the scale.
"""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from lightning_tilt.assets import folder
from lightning_tilt.frozen import Frozen
from lightning_tilt.rewards.checks import mend_missing
from lightning_tilt.rewards.clip_tower import CLIPTower, load_clip, load_tokenizer
from lightning_tilt.rewards.network import NetworkDtype, network_dtype

__all__ = ["CLIPScore"]


class CLIPScore(CLIPTower):
    """Cosine of image and prompt in a CLIP's common space.

    Args:
        path: folder or Hub name of a CLIP in transformers' layout, e.g. `openai/clip-vit-large-patch14`; None: the
            embedded CLIP of handwritten digits.
        scale: factor on the cosine: 1 gives [-1, 1], 100 the convention of many tables.
        antialias: filter before shrinking an image, as the image library of the training pipeline did.
        micro_batch: images scored at a time; None: all of them.
        dtype: of the network.
        sha256: what its `model.safetensors` must hash to; None: no check.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        FileNotFoundError: if there is no CLIP at `path`.
        ValueError: if it lacks weights, or its checksum is another.
    """

    sources: ClassVar[tuple[str, ...]] = ("hessel2021clipscore", "radford2021learning")

    def __init__(
        self,
        path: str | None = None,
        scale: float = 1.0,
        antialias: bool = True,
        *,
        micro_batch: int | None = None,
        dtype: NetworkDtype = "float32",
        sha256: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch=micro_batch, **kwargs)
        self.scale = scale
        name = str(folder("digits-clip")) if path is None else path
        mend = mend_missing(
            path, "a Hub name, or a folder that save_pretrained of model, tokenizer and processor wrote"
        )
        network, preprocess = load_clip("CLIPScore", name, network_dtype(dtype), sha256, mend)
        self.network, self.preprocess = Frozen(network), replace(preprocess, antialias=antialias)
        self.tokenizer = load_tokenizer("CLIPScore", name)

    def score_chunk(self, images: Tensor, g: Tensor) -> Tensor:
        """`scale * cos`: images (b, 3, H, W), the prompts' embeddings (b, D) -> (b,)."""
        f = self.embed_images(images)
        return self.scale * (f * g).sum(1)
