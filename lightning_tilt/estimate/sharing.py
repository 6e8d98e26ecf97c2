"""How a strategy shares a run out among its processes, as far as it decides what each of them holds.

    alone   one device
    ddp     every process holds everything, and the gradients a second time, in buckets, unless they are views of these
    fsdp2   every process holds 1/n of the networks that are trained, of their gradients, and of what belongs to them,
            and gathers units of them for a call

A unit is a block of its family, and what is outside of all blocks; without a family it is a network.  It is gathered
into a buffer and copied out of it, and the buffer is there until the next unit comes: a unit counts twice.  In a
backward pass a unit's gradients are there whole, and once more in float32, while they are summed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import nn

from lightning_tilt.estimate.classes import class_of
from lightning_tilt.strategies import BLOCKS, Family, FSDP2Strategy, blocks_of, check_name

__all__ = [
    "ALONE",
    "AUTO",
    "DDP",
    "Gathering",
    "Sharing",
    "fitting_family",
    "gathering",
    "read_devices",
    "read_sharing",
]


@dataclass(frozen=True)
class Sharing:
    """A strategy.

    Attributes:
        name: as the configuration has it.
        kind: what it does; None: not modelled.
        bucket_views: of ddp: gradients are views of their buckets.
        family: of fsdp2: whose blocks are gathered.
        activation_checkpointing: of fsdp2: the denoiser's blocks are computed again in the backward pass.
        cpu_offload: of fsdp2: shards, and what belongs to them, are in the CPU's memory.
        reshard_after_forward: of fsdp2: units are freed after their forward.
    """

    name: str
    kind: Literal["alone", "ddp", "fsdp2"] | None
    bucket_views: bool = False
    family: Family = "any"
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    reshard_after_forward: bool = True


ALONE, DDP = Sharing("one device", "alone"), Sharing("ddp", "ddp")
"""A device on its own, and ddp with Lightning's defaults."""

AUTO = Sharing("auto (ddp if there are several)", "ddp")
"""What Lightning chooses, where the devices are not known."""


def read_sharing(config: object, devices: int | None) -> Sharing:
    """The sharing that `trainer.strategy` asks for.

    Args:
        config: a name, or a class path with its arguments.
        devices: of the run, in all; None: not known.

    Raises:
        ValueError: for a name that no strategy has.
    """
    check_name(config)
    if config is None or config == "auto":
        return AUTO if devices is None else ALONE if devices == 1 else DDP
    if isinstance(config, Mapping):
        kind: type = class_of(config)
        name, options = kind.__name__, dict(config.get("init_args") or {})
    else:
        name = str(config).lower()
        entry = StrategyRegistry[name]
        kind, options = entry["strategy"], dict(entry["init_params"])
    if kind is SingleDeviceStrategy:
        return Sharing(name, "alone")
    if kind is DDPStrategy:
        return Sharing(name, "ddp", bucket_views=bool(options.get("gradient_as_bucket_view")))
    if kind is FSDP2Strategy:
        known = ("family", "activation_checkpointing", "cpu_offload", "reshard_after_forward")
        return Sharing(name, "fsdp2", **{n: v for n, v in options.items() if n in known})
    return Sharing(name, None)


def read_devices(trainer: Mapping[str, Any]) -> tuple[int | None, int]:
    """Devices of a node, and nodes.

    Args:
        trainer: `devices`, `num_nodes`, `accelerator`.

    Returns:
        None for the devices where the run takes all that it finds.

    Raises:
        ValueError: for what is no number of devices or nodes.
    """
    given, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes") or 1
    if given in (None, "auto", -1, "-1", [-1]):
        return (1 if trainer.get("accelerator") == "cpu" else None), nodes
    numbers = given if isinstance(given, list) else [n for n in str(given).split(",") if n.strip()]
    if not all(str(n).strip().isdecimal() for n in numbers):
        raise ValueError(f"trainer.devices is a number, a list of devices, -1 or auto, not {given!r}")
    devices = len(numbers) if isinstance(given, list) or "," in str(given) else int(given)
    if min(devices, nodes) < 1:
        raise ValueError(f"a run needs a device: trainer.devices is {given!r}, trainer.num_nodes {nodes}")
    return devices, nodes


@dataclass(frozen=True)
class Gathering:
    """Bytes of what fsdp2 gathers of one predictor, by the blocks of one family.

    Attributes:
        outside: of a network's weights outside of all blocks, which are there as long as the network is called.
        block: of the largest block.
        whole: of all networks.
        reduced: of the gradients of the largest unit, whole and in float32, while they are summed.
        moved: of the largest network as it is stored, which is moved to the device before it is cut.
    """

    outside: int
    block: int
    whole: int
    reduced: int
    moved: int

    def held(self, sharing: Sharing) -> int:
        """Bytes that are gathered at once."""
        if not sharing.reshard_after_forward:
            return self.whole + max(self.outside, self.block)
        return self.outside + max(self.outside, 2 * self.block)


def gathering(networks: list[nn.Module], family: Family, half: bool) -> Gathering:
    """What fsdp2 gathers.

    Args:
        networks: what a predictor shards, the trained one first.
        family: whose blocks.
        half: whether blocks are gathered in bfloat16, whatever they are stored in.

    Raises:
        ValueError: if the network has no block of that family.
    """

    def size(parameters: list[nn.Parameter]) -> int:
        return sum(p.numel() * (2 if half else p.element_size()) for p in parameters)

    blocks = [list(block.parameters()) for block in blocks_of(networks[0], family)]
    inside = {id(p) for block in blocks for p in block}
    outside = [p for p in networks[0].parameters() if id(p) not in inside]
    units = [*blocks, outside]
    trained = [[p for p in unit if p.requires_grad] for unit in units]
    return Gathering(
        outside=size(outside),
        block=max(map(size, blocks), default=0),
        whole=sum(size(list(n.parameters())) for n in networks),
        reduced=max(size(unit) + 4 * sum(p.numel() for p in unit) for unit in trained),
        moved=max(sum(p.numel() * p.element_size() for p in n.parameters()) for n in networks),
    )


def fitting_family(network: nn.Module) -> Family:
    """The family whose blocks a network has; "any" if there is none."""
    names = {type(module).__name__ for module in network.modules()}
    fits: list[Family] = [f for f in ("sd15", "sd3") if names & set(BLOCKS[f])]
    return fits[0] if fits else "any"
