"""The two towers of a CLIP, as rewards use them.

    f(x) = normalise(W_f vision(x)),     g(prompt) = normalise(W_g text(prompt)),     both of length 1, (B, D)

`CLIPImages` has f, differentiable in the images; `CLIPTower` has g as well, computed once for each prompt.  Loading is
transformers' (`from_pretrained`), but a weight that is missing is an error here, not a random number.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tilt.assets import locate
from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import ImageEmbedding
from lightning_tilt.interfaces.reports import without_reports
from lightning_tilt.interfaces.skeleton import skeleton_device
from lightning_tilt.rewards.known_clips import CLIP_NAME, clip_skeleton, known_clip
from lightning_tilt.rewards.network import NetworkReward
from lightning_tilt.rewards.preprocessing import ImagePreprocessing
from lightning_tilt.rewards.weights import check_fit, check_sha256, first_line, is_local

__all__ = ["CLIP_NAME", "CLIPImages", "CLIPTower", "load_clip", "load_tokenizer", "with_weights"]

_CACHED_PROMPTS = 4096  # 16 MB at 1024 dimensions


class CLIPImages(NetworkReward, ImageEmbedding):
    """A reward that sees images through a CLIP; a subclass sets `network` and `preprocess`."""

    has_skeleton = True
    network: Frozen[nn.Module]
    preprocess: ImagePreprocessing

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings of images in [0, 1]: (B, D), float32 or float64, with a gradient."""
        return self._in_chunks(self._embed, images)

    def _embed(self, images: Tensor) -> Tensor:
        f = self.see(self.preprocess(images).to(self._weight().dtype))
        return nn.functional.normalize(_at_least_float32(f), dim=1)

    def see(self, pixels: Tensor) -> Tensor:
        """The image tower: (b, 3, height, width), preprocessed, in the network's dtype -> (b, D)."""
        model: Any = self.network.module
        # The parts, not `get_image_features`: what that returns depends on the version of transformers.
        f: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return f

    def _weight(self) -> Tensor:
        """Any weight: it has the network's dtype and device."""
        return next(self.network.module.parameters())


