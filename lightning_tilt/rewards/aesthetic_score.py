"""AestheticScore: how much people liked the look of an image, on a scale of 1 to 10; it reads no prompt.

    r(x) = h(f(x)),      f the unit image embedding of CLIP ViT-L/14 (arXiv 2103.00020), h affine, five linear layers

The LAION aesthetic predictor, version 2 (`sac+logos+ava1-l14-linearMSE.pth`; of the people of arXiv 2210.08402); values
are about 4 to 7.  Since f has length 1 and h is affine, its whole gradient is one direction in CLIP's space: it is soon
hacked (arXiv 2305.13301).
"""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from lightning_tilt.frozen import Frozen
from lightning_tilt.rewards.clip_tower import CLIP_NAME, CLIPImages, load_clip
from lightning_tilt.rewards.linear_head import linear_head
from lightning_tilt.rewards.network import NetworkDtype, network_dtype
from lightning_tilt.rewards.weights import find_file, read_weights

__all__ = ["AestheticScore"]

_FILE = "sac+logos+ava1-l14-linearMSE.pth"


class AestheticScore(CLIPImages):
    """The LAION aesthetic predictor.

    Args:
        path: the head's checkpoint, `sac+logos+ava1-l14-linearMSE.pth` or its `.safetensors`, a folder that has it, or
            a Hub name that has it.
        clip: folder or Hub name of CLIP ViT-L/14 in transformers' layout; only its image tower is kept.
        antialias: filter before shrinking an image, as the image library of the training pipeline did.
        micro_batch: images scored at a time; None: all of them.
        dtype: of the CLIP; the head, under a million weights, stays in float32.
        sha256: what the head's checkpoint must hash to; None: no check.
        clip_sha256: what the CLIP's `model.safetensors` must hash to; None: no check.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        FileNotFoundError: if a file is not there, or the Hub cannot be reached.
        ValueError: if a checkpoint is refused.
    """

    sources: ClassVar[tuple[str, ...]] = ("schuhmann2022laion", "radford2021learning")

    def __init__(
        self,
        path: str,
        clip: str = CLIP_NAME,
        antialias: bool = True,
        *,
        micro_batch: int | None = None,
        dtype: NetworkDtype = "float32",
        sha256: str | None = None,
        clip_sha256: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch=micro_batch, **kwargs)
        file = find_file("AestheticScore", path, _FILE)
        state = read_weights("AestheticScore", file, sha256)
        mend = "give `clip`, a Hub name or a folder with its model and preprocessor files"
        network, preprocess = load_clip("AestheticScore", clip, network_dtype(dtype), clip_sha256, mend)
        del network.text_model, network.text_projection  # a third of the weights, and it reads no prompt
        width = network.config.projection_dim
        head = linear_head("AestheticScore", str(file), width, state, network_dtype("float32"))
        self.network, self.preprocess = Frozen(network), replace(preprocess, antialias=antialias)
        self.head = Frozen(head)

    def score_chunk(self, images: Tensor, read: Tensor) -> Tensor:
        """`h(f(x))`: images (b, 3, H, W) -> (b,)."""
        f = self.embed_images(images)
        r: Tensor = self.head(f)
        return r.squeeze(1)
