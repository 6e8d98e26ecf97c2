"""Wasserstein distances: closed forms of Gaussians, brute force over permutations, invariances, pieces and processes.

N(a, s^2 I), N(b, r^2 I) in d dimensions    W2^2 = |a - b|^2 + d (s - r)^2,     sliced  |a - b|^2/d + (s - r)^2
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_tilt.metrics import (
    EnergyWasserstein,
    SymmetricWasserstein2,
    Wasserstein2,
    noise_floor,
    sliced_wasserstein2,
    squared_sliced_wasserstein2,
    squared_symmetric_distances,
    squared_symmetric_wasserstein2,
    squared_wasserstein2,
    squared_wasserstein2_1d,
    wasserstein2,
)

D = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def quantiles(n: int) -> Tensor:
    """n equally likely values of N(0, 1), at the middles of their levels."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n, dtype=D) + 0.5) / n)


def turned(x: Tensor, seed: int, mirror: bool) -> Tensor:
    """Each system (n, N, d) shifted, permuted and rotated, by an R of its own; mirrored as well if asked."""
    n, N, d = x.shape
    R = torch.linalg.qr(normal(n, d, d, seed=seed))[0]
    R[:, :, 0] *= (torch.linalg.det(R) * (-1 if mirror else 1)).sign()[:, None]
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])
    return torch.stack([a[s] for a, s in zip(x @ R.mT, order, strict=True)]) + normal(n, 1, d, seed=seed + 1)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_exact_is_brute_force(n: int) -> None:
    x, y = normal(n, 2), normal(n, 2, seed=1)
    best = min(
        sum(float(((x[i] - y[s[i]]) ** 2).sum()) for i in range(n)) / n for s in itertools.permutations(range(n))
    )
    assert float(squared_wasserstein2(x, y)) == pytest.approx(best, rel=1e-12)
    assert float(wasserstein2(x, y)) == pytest.approx(math.sqrt(best), rel=1e-12)


