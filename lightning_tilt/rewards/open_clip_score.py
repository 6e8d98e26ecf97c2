"""OpenCLIPScore: how well an image fits its prompt, by any network of open_clip, with a gradient (arXiv 2212.07143).

    r(x, prompt) = scale * cos(f(x), g(prompt))

f, g, the size, mean and standard deviation of the images, how they are resized, and the tokenizer are those that
open_clip has for the model; resizing is done on tensors, so that the gradient arrives at the image.  `scale` is 1, a
plain cosine: about .3 for good images, about .1 under SigLIP; a multiplier `lam` has a meaning with the scale only.

It needs the extra `openclip`, which brings torchvision along.  What to cite is what the library asks for: itself
(Ilharco et al. 2021), the paper above, CLIP (arXiv 2103.00020), and the data of its best-known weights, LAION-5B (arXiv
2210.08402).
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_tilt.frozen import Frozen
from lightning_tilt.rewards.checks import optional
from lightning_tilt.rewards.clip_tower import CLIPTower
from lightning_tilt.rewards.network import NetworkDtype, network_dtype
from lightning_tilt.rewards.preprocessing import ImagePreprocessing
from lightning_tilt.rewards.weights import check_sha256, find_file, first_line, is_local

__all__ = ["OpenCLIPScore"]


class OpenCLIPScore(CLIPTower):
    """Cosine of image and prompt under a network of open_clip.

    Args:
        model: open_clip's name of the architecture, e.g. `ViT-B-32`, or `hf-hub:organisation/name`.
        pretrained: open_clip's tag of the weights, e.g. `laion2b_s34b_b79k`, or a local file; None: those that come
            with an `hf-hub:` name.
        scale: factor on the cosine.
        antialias: filter before shrinking an image, as open_clip's own transform does.
        micro_batch: images scored at a time; None: all of them.
        dtype: of the network.
        sha256: what the local file must hash to; None: no check.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ModuleNotFoundError: without the extra `openclip`.
        FileNotFoundError: if `pretrained` is a path without a file.
        ValueError: if open_clip does not know the model or its weights, or the weights are refused.
    """

    has_skeleton = False  # open_clip alone knows its networks' configurations, and is an extra
    sources: ClassVar[tuple[str, ...]] = (
        *("ilharco2021openclip", "cherti2022reproducible"),
        *("radford2021learning", "schuhmann2022laion"),
    )

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        scale: float = 1.0,
        antialias: bool = True,
        *,
        micro_batch: int | None = None,
        dtype: NetworkDtype = "float32",
        sha256: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch=micro_batch, **kwargs)
        open_clip = optional("OpenCLIPScore", "open_clip", "openclip")
        self.scale = scale
        if pretrained is not None and is_local(pretrained):
            file = find_file("OpenCLIPScore", pretrained, "open_clip_model.safetensors")
            check_sha256("OpenCLIPScore", file, sha256)
            pretrained = str(file)
        elif sha256 is not None:
            raise ValueError("OpenCLIPScore: sha256 is that of a file; give the path of one as `pretrained`")
        try:
            network = open_clip.create_model(model, pretrained, require_pretrained=True, weights_only=True)
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # unknown names, foreign weights, no connection: each fails in its own way
            raise ValueError(
                f"OpenCLIPScore could not load {model!r} with the weights {pretrained!r}; "
                f"open_clip.list_pretrained() has the names that go together ({first_line(error)})"
            ) from None
        self.preprocess = _preprocessing(model, open_clip.get_model_preprocess_cfg(network), antialias)
        held: nn.Module = network.to(network_dtype(dtype))
        self.network = Frozen(held)

    def see(self, pixels: Tensor) -> Tensor:
        """open_clip's image tower."""
        model: Any = self.network.module
        f: Tensor = model.encode_image(pixels)
        return f

    def read_tokens(self, prompts: list[str]) -> Tensor:
        """open_clip's tokenizer and text tower."""
        model: Any = self.network.module
        tokens: Tensor = self.tokenizer(prompts).to(self._weight().device)
        g: Tensor = model.encode_text(tokens)
        return g

    def score_chunk(self, images: Tensor, g: Tensor) -> Tensor:
        """`scale * cos`: images (b, 3, H, W), the prompts' embeddings (b, D) -> (b,)."""
        f = self.embed_images(images)
        return self.scale * (f * g).sum(1)


def _preprocessing(model: str, config: dict[str, Any], antialias: bool) -> ImagePreprocessing:
    """open_clip's transform for validation, in tensor operations."""
    given = config["size"]
    height, width = (given, given) if isinstance(given, int) else given
    mode, fill = config.get("resize_mode") or "shortest", config.get("fill_color") or 0
    shared: dict[str, Any] = {
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "resample": "bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
        "antialias": antialias,
    }
    if mode == "squash":
        return ImagePreprocessing(size=(height, width), crop=None, **shared)
    if height != width or (mode == "longest" and fill != 0):
        raise ValueError(
            f"OpenCLIPScore cannot show {model!r} its images: it resizes the {mode} edge to {height} x {width} with "
            f"fill colour {fill}; squares without a fill colour are known, and any size that is squashed"
        )
    if mode == "longest":
        return ImagePreprocessing(size=height, crop=None, fit="longest", **shared)
    return ImagePreprocessing(size=height, crop=(height, width), odd="even", **shared)
