"""Latent diffusion: a denoiser on the latents of a VAE, told what to draw by text encoders.

    prompts   -- text encoders -->  condition
    x, t, condition -- denoiser -->  prediction        x: latents (B, C, H/f, W/f), t in [0, 1), noise to data
    x         -- VAE -->            images in [0, 1]   (B, 3, H, W)

`LatentDiffusion` is what Stable Diffusion's families share; a family says which process its denoiser was trained with
and how a prompt becomes the denoiser's arguments.  Of its parts only the denoiser is trained, in whole or by
adapters; VAE and text encoders are frozen.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Condition, ExportablePredictor, Predictor, Prompts
from lightning_tilt.models.export import how_to_load, tuned_pipeline
from lightning_tilt.models.loading import Dtype, load_pipeline, torch_dtype
from lightning_tilt.models.lora import adapters_off, add_lora, lora_metadata, lora_weights

__all__ = ["LatentDiffusion", "Tuning"]

Tuning = Literal["lora", "full"]
"""What is trained: low-rank adapters beside the frozen denoiser, or all of the denoiser's weights."""


def _recompute(module: nn.Module, *args: Any) -> Any:
    # diffusers' own is a local function, which no spawned process can be sent.
    return checkpoint(module, *args, use_reentrant=False)


class LatentDiffusion(ExportablePredictor):
    """A predictor around a diffusers pipeline.

    Args:
        path: folder that diffusers' `save_pretrained` wrote, or a name on the Hub.
        tuning: "lora" trains adapters, "full" all weights of the denoiser (kept in float32, beside a frozen copy).
        rank: inner dimension of the adapters; LoRA alone.
        alpha: the adapters are scaled by `alpha / rank`; None is `alpha = rank`, a scale of 1 whatever the rank.
        targets: ends of the names of the layers that get adapters; None is all attention projections.
        dtype: of the frozen weights, whatever is on disk: text encoders and, with LoRA, the denoiser.
        vae_dtype: of the VAE's weights; rewards differentiate through it, so it is float32 by default.
        gradient_checkpointing: keep fewer activations of denoiser and VAE, for one more forward a backward.
        height: of the images, in pixels; None is the size that the model was trained with.
        width: of the images, in pixels; None is the size that the model was trained with.
        cached_prompts: how many prompts' embeddings are kept in the CPU's memory (SD 1.5: .2 MB each, SD 3: 3 - 6).
        variant: of the weight files, e.g. "fp16".
        revision: of the Hub repository: branch, tag or commit.
        without: components that are not loaded.

    Raises:
        FileNotFoundError: if `path` is neither a folder with a `model_index.json` nor found on the Hub.
        ValueError: for another kind of pipeline, an unknown scheduler or option, a size that does not fit.
    """

    pipeline_class: ClassVar[str]
    """Name of the diffusers pipeline class."""
    denoiser: ClassVar[str]
    """Which of the pipeline's components predicts."""
    attention_projections: ClassVar[tuple[str, ...]]
    """The layers that get adapters where nothing else is said."""
    text_encoders: ClassVar[tuple[str, ...]]
    """Which of the pipeline's components encode prompts."""

    def __init__(
        self,
        path: str | Path,
        *,
        tuning: Tuning = "lora",
        rank: int = 8,
        alpha: float | None = None,
        targets: list[str] | None = None,
        dtype: Dtype = "float32",
        vae_dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        height: int | None = None,
        width: int | None = None,
        cached_prompts: int = 512,
        variant: str | None = None,
        revision: str | None = None,
        without: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if tuning not in get_args(Tuning):
            raise ValueError(f"unknown tuning {tuning!r}; known are {', '.join(get_args(Tuning))}")
        dtypes = {"default": torch_dtype(dtype), "vae": torch_dtype(vae_dtype)}
        if tuning == "full":
            dtypes[self.denoiser] = torch.float32
        self._pipeline = load_pipeline(
            path, self.pipeline_class, dtypes, without=without, variant=variant, revision=revision
        )
        parts = self._pipeline.components
        self.network = parts[self.denoiser].train()  # the pipeline comes in eval mode; this part is what a fit trains
        self.vae: Frozen[Any] = Frozen(parts["vae"])
        self.encoders = nn.ModuleList(Frozen(parts[name]) for name in self.text_encoders if parts[name] is not None)
        self.state_shape = self._shape(height, width)
        self._embeddings: dict[str, dict[str, Tensor]] = {}
        self._cached_prompts = cached_prompts
        if gradient_checkpointing:
            for part in (self.network, self.vae.module):
                part.enable_gradient_checkpointing(_recompute)
        self._adapted: list[Any] = []
        if tuning == "lora":
            names = self.attention_projections if targets is None else targets
            self._adapted = add_lora(self.network, rank, rank if alpha is None else alpha, names)
            self.backward_cost = 1
        else:
            self.network.requires_grad_(True)
            self.untuned: Frozen[Any] = Frozen(copy.deepcopy(self.network))

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline around the tuned network (the same weights, not a copy)."""
        return self._pipeline

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output; see `Predictor.predict`.  It computes in the dtype of the denoiser's weights."""
        dtype = next(self.network.parameters()).dtype
        told = {name: tensor.to(x.device, dtype) for name, tensor in condition.tensors.items()}
        # Timesteps stay integer, or float32: bfloat16 knows no 999.
        output: Tensor = self.network(x.to(dtype), timestep=self.process.timestep(t), **told, return_dict=False)[0]
        return output.to(x.dtype)

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        """The untuned model, exactly.

        LoRA: this predictor with its adapters off, so whatever is differentiated through the base must be
        differentiated inside the block: `gradient_checkpointing` computes the forward again in the backward.
        Full: another predictor around the frozen copy, which shares everything else.
        """
        if self._adapted:
            with adapters_off(self._adapted):
                yield self
        else:
            view = copy.copy(self)
            view._modules = {**self._modules, "network": self.untuned.module}
            yield view

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

    def decode(self, x: Tensor) -> Tensor:
        """Images in [0, 1] (B, 3, H, W) of the latents `x` (B, C, H/f, W/f), differentiable, in the dtype of `x`.

            image = clamp(VAE(x / scaling_factor + shift_factor) / 2 + 1/2, 0, 1)

        The clamp is an ordinary one: a saturated pixel has no gradient.  That is the true gradient of the images that
        are scored and saved, so the law that is tilted is theirs; a straight-through clamp would train for another
        reward than the reported one.  Autocast does not reach in here: the VAE computes in its own dtype.
        """
        vae = self.vae.module
        z = x.to(vae.dtype) / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)
        with torch.autocast(x.device.type, enabled=False):
            images: Tensor = vae.decode(z, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).to(x.dtype)

    def save(self, folder: str | Path) -> None:
        """Write what was trained, for users of diffusers alone.

        LoRA: a file that the untuned pipeline's `load_lora_weights(folder)` takes.  Full: the denoiser, in
        `folder/unet` or `folder/transformer`, for its own `from_pretrained`.
        """
        if not self._adapted:
            self.network.save_pretrained(Path(folder) / self.denoiser)
            return
        layers, metadata = f"{self.denoiser}_lora_layers", f"{self.denoiser}_lora_adapter_metadata"
        type(self._pipeline).save_lora_weights(
            str(folder), **{layers: lora_weights(self.network), metadata: lora_metadata(self.network)}
        )

    def save_pipeline(self, folder: str | Path) -> None:
        """Write the whole tuned pipeline, adapters merged, for `DiffusionPipeline.from_pretrained(folder)`."""
        tuned_pipeline(self._pipeline, self.denoiser, bool(self._adapted)).save_pretrained(folder)

    @property
    def origin(self) -> str:
        """The folder or Hub name that the pipeline was loaded from."""
        return str(self._pipeline.name_or_path)

    def how_to_load(self, whole: bool, steps: int, guidance_scale: float) -> str:
        """Python for plain diffusers."""
        return how_to_load(self._pipeline, self.denoiser, bool(self._adapted), whole, steps, guidance_scale)

    @abstractmethod
    def _encode_alone(self, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """The denoiser's keyword arguments for one prompt, each (1, ...)."""

    def _embedding(self, prompt: str) -> dict[str, Tensor]:
        """One prompt's embeddings, without batch, on the CPU; the most recently used are kept."""
        if prompt in self._embeddings:
            embedding = self._embeddings.pop(prompt)
        else:
            device = next(self._pipeline.components[self.text_encoders[0]].parameters()).device
            # What a validation under inference mode remembers, training must be able to save for its backward.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                told = self._encode_alone(prompt, device)
            embedding = {name: tensor[0].cpu() for name, tensor in told.items()}
        self._embeddings[prompt] = embedding
        if len(self._embeddings) > self._cached_prompts:
            self._embeddings.pop(next(iter(self._embeddings)))
        return embedding

    def _shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Shape of one latent for images of `height` x `width` pixels."""
        config, factor = self.network.config, self._pipeline.vae_scale_factor
        sample = config["sample_size"]
        rows, columns = sample if isinstance(sample, (list, tuple)) else (sample, sample)
        multiple = factor * config.get("patch_size", 1)
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < multiple or pixels % multiple):
                raise ValueError(f"{name} must be a multiple of {multiple} pixels for this model, not {pixels}")
        rows = rows if height is None else height // factor
        columns = columns if width is None else width // factor
        return (config["in_channels"], rows, columns)

    def _apply(self, fn: Any, recurse: bool = True) -> "LatentDiffusion":
        # Another device or dtype of the text encoders: what was remembered is theirs no more.
        self._embeddings.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
