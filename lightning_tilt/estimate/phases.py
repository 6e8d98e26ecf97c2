"""The parts of an update, each run once on fake tensors of its own micro-batch by the code that a fit runs.

rollout   the tuned model, no gradient
reward    decoder and reward network, the gradient to the end points
adjoint   one step of the sweep: the base's mean and its product with a vector
loss      the tuned model, the gradient to what is trained
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tilt.chain import Chain, evaluating
from lightning_tilt.condition import Condition
from lightning_tilt.estimate.rewards import RewardNetwork
from lightning_tilt.estimate.settings import Settings
from lightning_tilt.estimate.tracking import AllocationTracker, cuda_autocast, fake_mode, make_fake
from lightning_tilt.models import LatentDiffusion
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.transition import DDIM, control

__all__ = ["Phase", "condition_shapes", "simulate"]


@dataclass(frozen=True)
class Phase:
    """What a part of an update needs beside the weights.

    Attributes:
        samples: its micro-batch.
        saved: bytes that a micro-batch holds from its forward to its backward.
        peak: the most bytes that it holds at once.
    """

    samples: int
    saved: int
    peak: int


def condition_shapes(predictor: LatentDiffusion) -> dict[str, tuple[int, ...]]:
    """Shapes of one prompt's embeddings, by the denoiser's names for them."""
    config = predictor.network.config
    if predictor.denoiser == "unet":
        return {"encoder_hidden_states": (77, config["cross_attention_dim"])}
    tokens = 77 + predictor.embeddings.identity["max_sequence_length"]
    return {
        "encoder_hidden_states": (tokens, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    }


def simulate(settings: Settings, predictor: LatentDiffusion, rewards: list[RewardNetwork]) -> dict[str, Phase]:
    """Run every part of an update on fake tensors.

    Args:
        settings: micro-batches, guidance, precision.
        predictor: built on the meta device; its weights are replaced by fake ones.
        rewards: what scores the images.

    Returns:
        The phases by name.
    """
    process = predictor.process
    with fake_mode():
        networks = [predictor.network, predictor.vae.module, *(n for r in rewards for n in r.networks)]
        if settings.tuning == "full":
            networks.append(predictor.untuned.module)
        for network in networks:
            make_fake(network)
        predictor.process = _WithoutNumbers()
        try:
            run = _Run(settings, predictor, rewards)
            phases = {"rollout": run.rollout(), "reward": run.reward()}
            if settings.adjoint_micro_batch:
                phases["adjoint"] = run.adjoint()
            return {**phases, "loss": run.loss()}
        finally:
            predictor.process = process


class _WithoutNumbers(RectifiedFlow):
    """A process that never looks at a number, in the place of any other: its arithmetic has the same shapes."""

    is_memoryless_start = False


class _Run:
    """One predictor on fake tensors."""

    def __init__(self, settings: Settings, predictor: LatentDiffusion, rewards: list[RewardNetwork]) -> None:
        self.settings, self.predictor, self.rewards = settings, predictor, rewards
        self.chain = Chain(predictor.process, DDIM(), torch.linspace(0, 1, 4).double(), context=self._autocast)
        # What guidance asks for beside the prompts.
        predictor.encode = lambda prompts, size: self._condition(size)  # type: ignore[method-assign]
        for parameter in predictor.trained_parameters().values():
            parameter.grad = torch.empty_like(parameter)

    def rollout(self) -> Phase:
        """One step."""
        x = self._states(size := self.settings.rollout_micro_batch)
        condition = self._condition(size)

        def step(tracker: AllocationTracker) -> int:
            with torch.no_grad(), evaluating(self.predictor):
                output = self.chain.output(self.predictor, x, 1, condition, self.settings.guidance)
                self.chain.kernel(self.predictor, output, x, 1).sample(x)
            return 0

        return self._measure(size, step, x, condition)

    def reward(self) -> Phase:
        """Decode, score, and go back to the latents."""
        x = self._states(size := self.settings.reward_micro_batch).requires_grad_(self.settings.reward_gradient)

        def score(tracker: AllocationTracker) -> int:
            with torch.set_grad_enabled(self.settings.reward_gradient):
                images = self.predictor.decode(x)
                total = sum((r.score(images) for r in self.rewards), images.mean((1, 2, 3)))
            saved = tracker.live
            if self.settings.reward_gradient:
                torch.autograd.grad(total.sum(), x)
            return saved

        return self._measure(size, score, x)

    def adjoint(self) -> Phase:
        """One step of the sweep."""
        x = self._states(size := self.settings.adjoint_micro_batch).requires_grad_()
        condition, a = self._condition(size), self._states(size)

        def sweep(tracker: AllocationTracker) -> int:
            with evaluating(self.predictor), self.predictor.base() as base:
                mean = self.chain.mean(base, condition, self.settings.adjoint_guidance)(x, 1)
                saved = tracker.live
                torch.autograd.grad(mean, x, a)
            return saved

        return self._measure(size, sweep, x, a, condition)

    def loss(self) -> Phase:
        """A micro-batch of pairs, forward and backward; without `checkpoint` the graphs of all are held at once."""
        x = self._states(size := self.settings.loss_micro_batch)
        condition, base_mean = self._condition(size), self._states(size)
        scale, both = self.settings.control_guidance, self.settings.unconditional_gradient

        def pairs(tracker: AllocationTracker) -> int:
            output = self.chain.output(self.predictor, x, 1, condition, scale, both)
            law = self.chain.kernel(self.predictor, output, x, 1)
            term = control(law.mean, base_mean, law.std).square().sum()
            saved = tracker.live
            del output, law
            term.backward()
            return saved

        phase = self._measure(size, pairs, x, base_mean, condition)
        graphs = 1 if self.settings.checkpoint else self.settings.loss_calls
        return Phase(size, graphs * phase.saved, phase.peak + (graphs - 1) * phase.saved)

    def _measure(self, size: int, call: Callable[[AllocationTracker], int], *inputs: Tensor | Condition) -> Phase:
        known = [t for i in inputs for t in ([i] if isinstance(i, Tensor) else i.tensors.values())]
        networks = [n for r in self.rewards for n in r.networks]
        for network in (self.predictor.network, self.predictor.vae.module, *networks):
            known += [*network.parameters(), *network.buffers()]
        if self.settings.tuning == "full":
            known += self.predictor.untuned.module.parameters()
        known += [p.grad for p in self.predictor.trained_parameters().values() if p.grad is not None]
        tracker = AllocationTracker(known)
        with ExitStack() as stack:
            if self.settings.cuda:
                stack.enter_context(cuda_autocast())
            stack.enter_context(tracker)
            saved = call(tracker)
        return Phase(size, saved, tracker.peak)

    def _states(self, size: int) -> Tensor:
        return torch.empty(size, *self.predictor.state_shape)

    def _condition(self, size: int) -> Condition:
        # Without the prompts themselves, which are looked up by number.
        shapes = condition_shapes(self.predictor)
        return Condition({n: torch.empty(size, *s) for n, s in shapes.items()}, None, size)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.autocast):
            yield
