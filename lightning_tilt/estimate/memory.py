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
from lightning_tilt.estimate.optimizers import optimizer_cost
from lightning_tilt.estimate.phases import Phase, condition_shapes, simulate
from lightning_tilt.estimate.rewards import RewardNetwork, find_rewards
from lightning_tilt.estimate.settings import Settings
from lightning_tilt.estimate.sharing import ALONE, DDP, Gathering, Sharing, fitting_family, gathering
from lightning_tilt.estimate.tracking import tensor_bytes
from lightning_tilt.interfaces.skeleton import without_weights
from lightning_tilt.models import LatentDiffusion
from lightning_tilt.models.embeddings import PromptEmbeddings
from lightning_tilt.strategies import Family

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
        family: whose blocks the denoiser has.
        gathers: what fsdp2 gathers, by family: the run's own, and the one that fits the denoiser.
        forwards: network evaluations an update, by part, of one process; see `forwards`.
        uncounted: what is not in these numbers, and why.
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
    family: Family
    gathers: dict[Family, Gathering]
    forwards: dict[str, float]
    uncounted: list[str]

    def resident(self, devices: int = 1, sharing: Sharing | None = None) -> int:
        """Bytes of weights and of what belongs to them, on each of so many devices.

        Args:
            devices: in all.
            sharing: a strategy that is modelled; None: ddp on several devices.
        """
        sharing = sharing or (ALONE if devices == 1 else DDP)
        kept = sum(self.weights.values()) - self._denoisers - (self.encoders if self.settings.drops_encoders else 0)
        if sharing.kind == "fsdp2":
            shards = 0 if sharing.cpu_offload else self.shards(devices)
            return kept + shards + self.gathers[sharing.family].held(sharing)
        buckets = self.gradients if sharing.kind == "ddp" and not sharing.bucket_views else 0
        return kept + self._denoisers + self.gradients + self.optimizer + self.average + buckets

    def shards(self, devices: int) -> int:
        """Bytes that fsdp2 deals out to each of so many processes: on its device, or offloaded in the CPU's memory."""
        return -(-(self._denoisers + self.gradients + self.optimizer + self.average) // devices)

    @property
    def _denoisers(self) -> int:
        return sum(b for (part, _), b in self.weights.items() if part in ("denoiser", "adapters", "frozen copy"))

    @property
    def encoders(self) -> int:
        """Bytes of the text encoders."""
        return sum(size for (part, _), size in self.weights.items() if part == "text encoders")

    def peak(self, devices: int = 1, sharing: Sharing | None = None) -> int:
        """Bytes at the fullest moment on each of so many devices, the allowance for CUDA included; see `resident`."""
        sharded = sharing is not None and sharing.kind == "fsdp2"
        parts = devices if sharded else 1
        # The last rollout is there until the next one is whole.
        held = {"rollout": self.trajectory + self.paths, "reward": self.trajectory + self.paths}
        held |= {"adjoint": 2 * self.trajectory, "loss": self.trajectory}
        if sharing is not None and sharded:
            held["loss"] += self.gathers[sharing.family].reduced
        offloaded = sharing is not None and sharing.cpu_offload
        step = 0 if offloaded else self.optimizer_step // parts
        passing = max(self.trajectory + step, *(held[name] + phase.peak for name, phase in self.phases.items()))
        if self.settings.drops_encoders:  # at the start, when nothing but the weights is there
            later = 0 if offloaded else (self.gradients + self.optimizer) // parts
            passing = max(passing, self.encoders - later)
        most = self.resident(devices, sharing) + passing
        if sharing is not None and sharded and not offloaded:  # before anything else, to be cut there
            most = max(most, self.gathers[sharing.family].moved)
        return most + (CONTEXT if self.settings.cuda else 0)


def estimate(settings: Settings) -> Estimate:
    """Build the run's networks without weights and add up what they need.

    Args:
        settings: the run.

    Raises:
        FileNotFoundError: if the configuration of its pipeline is not known.
        ValueError: for a predictor that is not of Stable Diffusion's kind, a strategy for other blocks, an optimiser
            that does not work.
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
    family = fitting_family(predictor.network)
    gathers = {
        f: gathering(predictor.sharded_networks(), f, settings.autocast) for f in {family, settings.sharing.family}
    }
    cost = optimizer_cost(*settings.optimizer)
    size = sum(p.numel() for p in trained)
    if settings.sharing.activation_checkpointing:
        predictor.checkpoint_activations()
    paths, trajectory = _trajectory(settings, predictor)
    phases = simulate(settings, predictor, rewards)
    return Estimate(
        settings=settings,
        weights={(n, str(d).removeprefix("torch.")): b for n, (_, by) in parts.items() for d, b in by.items()},
        counts={name: count for name, (count, _) in parts.items()},
        trained=size,
        gradients=tensor_bytes(trained),
        optimizer=round(4 * size * cost.state),
        optimizer_step=round(4 * size * cost.passing),
        average=4 * size if settings.ema else 0,
        paths=paths,
        trajectory=trajectory,
        phases=phases,
        family=family,
        gathers=gathers,
        forwards=forwards(settings, predictor, cost.closures),
        uncounted=sorted({*unknown, *also_unknown}),
    )


def forwards(settings: Settings, predictor: LatentDiffusion, closures: int = 1) -> dict[str, float]:
    """Network evaluations of one rollout of one process, in forwards of a sample, as the sampler counts them.

    Args:
        settings: the run.
        predictor: its predictor.
        closures: how often the optimiser asks for the loss in a step.

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
    found["loss"] = closures * (pairs * g_control * (2 if settings.checkpoint else 1) + backward)
    found["total"] = settings.accumulate * sum(found.values())
    checkpointed = settings.predictor[1].get("gradient_checkpointing") or settings.sharing.activation_checkpointing
    found["recomputed"] = settings.accumulate * (vjp + closures * pairs * both) if checkpointed else 0
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
        tensors.setdefault(reward.name, []).extend(p for n in reward.networks for p in n.parameters())
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
