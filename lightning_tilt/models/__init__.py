"""What predicts: closed-form mixtures, small networks, and large ones.

Importing this room is light; each name below is loaded when it is first used, so that a toy problem never imports
diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_tilt.models.closed_form import GaussianMixturePredictor as GaussianMixturePredictor
    from lightning_tilt.models.closed_form import the_mixture as the_mixture
    from lightning_tilt.models.equivariant import EquivariantTilt as EquivariantTilt
    from lightning_tilt.models.gaussian_base import GaussianBase as GaussianBase
    from lightning_tilt.models.gaussian_mixture import GaussianMixture as GaussianMixture
    from lightning_tilt.models.latent_diffusion import LatentDiffusion as LatentDiffusion
    from lightning_tilt.models.lattice import LatticeTilt as LatticeTilt
    from lightning_tilt.models.neural import NeuralTilt as NeuralTilt
    from lightning_tilt.models.stable_diffusion import StableDiffusion as StableDiffusion
    from lightning_tilt.models.stable_diffusion_3 import StableDiffusion3 as StableDiffusion3
    from lightning_tilt.models.text_conditioned import TextConditioned as TextConditioned
    from lightning_tilt.models.transport import NeuralTransport as NeuralTransport
    from lightning_tilt.models.transport import PotentialTransport as PotentialTransport

_HOMES = {
    "EquivariantTilt": "lightning_tilt.models.equivariant",
    "GaussianBase": "lightning_tilt.models.gaussian_base",
    "GaussianMixture": "lightning_tilt.models.gaussian_mixture",
    "GaussianMixturePredictor": "lightning_tilt.models.closed_form",
    "LatentDiffusion": "lightning_tilt.models.latent_diffusion",
    "LatticeTilt": "lightning_tilt.models.lattice",
    "NeuralTilt": "lightning_tilt.models.neural",
    "NeuralTransport": "lightning_tilt.models.transport",
    "PotentialTransport": "lightning_tilt.models.transport",
    "StableDiffusion": "lightning_tilt.models.stable_diffusion",
    "StableDiffusion3": "lightning_tilt.models.stable_diffusion_3",
    "TextConditioned": "lightning_tilt.models.text_conditioned",
    "the_mixture": "lightning_tilt.models.closed_form",
}

__all__ = [
    "EquivariantTilt",
    "GaussianBase",
    "GaussianMixture",
    "GaussianMixturePredictor",
    "LatentDiffusion",
    "LatticeTilt",
    "NeuralTilt",
    "NeuralTransport",
    "PotentialTransport",
    "StableDiffusion",
    "StableDiffusion3",
    "TextConditioned",
    "the_mixture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
