"""Two processes leave together, come back together, or not without each other."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from test_resume import Told, difference, run  # noqa: E402
from test_two_processes import free_port  # noqa: E402

# 4 calls of a rollout, 3 of the sweep and the loss's for a fresh batch; the loss's alone for a replayed one.
KIND = "replayed"


def one_of_two(rank: int, folder: Path, port: int, number: int, resume: Path | None) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank), "NODE_RANK": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    told: list[Any] = [Told(number, 20)] if number and rank == 1 else []
    both: dict[str, Any] = {"strategy": "ddp", "devices": 2, "num_nodes": 1, "limit_val_batches": 0}
    try:
        run(KIND, folder, resume, updates=6, callbacks=told, **both)
    except SystemExit as left:
        (folder / f"left{rank}").write_text(str(left.code))


def together(folder: Path, number: int = 0, resume: Path | None = None) -> None:
    mp.spawn(one_of_two, (folder, free_port(), number, resume), nprocs=2)


@pytest.mark.slow
def test_a_signal_to_one_process_makes_both_leave(tmp_path: Path) -> None:
    together(tmp_path / "whole")
    together(tmp_path / "told", signal.SIGTERM)
    assert [(tmp_path / f"told/left{rank}").read_text() for rank in (0, 1)] == ["143", "0"]
    saved = torch.load(tmp_path / "told/last.ckpt", weights_only=True)
    assert 0 < saved["global_step"] < 6
    ranks = saved["callbacks"]["TrajectorySampler"]["ranks"]
    assert len(ranks) == 2 and all(len(part["buffer"]) > 0 for part in ranks)
    together(tmp_path / "told", resume=tmp_path / "told/last.ckpt")
    whole, end = (torch.load(tmp_path / f"{n}/last.ckpt", weights_only=True) for n in ("whole", "told"))
    found = difference(whole, end)
    assert found is None, found


@pytest.mark.slow
def test_a_process_that_dies_takes_the_other_along(tmp_path: Path) -> None:
    context, port, folder = mp.get_context("spawn"), free_port(), tmp_path / "died"
    both = [context.Process(target=one_of_two, args=(rank, folder, port, signal.SIGKILL, None)) for rank in (0, 1)]
    for process in both:
        process.start()
    both[1].join(120)
    assert both[1].exitcode == -signal.SIGKILL
    start = time.monotonic()
    both[0].join(60)  # nobody ends it: it finds the connection closed
    assert both[0].exitcode not in (0, None) and time.monotonic() - start < 60
    torch.load(folder / "last.ckpt", weights_only=True)
