"""CLIPScore: how well an image fits its prompt, by any CLIP that transformers can load.

    r(x, prompt) = scale * cos(f(x), g(prompt)),      f, g the two towers' projected embeddings

The published CLIPScore (arXiv 2104.08718) is 2.5 max(cos, 0), many tables print 100 cos, the logits that CLIP was
trained with are exp(s) cos.  Here `scale` is 1: a plain cosine, about .27 for good images under ViT-L/14, without the
max, whose gradient vanishes just where it is needed.  A multiplier `lam` only has a meaning together with the scale.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tilt.assets import folder
from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import ImageEmbedding, Prompts, Reward
from lightning_tilt.rewards.checks import mend_missing, one_prompt_an_image
from lightning_tilt.rewards.preprocessing import ImagePreprocessing

__all__ = ["CLIPScore"]

_CACHED_PROMPTS = 4096  # 16 MB at 1024 dimensions


class CLIPScore(Reward, ImageEmbedding):
    """Cosine of image and prompt in a CLIP's common space.

    Args:
        path: folder or Hub name of a CLIP in transformers' layout, e.g. `openai/clip-vit-large-patch14`; None: the
            embedded CLIP of handwritten digits.
        scale: factor on the cosine: 1 gives [-1, 1], 100 the convention of many tables.
        antialias: filter before shrinking an image, as the image library of the training pipeline did.

    Raises:
        FileNotFoundError: if there is no CLIP at `path`.
    """

    needs_prompts = True

    def __init__(self, path: str | None = None, scale: float = 1.0, antialias: bool = True) -> None:
        super().__init__()
        self.scale = scale
        network, self.tokenizer, config = _load(path)
        self.network: Frozen[nn.Module] = Frozen(network)
        self.preprocess = ImagePreprocessing.from_config(config, antialias)
        self._known: dict[tuple[str, torch.dtype], Tensor] = {}

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """`scale * cos`.

        Args:
            images: in [0, 1], (B, 3, H, W), any size.
            prompts: B strings; longer ones than the text tower reads are cut.

        Returns:
            (B,), in the dtype of the images.

        Raises:
            ValueError: if there is not one prompt an image.
        """
        g = self.embed_prompts(one_prompt_an_image("CLIPScore", images, prompts))
        return (self.scale * (self.embed_images(images) * g).sum(1)).to(images.dtype)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings of images in [0, 1]: (B, D), in the network's dtype, with a gradient."""
        model: Any = self.network.module
        pixels = self.preprocess(images).to(model.dtype)
        # The parts, not `get_image_features`: what that returns depends on the version of transformers.
        f = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return nn.functional.normalize(f, dim=1)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings of prompts: (B, D), in the network's dtype, without a gradient; each is computed once."""
        model: Any = self.network.module
        new = [p for p in dict.fromkeys(prompts) if (p, model.dtype) not in self._known]
        if new:
            for prompt, g in zip(new, self._encode(new), strict=True):
                self._known[prompt, model.dtype] = g
        embedded = torch.stack([self._known[prompt, model.dtype].to(model.device) for prompt in prompts])
        while len(self._known) > _CACHED_PROMPTS:
            del self._known[next(iter(self._known))]
        return embedded

    # What is cached in inference mode could not be used with a gradient later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        model: Any = self.network.module
        # Padded to one length always, so that an embedding does not depend on its neighbours.
        length = min(self.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(model.device)
        pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return nn.functional.normalize(model.text_projection(pooled), dim=1)


def _load(path: str | None) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The network in float32, its tokenizer, the content of its preprocessor_config.json."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.image_processing_base import ImageProcessingMixin

    name = str(folder("digits-clip")) if path is None else str(Path(path).expanduser())
    try:
        # Looked at first: small, and absent where there is nothing.
        config, _ = ImageProcessingMixin.get_image_processor_dict(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        network = CLIPModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        mend = mend_missing(
            path, "a Hub name, or a folder that save_pretrained of model, tokenizer and processor wrote"
        )
        gone = Path(name).is_absolute() and not Path(name).is_dir()
        reason = "there is no such folder" if gone else str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"CLIPScore could not load a CLIP from {name!r}; {mend} ({reason})") from None
    return network, tokenizer, config
