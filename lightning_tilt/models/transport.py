"""Small networks for a transport: a velocity that is added to the base's, at all times up to the data.

    v_theta(x, t) = v(x, t) + w(x, t)             as x1_hat: x1_hat_theta = x1_hat + beta/(alpha' beta - alpha beta') w

    NeuralTransport       w = f                    a multilayer perceptron
    PotentialTransport    w = grad phi             phi(x, t) = x . N(x, t),  N a multilayer perceptron

(`NeuralTilt` has a gain of beta^2, with which w vanishes at the data.)  phi is 0 at x = 0, so that no function of the
time alone is in it: such a function moves nothing, and action matching on a grid of times could grow it for ever.
"""

import torch
from torch import Tensor

from lightning_tilt.interfaces import Condition, Predictor
from lightning_tilt.models.neural import NeuralTilt
from lightning_tilt.transport import KnownTransport

__all__ = ["NeuralTransport", "PotentialTransport"]


class NeuralTransport(NeuralTilt, KnownTransport):
    """The velocity of a frozen base plus an MLP (SiLU, Fourier features of t), which is 0 at the start.

    Args:
        base: the model to move; any prediction type.  It is frozen and held once, outside the checkpoint.
        hidden: width of the hidden layers.
        layers: number of hidden layers.
        frequencies: number of frequencies in the features of the time.
        input_scale: the unit of length of states and transport.
    """

    # No guide: the chain of a transport has the gradient of r_t in its drift already.
    def __init__(
        self, base: Predictor, hidden: int = 128, layers: int = 3, frequencies: int = 6, input_scale: float = 1.0
    ) -> None:
        super().__init__(base, hidden, layers, frequencies, input_scale)

    def gain(self, t: Tensor) -> Tensor:
        """`unit beta/(alpha' beta - alpha beta')`, what multiplies `f` in x1_hat: (B,), float64."""
        process, t = self.process, t.double()
        det = process.d_alpha(t) * process.beta(t) - process.alpha(t) * process.d_beta(t)
        return self.input_scale * process.beta(t) / det

    def w(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """`unit f(x/unit, t)`, on the subspace of the states: (B, *state_shape)."""
        return self.project(self.input_scale * self.f(x / self.input_scale, t).to(x.dtype))


class PotentialTransport(NeuralTransport):
    """The velocity of a frozen base plus the gradient of a potential, which is 0 at the start.

    Its arguments are those of `NeuralTransport`.
    """

    def potential(self, x: Tensor, t: Tensor) -> Tensor:
        """`phi(x, t)` of states (B, *state_shape) and times (B,), differentiable in both: (B,)."""
        return self.input_scale**2 * self._phi(x / self.input_scale, t).to(x.dtype)

    def f(self, x: Tensor, t: Tensor) -> Tensor:
        """The gradient of the potential in units of `input_scale`, (B, ...); it has a graph where gradients are on."""
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if not (graph and x.requires_grad):
                x = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self._phi(x, t).sum(), x, create_graph=graph)
        return gradient

    def _phi(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.project(x)  # of the centre of particles, which is of no interest, phi knows nothing
        return (x * super().f(x, t).to(x.dtype)).flatten(1).sum(1)
