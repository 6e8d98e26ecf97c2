"""The blocks of each model family: what is gathered, and recomputed, as one.

They are told by the names of their classes, so that a user's own network of the same blocks is one of the family, and
no large library is loaded to know them.
"""

from typing import Literal

from torch import nn

__all__ = ["BLOCKS", "Family", "blocks_of"]

Family = Literal["any", "sd15", "sd3"]
"""Whose blocks are cut: of Stable Diffusion 1.5, of 3 and 3.5, or of any predictor."""

BLOCKS: dict[str, tuple[str, ...]] = {
    "sd15": (
        "DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D",
    ),
    "sd3": ("JointTransformerBlock",),
}  # fmt: skip
"""Classes of the blocks that are gathered one at a time, by family."""


def blocks_of(network: nn.Module, family: Family) -> list[nn.Module]:
    """The blocks of a network that are gathered one at a time, in its order.

    Args:
        network: what a predictor shards.
        family: whose blocks; "any" gathers the network as a whole.

    Raises:
        ValueError: if the network has no block of that family.
    """
    if family == "any":
        return []
    blocks = [module for module in network.modules() if type(module).__name__ in BLOCKS[family]]
    if not blocks:
        fits = [f for f, names in BLOCKS.items() if any(type(m).__name__ in names for m in network.modules())]
        raise ValueError(
            f"strategy fsdp2_{family} gathers {', '.join(BLOCKS[family])}, and {type(network).__name__} has none of "
            f"them: take {'fsdp2_' + fits[0] if fits else 'fsdp2'}"
        )
    return blocks
