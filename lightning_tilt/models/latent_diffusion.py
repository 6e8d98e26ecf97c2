"""Latent diffusion: a denoiser on the latents of a VAE, told what to draw by text encoders.

    prompts   -- text encoders -->  condition
    x, t, condition -- denoiser -->  prediction        x: latents (B, C, H/f, W/f), t in [0, 1), noise to data
    x         -- VAE -->            images in [0, 1]   (B, 3, H, W)

`LatentDiffusion` is what Stable Diffusion's families share; a family says which process its denoiser was trained with
and how a prompt becomes the denoiser's arguments.  Of its parts only the denoiser is trained, in whole or by
adapters; VAE and text encoders are frozen.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Condition, Predictor
from lightning_tilt.models.compiling import CompileMode, check_compile_mode, compile_in_place
from lightning_tilt.models.embeddings import PromptEmbeddings, identity_of
from lightning_tilt.models.export import how_to_load, tuned_pipeline
from lightning_tilt.models.loading import Dtype, load_pipeline, load_tiny_vae, torch_dtype
from lightning_tilt.models.lora import CitesLoRA, adapters_off, add_lora, lora_metadata, lora_weights
from lightning_tilt.models.text_conditioned import TextConditioned

__all__ = ["LatentDiffusion", "Tuning"]

Tuning = Literal["lora", "full"]
"""What is trained: low-rank adapters beside the frozen denoiser, or all of the denoiser's weights."""


def _recompute(module: nn.Module, *args: Any) -> Any:
    # diffusers' own is a local function, which no spawned process can be sent.
    return checkpoint(module, *args, use_reentrant=False)


class LatentDiffusion(CitesLoRA, TextConditioned):
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
        compile: compile the denoiser by `torch.compile` in this mode; the first calls of a run then take minutes.
        vae_slicing: decode one sample at a time, whatever the micro-batch.
        vae_tiling: decode images that are larger than the VAE was trained for in overlapping tiles, which changes them
            a little where tiles meet.
        tiny_vae: folder or Hub name of a small decoder in the VAE's place (`madebyollin/taesd`, `.../taesd3`).  All
            images, rewards and pictures are then the small decoder's: what is tilted is the law of its images.
        height: of the images, in pixels; None is the size that the model was trained with.
        width: of the images, in pixels; None is the size that the model was trained with.
        cached_prompts: how many prompts' embeddings are kept in the CPU's memory (SD 1.5: .2 MB each, SD 3: 3 - 6).
        embeddings: folder where the embeddings of all prompts are kept from run to run; None keeps them in memory.
        without_encoders: load no text encoder; all prompts, and "" for guidance, must be in `embeddings`.
        variant: of the weight files, e.g. "fp16".
        revision: of the Hub repository: branch, tag or commit.
        allow_pickle: read weights from a `.bin` where there is no `.safetensors`: tensors alone, code is never run.
        without: components that are not loaded.

    Raises:
        FileNotFoundError: if `path` is neither a folder with a `model_index.json` nor found on the Hub.
        ValueError: for another kind of pipeline, an unknown scheduler or option, a size or weights that do not fit.
    """

    pipeline_class: ClassVar[str]
    """Name of the diffusers pipeline class."""
    denoiser: ClassVar[str]
    """Which of the pipeline's components predicts."""
    attention_projections: ClassVar[tuple[str, ...]]
    """The layers that get adapters where nothing else is said."""

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
        compile: CompileMode = "off",
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        tiny_vae: str | None = None,
        height: int | None = None,
        width: int | None = None,
        cached_prompts: int = 512,
        embeddings: str | None = None,
        without_encoders: bool = False,
        variant: str | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
        without: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if tuning not in get_args(Tuning):
            raise ValueError(f"unknown tuning {tuning!r}; known are {', '.join(get_args(Tuning))}")
        check_compile_mode(compile)
        if without_encoders and embeddings is None:
            raise ValueError("without_encoders needs embeddings: the folder that has the embeddings of all prompts")
        dtypes = {"default": torch_dtype(dtype), "vae": torch_dtype(vae_dtype)}
        if tuning == "full":
            dtypes[self.denoiser] = torch.float32
        left_out = (*without, *(self.text_encoders if without_encoders else ()))
        self._load = partial(load_pipeline, path, self.pipeline_class, dtypes, variant, revision, allow_pickle)
        self._without, self._pipeline = tuple(without), self._load(without=left_out)
        parts = self._pipeline.components
        self.network = parts[self.denoiser].train()  # the pipeline comes in eval mode; this part is what a fit trains
        # The pipeline keeps its own VAE, for exports; it is not moved to the device then.
        vae = parts["vae"] if tiny_vae is None else load_tiny_vae(tiny_vae, dtypes["vae"], self.network.config)
        self.vae: Frozen[Any] = Frozen(vae)
        self._tiny_vae = "" if tiny_vae is None else str(tiny_vae)
        if vae_slicing:
            vae.enable_slicing()
        if vae_tiling:
            vae.enable_tiling()
        self.state_shape = self._shape(height, width)
        used = [n for n in self.text_encoders if n not in without]
        used += [name.replace("text_encoder", "tokenizer") for name in used]
        identity = {} if embeddings is None else identity_of(path, used, revision=revision, variant=variant)
        self._set_up_text(PromptEmbeddings(cached_prompts, embeddings, {**identity, "parts": used}), dtypes["default"])
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
            compile_in_place(self.untuned.module, compile)
        compile_in_place(self.network, compile)

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

    def sharded_networks(self) -> list[nn.Module]:
        """The denoiser, and its frozen copy under full fine-tuning; VAE and text encoders stay whole."""
        return [self.network] if self._adapted else [self.network, self.untuned.module]

    def replace_networks(self, change: Callable[[nn.Module], nn.Module]) -> None:
        """Put `change(network)` in the place of the denoiser, and of its frozen copy."""
        self.network = change(self.network)
        if not self._adapted:
            self.untuned = Frozen(change(self.untuned.module))

    def checkpoint_activations(self) -> None:
        """Recompute the activations of each of the denoiser's blocks in the backward pass."""
        for network in self.sharded_networks():
            network.enable_gradient_checkpointing(_recompute)  # type: ignore[operator]

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
        """Write the whole tuned pipeline, adapters merged, for `DiffusionPipeline.from_pretrained(folder)`.

        Text encoders that were dropped, or never loaded, are read again: the pipeline has them.
        """
        pipeline = copy.copy(tuned_pipeline(self._pipeline, self.denoiser, bool(self._adapted)))
        gone = [n for n in self.text_encoders if pipeline.components[n] is None and n not in self._without]
        if gone:
            fresh = self._load(without=(*self._without, self.denoiser, "vae")).components
            pipeline.register_modules(**{name: fresh[name] for name in gone})
        pipeline.save_pretrained(folder)

    @property
    def origin(self) -> str:
        """The folder or Hub name that the pipeline was loaded from."""
        return str(self._pipeline.name_or_path)

    @property
    def borrowed_decoder(self) -> str:
        """`tiny_vae`; the exported pipeline has its own VAE all the same."""
        return self._tiny_vae

    def how_to_load(self, whole: bool, steps: int, guidance_scale: float) -> str:
        """Python for plain diffusers."""
        adapted, decoder = bool(self._adapted), self._tiny_vae
        return how_to_load(self._pipeline, self.denoiser, adapted, whole, steps, guidance_scale, decoder)

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
