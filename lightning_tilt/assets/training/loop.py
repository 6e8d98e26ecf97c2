"""The one training loop: AdamW, linear warm-up into a half cosine, clipping, and an average of the weights.

    lr_k = lr * min(1, k / warmup) * (1 + cos(pi k / steps)) / 2
    average <- d average + (1 - d) weights,   d = min(decay, (1 + k) / (10 + k))

`fit` leaves the *average* in the networks when it returns: that is what gets judged and saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

__all__ = ["fit"]


def fit(
    networks: Sequence[nn.Module],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    decay: float = 0.999,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    name: str = "",
) -> dict[str, float]:
    """Minimise `loss()` over the parameters of `networks`; return the last mean loss and the CPU seconds."""
    parameters = [p for p in chain(*(network.parameters() for network in networks)) if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    window: list[float] = []
    start = time.process_time()
    for network in networks:
        network.train()
    for k in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (k + 1) / warmup) * (1 + math.cos(math.pi * k / steps)) / 2
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        d = min(decay, (1 + k) / (10 + k))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - d)
        window = [*window[-499:], value.item()]
        if (k + 1) % 100 == 0:
            recent = sum(window[-100:]) / len(window[-100:])
            print(f"{name} {k + 1}/{steps} loss {recent:.4f} {time.process_time() - start:.0f} CPU seconds", flush=True)
    with torch.no_grad():
        for p, mean in zip(parameters, average, strict=True):
            p.copy_(mean)
    for network in networks:
        network.eval()
    return {"loss": sum(window) / max(1, len(window)), "cpu_seconds": time.process_time() - start}
