"""The classic FSDP with the same blocks, for GPUs and those who need it; FSDP2 does all of this, and more.

Lightning would wrap the whole LightningModule, and a rollout calls the network before `training_step` does: the network
itself is the root here, and its blocks are wrapped inside of it.  A flat parameter has one dtype, so adapters in
float32 beside a network in bfloat16 are wrapped by themselves.

Every process sees flat pieces of parameters: what needs whole ones (`ExponentialMovingAverage`, `ExportWeights`, Tilt
Matching's copy, clipping by norm) is refused, and the gradient's norm is not logged.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lightning_tilt.interfaces import Predictor
from lightning_tilt.strategies.blocks import BLOCKS, Family, blocks_of

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecision

__all__ = ["BlockFSDPStrategy", "wrap_policy"]

_PRECISIONS = ("32-true", "bf16-mixed")


def wrap_policy(network: nn.Module, family: Family) -> Callable[[nn.Module], bool]:
    """Which modules of a network are wrapped: its family's blocks, and adapters of another dtype than the network's.

    Args:
        network: what a predictor shards.
        family: whose blocks.

    Raises:
        ValueError: if the network has no block of that family.
    """
    blocks = {id(block) for block in blocks_of(network, family)}
    mixed = len({p.dtype for p in network.parameters()}) > 1

    def wrapped(module: nn.Module) -> bool:
        own = list(module.parameters(recurse=False))
        return id(module) in blocks or (mixed and bool(own) and all(p.requires_grad for p in own))

    return wrapped


class BlockFSDPStrategy(FSDPStrategy):
    """Classic FSDP of a predictor's networks, block by block.

    Args:
        family: whose blocks are wrapped: "sd15" or "sd3".
        cpu_offload: keep shards in the CPU's memory.

    Raises:
        ValueError: for an unknown family; at set-up without GPUs, or for a precision that casts what must stay float32.
    """

    def __init__(self, family: Family = "sd15", cpu_offload: bool = False) -> None:
        if family not in BLOCKS:
            raise ValueError(f"the classic fsdp knows the families {', '.join(BLOCKS)}, not {family!r}: use fsdp2")
        super().__init__(cpu_offload=cpu_offload, use_orig_params=True)
        self.family: Family = family

    @property
    def mixed_precision_config(self) -> "MixedPrecision | None":
        """Blocks in bfloat16 under bf16-mixed, sums in float32, inputs as they are."""
        if str(self.precision_plugin.precision) != "bf16-mixed":
            return None
        from torch.distributed.fsdp import MixedPrecision

        half, single = torch.bfloat16, torch.float32
        return MixedPrecision(half, single, single, cast_forward_inputs=False, cast_root_forward_inputs=False)

    def setup_environment(self) -> None:
        """Refuse devices and precisions that it is not for."""
        if self.root_device.type != "cuda":
            raise ValueError(
                f"strategy fsdp_{self.family} needs GPUs: on the {self.root_device.type} use fsdp2_{self.family} or ddp"
            )
        precision = str(self.precision_plugin.precision)
        if precision not in _PRECISIONS:
            raise ValueError(f"fsdp_{self.family} runs with precision 32-true or bf16-mixed, not {precision}")
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Refuse to clip by a norm that no process knows."""
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            raise ValueError(
                f"fsdp_{self.family} cannot clip by norm: gradient_clip_algorithm: value, or fsdp2_{self.family}"
            )
        super().setup(trainer)

    def shard_predictor(self, predictor: Predictor) -> None:
        """Wrap the predictor's networks, once."""
        predictor.replace_networks(self._wrapped)

    def _wrapped(self, network: nn.Module) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        if isinstance(network, FullyShardedDataParallel):
            return network
        policy = wrap_policy(network, self.family)
        return FullyShardedDataParallel(
            network,
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: True if recurse else policy(module),
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device.index,
            use_orig_params=True,
        )
