"""Losses: one method a file, first the pure function, then its mixin."""

from lightning_tilt.losses.adjoint_matching import AdjointMatching

__all__ = ["AdjointMatching"]
