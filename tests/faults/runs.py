"""Runs that are killed and go on: `lightning-tilt fit`, each in a process of its own, compared with one left alone.

The processes are forked from one that has done nothing but import the command line, which spares half a minute each.

    python tests/faults/runs.py        the table of all faults, as the README carries it
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent)]

from test_resume import difference  # noqa: E402
from test_resume_metrics import rows  # noqa: E402

__all__ = ["RUNS", "Fault", "Outcome", "faults", "survive", "whole"]

ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
WARM_UP = {
    "class_path": "torch.optim.lr_scheduler.LinearLR",
    "init_args": {"start_factor": 0.1, "total_iters": 6},
}
EMA = {"class_path": "ExponentialMovingAverage", "init_args": {"decay": 0.9}}


def _toy(config: str, reward: str | None = None, **sections: Any) -> dict[str, Any]:
    """A config of configs/toy, cut down to thirty updates in epochs of five batches."""
    content: dict[str, Any] = yaml.safe_load((ROOT / f"configs/toy/{config}.yaml").read_text())
    model = content["model"]["init_args"]
    model |= {"optimizer": ADAM, "lr_scheduler": WARM_UP}
    model["predictor"]["init_args"] |= {"hidden": 16, "layers": 1}
    if reward is not None:
        model["reward"]["class_path"] = reward
    content["data"]["init_args"] = {"samples": 16, "batches": 5, "val_samples": 16}
    content["sampler"] |= {"steps": 10}
    content["trainer"] |= {"max_steps": 30, "log_every_n_steps": 1}
    for name, values in sections.items():
        content[name] |= values
    return content


def _digits(config: str = "sd15_adjoint_matching", **sections: Any) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / f"configs/digits/{config}.yaml").read_text())
    model = content["model"]["init_args"]
    model |= {"reward": "kills.RestlessInk", "lr_scheduler": WARM_UP}
    model["predictor"]["init_args"] |= {"rank": 4, "targets": ["to_q", "to_v"]}
    content["data"]["init_args"] |= {"batch_size": 8}
    content["sampler"] |= {"steps": 4, "samples_per_condition": 1, "rollout_micro_batch": 4}
    content["trainer"] |= {"max_steps": 16}
    for name, values in sections.items():
        content[name] |= values
    return content


# Name: config, updates between two checkpoints.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "Adjoint Matching": (_toy("adjoint_matching", "kills.RestlessQuadratic"), 1),
    "accumulated gradients": (
        _toy("adjoint_matching", "kills.RestlessQuadratic", trainer={"accumulate_grad_batches": 3, "max_steps": 15}),
        2,
    ),
    "replayed Adjoint Sampling": (
        _toy("adjoint_sampling", sampler={"rollout_every": 3, "buffer_size": 4, "replay_samples": 32}),
        2,
    ),
    "learned log Z": (_toy("trajectory_balance"), 3),
    "digits, LoRA": (_digits(), 1),
}


@dataclass(frozen=True)
class Fault:
    """What is done to a run, and when."""

    place: str  # of `Kill`; or "clock": killed from outside, `visit` milliseconds after the first row of metrics
    visit: int
    number: int

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        where = f"{self.visit} ms after the first update" if self.place == "clock" else f"{self.place} {self.visit}"
        return f"{name} at {where}"


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    status: int
    at: int | None  # the last update that a checkpoint has
    said: str  # the command's own last line


def faults(name: str, seed: int, count: int) -> list[Fault]:
    """Random ones, among them both signals."""
    draw = random.Random(f"{name} {seed}")
    digits = "digits" in name
    found = []
    for i in range(count):
        number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
        places = ["rollout", "backward", "clock"] + ["update", "write", "rename"] * (number == signal.SIGKILL)
        place = draw.choice(places)
        longest = {"rollout": 30, "backward": 3, "update": 3, "write": 4, "rename": 4, "clock": 200 if digits else 80}
        found.append(Fault(place, draw.randint(1, longest[place]), number))
    return found


def _command(args: list[str], err: Path) -> None:
    """`lightning-tilt ARGS` in this process, as its console script would run it."""
    from lightning_tilt.cli import main

    os.chdir(ROOT)
    sys.path[:0] = [str(HERE)]
    handle = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr, sys.stdout = os.fdopen(2, "w", buffering=1), os.fdopen(1, "w")
    torch.set_num_threads(1)
    main(args)


def _start(name: str, folder: Path, fault: Fault | None) -> Any:
    content, every = RUNS[name]
    callbacks: list[dict[str, Any]] = [EMA]
    if fault is not None and fault.place != "clock":
        kill = {"place": fault.place, "visit": fault.visit, "number": int(fault.number)}
        callbacks.append({"class_path": "kills.Kill", "init_args": kill})
    keep = {"save_last": True, "every_n_train_steps": every, "save_top_k": 1}
    callbacks.append({"class_path": "ModelCheckpoint", "init_args": keep})
    quiet = {"default_root_dir": str(folder), "callbacks": callbacks, "enable_progress_bar": False}
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**content, "trainer": {**content["trainer"], **quiet}}))
    args = ["fit", "--config", str(config)]
    if (last := folder / "checkpoints/last.ckpt").exists():
        args += ["--ckpt_path", str(last)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_tilt.cli", "diffusers", "peft"])
    process = context.Process(target=_command, args=(args, folder.with_suffix(".err")))
    process.start()
    return process


def _rows(folder: Path) -> int:
    file = folder / "metrics.csv"
    return len(file.read_text().splitlines()) if file.exists() else 0


def once(name: str, folder: Path, fault: Fault | None = None) -> Outcome:
    """One process of a run, with or without a fault, from the last checkpoint if there is one."""
    before = _rows(folder)
    process = _start(name, folder, fault)
    if fault is not None and fault.place == "clock":
        while _rows(folder) <= max(before, 1) and process.is_alive():
            time.sleep(0.01)
        time.sleep(fault.visit / 1000)
        if process.is_alive():
            os.kill(process.pid, fault.number)
    process.join(600)
    err = folder.with_suffix(".err").read_text()
    last = folder / "checkpoints/last.ckpt"
    at = int(torch.load(last, weights_only=True)["global_step"]) if last.exists() else None
    said = [line for line in err.splitlines() if line.startswith("lightning-tilt: ")]
    return Outcome(process.exitcode, at, said[-1] if said else err[-2000:])


def whole(name: str, folder: Path) -> dict[str, Any]:
    """The last checkpoint of a run that was left alone."""
    outcome = once(name, folder)
    assert outcome.status == 0, outcome.said
    return dict(torch.load(folder / "checkpoints/last.ckpt", weights_only=True))


def survive(name: str, folder: Path, series: list[Fault], alone: dict[str, Any]) -> tuple[list[Outcome], str | None]:
    """Bring faults upon a run, one after the other, and let it go on each time until it ends.

    Returns:
        What came of each fault (status 0: the run was over before), and where the end differs from that of the run
        that was left alone; None: nowhere.
    """
    outcomes = [once(name, folder, fault) for fault in series]
    end = once(name, folder)
    assert end.status == 0, end.said
    last = dict(torch.load(folder / "checkpoints/last.ckpt", weights_only=True))
    del last["hyper_parameters"]
    found = difference({k: v for k, v in alone.items() if k != "hyper_parameters"}, last)
    return outcomes, found or _other_rows(folder, series)


def _other_rows(folder: Path, series: list[Fault]) -> str | None:
    """Where metrics.csv differs from that of the run that was left alone, but for what a strike of the clock may cost.

    Between a checkpoint and its row of metrics are milliseconds: whoever is killed there has no such row.
    """
    mine, theirs = rows(folder), rows(folder.with_name("alone"))
    strikes = sum(fault.place == "clock" and fault.number == signal.SIGKILL for fault in series)
    if strikes and len(theirs) - len(mine) <= strikes:
        theirs = [row for row in theirs if row in mine]
    return next(
        (f"metrics.csv, row {i}" for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None
    ) or (None if len(mine) == len(theirs) else f"metrics.csv: {len(mine)} rows, not {len(theirs)}")


def table(folder: Path, seed: int = 0) -> str:
    """All faults and what came of them, in Markdown."""
    rows = ["| run | fault | exit | saved after update | then resumed, at the end |", "| --- | --- | --- | --- | --- |"]
    for name in RUNS:
        alone = whole(name, folder / name / "alone")
        series = faults(name, seed, 5)
        outcomes, found = survive(name, folder / name / "killed", series, alone)
        for fault, outcome in zip(series, outcomes, strict=True):
            end = "bit for bit" if found is None else found
            rows.append(f"| {name} | {fault} | {outcome.status} | {outcome.at} | {end} |")
            print(rows[-1], flush=True)
    return "\n".join(rows)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        print("\n" + table(Path(temporary), int(sys.argv[1]) if len(sys.argv) > 1 else 0))
