"""Adjoint Matching as published (2409.08861, algorithm 1 and its memoryless SDE), for an epsilon prediction, plainly.

    X_{k+1} = X_k + d_k (X_k - 2 eps_theta(X_k)/beta_k) + sqrt(2 d_k) z_k        d_k = log alpha_{k+1} - log alpha_k
    a_K = -lam grad r(X_K)          a_k = a_{k+1} + d_k J[X - 2 eps_base(X)/beta_k]^T a_{k+1}
    L = mean over supervised k of  1/2 | sqrt(2 d_k) ( -(eps_theta - eps_base)/beta_k + a_{k+1} ) |^2

(variance preserving: kappa = eta = d log alpha/dt, so sigma^2 dt = 2 d_k).  What it is to be compared with does as
little as it can; this does what the algorithm and its authors' code do: a second network is the base, all weights are
trained in float32, the path is swept from end to end whatever is supervised, what the base said in the sweep serves
the loss too, the loss asks the tuned network for all supervised pairs in one call, and images are decoded in the
rollout, and once more for the gradient of their reward.  Where it departs from their code, at no cost in time: the
target of step k is a_{k+1}, not a_k (which has one product too many and is biased); steps are Euler-Maruyama's on the
pipeline's own spacing; no guidance (with it, rollout and sweep cost twice); no term is left out for its size.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

__all__ = ["PublishedAdjointMatching"]


class PublishedAdjointMatching:
    """A diffusers pipeline that predicts epsilon, towards a reward of images.

    Args:
        folder: of the pipeline.
        reward: images (N, 3, H, W) in [0, 1] to rewards (N,).
        lam: its multiplier.
        steps: K.
        supervised: steps that the loss looks at, drawn anew for each update.
        last: steps next to the data that are always among them.
        in_one_call: ask the tuned network for all supervised pairs at once; else step by step, in less memory.
        lr: learning rate of AdamW.
    """

    def __init__(
        self,
        folder: str,
        reward: Any,
        lam: float,
        *,
        steps: int,
        supervised: int,
        last: int = 0,
        in_one_call: bool = True,
        lr: float = 1e-4,
    ) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
        self.pipeline.vae.requires_grad_(False)
        self.base = self.pipeline.unet.requires_grad_(False).eval()
        self.tuned = copy.deepcopy(self.base).requires_grad_(True)
        self.reward, self.lam, self.supervised, self.last = reward, lam, supervised, last
        self.in_one_call = in_one_call
        self.optimizer = torch.optim.AdamW(self.tuned.parameters(), lr=lr)
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(steps)
        self.timesteps = scheduler.timesteps
        alphas = torch.cat([scheduler.alphas_cumprod[self.timesteps], scheduler.final_alpha_cumprod[None]]).sqrt()
        self.beta = (1 - alphas[:-1] ** 2).sqrt()
        self.d = alphas[1:].log() - alphas[:-1].log()
        self.rewards = torch.zeros(0)

    def update(self, prompts: Sequence[str]) -> int:
        """One update on a path for each prompt; the number of supervised pairs."""
        told = self._encode(prompts)
        states = self._rollout(told)
        adjoints, base = self._sweep(states, told)
        chosen = self._draw()
        for ks in [chosen] if self.in_one_call else [[k] for k in chosen]:
            (self._loss(ks, states, adjoints, base, told) * len(ks) / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(self.tuned.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(chosen) * len(prompts)

    def _loss(
        self, ks: list[int], states: list[Tensor], adjoints: list[Tensor], base: list[Tensor], told: Tensor
    ) -> Tensor:
        """The mean over the pairs of steps `ks` with all paths."""
        k = torch.tensor(ks).repeat_interleave(len(told))
        x, a, eps_base = (torch.cat([per[i] for i in steps]) for per, steps in (
            (states, ks), (adjoints, [i + 1 for i in ks]), (base, ks),
        ))  # fmt: skip
        eps = self.tuned(x, self.timesteps[k], encoder_hidden_states=told.repeat(len(ks), 1, 1)).sample
        d, beta = (per[k].reshape(-1, 1, 1, 1) for per in (self.d, self.beta))
        error = (2 * d).sqrt() * (a - (eps - eps_base) / beta)
        return 0.5 * (error**2).flatten(1).sum(1).mean()

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        told: Tensor = self.pipeline.text_encoder(tokens.input_ids)[0]
        return told

    def _eps(self, network: Any, x: Tensor, k: int, told: Tensor) -> Tensor:
        eps: Tensor = network(x, self.timesteps[k], encoder_hidden_states=told).sample
        return eps

    def _drift(self, network: Any, x: Tensor, k: int, told: Tensor) -> Tensor:
        """What the step adds to x, but for its noise."""
        return self.d[k] * (x - 2 * self._eps(network, x, k, told) / self.beta[k])

    @torch.no_grad()
    def _rollout(self, told: Tensor) -> list[Tensor]:
        """X_0 ... X_K of the tuned network."""
        config = self.base.config
        states = [torch.randn(len(told), config.in_channels, config.sample_size, config.sample_size)]
        for k, d in enumerate(self.d):
            x = states[-1]
            # No noise in the last step, as samplers leave it out.
            z = torch.randn_like(x) if k < len(self.d) - 1 else torch.zeros_like(x)
            states.append(x + self._drift(self.tuned, x, k, told) + (2 * d).sqrt() * z)
        self.rewards = self.reward(self._decode(states[-1]))
        return states

    def _sweep(self, states: list[Tensor], told: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """a_0 ... a_K, and what the base said at X_0 ... X_{K-1}."""
        x = states[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.reward(self._decode(x)).sum(), x)
        adjoints, said = [-self.lam * gradient], list[Tensor]()
        for k in reversed(range(len(self.d))):
            x = states[k].detach().requires_grad_()
            eps = self._eps(self.base, x, k, told)
            (product,) = torch.autograd.grad(self.d[k] * (x - 2 * eps / self.beta[k]), x, adjoints[0])
            adjoints.insert(0, adjoints[0] + product)
            said.insert(0, eps.detach())
        return adjoints, said

    def _decode(self, x: Tensor) -> Tensor:
        images: Tensor = self.pipeline.vae.decode(x / self.pipeline.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def _draw(self) -> list[int]:
        """The supervised steps of an update."""
        steps = len(self.d)
        last = list(range(steps - self.last, steps))
        return torch.randperm(steps - self.last)[: self.supervised - self.last].tolist() + last
