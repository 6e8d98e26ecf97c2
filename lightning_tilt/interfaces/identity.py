"""Which base a checkpoint belongs to: digests of what was not trained, cheap enough for every run.

    parts of a predictor, by the names of its children  ->  sha256 of shapes and of 32 values of each frozen tensor

Values are rounded to bfloat16 first, so that a base held in bfloat16 and in float32 is one base; names are left out, so
that compiling or wrapping a network changes nothing.  A closed form is known by its log density at a few points, and
every process by alpha and beta at a few times.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces.predictor import KnownLaw, Predictor

__all__ = ["base_identity", "same_base"]

_VALUES = 32  # of each tensor


def base_identity(predictor: Predictor) -> dict[str, str]:
    """What the predictor's base is: a digest for each of its parts.

    Args:
        predictor: the model; its trained parameters are left out.

    Returns:
        Digests by part: "process", "output", "density" of a closed form, and each child that holds something frozen.
    """
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    schedule = torch.cat([predictor.process.alpha(t), predictor.process.beta(t)])
    found = {"process": _digest(_rounded(schedule)), "output": f"{tuple(predictor.state_shape)}"}
    with predictor.base() as base:
        found["output"] = f"{base.prediction_type} {found['output']}"
        if isinstance(base, KnownLaw):
            found["density"] = _digest(_rounded(base.log_prob(_points(predictor.state_shape)).detach()))
    for name, child in predictor.named_children():
        samples = [_sample(tensor) for tensor in _frozen(child)]
        if samples:
            found[name] = _digest(*samples)
    return found


def same_base(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """The parts that both name and that differ; text encoders that were left out differ from nothing.

    Example:
        >>> same_base({"network": "a", "vae": "b"}, {"network": "c", "vae": "b", "encoders": "d"})
        ['network']
    """
    return [name for name, digest in saved.items() if name in present and present[name] != digest]


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that are not trained, those inside of `Frozen` parts too."""
    for part in module.modules():
        yield from (p for p in part.parameters(recurse=False) if not p.requires_grad)
        yield from (b for b in part.buffers(recurse=False) if b.is_floating_point())
        if isinstance(part, Frozen):
            yield from _frozen(part.module)


def _sample(tensor: Tensor) -> bytes:
    """Shape and a few values; a tensor without memory (meta device) is its shape."""
    shape = str(tuple(tensor.shape)).encode()
    if tensor.is_meta or tensor.numel() == 0:
        return shape
    n = min(_VALUES, tensor.numel())
    # In integers: float32 holds no index above 2^24 exactly.
    i = torch.arange(n, device=tensor.device) * (tensor.numel() - 1) // max(n - 1, 1)
    values = tensor.detach().reshape(-1)[i].to(torch.bfloat16).cpu()
    return shape + values.view(torch.int16).numpy().tobytes()


def _points(shape: tuple[int, ...]) -> Tensor:
    """Four states, (4, *shape), float64: no two numbers of one are the same."""
    line = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return torch.stack([scale * line + scale**2 / 7 for scale in (0.1, 0.5, 1.0, 2.0)])


def _rounded(values: Tensor) -> bytes:
    """Six digits: what another machine's arithmetic changes is below them."""
    return ",".join(f"{value:.5e}" for value in values.double().tolist()).encode()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
