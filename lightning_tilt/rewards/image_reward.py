"""ImageReward: human preference between images of one prompt (arXiv 2304.05977), by BLIP with a linear head.

    r(x, prompt) = (h(c) - m) / s,      c = text(prompt | vision(x)) at the first token, m = .1672, s = 1.0333

In BLIP (arXiv 2201.12086) the prompt's tokens look at the image's patches by cross attention, so that an embedding of
prompts alone does not exist and every pair is one pass of both towers.  m and s make the values of the training set
standard normal: bad images are below -1, good ones above 1, and one unit of r is one unit of `lam`'s denominator.

Images: the shorter side to 224, bicubic; the centre crop; CLIP's mean and standard deviation.
Prompts: BERT's tokens (uncased), padded and cut at 35; longer texts read otherwise give other numbers.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tilt.frozen import Frozen
from lightning_tilt.rewards.clip_tower import load_tokenizer, with_weights
from lightning_tilt.rewards.key_maps import blip_vision_to_transformers
from lightning_tilt.rewards.linear_head import linear_head
from lightning_tilt.rewards.network import NetworkDtype, NetworkReward, network_dtype
from lightning_tilt.rewards.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessing
from lightning_tilt.rewards.weights import find_file, only_prefixed, read_weights

__all__ = ["ImageReward"]

_REPOSITORY, _FILE = "THUDM/ImageReward", "ImageReward.pt"
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_TOKENS = 35


class ImageReward(NetworkReward):
    """ImageReward, version 1.0.

    Args:
        path: the checkpoint `ImageReward.pt` or its `.safetensors`, a folder that has it, or a Hub name.
        tokenizer: folder or Hub name of `bert-base-uncased`'s tokenizer.
        antialias: filter before shrinking an image, as the image library of the training pipeline did.
        micro_batch: images scored at a time; None: all of them.
        dtype: of the two towers, 445,278,720 weights; the head stays in float32.
        sha256: what the checkpoint must hash to; None: no check.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        FileNotFoundError: if there is no checkpoint or no tokenizer, or the Hub cannot be reached.
        ValueError: if the checkpoint is refused.
    """

    sources: ClassVar[tuple[str, ...]] = ("xu2023imagereward", "li2022blip")
    needs_prompts = True
    has_skeleton = True

    def __init__(
        self,
        path: str = _REPOSITORY,
        tokenizer: str = "google-bert/bert-base-uncased",
        antialias: bool = True,
        *,
        micro_batch: int | None = None,
        dtype: NetworkDtype = "float32",
        sha256: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(micro_batch=micro_batch, **kwargs)
        file = find_file("ImageReward", path, _FILE)
        state = read_weights("ImageReward", file, sha256)
        vision, text = self.configurations()
        make: dict[str, Any] = {"owner": "ImageReward", "source": str(file), "dtype": network_dtype(dtype)}
        seeing = blip_vision_to_transformers(only_prefixed(state, "blip.visual_encoder."))
        reading = only_prefixed(state, "blip.text_encoder.")
        reading.pop("embeddings.position_ids", None)  # 0, 1, 2...: saved as a buffer by older versions
        self.vision = Frozen(with_weights(kind="BlipVisionModel", config=vision, state=seeing, **make))
        self.text = Frozen(
            with_weights(kind="BlipTextModel", config=text, state=reading, add_pooling_layer=False, **make)
        )
        rating = only_prefixed(state, "mlp.")
        head = linear_head("ImageReward", str(file), text.hidden_size, rating, network_dtype("float32"))
        self.head: Frozen[nn.Module] = Frozen(head)
        self.tokenizer = load_tokenizer("ImageReward", tokenizer)  # after the checkpoint is known to be the right one
        size = vision.image_size
        self.preprocess = ImagePreprocessing(size, (size, size), CLIP_MEAN, CLIP_STD, antialias=antialias, odd="even")

    @staticmethod
    def configurations() -> tuple[Any, Any]:
        """BLIP's ViT-L/16, a `BlipVisionConfig`, and its BERT with cross attention, a `BlipTextConfig`."""
        from transformers import BlipTextConfig, BlipVisionConfig

        vision = BlipVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=16,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
        text = BlipTextConfig(
            vocab_size=30524,  # BERT's, [DEC] and [ENC]
            hidden_size=768,
            encoder_hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=512,
            is_decoder=True,  # it has cross attention; but it is called as an encoder
            layer_norm_eps=1e-12,
            hidden_act="gelu",
        )
        return vision, text

    def read(self, prompts: list[str]) -> Tensor:
        """The prompts' tokens and which of them count, (B, 2, 35)."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt")
        both = torch.stack([tokens["input_ids"], tokens["attention_mask"]], 1)
        return both.to(next(self.text.module.parameters()).device)

    def blank(self, n: int) -> Tensor:
        """Tokens (n, 2, 35) that all count."""
        return torch.ones(n, 2, _TOKENS, dtype=torch.long)

    def score_chunk(self, images: Tensor, read: Tensor) -> Tensor:
        """`(h(c) - m) / s`: images (b, 3, H, W), tokens (b, 2, 35) -> (b,)."""
        tokens, mask = read.unbind(1)
        dtype = next(self.vision.module.parameters()).dtype
        patches = self.vision(self.preprocess(images).to(dtype)).last_hidden_state
        c = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        h: Tensor = self.head(c.to(next(self.head.module.parameters()).dtype)).squeeze(1)
        return (h - _MEAN) / _STD
