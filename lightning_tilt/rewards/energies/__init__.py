"""The classical benchmarks of sampling an unnormalised density, as rewards: `exp(-E)` with what is known of each.

| density          | states    | log Z      | reference samples       |
| ---------------- | --------- | ---------- | ----------------------- |
| `GMM40`          | (2,)      | 0          | exact                   |
| `ManyWell32`     | (32,)     | 164.695675 | exact                   |
| `Funnel`         | (10,)     | 0          | exact                   |
| `DoubleWell4`    | (4, 2)    |            | kept, of long chains    |
| `LennardJones13` | (13, 3)   |            | kept, of long chains    |
| `LennardJones55` | (55, 3)   |            | kept, of long chains    |
| `Phi4`           | (L, L)    | if g = 0   | chains, on the spot     |
| `FunctionDensity`| any       | if given   |                         |
"""

from lightning_tilt.rewards.energies.double_well import DoubleWell4
from lightning_tilt.rewards.energies.function import FunctionDensity
from lightning_tilt.rewards.energies.funnel import Funnel
from lightning_tilt.rewards.energies.gmm40 import GMM40
from lightning_tilt.rewards.energies.lennard_jones import LennardJones13, LennardJones55
from lightning_tilt.rewards.energies.many_well import ManyWell32
from lightning_tilt.rewards.energies.phi4 import Phi4

__all__ = [
    "GMM40",
    "DoubleWell4",
    "FunctionDensity",
    "Funnel",
    "LennardJones13",
    "LennardJones55",
    "ManyWell32",
    "Phi4",
]
