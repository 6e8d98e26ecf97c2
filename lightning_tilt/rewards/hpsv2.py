"""HPSv2: human preference between images of one prompt (arXiv 2306.09341), by a CLIP trained on rankings.

    r(x, prompt) = cos(f(x), g(prompt))

The CLIP (arXiv 2103.00020) is a ViT-H/14.  A plain cosine, no logit scale and no factor 100: values are about .2 to .3,
those of version 2.1 spread wider, and good and bad images differ by a few hundredths.  A multiplier `lam` for this
convention is therefore in the thousands.

Images: the longest side to 224, bicubic; zeros around it up to a square; CLIP's mean and standard deviation.
Prompts: CLIP's tokens, cut at 77 with the end token kept.  The network's trained logit scale is loaded and not used.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_tilt.frozen import Frozen
from lightning_tilt.rewards.clip_tower import CLIP_NAME, CLIPTower, load_tokenizer, with_weights
from lightning_tilt.rewards.key_maps import open_clip_to_transformers
from lightning_tilt.rewards.known_clips import vit_h_14
from lightning_tilt.rewards.network import NetworkDtype, network_dtype
from lightning_tilt.rewards.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessing
from lightning_tilt.rewards.weights import find_file, read_weights

__all__ = ["HPSv2"]

_REPOSITORY = "xswu/HPSv2"
_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(CLIPTower):
    """Human Preference Score, version 2.0 or 2.1.

    Args:
        version: of the weights; tells which file is looked for, and nothing else.
        path: the checkpoint itself, in open_clip's names or in transformers', or a folder that has it; None: the Hub.
        tokenizer: folder or Hub name of CLIP's tokenizer (that of Stable Diffusion 1.5 is the same).
        antialias: filter before shrinking an image, as today's image libraries do; older ones did not on tensors.
        micro_batch: images scored at a time; None: all of them.
        dtype: of the network, 986,109,441 weights.
        sha256: what the checkpoint must hash to; None: no check.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        FileNotFoundError: if there is no checkpoint or no tokenizer, or the Hub cannot be reached.
        ValueError: if `version` is unknown, or the checkpoint is refused.
    """

    sources: ClassVar[tuple[str, ...]] = ("wu2023human", "radford2021learning")

    def __init__(
        self,
        version: Literal["2.1", "2.0"] | float = "2.1",
        path: str | None = None,
        tokenizer: str = CLIP_NAME,
        antialias: bool = True,
        *,
        micro_batch: int | None = None,
        dtype: NetworkDtype = "float32",
        sha256: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch=micro_batch, **kwargs)
        self.version = str(version)  # a number where a YAML does not quote it
        if self.version not in _FILES:
            raise ValueError(f"HPSv2 has the versions {' and '.join(_FILES)}, not {self.version!r}")
        file = find_file("HPSv2", path or _REPOSITORY, _FILES[self.version])
        state = read_weights("HPSv2", file, sha256)
        if "visual.conv1.weight" in state:
            state = open_clip_to_transformers(state)
        config = self.configuration()
        self.network = Frozen(with_weights("HPSv2", str(file), "CLIPModel", config, state, network_dtype(dtype)))
        self.tokenizer = load_tokenizer("HPSv2", tokenizer)  # after the checkpoint is known to be the right one
        size = config.vision_config.image_size
        self.preprocess = ImagePreprocessing(size, None, CLIP_MEAN, CLIP_STD, antialias=antialias, fit="longest")

    @staticmethod
    def configuration() -> Any:
        """CLIP ViT-H/14, a `CLIPConfig`; a subclass may name another network of the same layout."""
        return vit_h_14()

    def score_chunk(self, images: Tensor, g: Tensor) -> Tensor:
        """`cos`: images (b, 3, H, W), the prompts' embeddings (b, D) -> (b,)."""
        f = self.embed_images(images)
        return (f * g).sum(1)
