"""`torch.compile` for a denoiser that is called in several ways: with adapters and without, with gradients and without.

Each way is a graph of its own: the rollout (no gradient), the adjoint's sweep (a gradient to the input, adapters off),
the loss (gradients to what is trained), and each once more for every further size of micro-batch.
"""

from typing import Any, Literal, get_args

import torch

__all__ = ["CompileMode", "check_compile_mode", "compile_in_place"]

CompileMode = Literal["off", "default", "max-autotune-no-cudagraphs", "aot_eager"]
"""torch.compile's modes that fit: CUDA graphs would overwrite an output that guidance or the adjoint still needs.
"aot_eager" traces and differentiates but generates no code: it needs no C++ compiler, and is no faster."""

_GRAPHS = 64  # torch's own limit, 8, is for one way of calling; beyond it a network silently runs uncompiled


def check_compile_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ValueError: if `mode` is none of `CompileMode`.
    """
    if mode not in get_args(CompileMode):
        raise ValueError(f"unknown compile mode {mode!r}; known are {', '.join(get_args(CompileMode))}")


def compile_in_place(network: Any, mode: CompileMode) -> None:
    """Let calls of `network` run compiled; its parameters keep their names.

    Args:
        network: a diffusers model, with its adapters.
        mode: how; "off" does nothing.
    """
    check_compile_mode(mode)
    if mode == "off":
        return
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * _GRAPHS)
    how: dict[str, Any] = {"backend": "aot_eager"} if mode == "aot_eager" else {"mode": mode}
    # Micro-batches have few sizes: a graph for each is faster than one for all.
    torch.nn.Module.compile(network, dynamic=False, **how)
