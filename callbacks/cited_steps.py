"""What a sampler's steps are from: guidance is classifier-free (2207.12598), and DDIM is of 2010.02502.

DDIM is cited where `ddim_eta` is below 1.  At 1 its step is the ancestral one of every diffusion model.
"""

from collections.abc import Mapping
from typing import Any

from ..interfaces import Cited
from ..transition import DDIM, Transition

__all__ = ["CitedSteps"]


class CitedSteps(Cited):
    """What has a `guidance_scale` and a `transition`, in its constructor and as attributes."""

    guidance_scale: float
    transition: Transition

    @classmethod
    def sources_with(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """See `Cited`."""
        transition = arguments.get("transition")
        given = transition.get("init_args") if isinstance(transition, Mapping) else None
        return cls._sources(arguments.get("guidance_scale", 1.0), (given or {}).get("ddim_eta", 1.0))

    def own_sources(self) -> tuple[str, ...]:
        """See `Cited`."""
        eta = self.transition.ddim_eta if isinstance(self.transition, DDIM) else 1.0
        return self._sources(self.guidance_scale, eta)

    @classmethod
    def _sources(cls, guidance_scale: float, ddim_eta: float) -> tuple[str, ...]:
        guided = ("ho2022classifier",) if guidance_scale != 1 else ()
        return (*cls.sources, *guided, *(("song2020denoising",) if ddim_eta != 1 else ()))
