"""Five linear layers without an activation, D - 1024 - 128 - 64 - 16 - 1: the head of AestheticScore and ImageReward.

    h(f) = W5 (W4 (W3 (W2 (W1 f + b1) + b2) + b3) + b4) + b5

One affine function of f, factorised; it was trained with dropout between the layers, which is the identity ever after.
Published checkpoints count the dropouts: the linear layers are `layers.0, 2, 4, 6, 7`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_tilt.interfaces.skeleton import skeleton_device
from lightning_tilt.rewards.weights import check_fit

__all__ = ["linear_head"]

_WIDTHS = (1024, 128, 64, 16, 1)


def linear_head(owner: str, source: str, width: int, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Sequential:
    """The head with its published weights; a skeleton inside `without_weights`.

    Args:
        owner: whose message it is.
        source: where the weights come from, for the message.
        width: D, of what it is applied to.
        state: `layers.0.weight` and so on.
        dtype: of the head.

    Returns:
        A map (B, D) -> (B, 1).

    Raises:
        ValueError: if a weight is missing, left over, or of another shape.
    """
    device = skeleton_device()
    layers: list[nn.Module] = []
    for i, (d, e) in enumerate(zip((width, *_WIDTHS), _WIDTHS, strict=False)):
        layers += [nn.Linear(d, e, device=device), *([nn.Identity()] if i < 3 else [])]
    head = nn.Sequential(*layers)
    if device is not None:
        return head.to(dtype)
    check_fit(owner, source, state, {f"layers.{k}": v for k, v in head.state_dict().items()})
    head.load_state_dict({k.removeprefix("layers."): v for k, v in state.items()})
    return head.to(dtype)
