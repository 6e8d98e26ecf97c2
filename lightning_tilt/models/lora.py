"""Low-rank adapters: add them to a network, switch them off for the base, write them down.

    W x  ->  W x + (alpha / rank) B A x        A: (rank, in), B: (out, rank), B = 0 at the start   (2106.09685)

The tuned network and the base are one set of weights: with the adapters off, the network is the untuned one, bit for
bit.  Switching leaves `requires_grad` of every parameter as it was (peft alone would not), so that optimisers,
checkpoints and DDP see nothing of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_tilt.interfaces import Cited

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["CitesLoRA", "adapters_off", "add_lora", "lora_metadata", "lora_weights"]

_NAME = "default"
_SOURCES = ("hu2021lora",)


class CitesLoRA(Cited):
    """A model whose argument `tuning` is "lora" by default: it cites LoRA where it has adapters."""

    _adapted: list[Any]

    @classmethod
    def sources_with(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """See `Cited`."""
        return (*cls.sources, *(_SOURCES if arguments.get("tuning", "lora") == "lora" else ()))

    def own_sources(self) -> tuple[str, ...]:
        """See `Cited`."""
        return (*self.sources, *(_SOURCES if self._adapted else ()))


def add_lora(network: Any, rank: int, alpha: float, targets: Sequence[str]) -> list["BaseTunerLayer"]:
    """Freeze `network` (a diffusers model) and add adapters, float32 where the network is of lower precision.

    Args:
        network: the denoiser; changed in place.
        rank: inner dimension of A and B.
        alpha: the adapters are scaled by `alpha / rank`.
        targets: ends of the names of the layers that get one, e.g. `["to_q", "to_out.0"]`.

    Returns:
        The layers with adapters, in the network's order.

    Raises:
        ValueError: if the rank is not positive, or a target matches no layer.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, not {rank}")
    names = ["." + name for name, _ in network.named_modules()]
    missing = [target for target in targets if not any(name.endswith("." + target) for name in names)]
    if missing or not targets:
        raise ValueError(
            f"LoRA targets {missing} match no layer of {type(network).__name__}; they are ends of the names in "
            "`network.named_modules()`, e.g. 'to_q'"
        )
    network.requires_grad_(False)
    # peft declares alpha an int, and divides it by the rank: a float serves as well.
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
    network.add_adapter(LoraConfig(**options), adapter_name=_NAME)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def adapters_off(layers: Sequence["BaseTunerLayer"]) -> Iterator[None]:
    """Adapters off for the length of a `with` block; nested blocks and exceptions restore what was."""
    were_on = [layer for layer in layers if not layer.disable_adapters]
    _switch(were_on, on=False)
    try:
        yield
    finally:
        _switch(were_on, on=True)


def _switch(layers: Sequence["BaseTunerLayer"], on: bool) -> None:
    # peft couples the switch with requires_grad; a graph, an optimiser or a checkpoint must not notice it.
    flags = [(p, p.requires_grad) for layer in layers for p in _as_module(layer).parameters()]
    for layer in layers:
        layer.enable_adapters(on)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _as_module(layer: Any) -> nn.Module:
    assert isinstance(layer, nn.Module)
    return layer


def lora_weights(network: Any) -> dict[str, Tensor]:
    """The adapters' weights by the names that diffusers' `save_lora_weights` expects, on the CPU."""
    from peft.utils import get_peft_model_state_dict

    weights = get_peft_model_state_dict(network, adapter_name=_NAME, save_embedding_layers=False)
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


def lora_metadata(network: Any) -> dict[str, Any]:
    """Rank, alpha and targets; without them a loader has to guess that alpha equals the rank."""
    metadata: dict[str, Any] = network.peft_config[_NAME].to_dict()
    return metadata
