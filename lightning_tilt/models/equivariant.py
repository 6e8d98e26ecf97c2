"""An E(n)-equivariant graph network on top of any base of n particles in d dimensions (after 2102.09844).

A rotation, reflection or permutation of the particles does the same to `f(x, t)`; a translation does nothing, and f has
no mean over the particles.  All pairs (i, j) are neighbours, h_i features, y_i working coordinates, y^0 = x:

    e_ij    = y_i - y_j                                                             d_ij = |e_ij|
    m_ij    = SiLU( W SiLU( A (h_i + h_j) + C rho(d_ij, d^0_ij) ) )                 rho: distances, see `_radial`
    y_i    <- y_i + 1/(n - 1) sum_j e_ij/(d_ij + 1) tanh(w . m_ij)                  all layers but the last
    h_i    <- h_i + MLP( h_i, 1/(n - 1) sum_j m_ij )
    f_i     = sum_j e_ij/(d_ij + 1) bound tanh(w . m_ij/bound)                      last layer

The features start from the time alone.  Unlike the paper's, messages are symmetric, m_ij = m_ji: the gradient of a
function of the distances is a sum of pushes `e_ij` times something symmetric, and each pair is worked on once.
`e/(d + 1)` is shorter than 1 and tanh is bounded: a head that multiplies positions explodes in the first, long steps.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_tilt.interfaces import Predictor, Reward
from lightning_tilt.models.guide import time_features
from lightning_tilt.models.tilt import TiltOfBase

__all__ = ["EquivariantTilt"]

# Keeps the gradient of |e| finite where two particles coincide, as all do at the start of `Driftless`.
_TINY = 1e-12


class EquivariantTilt(TiltOfBase):
    """`x1_hat` of a frozen base plus the gain of `TiltOfBase` times an equivariant network, 0 at the start.

    Args:
        base: the model to tune, of states (n, d), n >= 2.  It is frozen and held once, outside the checkpoint.
        hidden: width of features, messages and hidden layers.
        layers: rounds of messages.
        frequencies: number of frequencies in the features `cos(pi j t), sin(pi j t)` of the time.
        bound: the largest push of one particle on another in f.
        input_scale: the unit of length of the states.
        guide: see `TiltOfBase`; the gradient of an energy of particles is equivariant too.
        guide_reach: see `TiltOfBase`.

    Raises:
        ValueError: if the states of the base are not those of at least two particles, or a size is not positive.
    """

    sources: ClassVar[tuple[str, ...]] = ("satorras2021en",)
    signed: Tensor

    def __init__(
        self,
        base: Predictor,
        hidden: int = 64,
        layers: int = 4,
        frequencies: int = 6,
        bound: float = 10.0,
        input_scale: float = 1.0,
        guide: Reward | None = None,
        guide_reach: float = 3.0,
    ) -> None:
        super().__init__(base, input_scale, guide, guide_reach)
        if len(self.state_shape) != 2 or self.state_shape[0] < 2:
            raise ValueError(f"EquivariantTilt moves particles: states of shape (n, d), n >= 2, not {self.state_shape}")
        if layers < 1 or bound <= 0:
            raise ValueError(f"layers must be at least 1 and bound positive, not {layers} and {bound}")
        self.frequencies = frequencies
        self.bound = bound
        self.embed = nn.Linear(1 + 2 * frequencies, hidden)
        self.rounds = nn.ModuleList(_Round(hidden) for _ in range(layers - 1))
        self.messages = _Messages(hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        # Rows are the pairs i < j, with 1 at i and -1 at j: products with it, and with its absolute value, are
        # differences, sums and their adjoints, much faster than indexing forth and back.
        i, j = torch.triu_indices(self.state_shape[0], self.state_shape[0], 1)
        eye = torch.eye(self.state_shape[0])
        self.register_buffer("signed", eye[i] - eye[j], persistent=False)

    @property
    def vector_dims(self) -> tuple[int, ...]:
        """Those of a particle."""
        return (-1,)

    def f(self, x: Tensor, t: Tensor) -> Tensor:
        """The network alone: states in units of `input_scale` (B, n, d), times (B,), to (B, n, d), in its own dtype."""
        dtype = self.last.weight.dtype
        y, signed = x.to(dtype), self.signed.to(dtype)
        h = self.embed(time_features(t, self.frequencies).to(dtype))[:, None].expand(-1, y.shape[1], -1)
        _, start = _distances(y, signed)
        for block in self.rounds:
            y, h = block(y, h, start, signed)
        e, d = _distances(y, signed)
        push = self.bound * (self.last(self.messages(h, d, start, signed)) / self.bound).tanh()
        out: Tensor = signed.mT @ (e / (d + 1) * push)
        return out


class _Messages(nn.Module):
    """m_ij, (B, P, hidden), from features (B, n, hidden) and distances now and at the start, (B, P, 1) each."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.features = nn.Linear(hidden, hidden, bias=False)
        self.radial = nn.Linear(4, hidden)
        self.second = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, d: Tensor, start: Tensor, signed: Tensor) -> Tensor:
        pairs = signed.abs() @ self.features(h) + self.radial(_radial(d, start))
        out: Tensor = nn.functional.silu(self.second(nn.functional.silu(pairs)))
        return out


class _Round(nn.Module):
    """One round: messages, a bounded move of the coordinates, an update of the features."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.messages = _Messages(hidden)
        self.move = nn.Linear(hidden, 1)
        self.update = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, y: Tensor, h: Tensor, start: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
        others = y.shape[1] - 1
        e, d = _distances(y, signed)
        m = self.messages(h, d, start, signed)
        y = y + signed.mT @ (e / (d + 1) * self.move(m).tanh()) / others
        return y, h + self.update(torch.cat([h, signed.abs().mT @ m / others], -1))


def _distances(y: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    """e_ij = y_i - y_j of the P pairs, (B, P, d), and their lengths, (B, P, 1)."""
    e = signed @ y
    return e, (e.square().sum(-1, keepdim=True) + _TINY).sqrt()


def _radial(d: Tensor, start: Tensor) -> Tensor:
    """Functions of the squared distances now and at the start that grow slowly and tell short ones apart: (..., 4)."""
    return torch.cat([torch.log1p(d**2), 1 / (1 + d**2), torch.log1p(start**2), 1 / (1 + start**2)], -1)
