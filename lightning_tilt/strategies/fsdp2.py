"""FSDP2 by model family: what Lightning's ModelParallelStrategy leaves to its users.

Every process holds 1/n of the rows of each parameter.  Before a block is called its rows are gathered, after the call
they are freed; a gradient is summed and dealt out again.  `predict` calls the networks as modules, so rollouts, adjoint
sweeps and losses gather alike, inside of `training_step` and outside of it.
"""

import warnings
from collections.abc import Iterator
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn

from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Predictor
from lightning_tilt.shards import dealt, is_sharded, wholes
from lightning_tilt.strategies.blocks import Family, blocks_of

__all__ = ["FSDP2Strategy"]

_PRECISIONS = ("32-true", "64-true", "bf16-mixed")


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes, with single-file checkpoints that every other strategy loads.

    Args:
        family: whose blocks are gathered one at a time: "sd15", "sd3"; "any": each network as a whole.
        activation_checkpointing: recompute each block's activations in the backward pass.
        cpu_offload: keep shards, gradients and the optimiser's state in the CPU's memory.
        reshard_after_forward: free a block after its forward; False keeps it until its backward, for memory.
        process_group_backend: of torch.distributed; None: that of the device.

    Raises:
        ValueError: for an unknown family; at set-up, for a precision that casts what must stay float32.
    """

    def __init__(
        self,
        family: Family = "any",
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        if family not in get_args(Family):
            raise ValueError(f"family is one of {', '.join(get_args(Family))}, not {family!r}")
        super().__init__("auto", 1, save_distributed_checkpoint=False, process_group_backend=process_group_backend)
        self.family: Family = family
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Before, as ddp does: then callbacks find their state where they expect it."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Through `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """One mesh over all processes; Lightning's own default would take the nodes for it."""
        precision = str(self.precision_plugin.precision)
        if precision not in _PRECISIONS:
            raise ValueError(
                f"fsdp2 keeps float32 parameters and sums, which trainer.precision: {precision} does not: "
                "use 32-true or bf16-mixed, and give the frozen network's dtype to the predictor"
            )
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Refuse a host that shards nothing; look without inference mode, whose tensors no later backward may keep."""
        assert self.model is not None
        if not any(is_sharded(p) for p in _all_parameters(self.model)):
            raise TypeError(
                f"{type(self).__name__}: nothing of {type(self.lightning_module).__name__} is sharded: a host calls "
                "lightning_tilt.strategies.shard(self) in configure_model, as TiltModule does; a predictor without a "
                "network of its own is for ddp"
            )
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
        for loop in loops:
            loop.inference_mode = False
        super().setup(trainer)

    def shard_predictor(self, predictor: Predictor) -> None:
        """Shard the predictor's networks, once."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        # SD 3's transformer returns a view, which nothing here changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        half = str(self.precision_plugin.precision) == "bf16-mixed"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,  # bfloat16 knows no timestep 999; autocast casts where it should
        )
        offload = CPUOffloadPolicy(self.root_device.type == "cuda") if self.cpu_offload else OffloadPolicy()
        options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"], "mp_policy": policy}
        options |= {"offload_policy": offload, "reshard_after_forward": self.reshard_after_forward}
        for network in predictor.sharded_networks():
            if any(is_sharded(p) for p in network.parameters()):
                continue
            if not self.cpu_offload:
                network.to(self.root_device)
            for block in blocks_of(network, self.family):
                fully_shard(block, **options)
            fully_shard(network, **options)
        if self.activation_checkpointing:
            predictor.checkpoint_activations()

    def model_to_device(self) -> None:
        """Move what is not sharded: shards are where they belong."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        self.lightning_module._apply(lambda t: t if is_sharded(t) else t.to(self.root_device))  # type: ignore[no-untyped-call]
        _update_properties(self.lightning_module, device=self.root_device)

    def process_dataloader(self, dataloader: object) -> object:
        """Refuse loaders of which one process would be through while others still wait for its shards."""
        try:
            batches = len(dataloader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return dataloader
        counts: list[Any] = [None] * self.world_size
        dist.all_gather_object(counts, batches)
        if len(set(counts)) > 1:
            raise ValueError(
                f"under {type(self).__name__} all processes go through their batches in step, and these have "
                f"{', '.join(map(str, counts))}: give as many prompts as fill all batches, or use one device or ddp"
            )
        return dataloader

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of what is trained and not sharded (a loss's own parameters) over the processes."""
        super().post_backward(closure_loss)
        assert self.model is not None
        own = [p for p in self.model.parameters() if p.requires_grad and not is_sharded(p)]
        if not own or self.world_size == 1:
            return
        used = torch.tensor([p.grad is not None for p in own], dtype=torch.float32, device=self.root_device)
        dist.all_reduce(used)
        for p, n in zip(own, used.tolist(), strict=True):
            if n > 0:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad.div_(self.world_size)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state in whole tensors, on the process that writes."""
        assert self.lightning_module is not None
        return wholes(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state as a single device would have it."""
        state = ParallelStrategy.optimizer_state(self, optimizer)
        return {
            **state,
            "state": {i: wholes(s, keep=self.is_global_zero) for i, s in cast(Any, state["state"]).items()},
        }

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file, as every other strategy does."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Deal the whole tensors of a checkpoint out."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        state = {n: dealt(v, own[n]) if n in own and v.shape == own[n].shape else v
                 for n, v in checkpoint["state_dict"].items()}  # fmt: skip
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """The same for what the optimisers keep."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {n: dealt(v, own[i]) if isinstance(v, Tensor) and v.shape == own[i].shape else v
                    for n, v in values.items()}
                for i, values in saved["state"].items()
            }  # fmt: skip
            optimizer.load_state_dict({**saved, "state": state})


def _all_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters, those of frozen parts among them."""
    yield from module.parameters()
    for part in module.modules():
        if isinstance(part, Frozen):
            yield from part.module.parameters()