def test_gaussians_have_closed_forms() -> None:
    """In one dimension by quantiles, without noise; sliced from samples."""
    z = quantiles(20_000)
    value = squared_wasserstein2_1d(1.0 + 2.0 * z, -0.5 + 0.7 * z)
    assert float(value) == pytest.approx(1.5**2 + 1.3**2, rel=1e-3)
    x, y, a = normal(4000, 3), normal(4000, 3, seed=1), torch.tensor([2.0, -1.0, 0.5], dtype=D)
    theta = torch.randn(3, 50, generator=torch.Generator().manual_seed(5), dtype=D)
    shift = ((a @ (theta / theta.norm(dim=0))) ** 2).mean()
    value = squared_sliced_wasserstein2(a + 2.0 * x, y, projections=50, seed=5)
    # Standard errors: 2 |a|/3 sqrt(5/N) = .054 of the means, 2 sqrt(5/2N)/sqrt(3) = .03 of the widths; four of both.
    assert float(value) == pytest.approx(float(shift) + 1.0, abs=4 * math.hypot(0.054, 0.03))
    assert float(sliced_wasserstein2(a + 2.0 * x, y, projections=50, seed=5)) == pytest.approx(math.sqrt(float(value)))
    # A shift alone is exact for every direction, and (a . theta)^2 has the mean |a|^2/3 and the variance 4/45 |a|^4.
    assert float(shift) == pytest.approx(float(a @ a) / 3, abs=4 * float(a @ a) * math.sqrt(4 / 45 / 50))
    torch.testing.assert_close(squared_sliced_wasserstein2(x[:50] + a, x[:50], projections=50, seed=5), shift)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 7), (6, 4), (1, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_dimension_is_the_linear_program(n: int, m: int, weighted: bool) -> None:
    x, y = normal(n, 3), normal(m, 3, seed=1)
    p, q = (normal(k, seed=k).exp() if weighted else None for k in (n, m))
    naive = torch.stack([squared_wasserstein2(x[:, c : c + 1], y[:, c : c + 1], p, q) for c in range(3)])
    torch.testing.assert_close(squared_wasserstein2_1d(x, y, p, q), naive, rtol=1e-10, atol=1e-12)


def test_ties_of_levels_and_of_values() -> None:
    """Repeated points are weights: 6 against 4 samples share the levels 1/2 and 1."""
    x, y = torch.tensor([0.0, 0, 0, 2, 2, 2], dtype=D), torch.tensor([1.0, 1, 5, 5], dtype=D)
    assert float(squared_wasserstein2_1d(x, y)) == pytest.approx(0.5 * 1 + 0.5 * 9, rel=1e-12)
    assert float(squared_wasserstein2_1d(y, x)) == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize("distance", [squared_wasserstein2, squared_sliced_wasserstein2])
def test_whole_weights_are_repetitions(distance: Callable[..., Tensor]) -> None:
    x, y, k = normal(5, 2), normal(7, 2, seed=1), torch.tensor([3, 0, 1, 2, 1])
    torch.testing.assert_close(distance(x, y, k.double()), distance(x.repeat_interleave(k, 0), y))


@pytest.mark.parametrize("p", [[1.0, -1.0], [0.0, 0.0], [1.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_refuses_what_are_no_weights(p: list[float]) -> None:
    for distance in (squared_wasserstein2, squared_sliced_wasserstein2):
        with pytest.raises(ValueError, match="weights of 2 samples"):
            distance(normal(2, 2), normal(3, 2), torch.tensor(p))


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="have no distance"):
        wasserstein2(normal(2, 2), normal(2, 3))
    with pytest.raises(ValueError, match="systems must be"):
        squared_symmetric_distances(normal(2, 4), normal(2, 4))
    with pytest.raises(ValueError, match="search must be one of auto, exact"):
        squared_symmetric_distances(normal(2, 4, 2), normal(2, 4, 2), "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="too many to enumerate"):
        squared_symmetric_distances(normal(2, 9, 2), normal(2, 9, 2), "exact")


def naive_distance(a: np.ndarray, b: np.ndarray, mirrors: bool, orders: list[tuple[int, ...]] | None) -> float:
    """min over the orders (None: the one by assignment) of the squared distance after numpy's Kabsch rotation."""
    a, b = a - a.mean(0), b - b.mean(0)
    if orders is None:
        orders = [tuple(linear_sum_assignment(((a[:, None] - b[None]) ** 2).sum(-1))[1])]
    values = []
    for s in orders:
        u, _, vh = np.linalg.svd(b[list(s)].T @ a)
        if not mirrors and np.linalg.det(u @ vh) < 0:
            u[:, -1] *= -1
        values.append(float(((a - b[list(s)] @ u @ vh) ** 2).sum()))
    return min(values)


@pytest.mark.parametrize("mirrors", [False, True])
@pytest.mark.parametrize(("N", "d"), [(2, 1), (4, 2), (5, 2), (3, 3), (4, 3), (6, 3)])
def test_symmetric_distances_equal_naive_loops(N: int, d: int, mirrors: bool) -> None:
    x, y = normal(4, N, d), normal(3, N, d, seed=1)

    def naive(orders: list[tuple[int, ...]] | None) -> Tensor:
        return torch.tensor([[naive_distance(a, b, mirrors, orders) for b in y.numpy()] for a in x.numpy()], dtype=D)

    exact = squared_symmetric_distances(x, y, "exact", mirrors)
    torch.testing.assert_close(exact, naive([*itertools.permutations(range(N))]))
    published = squared_symmetric_distances(x, y, "published", mirrors)
    torch.testing.assert_close(published, naive(None))
    alternate, thorough = (squared_symmetric_distances(x, y, s, mirrors) for s in ("alternate", "thorough"))
    for smaller, larger in itertools.pairwise((exact, thorough, alternate, published)):
        assert bool((smaller <= larger + 1e-10).all())
    assert mirrors or bool((exact >= squared_symmetric_distances(x, y, "exact") - 1e-10).all())


@pytest.mark.parametrize(
    ("N", "d", "search"), [(4, 2, "auto"), (4, 3, "auto"), (13, 3, "thorough"), (7, 2, "thorough")]
)
def test_turned_systems_are_the_same(N: int, d: int, search: Any) -> None:
    x, y = normal(5, N, d), normal(6, N, d, seed=1)
    plain = squared_symmetric_distances(x, y, search)
    copy = turned(x, 3, mirror=True)
    torch.testing.assert_close(squared_symmetric_distances(x, copy, search).diagonal(), torch.zeros(5, dtype=D))
    assert float(squared_symmetric_distances(x, copy, search, mirrors=False).diagonal().min()) > 1e-3
    rotated = turned(x, 3, mirror=False)
    same = squared_symmetric_distances(x, rotated, search, mirrors=False).diagonal()
    torch.testing.assert_close(same, torch.zeros(5, dtype=D))
    assert float(squared_symmetric_wasserstein2(x, copy, search=search)) < 1e-10
    torch.testing.assert_close(squared_symmetric_distances(y, x, search), plain.T)
    if search == "auto":
        torch.testing.assert_close(squared_symmetric_distances(copy, y), plain)


def test_near_copies_are_found_in_turns() -> None:
    """A permuted, slightly turned copy: alternating reaches zero from the given orientation."""
    x, angle = 3 * normal(4, 13, 3), torch.tensor(0.1, dtype=D)
    R = torch.eye(3, dtype=D)
    R[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    near = (x @ R.T)[:, torch.randperm(13)]
    assert float(squared_symmetric_distances(x, near).diagonal().max()) < 1e-10


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for N, search in ((4, "exact"), (6, "alternate")):
        x, y = normal(5, N, 2), normal(3, N, 2, seed=1)
        whole = squared_symmetric_distances(x, y, search)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr("lightning_tilt.metrics.particles.PAIRS_AT_ONCE", 6)
            torch.testing.assert_close(squared_symmetric_distances(x, y, search), whole)  # type: ignore[arg-type]


METRICS: dict[str, tuple[Callable[..., Any], tuple[int, ...], Callable[..., Tensor]]] = {
    "wasserstein2": (Wasserstein2, (2,), squared_wasserstein2),
    "sliced_wasserstein2": (lambda y, **k: Wasserstein2(y, projections=128, **k), (2,), squared_sliced_wasserstein2),
    "energy_wasserstein2": (EnergyWasserstein, (), squared_wasserstein2_1d),
    "symmetric_wasserstein2": (SymmetricWasserstein2, (4, 2), squared_symmetric_wasserstein2),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("squared", [False, True])
def test_metric_in_pieces_and_over_processes(name: str, squared: bool) -> None:
    make, shape, function = METRICS[name]
    x, y, log_w = normal(9, *shape), normal(11, *shape, seed=1), normal(9, seed=2)
    expected = float(function(x, y, log_w.softmax(0)))
    pieces = make(y, squared=squared)
    for part in (slice(0, 2), slice(2, 6), slice(6, 9)):
        pieces.update(x[part], log_w[part])
    result = {k: v.item() for k, v in pieces.compute().items()}
    key = "squared_" + name if squared else name
    value = expected if squared else math.sqrt(expected)
    assert result == {key: pytest.approx(value, rel=1e-6), "n": 9, "n_reference": 11}

    # Two processes of unequal load: each state is gathered as [of rank 0, of rank 1] and concatenated.
    halves = {"samples": x.split([3, 6]), "log_w": log_w.split([3, 6])}

    def gather(state: Tensor, group: Any) -> list[Tensor]:
        return [*halves["log_w" if state.shape == (3,) and torch.equal(state, log_w[:3]) else "samples"]]

    first = make(y, squared=squared, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    for part in (slice(0, 1), slice(1, 3)):  # gathered as one: ranks may differ in how often they update
        first.update(x[part], log_w[part])
    torch.testing.assert_close(first.compute(), pieces.compute())
    plain = make(y, squared=True)
    plain.update(x)
    assert plain.compute()["squared_" + name].item() == pytest.approx(float(function(x, y)), rel=1e-6)
    plain.reset()
    plain.update(x[:4])
    assert plain.compute()["n"].item() == 4


def test_metric_refuses_other_shapes() -> None:
    metric = Wasserstein2(normal(3, 2))
    with pytest.raises(ValueError, match="no distance to reference"):
        metric.update(normal(3, 1))
    with pytest.raises(ValueError, match=r"log weights \(3,\)"):
        metric.update(normal(3, 2), normal(2))


def test_floor_stands_beside_the_number() -> None:
    """Truth has the floor's distance from itself; what is shifted by 1 lies above."""
    y = normal(1000, 2, seed=1)
    metric = Wasserstein2(y, projections=64, floor=8, seed=3)
    metric.update(normal(250, 2))
    result = {k: v.item() for k, v in metric.compute().items()}
    floor = noise_floor(lambda a, b: sliced_wasserstein2(a, b, projections=64, seed=3), y, 250, 8, 3)
    name = "sliced_wasserstein2"
    assert (result[f"{name}_floor"], result[f"{name}_floor_se"]) == pytest.approx((floor.mean, floor.se), rel=1e-6)
    assert (result["n"], result["n_reference"], floor.n) == (250, 250, 8)
    assert abs(result[name] - floor.mean) < 4 * floor.se * math.sqrt(1 + floor.n)
    metric.reset()
    metric.update(normal(250, 2) + 1.0)
    assert metric.compute()[name].item() > floor.mean + 10 * floor.se


def test_floor_is_a_mean_over_disjoint_pairs() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, b))
        return (a.mean() - b.mean()).abs()

    floor = noise_floor(distance, torch.arange(10.0), 5, repeats=4)
    values = torch.stack([(a.mean() - b.mean()).abs() for a, b in seen])
    assert all(sorted([*a.tolist(), *b.tolist()]) == [*range(10)] for a, b in seen)
    assert (floor.mean, floor.se) == pytest.approx((float(values.mean()), float(values.std() / 2)), rel=1e-6)
    for n, repeats in ((6, 4), (5, 0)):
        with pytest.raises(ValueError, match="draw more reference samples"):
            noise_floor(distance, torch.arange(10.0), n, repeats)


@pytest.mark.slow
def test_floor_of_the_forty_gaussians() -> None:
    """Published, by others: 4.8 +- 1.1 for a single value at 1000 samples."""
    torch.manual_seed(0)
    means = (torch.rand(40, 2) - 0.5) * 80
    truth = means[torch.randint(40, (20_000,))] + 1.3132617 * torch.randn(20_000, 2)
    floor = noise_floor(wasserstein2, truth, 1000, repeats=8)
    assert abs(floor.mean - 4.8) < 4 * 1.1 / math.sqrt(8)
