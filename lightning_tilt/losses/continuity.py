"""The continuity equation of a path of tilted marginals, in two forms that a loss can minimise.

    R = d_t r_t + (v + w).grad r_t + div w + w.s - d_t F_t          0 at every state, where w moves pi_t ~ p_t exp(r_t)
    |grad phi|^2/2 - (rho - E[rho]) phi,  rho = d_t r_t + v.grad r_t          its mean is least there, w = grad phi

F_t = log Z_t; only its rate enters, and that is what is learned.  (2410.02711; 2210.06662.)
"""

import torch
from torch import Tensor, nn

from lightning_tilt.identities import treat_weights
from lightning_tilt.models.guide import time_features
from lightning_tilt.transport import Fields

__all__ = ["FreeEnergy", "action_terms", "marginal_weights", "residual"]

_FREQUENCIES = 4


def residual(f: Fields, w: Tensor, div_w: Tensor, d_free_energy: Tensor) -> Tensor:
    """`R = d_t r_t + (v + w).grad r_t + div w + w.s - d_t F_t`, (P,).

    Args:
        f: the base's fields with the rate of r_t.
        w: the transport, (P, *shape).
        div_w: its divergence, (P,).
        d_free_energy: d_t F_t, (P,).
    """
    assert f.rate is not None
    moved = ((f.v + w) * f.grad_r + w * f.s).flatten(1).sum(1)
    return f.rate + moved + div_w - d_free_energy


def action_terms(grad_phi: Tensor, phi: Tensor, source: Tensor) -> Tensor:
    """`|grad phi|^2/2 - source phi`, (P,).

    Args:
        grad_phi: the gradient of the potential, (P, *shape).
        phi: the potential, (P,).
        source: `rho - E_pi_t[rho]`, `rho = d_t r_t + v.grad r_t`, (P,).
    """
    return (grad_phi**2).flatten(1).sum(1) / 2 - source * phi


def marginal_weights(log_w: Tensor, rho: Tensor, good: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of mean 1 for each group and time, 0 for bad samples, and `rho - E_pi_t[rho]`: both (K, N).

    Args:
        log_w: log weights of the states for pi_{t_k}, (K, N).
        rho: `d_t r_t + v.grad r_t` there, (K, N).
        good: whether a sample counts, (N,).
        group: the number of its prompt, (N,).
    """
    weight, source = torch.zeros_like(rho), torch.zeros_like(rho)
    if not bool(good.any()):
        return weight, source
    places = group[good] + (int(group.max()) + 1) * torch.arange(len(rho), device=rho.device)[:, None]
    place = places.flatten().unique(return_inverse=True)[1]
    w = treat_weights(log_w[:, good].flatten(), "self_normalised", group=place)
    of_rho = rho[:, good].flatten()
    means = w.new_zeros(int(place.max()) + 1).index_add(0, place, w * of_rho) / place.bincount()
    weight[:, good], source[:, good] = w.reshape(places.shape), (of_rho - means[place]).reshape(places.shape)
    return weight, source


class FreeEnergy(nn.Module):
    """`d_t F_t` as a small network of the time, 0 at the start.

    Args:
        hidden: width of its hidden layer.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Linear(1 + 2 * _FREQUENCIES, hidden)
        self.last = nn.Linear(hidden, 1)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, t: Tensor) -> Tensor:
        """`d_t F_t` at the times t (P,): (P,)."""
        out: Tensor = self.last(nn.functional.silu(self.hidden(time_features(t, _FREQUENCIES).to(self.last.weight))))
        return out[:, 0]

    @torch.no_grad()
    def log_z(self, t: Tensor) -> Tensor:
        """`F` at the last of the times t (K,), by the trapezoid rule: ()."""
        return torch.trapezoid(self(t), t.to(self.last.weight))
