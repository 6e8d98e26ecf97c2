"""Sharding by model family: strategies that a YAML names, `trainer.strategy: fsdp2_sd3`.

    ddp             Lightning's own: every process holds everything, gradients are averaged
    fsdp2           FSDP2: every process holds 1/n of the network, of its gradients, and of what the optimiser keeps
    fsdp2_sd15      the same, gathered by the blocks of a U-Net
    fsdp2_sd3       the same, gathered by joint transformer blocks; for SD 3 and 3.5
    ..._checkpoint  recomputes each block's activations in the backward pass
    ..._offload     keeps shards, gradients and optimiser in the CPU's memory; `..._offload_checkpoint` does both
    fsdp_sd15, fsdp_sd3     the classic FSDP with the same blocks, on GPUs

**What is sharded.**  The network that is trained and, under full fine-tuning, its frozen copy: both are called by all
processes in step.  With LoRA the base is the same network, adapters off, and nothing is held twice.  VAE, text encoders
and rewards are copies of every process: a prompt whose embedding one process remembers is not encoded there, and a
sharded encoder would wait for it forever.

**Precision.**  Parameters, gradients' sums, the optimiser and its averages are float32 (frozen weights of a LoRA stay
in the predictor's `dtype`).  With `precision: bf16-mixed` blocks are gathered, and compute, in bfloat16.  Inputs are
not cast on entry: timesteps stay exact.  States, adjoints, rewards and the loss are float32 on every strategy.

**Checkpoints** are single files of whole tensors, the very ones that ddp and a single device write: each loads the
others'.  A user's own host calls `shard(self)` in `configure_model`.
"""

from difflib import get_close_matches
from typing import Any, get_args

from lightning.pytorch.strategies import StrategyRegistry

from lightning_tilt.strategies.blocks import BLOCKS, Family, blocks_of
from lightning_tilt.strategies.fsdp import BlockFSDPStrategy, wrap_policy
from lightning_tilt.strategies.fsdp2 import FSDP2Strategy
from lightning_tilt.strategies.hosts import shard, whole_weights

__all__ = [
    "BLOCKS",
    "BlockFSDPStrategy",
    "FSDP2Strategy",
    "Family",
    "blocks_of",
    "check_name",
    "shard",
    "whole_weights",
    "wrap_policy",
]


def check_name(strategy: object) -> None:
    """Refuse a name that no strategy has; Lightning's "auto", and whatever is no name, pass.

    Raises:
        ValueError: with the nearest names.
    """
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy.lower() not in known:
        near = get_close_matches(strategy.lower(), known, n=3)
        raise ValueError(
            f"trainer.strategy: there is no {strategy!r}; {'did you mean ' if near else 'known are '}"
            f"{' or '.join(near) if near else ', '.join(sorted(known))}?"
        )


def _register() -> None:
    suffixes: dict[str, dict[str, Any]] = {
        "": {},
        "_checkpoint": {"activation_checkpointing": True},
        "_offload": {"cpu_offload": True},
        "_offload_checkpoint": {"cpu_offload": True, "activation_checkpointing": True},
    }
    for family in get_args(Family):
        for suffix, options in suffixes.items():
            name = f"fsdp2{'' if family == 'any' else '_' + family}{suffix}"
            StrategyRegistry.register(name, FSDP2Strategy, override=True, family=family, **options)
    for family in BLOCKS:
        StrategyRegistry.register(f"fsdp_{family}", BlockFSDPStrategy, override=True, family=family)


_register()
