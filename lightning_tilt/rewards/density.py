"""An unnormalised density as a reward.

    p*(x) ~ exp(-E(x))        is the tilt of p_base by        lam r(x) = -E(x) - log p_base(x),    lam = 1

so that Z = E_base[exp(r)] is the integral of exp(-E): `log Z` of a run is the log normaliser of the density itself.
The base must have a density in closed form (`KnownLaw`); the reward learns it at set-up.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_tilt.interfaces import KnownLaw, Predictor, Prompts, Reward

__all__ = ["Density"]


class Density(Reward):
    """`exp(-E)`, known up to its normaliser. A subclass gives `energy`, and what is known of it.

    Attributes:
        log_z: log of the integral of exp(-E) over the states, None where it is not known. Of mean-free particles the
            integral is over the mean-free subspace.
        particles: (n, d) where the states are n points in d dimensions whose labels, rotations, reflections and
            translations do not matter; None for a plain density.

    Args:
        kwargs: of `torchmetrics.Metric`.
    """

    log_z: float | None = None
    particles: tuple[int, int] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._base: list[KnownLaw] = []

    @abstractmethod
    def energy(self, x: Tensor) -> Tensor:
        """`E(x)` of states (B, *state_shape), differentiable: (B,)."""

    def reference(self, n: int, seed: int = 0) -> Tensor | None:
        """`n` samples of the density, (n, *state_shape), float32; None where none can be made."""
        return None

    def figures(self, x: Tensor) -> dict[str, float]:
        """What else there is to say of samples (n, *state_shape), by name: how many modes they have found, say."""
        return {}

    def bind(self, predictor: Predictor) -> None:
        """Take the density of the predictor's base.

        Raises:
            TypeError: if the base has none in closed form.
        """
        with predictor.base() as base:
            if not isinstance(base, KnownLaw):
                raise TypeError(
                    f"{type(self).__name__} tilts a base of known density, and {type(base).__name__} has none: use "
                    "GaussianBase or GaussianMixturePredictor as the predictor's base"
                )
            self._base = [base]

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """`-E(x) - log p_base(x)` of the states (B, *state_shape): (B,).

        Raises:
            RuntimeError: before `bind`.
        """
        if not self._base:
            raise RuntimeError(f"{type(self).__name__} does not know its base yet: call bind(predictor) first")
        x = images
        return -self.energy(x) - self._base[0].log_prob(x)

    @torch.no_grad()
    def log_density(self, x: Tensor) -> Tensor:
        """`-E(x)`, (B,), without gradient: what pictures draw."""
        return -self.energy(x)
