"""Metrics of log weights: naive formulas, Gaussians in closed form, a lost mode, pieces and processes.

With q = N(0, 1) and p* = N(c, 1), w = Z p*/q has log w = log Z + c x - c^2/2 and ESS = exp(-c^2) from either side.
"""

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_tilt.identities import ess, log_partition
from lightning_tilt.metrics import EffectiveSampleSize, LogPartition, forward_ess

D = torch.float64
LOG_W = torch.tensor([0.3, -1.2, 2.0, 0.0, -0.4], dtype=D)


def items(result: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in result.items()}


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_forward_is_the_naive_formula(shift: float) -> None:
    w = [math.exp(v) for v in LOG_W.tolist()]
    n = len(w)
    assert forward_ess(LOG_W + shift) == pytest.approx(n * n / (sum(w) * sum(1 / v for v in w)), rel=1e-9)


def test_both_sides_estimate_one_number() -> None:
    """exp(-c^2): relative standard errors of mean w and 1/w under p*, of w and w^2 under q, by the delta method."""
    c, n, log_z = 0.5, 200_000, 3.0
    q = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=D)

    def log_w(x: Tensor) -> Tensor:
        return log_z + c * x - c * c / 2

    def error(a: Tensor, b: Tensor, power: float) -> float:
        return float((a / a.mean() + power * b / b.mean()).std() / math.sqrt(n))

    forward, reverse = log_w(q + c), log_w(q)
    exact = math.exp(-c * c)
    assert abs(forward_ess(forward) / exact - 1) < 4 * error(forward.exp(), (-forward).exp(), 1.0)
    assert abs(ess(reverse) / exact - 1) < 4 * error((2 * reverse).exp(), reverse.exp(), -2.0)


def test_only_forward_sees_a_lost_mode() -> None:
    """p* has two modes at -4 and 4, q only the one at 4, of width 1: w is nearly constant under q, and huge at -4."""
    n = 2000
    z = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=D)
    sign = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)

    def log_w(x: Tensor) -> Tensor:
        return torch.logaddexp(-((x - 4) ** 2) / 2, -((x + 4) ** 2) / 2) + (x - 4) ** 2 / 2

    assert ess(log_w(z + 4)) > 0.99
    assert forward_ess(log_w(z + 4 * sign)) < 1e-6


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_effective_sample_size_in_pieces(direction: Any) -> None:
    metric = EffectiveSampleSize(direction)
    for part in LOG_W.float().split([2, 3]):
        metric.update(part)
    exact = ess(LOG_W.float()) if direction == "reverse" else forward_ess(LOG_W.float())
    assert items(metric.compute()) == {f"{direction}_ess": pytest.approx(exact, rel=1e-6), "n": 5}
    metric.reset()
    metric.update(torch.zeros(3))
    assert items(metric.compute()) == {f"{direction}_ess": 1.0, "n": 3}


def test_log_partition_in_pieces() -> None:
    metric = LogPartition()
    for part in (LOG_W + 1e3).split([1, 3, 1]):
        metric.update(part)
    exact = log_partition(LOG_W)
    result = items(metric.compute())
    assert result == {"mean": pytest.approx(exact.mean + 1e3, rel=1e-6), "se": pytest.approx(exact.se), "n": 5}


def test_log_partition_of_a_gaussian() -> None:
    c, log_z = 0.5, -2.0
    metric = LogPartition()
    metric.update(log_z + c * torch.randn(5000, dtype=D) - c * c / 2)
    result = items(metric.compute())
    assert abs(result["mean"] - log_z) < 4 * result["se"] < 0.05


def test_refusals() -> None:
    with pytest.raises(ValueError, match="direction must be 'reverse'"):
        EffectiveSampleSize("backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"log weights must be \(n,\)"):
        LogPartition().update(torch.zeros(2, 2))


def one_of_two(rank: int, folder: Path, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for load, mine in {"unequal": LOG_W.split([2, 3])[rank], "empty": LOG_W if rank else None}.items():
        for metric in (EffectiveSampleSize("reverse"), EffectiveSampleSize("forward"), LogPartition()):
            if mine is not None:
                metric.update(mine)
            found[load] = found.get(load, {}) | items(metric.compute())
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (tmp_path, port), nprocs=2)
    exact = log_partition(LOG_W)
    whole = {"reverse_ess": ess(LOG_W), "forward_ess": forward_ess(LOG_W), "mean": exact.mean, "se": exact.se, "n": 5}
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == {load: pytest.approx(whole, rel=1e-6) for load in ("unequal", "empty")}
