"""The chain of a tilted process with any bounded noise: transport and guidance on top of the base, weighed both ways.

    pi_t ~ p_t exp(r_t)         r_t: `MarginalPath`        w = v_theta - v: the transport that is learned

    F(x_{k+1} | x_k) = N( x_k     + h_k (v + w + sigma^2/2 (s + grad r_t)),           sigma_k^2 h_k )
    B(x_k | x_{k+1}) = N( x_{k+1} - h_k (v + w - sigma^2/2 (s + grad r_t))(x_{k+1}),  sigma_{k+1}^2 h_k )

v, s are the base's, h_k = t_{k+1} - t_k, and F0, B0 have w = 0, r = 0.  The score is infinite at t = 1, so the last
step, from t_{K-1} to 1, is the base's own deterministic one, x1_hat(X_{K-1}): the path of marginals ends at t_{K-1},
and the law that is tilted is that of x1_hat(X), X ~ p_{t_{K-1}}, with its reward: p_base up to O(beta^2) there.

    Crooks       log w = lam r(X_K) - sum_{k < K-1} ( log F/F0 (X_{k+1} | X_k) - log B/B0 (X_k | X_{k+1}) )
    Jarzynski    log w = lam r(X_K) - r_{K-1}(X_{K-1}) + A_{K-1}        A: `identities.marginals`, at the midpoint

Both have E[w] = Z up to the discretisation, for every w: first order in h, Jarzynski's second where w is exact.  Crooks
reads w off the recorded noise, so that the paths of an older model are weighed rightly and only the base is asked;
Jarzynski needs div w, exactly, since an estimate of it in the exponent would bias.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_tilt.chain import Chain, evaluating, slices
from lightning_tilt.condition import Condition
from lightning_tilt.identities import backward_drift, forward_drift
from lightning_tilt.interfaces.predictor import Predictor
from lightning_tilt.process import Prediction, expand
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import Gaussian
from lightning_tilt.transport.noise import BoundedNoise
from lightning_tilt.transport.path import MarginalPath
from lightning_tilt.transport.weights import crooks, jarzynski

__all__ = ["Fields", "KnownTransport", "TransportChain"]


class KnownTransport(ABC):
    """A predictor that knows its transport w = v_theta - v without asking its base."""

    @abstractmethod
    def w(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transport at states (B, *state_shape) and times (B,), differentiable in x: (B, *state_shape)."""


class Fields(NamedTuple):
    """What drives B states at their times, (B, *shape) each.

    Attributes:
        prediction: the base's.
        v: its velocity.
        s: its score.
        r: r_t(x), (B,).
        grad_r: grad r_t(x).
        rate: d_t r_t(x), (B,), if asked for.
    """

    prediction: Prediction
    v: Tensor
    s: Tensor
    r: Tensor
    grad_r: Tensor
    rate: Tensor | None


