"""The lean adjoint, by the name that losses know it by; it is defined in `identities.lean_adjoint`."""

from lightning_tilt.identities.lean_adjoint import lean_adjoint

__all__ = ["lean_adjoint"]
