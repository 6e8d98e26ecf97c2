"""What a reward's gradient at the predicted end point says, as a part of a small network's prediction.

    move(x, t) = gate(t) soften( V_t grad r(x1_hat_base(x, t)) ),      soften(v) = v/sqrt(1 + |v|^2/(reach^2 V_t))

with V_t = Var(X_1 | X_t) of a Gaussian base, beta^2 of another.  A tilt moves x1_hat by V_t E*[lam grad r(X_1) | X_t],
which near the data is V_t lam grad r(x1_hat): a network beside this move, times a learned function of the time, has
only to learn the rest.  Far from the data a steep reward has a gradient at x1_hat that says little of the one at X_1,
and of any length, where no tilt moves a coordinate by many standard deviations of what is still open: longer moves are
softened, |v| the length of what the network calls one vector (a sample, a particle, a site).  The limit is gone where
V_t is.

Samplers of unnormalised densities have used such a part since the path integral sampler (2111.15141, section 4; DDS,
2302.13834), there with the gradient at x.  It costs an energy evaluation a network call, which the
counters of a run show as `reward` evaluations.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Cited, Predictor, Reward
from lightning_tilt.process import expand

__all__ = ["Guide", "time_features"]


def time_features(t: Tensor, frequencies: int) -> Tensor:
    """`t`, `cos(pi j t)` and `sin(pi j t)` for j = 1 .. frequencies: (B,) -> (B, 1 + 2 frequencies), float64."""
    phase = torch.pi * t.double()[:, None] * torch.arange(1, frequencies + 1, device=t.device)
    return torch.cat([t.double()[:, None], phase.cos(), phase.sin()], 1)


class Guide(nn.Module, Cited):
    """`gate(t) soften(V_t grad r(x1_hat))`, 0 at the start; the gate, one number a time, is learned.

    Args:
        reward: whose gradient is followed: a density, or any other reward that is differentiable and needs no prompts.
        reach: longest move before the gate, in standard deviations sqrt(V_t).
        dims: the dimensions of states (B, *shape) that make one vector; (): every number is on its own.
        frequencies: of the gate's features of the time.
        hidden: width of the gate's hidden layer.

    Raises:
        TypeError: for a reward without gradient, or one that reads prompts.
        ValueError: if `reach` is not positive.
    """

    sources: ClassVar[tuple[str, ...]] = ("zhang2021path", "vargas2023denoising")

    def __init__(
        self,
        reward: Reward,
        reach: float = 3.0,
        dims: tuple[int, ...] = (-1,),
        frequencies: int = 6,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        if not reward.is_differentiable or reward.needs_prompts:
            raise TypeError(
                f"a guide follows the gradient of a reward that needs no prompts; {type(reward).__name__} "
                f"{'reads prompts' if reward.needs_prompts else 'has no gradient'}: leave the guide out"
            )
        if not reach > 0:
            raise ValueError(f"guide_reach is a number of standard deviations and positive, not {reach}")
        self._reward = Frozen(reward)
        self.reach = reach
        self.dims = dims
        self.frequencies = frequencies
        self.hidden = nn.Linear(1 + 2 * frequencies, hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def bind(self, predictor: Predictor) -> None:
        """Tell a density which base it tilts."""
        self._reward.module.bind(predictor)

    def forward(self, x1_hat: Tensor, t: Tensor, variance: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """The move of `x1_hat`, (B, *shape), in its dtype; the reward is asked in full precision.

        Where gradients are on and `x1_hat` has one, that of the move flows back through the reward's second derivative.
        Where the reward's gradient is not finite it counts as 0: two particles in one place are not pushed anywhere.

        Args:
            x1_hat: what the base predicts, (B, *shape).
            t: times, (B,).
            variance: V_t, (B,), float64.
            decode: what makes of end points what the reward is asked about.
        """
        graph = torch.is_grad_enabled() and x1_hat.requires_grad
        device = x1_hat.device.type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            x = x1_hat if graph else x1_hat.detach().clone().requires_grad_()
            x = x if x.dtype == torch.float64 else x.float()
            score = self._reward.module.score(decode(x), None).sum()
            (gradient,) = torch.autograd.grad(score, x, create_graph=graph)
            variance = expand(variance, x)
            # squares of more than 1e18 are not float32's
            v = variance * torch.where(gradient.isfinite(), gradient, 0.0).clamp(-1e18, 1e18)
            square = v.square().sum(self.dims, keepdim=True) if self.dims else v.square()
            v = v / (1 + square / (self.reach**2 * variance).clamp(min=1e-30)).sqrt()
        v = v if graph else v.detach()
        features = time_features(t, self.frequencies).to(self.last.weight)
        gate = self.last(nn.functional.silu(self.hidden(features))).to(v)
        move: Tensor = v * gate.reshape(-1, *(1,) * (v.ndim - 1))
        return move.to(x1_hat.dtype)
