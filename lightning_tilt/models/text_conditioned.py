"""Predictors that are told what to draw in words: text encoders, and the embeddings that they have made.

Each prompt is encoded alone, once; see `PromptEmbeddings` for where its embedding is kept.  With all of them in a
folder the encoders are not needed: they are not loaded, or dropped once they have done their work.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tilt.condition import quoted
from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Condition, ExportablePredictor, Prompts
from lightning_tilt.models.embeddings import PromptEmbeddings

__all__ = ["TextConditioned"]


class TextConditioned(ExportablePredictor):
    """A predictor whose conditions are prompts, by the text encoders of a diffusers pipeline.

    Attributes:
        network: the denoiser; conditions go where it is.
        encoders: the text encoders that are loaded, frozen.
        embeddings: what they have made.
    """

    text_encoders: ClassVar[tuple[str, ...]]
    """Which of the pipeline's components encode prompts."""

    network: Any
    encoders: nn.ModuleList
    embeddings: PromptEmbeddings
    _pipeline: Any
    _encoder_dtype: torch.dtype

    def _set_up_text(self, embeddings: PromptEmbeddings, dtype: torch.dtype) -> None:
        """Hold the pipeline's text encoders; `dtype` is theirs, whether they are loaded or not."""
        found = [self._pipeline.components[name] for name in self.text_encoders]
        self.encoders = nn.ModuleList(Frozen(encoder) for encoder in found if encoder is not None)
        self.embeddings = embeddings
        self._encoder_dtype = dtype

    def encode(self, prompts: Prompts, size: int) -> Condition:
        """The text encoders' embeddings of `size` prompts, "" for each where `prompts` is None.

        Each prompt is encoded alone, in the encoders' own precision, and remembered: its embedding does not depend on
        the batch that it came in, on autocast or on the number of processes.

        Raises:
            ValueError: if there are not `size` prompts.
        """
        texts = [""] * size if prompts is None else list(prompts)
        if len(texts) != size:
            raise ValueError(f"{len(texts)} prompts were given for {size} samples")
        device = next(self.network.parameters()).device
        found = [self._embedding(text) for text in texts]
        return Condition({name: torch.stack([e[name] for e in found]).to(device) for name in found[0]}, texts, size)

    @abstractmethod
    def _encode_alone(self, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """The denoiser's keyword arguments for one prompt, each (1, ...)."""

    def cache_prompts(self, prompts: Sequence[str]) -> None:
        """Encode the prompts, and "" for guidance, that are not known yet."""
        for prompt in dict.fromkeys(["", *prompts]):
            self._embedding(prompt)

    def drop_encoders(self) -> None:
        """Remove the text encoders from memory; from now on prompts are those that `embeddings` has on disk.

        Raises:
            ValueError: if the embeddings have no folder.
        """
        if self.embeddings.folder is None:
            raise ValueError("the text encoders can be dropped only where predictor.embeddings names a folder")
        self.encoders = nn.ModuleList()
        for name in self.text_encoders:
            self._pipeline.register_modules(**{name: None})

    def _embedding(self, prompt: str) -> dict[str, Tensor]:
        """One prompt's embeddings, without batch, on the CPU; the most recently used are kept."""
        encoder = next(iter(self.encoders), None)
        weights = None if encoder is None else next(encoder.module.parameters())  # type: ignore[union-attr]
        dtype = self._encoder_dtype if weights is None else weights.dtype
        found = self.embeddings.find(prompt, dtype)
        if found is not None:
            return found
        if weights is None:
            raise FileNotFoundError(
                f"the prompt {quoted(prompt)} has no embedding in {str(self.embeddings.folder)!r}, and the text "
                "encoders are not loaded: encode it first (lightning-tilt fit ... --dry_run prompts), or unset "
                "without_encoders"
            )
        # What a validation under inference mode remembers, training must be able to save for its backward.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
            told = self._encode_alone(prompt, weights.device)
        self.embeddings.add(prompt, dtype, {name: tensor[0] for name, tensor in told.items()})
        return {name: tensor[0].cpu() for name, tensor in told.items()}

    def _apply(self, fn: Any, recurse: bool = True) -> "TextConditioned":
        # Another device or dtype of the text encoders: what was remembered is theirs no more.
        if self.embeddings.folder is None:
            self.embeddings.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