@dataclass(frozen=True, kw_only=True)
class TransportChain(Chain):
    """A chain of the forward process, with the weights of Crooks or Jarzynski.

    Attributes:
        transition: the noise; its kernels of the base are F0.
        path: r_t, from t_0 to t_{K-1}.
        weights: which identity `log_weights` takes.
    """

    transition: BoundedNoise
    path: MarginalPath
    weights: Literal["crooks", "jarzynski"] = "crooks"

    @property
    def control_form(self) -> bool:
        """False: the backward kernels reverse the base to first order in the step, and so is E[w] = Z."""
        return False

    def fields(
        self,
        predictor: Predictor,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        scale: float = 1.0,
        *,
        rate: bool = False,
        create_graph: bool = False,
    ) -> Fields:
        """The base's fields and `r_t` at states (B, *shape) and times (B,), from one evaluation of the base.

        Args:
            predictor: the model whose base is asked.
            x: states.
            t: their times, float64.
            condition: B conditions.
            scale: guidance of the base.
            rate: bring d_t r_t too.
            create_graph: let gradients flow back to x.
        """
        self.evaluations.reward += len(x)
        with predictor.base() as base:

            def predict(x: Tensor, t: Tensor, condition: Condition) -> Prediction:
                output = self.output_at(base, x, t, condition, scale, unconditional_gradient=True)
                return self.process.interpret(output, base.prediction_type, x, t)

            prediction, r, grad_r, d_t = self.path.look(x, t, condition, predict, rate=rate, create_graph=create_graph)
        v, s = self.process.velocity(prediction, t), self.process.score(prediction, t)
        return Fields(prediction, v, s, r, grad_r, d_t)

    def transport(
        self, predictor: Predictor, t: Tensor, condition: Condition, scale: float = 1.0, v: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The field `x -> w(x, t)` at times (B,), with gradient to x and to what is trained.

        Args:
            predictor: the tuned model.
            t: times, float64.
            condition: B conditions.
            scale: guidance of model and base.
            v: the base's velocity where it is known and x carries no gradient; None: the base is asked.
        """

        def w(x: Tensor) -> Tensor:
            if isinstance(predictor, KnownTransport) and scale == 1:
                self.evaluations.forward += len(x)
                with self.context():
                    return predictor.w(x, t, condition).to(x.dtype)
            tuned = self._velocity(predictor, x, t, condition, scale)
            if v is not None:
                return tuned - v
            with predictor.base() as base:
                return tuned - self._velocity(base, x, t, condition, scale)

        return w

    def forward(self, f: Fields, w: Tensor, x: Tensor, k: Tensor) -> tuple[Gaussian, Gaussian]:
        """F and F0 from states of steps k (B,), k < K: by the length of the step from t_k."""
        t, h = self.times(k, x), self.times(k + 1, x) - self.times(k, x)
        return self._kernels(f, w, x, t, h, 1)

    def backward(self, f: Fields, w: Tensor, x: Tensor, k: Tensor) -> tuple[Gaussian, Gaussian]:
        """B and B0 from states of steps k (B,) back to k - 1; where k = 0 they mean nothing."""
        k = k.clamp(min=1)
        t, h = self.times(k, x), self.times(k, x) - self.times(k - 1, x)
        return self._kernels(f, w, x, t, h, -1)

    def times(self, k: Tensor | int, x: Tensor) -> Tensor:
        """`t_k` of states x (B, ...), for one k or one a sample: (B,), float64."""
        return self.t[torch.as_tensor(k, device=self.t.device)].to(x.device).expand(len(x))

    def rollout(
        self,
        predictor: Predictor,
        condition: Condition,
        noise: Tensor,
        *,
        scale: float = 1.0,
        base: bool = False,
        base_last_step: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """As `Chain.rollout`; the tuned law has transport and guidance, the base neither."""
        if base:
            return super().rollout(predictor, condition, noise, scale=scale, base=True)
        x, noise = self.process.initial(noise[0]), noise[1:]
        states = [x]
        for k in range(self.steps - 1):
            t, i = self.times(k, x), torch.full((len(x),), k)
            f = self.fields(predictor, x, t, condition, scale)
            w = self.transport(predictor, t, condition, scale, f.v)(x)
            x = self.forward(f, w, x, i)[0].sample(noise[k])
            states.append(x)
        k = self.steps - 1
        with predictor.base() if base_last_step else nullcontext(predictor) as model:
            states.append(self.mean(model, condition, scale)(x, k))
        return torch.stack(states), noise

    def log_weights(
        self,
        predictor: Predictor,
        trajectory: Trajectory,
        lam: float,
        scale: float = 1.0,
        micro_batch: int | None = None,
    ) -> Tensor:
        """Log path weights by Crooks or Jarzynski; see `Chain.log_weights`."""
        parts = []
        with torch.no_grad(), evaluating(predictor):
            for i in slices(len(trajectory), micro_batch):
                part = trajectory[i]
                if self.weights == "crooks":
                    *_, (_, log_ratio) = crooks(self, predictor, part, scale)
                else:
                    log_ratio = jarzynski(self, predictor, part, scale)
                parts.append(lam * part.reward + log_ratio)
        return torch.cat(parts)

    def _kernels(self, f: Fields, w: Tensor, x: Tensor, t: Tensor, h: Tensor, way: int) -> tuple[Gaussian, Gaussian]:
        sigma, step = expand(self.transition.sigma(t), x), expand(h, x)
        drift = forward_drift if way > 0 else backward_drift
        means = (x + way * step * drift(f.v, f.s, sigma, w, f.grad_r), x + way * step * drift(f.v, f.s, sigma))
        std = sigma * step.sqrt()
        return Gaussian(means[0], std), Gaussian(means[1], std)

    def _velocity(self, predictor: Predictor, x: Tensor, t: Tensor, condition: Condition, scale: float) -> Tensor:
        output = self.output_at(predictor, x, t, condition, scale, unconditional_gradient=True)
        return self.process.velocity(self.process.interpret(output, predictor.prediction_type, x, t), t)

    def r(self, predictor: Predictor, t: Tensor, condition: Condition, scale: float) -> Callable[[Tensor], Tensor]:
        """`x -> r_t(x)`; the base is asked where the path goes through its prediction."""

        def value(x: Tensor) -> Tensor:
            self.evaluations.reward += len(x)
            x1_hat = x
            if self.path.kind == "x1_hat":
                with predictor.base() as base:
                    output = self.output_at(base, x, t, condition, scale)
                    x1_hat = self.process.interpret(output, base.prediction_type, x, t).x1_hat
            return self.path.value(x, t, condition, x1_hat)

        return value
