"""Callbacks: the trajectory sampler that every loss shares, and what watches, draws and reports."""

from .sampler import TrajectorySampler

__all__ = ["TrajectorySampler"]
