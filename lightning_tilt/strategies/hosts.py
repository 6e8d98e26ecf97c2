"""What a host asks of a sharding strategy: to shard its predictor, and to have it whole for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_tilt.interfaces import Predictor
from lightning_tilt.shards import is_sharded, whole
from lightning_tilt.strategies.fsdp import BlockFSDPStrategy
from lightning_tilt.strategies.fsdp2 import FSDP2Strategy

__all__ = ["shard", "whole_weights"]


def shard(host: LightningModule) -> None:
    """Shard a host's predictor as its Trainer's strategy says: to be called in `configure_model`, any number of times.

    Under a strategy that shards nothing this does nothing.

    Args:
        host: a LightningModule with a `predictor`.

    Raises:
        TypeError: for Lightning's own sharding strategies, which have no recipe.
    """
    trainer = host._trainer
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, FSDP2Strategy | BlockFSDPStrategy):
        assert isinstance(host.predictor, Predictor)
        strategy.shard_predictor(host.predictor)
    elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        raise TypeError(
            f"trainer.strategy: Lightning's {type(strategy).__name__} does not know what to shard of a predictor: use "
            "fsdp2, fsdp2_sd15, fsdp2_sd3, or the classic fsdp_sd15, fsdp_sd3"
        )


@contextmanager
def whole_weights(predictor: Predictor) -> Iterator[bool]:
    """Whole tensors in place of a predictor's shards for the length of a block, on the first process; the value says
    whether this is the one that should write.

    Collective: all processes enter it.

        with whole_weights(predictor) as writes:
            if writes:
                predictor.save(folder)
    """  # noqa: D205
    writes = not dist.is_initialized() or dist.get_rank() == 0
    networks = predictor.sharded_networks()
    parts = [part for network in networks for part in network.modules()]
    held = [(part, dict(part._parameters), type(part)) for part in parts]
    found: dict[int, nn.Parameter] = {}
    for part, parameters, kind in held:
        for name, p in parameters.items():
            if p is not None and is_sharded(p):
                full = whole(p)
                if writes:
                    found.setdefault(id(p), nn.Parameter(full.cpu(), requires_grad=p.requires_grad))
                    part._parameters[name] = found[id(p)]
        if writes and kind.__name__.startswith("FSDP"):
            part.__class__ = kind.__bases__[1]  # fully_shard made a subclass, whose name would be written down
    try:
        yield writes
    finally:
        for part, parameters, kind in held:
            part._parameters.update(parameters)
            part.__class__ = kind