class CLIPTower(CLIPImages):
    """A reward that compares images with prompts in a CLIP's common space; a subclass sets `tokenizer` as well."""

    needs_prompts = True
    tokenizer: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._known: dict[tuple[str, torch.dtype], Tensor] = {}

    def read(self, prompts: list[str]) -> Tensor:
        """The prompts' embeddings."""
        return self.embed_prompts(prompts)

    def blank(self, n: int) -> Tensor:
        """Columns (n, 1), which go with images' embeddings of any width."""
        return torch.ones(n, 1)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings of prompts: (B, D), float32 or float64, without a gradient; each is computed once.

        Prompts longer than the text tower reads are cut; the end token stays.
        """
        weight = self._weight()
        new = [p for p in dict.fromkeys(prompts) if (p, weight.dtype) not in self._known]
        n = self.micro_batch or max(1, len(new))
        for i in range(0, len(new), n):
            for prompt, g in zip(new[i : i + n], self._encode(new[i : i + n]), strict=True):
                self._known[prompt, weight.dtype] = g
        embedded = torch.stack([self._known[prompt, weight.dtype].to(weight.device) for prompt in prompts])
        while len(self._known) > _CACHED_PROMPTS:
            del self._known[next(iter(self._known))]
        return embedded

    # What is cached in inference mode could not be used with a gradient later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        return nn.functional.normalize(_at_least_float32(self.read_tokens(prompts)), dim=1)

    def read_tokens(self, prompts: list[str]) -> Tensor:
        """The tokenizer and the text tower: b strings -> (b, D)."""
        model: Any = self.network.module
        # Padded to one length always, so that an embedding does not depend on its neighbours.
        length = min(self.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(model.device)
        pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        g: Tensor = model.text_projection(pooled)
        return g


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def load_clip(
    owner: str, path: str, dtype: torch.dtype, sha256: str | None, mend: str
) -> tuple[Any, ImagePreprocessing]:
    """A `CLIPModel` in transformers' layout, and what it does to images first; inside `without_weights` a skeleton.

    Args:
        owner: whose message it is.
        path: folder or Hub name.
        dtype: of the network.
        sha256: of its `model.safetensors` (or `pytorch_model.bin`, if there is only that); None: no check.
        mend: what to do if it is not there.

    Raises:
        FileNotFoundError: if there is no CLIP at `path`, or the Hub cannot be reached.
        NoSkeleton: inside `without_weights`, for a Hub name that the package does not know.
        ValueError: if weights are missing, or the checksum is another.
    """
    from transformers import CLIPConfig, CLIPModel
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.utils import cached_file

    name = str(locate(path)) if is_local(path) else path
    device = skeleton_device()
    if device is not None and not is_local(path):
        known, preprocess = known_clip(owner, path)
        return clip_skeleton(known, dtype, device), preprocess
    try:
        # Looked at first: small, and absent where there is nothing.
        config, _ = ImageProcessingMixin.get_image_processor_dict(name)
        if device is not None:
            layout, _ = CLIPConfig.get_config_dict(name)
            if layout.get("model_type") != "clip":
                raise OSError(f"its config.json is of the kind {layout.get('model_type')!r}, not 'clip'")
            return clip_skeleton(CLIPConfig.from_dict(layout), dtype, device), ImagePreprocessing.from_config(config)
        if sha256 is not None:
            found = {f: cached_file(name, f, _raise_exceptions_for_missing_entries=False) for f in _WEIGHTS}
            file = next((f for f in found.values() if f is not None), None)
            if file is None:
                raise OSError(f"no {' or '.join(_WEIGHTS)} whose sha256 could be compared")
            check_sha256(owner, Path(file), sha256)
        preprocess = ImagePreprocessing.from_config(config)
        with without_reports():
            network, told = CLIPModel.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except OSError as error:
        gone = is_local(path) and not Path(name).is_dir()
        reason = "there is no such folder" if gone else first_line(error)
        raise FileNotFoundError(f"{owner} could not load a CLIP from {name!r}; {mend} ({reason})") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{owner}: the weights of the CLIP in {name!r} are a pickle that is damaged or holds more than tensors; no "
            "code of it was run; give a model.safetensors in its place"
        ) from None
    except Exception as error:  # a damaged file fails in many ways, and ours say all in one line
        if str(error).startswith(f"{owner}:"):
            raise
        raise ValueError(
            f"{owner} could not read the CLIP in {name!r}; its files are truncated or another network's; fetch them "
            f"again ({first_line(error)})"
        ) from None
    lacking = sorted({*told["missing_keys"], *(key[0] for key in told["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"{owner}: {name!r} is a checkpoint of another network: {len(lacking)} weights are missing or of another "
            f"shape, {lacking[0]} among them"
        )
    return network, preprocess


_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_tokenizer(owner: str, path: str) -> Any:
    """The tokenizer in a folder or of a Hub name; None of a Hub name inside `without_weights`, which fetches nothing.

    Args:
        owner: whose message it is.
        path: folder with its files, or Hub name.

    Raises:
        FileNotFoundError: if there is none, or the Hub cannot be reached.
    """
    from transformers import AutoTokenizer

    if skeleton_device() is not None and not is_local(path):
        return None
    name = str(locate(path)) if is_local(path) else path
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a folder without its files fails in many ways
        raise FileNotFoundError(
            f"{owner} could not load a tokenizer from {name!r}; give a folder with its files, or a Hub name "
            f"({first_line(error)})"
        ) from None


def with_weights(
    owner: str, source: str, kind: str, config: Any, state: Mapping[str, Tensor], dtype: torch.dtype, **options: Any
) -> nn.Module:
    """A network of transformers with given weights, all of them and no other; a skeleton inside `without_weights`.

    Args:
        owner: whose message it is.
        source: where the weights come from, for the message.
        kind: class of transformers.
        config: its configuration.
        state: weights by its names, in any floating-point format.
        dtype: of the network.
        options: of the class.

    Raises:
        ValueError: if a weight is missing, left over, or of another shape.
    """
    import transformers

    make = getattr(transformers, kind)
    if (device := skeleton_device()) is not None:
        with device:
            skeleton: nn.Module = make(config, **options).to(dtype)
        return skeleton.eval()
    with torch.device("meta"):
        wanted = make(config, **options).state_dict()
    check_fit(owner, source, state, wanted)
    network: nn.Module = make.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype, **options)
    return network
