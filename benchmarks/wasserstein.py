"""Symmetric W2 of particle systems over a plain loop of scipy's Hungarian method, in one run.

    python benchmarks/wasserstein.py [--systems 2000 --particles 4 --dimensions 2 [--search auto]] [--floors]

The loop does what public code does for every pair: distances, one assignment, one Kabsch rotation by numpy.  It is
timed on a subset of the pairs and scaled to all of them, since it would take minutes; the transport problem on top is
the same for both and is timed once, on the matrix that the package made.  `--floors` measures noise floors instead.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from results import markdown, parser, publish
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from lightning_tilt.metrics import noise_floor, sliced_wasserstein2, squared_symmetric_distances, wasserstein2
from lightning_tilt.metrics.wasserstein import squared_transport_cost
from lightning_tilt.models import the_mixture

__all__ = ["floors", "loop", "main", "ratio"]


def loop(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (n, m) of systems, pair by pair."""
    cost = np.empty((len(x), len(y)))
    for i, a in enumerate(x.numpy()):
        for j, b in enumerate(y.numpy()):
            a0, b0 = a - a.mean(0), b - b.mean(0)
            _, s = linear_sum_assignment(((a0[:, None] - b0[None]) ** 2).sum(-1))
            u, _, vh = np.linalg.svd(b0[s].T @ a0)
            cost[i, j] = ((a0 - b0[s] @ u @ vh) ** 2).sum()
    return torch.from_numpy(cost)


def ratio(systems: int, particles: int, dimensions: int, search: str, pairs: int) -> list[str]:
    """Time both on random systems, and compare their values on the subset: a line of the table."""
    shape = (systems, particles, dimensions)
    generator = torch.Generator().manual_seed(0)
    x, y = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    start = time.process_time()
    cost = squared_symmetric_distances(x, y, search)  # type: ignore[arg-type]
    ours = time.process_time() - start
    start = time.process_time()
    value = float(squared_transport_cost(cost).sqrt())
    transport = time.process_time() - start
    rows = min(systems, max(1, round(pairs**0.5)))
    start = time.process_time()
    naive = loop(x[:rows], y[:rows])
    scaled = (time.process_time() - start) * (systems / rows) ** 2
    return [
        f"{systems} x {systems} of {particles} in {dimensions} dimensions, {search}", f"{scaled / ours:.1f}",
        f"{(scaled + transport) / (ours + transport):.1f}", f"{value:.4f}", f"{cost[:rows, :rows].mean():.4f}",
        f"{naive.mean():.4f}",
    ]  # fmt: skip


def floors() -> None:
    """Truth against truth: the numbers in the docstring of lightning_tilt/metrics/reference.py."""
    torch.manual_seed(0)
    means = (torch.rand(40, 2) - 0.5) * 80
    gmm40 = means[torch.randint(40, (40_000,))] + 1.3132617 * torch.randn(40_000, 2)
    mixture, reward = the_mixture()
    tilted = mixture.tilt(reward, 1.0)[0].sample(200_000)
    cases: list[tuple[str, Callable[[Tensor, Tensor], Tensor], Tensor, tuple[int, ...], int]]
    cases = [("GMM40, W2", wasserstein2, gmm40, (1000, 2000), 20)]
    cases += [("the mixture, sliced W2", sliced_wasserstein2, tilted, (500, 1000, 2000, 3000), 60)]
    for name, distance, truth, sizes, repeats in cases:
        for n in sizes:
            floor = noise_floor(distance, truth, n, repeats)
            deviation = floor.se * repeats**0.5
            print(f"{name} at N = {n}: {floor.mean:.4f} +- {floor.se:.4f}; a single value +- {deviation:.4f}")


def main() -> None:
    """Write the ratios, or print the floors."""
    arguments = parser(__doc__)
    arguments.add_argument("--systems", type=int, help="one case of so many in the place of the table's")
    arguments.add_argument("--particles", type=int, default=4)
    arguments.add_argument("--dimensions", type=int, default=2)
    arguments.add_argument("--search", default="auto", help="of squared_symmetric_distances")
    arguments.add_argument("--pairs", type=int, default=10_000, help="pairs that the plain loop is timed on")
    arguments.add_argument("--floors", action="store_true", help="measure noise floors instead")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    if args.floors:
        floors()
        return
    cases = [(1000, 4, 2, "auto"), (200, 13, 3, "alternate"), (200, 13, 3, "thorough")]
    if args.systems is not None:
        cases = [(args.systems, args.particles, args.dimensions, args.search)]
    if args.quick:
        cases = [(min(n, 10), *rest) for n, *rest in cases]
    text = (
        "CPU seconds of the plain loop over those of the package, on one thread. The loop makes one assignment and one "
        f"rotation a pair; it is timed on {args.pairs:,} pairs and scaled to all. Where it finds a larger distance, "
        "it has not found the least over permutations and rotations together; the package looks longer."
    )
    header = ["systems", "**distances**", "with transport", "symmetric W2", "mean squared distance", "the loop's"]
    table = markdown(header, [ratio(*case, args.pairs) for case in cases])
    publish("wasserstein", "Symmetric distances against a plain loop", [text, table], args)


if __name__ == "__main__":
    main()
