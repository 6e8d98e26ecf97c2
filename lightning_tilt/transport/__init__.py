"""Tilting along a path of marginals: the path, the bounded noise, the chain of both, and how its paths are weighed."""

from lightning_tilt.transport.chain import Fields, KnownTransport, TransportChain
from lightning_tilt.transport.noise import BoundedNoise
from lightning_tilt.transport.path import SCHEDULES, Look, MarginalPath, PathKind, PathSchedule
from lightning_tilt.transport.weights import crooks, jarzynski

__all__ = [
    "SCHEDULES",
    "BoundedNoise",
    "Fields",
    "KnownTransport",
    "Look",
    "MarginalPath",
    "PathKind",
    "PathSchedule",
    "TransportChain",
    "crooks",
    "jarzynski",
]
