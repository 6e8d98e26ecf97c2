"""Memory and network evaluations of a run before it is made, from its configuration alone.

    peak = weights + gradients + optimiser + average + trajectory + max over phases of what a phase needs

Everything is counted in bytes of tensors on one device.  What is left out: the CUDA context and the workspaces of its
libraries (about 1 GB, listed as an allowance), what an allocator loses between tensors, and, before the first update,
what loading needs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_tilt.chain import Chain
from lightning_tilt.estimate.phases import Phase, condition_shapes, largest_block, simulate
from lightning_tilt.estimate.rewards import RewardNetwork, find_rewards
from lightning_tilt.estimate.settings import Settings
from lightning_tilt.estimate.tracking import AllocationTracker, tensor_bytes
from lightning_tilt.models import LatentDiffusion
from lightning_tilt.models.embeddings import PromptEmbeddings
from lightning_tilt.models.skeletons import without_weights

__all__ = ["CONTEXT", "Estimate", "estimate", "forwards"]

CONTEXT = 10**9
"""Bytes allowed for the CUDA context and the workspaces of its libraries."""


@dataclass(frozen=True)
class Estimate:
    """What one process of a run needs.

    Attributes:
        settings: the run.
        weights: bytes by part and dtype, e.g. {("denoiser", "bfloat16"): ...}.
        counts: parameters by part.
        trained: number of trained parameters.
        gradients: bytes.
        optimizer: bytes of its state.
        optimizer_step: bytes that a step of it needs in passing.
        average: bytes of the moving average.
        paths: bytes of a rollout's states and noise.
        trajectory: bytes of a rollout with its adjoints.
        phases: what each part of an update needs.
        block: bytes of the largest block, in the dtype that it computes in.
        forwards: network evaluations an update, by part, of one process; see `forwards`.
        uncounted: rewards whose networks are not known.
    """

    settings: Settings
    weights: dict[tuple[str, str], int]
    counts: dict[str, int]
    trained: int
    gradients: int
    optimizer: int
    optimizer_step: int
    average: int
    paths: int
    trajectory: int
    phases: dict[str, Phase]
    block: int
    forwards: dict[str, float]
    uncounted: list[str]

    def resident(self, devices: int = 1, strategy: str = "ddp") -> int:
        """Bytes of weights and of what belongs to them, on each of so many devices.

        `ddp` keeps all of it everywhere and the gradients twice (its buckets); `fsdp2` shards the denoiser, its frozen
        copy, gradients, optimiser and average, and gathers a block at a time (two: one is fetched ahead).
        """
        denoiser = sum(b for (part, _), b in self.weights.items() if part in ("denoiser", "adapters", "frozen copy"))
        sharded = denoiser + self.gradients + self.optimizer + self.average
        kept = sum(self.weights.values()) - denoiser - (self.encoders if self.settings.drops_encoders else 0)
        if devices == 1:
            return kept + sharded
        if strategy == "ddp":
            return kept + sharded + self.gradients
        return kept + -(-sharded // devices) + 2 * self.block

    @property
    def encoders(self) -> int:
        """Bytes of the text encoders."""
        return sum(size for (part, _), size in self.weights.items() if part == "text encoders")

    def peak(self, devices: int = 1, strategy: str = "ddp") -> int:
        """Bytes at the fullest moment on each of so many devices, the allowance for CUDA included."""
        step = self.optimizer_step if devices == 1 or strategy == "ddp" else self.optimizer_step // devices
        # The last rollout is there until the next one is whole.
        held = {"rollout": self.trajectory + self.paths, "reward": self.trajectory + self.paths}
        held |= {"adjoint": 2 * self.trajectory, "loss": self.trajectory}
        passing = max(self.trajectory + step, *(held[name] + phase.peak for name, phase in self.phases.items()))
        if self.settings.drops_encoders:  # at the start, when nothing but the weights is there
            passing = max(passing, self.encoders - self.gradients - self.optimizer)
        return self.resident(devices, strategy) + passing + (CONTEXT if self.settings.cuda else 0)


def estimate(settings: Settings) -> Estimate:
    """Build the run's networks without weights and add up what they need.

    Args:
        settings: the run.

    Raises:
        FileNotFoundError: if the configuration of its pipeline is not known.
        ValueError: for a predictor that is not of Stable Diffusion's kind.
    """
    kind, arguments = settings.predictor
    if not issubclass(kind, LatentDiffusion):
        raise ValueError(f"the estimate is for StableDiffusion and StableDiffusion3, not for {kind.__name__}")
    with without_weights("meta"):
        predictor = kind(**{**arguments, "compile": "off"})
    predictor.embeddings = PromptEmbeddings(1, None, predictor.embeddings.identity)  # nothing goes to the run's folder
    rewards, unknown = find_rewards(settings.reward)
    judges, also_unknown = find_rewards(settings.callbacks, "judge ")
    trained = list(predictor.trained_parameters().values())
    parts = _parts(predictor, [*rewards, *judges])
    block = largest_block(predictor.network)
    compute = 2 if settings.autocast else next(predictor.network.parameters()).element_size()
    state, passing = _optimizer_bytes(*settings.optimizer)
    size = sum(p.numel() for p in trained)
    numbers = forwards(settings, predictor)
    paths, trajectory = _trajectory(settings, predictor)
    phases = simulate(settings, predictor, rewards)
    return Estimate(
        settings=settings,
        weights={(n, str(d).removeprefix("torch.")): b for n, (_, by) in parts.items() for d, b in by.items()},
        counts={name: count for name, (count, _) in parts.items()},
        trained=size,
        gradients=tensor_bytes(trained),
        optimizer=round(4 * size * state),
        optimizer_step=round(4 * size * passing),
        average=4 * size if settings.ema else 0,
        paths=paths,
        trajectory=trajectory,
        phases=phases,
        block=block * compute,
        forwards=numbers,
        uncounted=sorted({*unknown, *also_unknown}),
    )


def forwards(settings: Settings, predictor: LatentDiffusion) -> dict[str, float]:
    """Network evaluations of one rollout of one process, in forwards of a sample, as the sampler counts them.

    Returns:
        "rollout", "adjoint" (its forwards and VJPs), "loss" (forwards, recomputed ones, backwards), "total" of the
        update, and "recomputed": what gradient checkpointing inside the network adds, which the sampler does not see.
    """
    kind, arguments = settings.transition
    chain = Chain(predictor.process, kind(**arguments), predictor.process.grid(settings.steps))
    noisy, n, steps = chain.noisy_steps, settings.samples, settings.steps
    g, g_adjoint, g_control = (
        1 if s == 1 else 2 for s in (settings.guidance, settings.adjoint_guidance, settings.control_guidance)
    )
    found: dict[str, float] = {"rollout": n * steps * g, "adjoint": 0}
    supervised, first = len(noisy), float(noisy[0])
    if settings.supervised != "all":
        last = min(settings.last_steps, len(noisy))
        drawn = min(int(settings.supervised), len(noisy) - last)
        supervised = drawn + last
        # The expected smallest of `drawn` of the first steps.
        first = (len(noisy) - last + 1) / (drawn + 1) - 1 if drawn else len(noisy) - last
    vjp = 0.0
    if settings.adjoint_micro_batch:
        vjp = n * (steps - 1 - first) * g_adjoint
        found["adjoint"] = n * (steps - first) * g_adjoint + vjp
        if settings.control_guidance != settings.adjoint_guidance:
            found["adjoint"] += n * supervised * g_control
    pairs = n * supervised if settings.pairs != n else n
    both = 2 if g_control == 2 and settings.unconditional_gradient else 1
    backward = pairs * predictor.backward_cost * both
    found["loss"] = pairs * g_control * (2 if settings.checkpoint else 1) + backward
    found["total"] = settings.accumulate * sum(found.values())
    checkpointed = settings.predictor[1].get("gradient_checkpointing")
    found["recomputed"] = settings.accumulate * (vjp + pairs * both) if checkpointed else 0
    return found


def _parts(predictor: LatentDiffusion, rewards: list[RewardNetwork]) -> dict[str, tuple[int, dict[torch.dtype, int]]]:
    """Parameters and bytes of what a device holds, by part."""
    adapters = [p for n, p in predictor.network.named_parameters() if "lora_" in n]
    others = [p for n, p in predictor.network.named_parameters() if "lora_" not in n]
    tensors: dict[str, list[torch.Tensor]] = {"denoiser": list(others), "adapters": list(adapters)}
    if predictor.backward_cost == 2:
        tensors["frozen copy"] = list(predictor.untuned.module.parameters())
    tensors["VAE"] = list(predictor.vae.module.parameters())
    encoders = [p for frozen in predictor.encoders for p in _held(frozen).parameters()]
    tensors["text encoders"] = list(encoders)
    for reward in rewards:
        tensors.setdefault(reward.name, []).extend(reward.network.parameters())
    parts = {}
    for name, group in tensors.items():
        by = {d: tensor_bytes(t for t in group if t.dtype == d) for d in dict.fromkeys(t.dtype for t in group)}
        if group:
            parts[name] = (sum(t.numel() for t in group), by)
    return parts


def _held(frozen: Any) -> nn.Module:
    module = frozen.module
    assert isinstance(module, nn.Module)
    return module


def _trajectory(settings: Settings, predictor: LatentDiffusion) -> tuple[int, int]:
    """Bytes of the states and the noise of a rollout in float32 and its prompts, and with adjoints and base means."""
    state = 4 * settings.samples * torch.Size(predictor.state_shape).numel()
    encoder = torch.finfo(predictor._encoder_dtype).bits // 8
    told = sum(torch.Size(shape).numel() for shape in condition_shapes(predictor).values())
    paths = (2 * settings.steps + 2) * state + settings.batch_size * told * encoder
    swept = 1 + 2 * (settings.pairs // settings.samples) if settings.adjoint_micro_batch else 0
    return paths, paths + swept * state


def _optimizer_bytes(kind: Any, arguments: dict[str, Any]) -> tuple[float, float]:
    """State, and passing memory of a step, of an optimiser, in units of its parameters: it is tried on a small one."""
    parameters = [nn.Parameter(torch.zeros(128, 128)) for _ in range(4)]
    options = {n: v for n, v in arguments.items() if n not in ("foreach", "fused")}
    try:
        optimizer = kind(parameters, **options, foreach=True)  # what it does on a GPU
    except TypeError:
        optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    known = [*parameters, *tensors, *(p.grad for p in parameters if p.grad is not None)]
    with AllocationTracker(known) as tracker:
        optimizer.step()
    size = tensor_bytes(parameters)
    return tensor_bytes(tensors) / size, tracker.peak / size
