"""Two processes are one: the same samples, gradients, statistics and averages, whatever the strategy and the loss.

One process with batches of 4 is compared with two gloo processes with batches of 2.  float32: gradients agree to 1e-6
of their largest entry, or better.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import fitted, in_two
from quiet import RESUMED
from toys import SumReward

from lightning_tilt.callbacks import TiltReport

pytestmark = [pytest.mark.slow, RESUMED]

TWICE = ["a", "bb", "a", "bb", "bb", "a", "a", "bb"]
"""Prompts that two processes have at the same time: their groups span both."""

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"model": "mlp", "strategy": "ddp"},
    "fsdp2": {"model": "mlp", "strategy": "fsdp2"},
    "ddp_sd15_lora": {"model": "sd15_lora", "strategy": "ddp"},
    "fsdp2_sd15_lora": {"model": "sd15_lora", "strategy": "fsdp2_sd15"},
    "fsdp2_sd15_full": {"model": "sd15_full", "strategy": "fsdp2_sd15_checkpoint"},
    "fsdp2_sd3_lora": {"model": "sd3_lora", "strategy": "fsdp2_sd3_checkpoint"},
    "fsdp2_sd3_full": {"model": "sd3_full", "strategy": "fsdp2_sd3"},
    "fsdp2_sd3_offload": {"model": "sd3_lora", "strategy": "fsdp2_sd3_offload"},
    "clipped": {"model": "mlp", "strategy": "fsdp2", "gradient_clip_val": 0.01},
    "accumulated": {"model": "mlp", "strategy": "fsdp2", "accumulate_grad_batches": 2, "batch": 1, "steps": 1},
    "capped": {"model": "mlp", "strategy": "ddp", "settings": {"loss_cap": 0.4}},
}
for _loss, _settings in {
    "GRPO": {"divide_by_std": True}, "Reinforce": {}, "LogVariance": {}, "CrossEntropy": {}, "RelativeEntropy": {},
    "ReinforceAdjointMatching": {"noisings": 2},
    "ExactReinforceAdjointMatching": {"path_weights": "clipped", "weight_clip": 1.2},
    "TiltMatching": {"variant": "implicit", "level_ess": 0.9},
    "ConditionalScoreMatching": {"time_sampling": "importance"},
}.items():  # fmt: skip
    CASES[_loss] = {"model": "mlp", "strategy": "ddp", "loss": _loss + "Task", "settings": _settings, "prompts": TWICE}
CASES["fsdp2_GRPO"] = CASES["GRPO"] | {"strategy": "fsdp2"}
CASES["fsdp2_TiltMatching"] = CASES["TiltMatching"] | {"strategy": "fsdp2"}
for _strategy in ("ddp", "fsdp2"):  # a log Z that the loss learns beside the network
    CASES[f"{_strategy}_TrajectoryBalance"] = {
        "model": "density", "strategy": _strategy, "loss": "TrajectoryBalanceTask",
        "sampler": {"samples_per_condition": 1},
    }  # fmt: skip


def every_case(rank: int, folder: Path, folders: dict[str, Path], names: list[str]) -> None:
    for name in names:
        fitted(folder, f"{name}_two", folders=folders, devices=2, num_nodes=1, **CASES[name])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sd15_folder: Path, sd3_folder: Path) -> Iterator[Any]:
    folder, folders = tmp_path_factory.mktemp("runs"), {"sd15": sd15_folder, "sd3": sd3_folder}
    in_two(every_case, folder, folders, list(CASES))

    def of(name: str) -> list[dict[str, Any]]:
        settings = {k: v for k, v in CASES[name].items() if k != "strategy"}
        fitted(folder, f"{name}_one", folders=folders, **(settings | {"batch": 2 * settings.get("batch", 2)}))
        return [torch.load(folder / f"{name}_{n}.pt", weights_only=True) for n in ("one0", "two0", "two1")]

    yield of


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name: str, runs: Any) -> None:
    one, first, second = runs(name)
    assert not set(first["end"]) & set(second["end"]) and set(first["end"]) | set(second["end"]) == set(one["end"])
    together = first["end"] | second["end"]
    for number, x in one["end"].items():
        torch.testing.assert_close(together[number], x, rtol=1e-5, atol=1e-5)
    prompts = first["prompts"] | second["prompts"]
    assert prompts == one["prompts"]
    for step, gradients in enumerate(one["gradients"]):
        size = max(float(g.abs().max()) for g in gradients.values())
        for other in (first, second):
            assert set(other["gradients"][step]) == set(gradients)
            for key, gradient in gradients.items():
                torch.testing.assert_close(other["gradients"][step][key], gradient, rtol=1e-5, atol=1e-6 * max(size, 1))
    for kind in ("weights", "average"):
        for key, value in one[kind].items():
            torch.testing.assert_close(first[kind][key], value, rtol=1e-5, atol=1e-6)
    for key, figure in one["figures"].items():
        assert first["figures"][key] == pytest.approx(figure, rel=1e-3, abs=1e-5), key
    assert first["said"].replace(" over 2 processes", "") == one["said"]


class BadForA(SumReward):
    """Not finite for one prompt of a report, which one of the processes samples."""

    def score(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        r = super().score(images, prompts)
        return torch.full_like(r, torch.nan) if len(r) == 5 and prompts[0] == "a" else r


def reported(rank: int, folder: Path) -> None:
    report = TiltReport(base_samples=7, tuned_samples=5, prompts=["a", "bb", "ccc", "dddd"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "SumReward", BadForA)
        with pytest.raises(FloatingPointError, match=r"rank 0.*'a'"):
            fitted(folder, "x", "mlp", {}, devices=2, strategy="fsdp2", callbacks=[report], default_root_dir=folder)


def test_a_report_of_a_sharded_model_stops_on_both_processes(tmp_path: Path) -> None:
    in_two(reported, tmp_path)
