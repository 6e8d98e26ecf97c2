"""What a sharded run leaves behind is what any other leaves: checkpoints, averages, reports, exports, predictions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from processes import fitted, in_two, predictor
from quiet import RESUMED
from safetensors.torch import load_file
from toys import SumReward, trainer

from lightning_tilt.callbacks import ExportWeights, PredictionWriter, TiltReport, TrajectorySampler
from lightning_tilt.data import PromptDataModule
from lightning_tilt.tasks import AdjointMatchingTask

pytestmark = [pytest.mark.slow, RESUMED]

STRATEGIES = {"one": None, "ddp": "ddp", "fsdp2": "fsdp2_sd15"}
HALF, WHOLE = 2, 4
"""Updates until the checkpoint, at the end of an epoch, and in all."""


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3)


def options(name: str) -> dict[str, Any]:
    strategy = STRATEGIES[name]
    return {"batch": 4} if strategy is None else {"strategy": strategy, "devices": 2, "num_nodes": 1}


def leave(folder: Path, folders: dict[str, Path], name: str, model: str) -> None:
    fitted(folder, f"{model}_{name}", model, folders, steps=HALF, optimizer=adam, **options(name))


def resume(folder: Path, folders: dict[str, Path], name: str, other: str, model: str) -> None:
    file = folder / f"{model}_{other}.ckpt"
    fitted(
        folder, f"{model}_{other}_{name}", model, folders, steps=WHOLE, optimizer=adam, ckpt=file,
        **options(name),
    )  # fmt: skip


def finish(folder: Path, folders: dict[str, Path], name: str, model: str) -> None:
    """A whole run with what reports and exports, then validation and prediction in the same processes."""
    root = folder / f"{model}_{name}_run"
    root.mkdir(exist_ok=True)
    report = TiltReport(base_samples=4, tuned_samples=4, prompts=["a", "bb", "e"])
    callbacks = [report, ExportWeights("lora"), PredictionWriter()]
    task = fitted(
        folder, f"{model}_{name}_run", model, folders, optimizer=adam, callbacks=callbacks, default_root_dir=str(root),
        **options(name),
    )  # fmt: skip
    run = trainer(
        [TrajectorySampler(steps=4, samples_per_condition=2, seed=1), PredictionWriter()],
        default_root_dir=str(root), **{k: v for k, v in options(name).items() if k != "batch"},
    )  # fmt: skip
    data = PromptDataModule(["a", "bb", "e", "ff"], batch_size=2 if name == "one" else 1)
    (values,) = run.validate(task, datamodule=data, verbose=False)
    run.predict(task, datamodule=data)
    if run.global_rank == 0:
        (root / "validated.json").write_text(json.dumps(values))


def everything(rank: int, folder: Path, folders: dict[str, Path]) -> None:
    for model in ("sd15_lora", "sd15_full"):
        leave(folder, folders, "fsdp2", model)
        resume(folder, folders, "fsdp2", "one", model)
        finish(folder, folders, "fsdp2", model)
        leave(folder, folders, "ddp", model)
    resume(folder, folders, "ddp", "fsdp2", "sd15_lora")
    resume(folder, folders, "fsdp2", "ddp", "sd15_lora")
    resume(folder, folders, "ddp", "one", "sd15_lora")
    resume(folder, folders, "fsdp2", "fsdp2", "sd15_lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sd15_folder: Path) -> Iterator[Path]:
    folder, folders = tmp_path_factory.mktemp("resumed"), {"sd15": sd15_folder}
    for model in ("sd15_lora", "sd15_full"):
        leave(folder, folders, "one", model)
        resume(folder, folders, "one", "one", model)
        finish(folder, folders, "one", model)
    in_two(everything, folder, folders)
    for model in ("sd15_lora", "sd15_full"):
        resume(folder, folders, "one", "fsdp2", model)
        resume(folder, folders, "one", "ddp", model)
    yield folder


@pytest.mark.parametrize(
    "way",
    ["sd15_lora_one_fsdp2", "sd15_lora_fsdp2_one", "sd15_lora_ddp_fsdp2", "sd15_lora_fsdp2_ddp", "sd15_lora_one_ddp",
     "sd15_lora_fsdp2_fsdp2", "sd15_full_one_fsdp2", "sd15_full_fsdp2_one"],
)  # fmt: skip
def test_each_goes_on_with_the_checkpoint_of_another(way: str, folder: Path) -> None:
    """Named `model_who left it_who went on`: they end where one device ends that goes on with its own checkpoint.

    The place in the data is counted a process: what one device makes of two processes' is compared with ddp's.
    """
    model, left, on = way[: -len(way.split("_", 2)[2]) - 1], *way.split("_")[2:]
    reference = "ddp_one" if (left, on) == ("fsdp2", "one") else "one_one"
    whole, resumed = (torch.load(folder / f"{n}0.pt", weights_only=True) for n in (f"{model}_{reference}", way))
    half = torch.load(folder / f"{'_'.join(way.split('_')[:3])}.ckpt", weights_only=True)["state_dict"]
    assert set(half) == set(whole["weights"])
    moved = 0.0
    for kind in ("weights", "average"):
        for key, value in whole[kind].items():
            torch.testing.assert_close(resumed[kind][key], value, rtol=1e-4, atol=2e-5)
            if kind == "weights":
                moved = max(moved, float((half[key] - value).abs().max()))
    assert moved > 1e-3, "the updates after the checkpoint did something"


@pytest.mark.parametrize("model", ["sd15_lora", "sd15_full"])
def test_checkpoints_are_the_same_file(model: str, folder: Path) -> None:
    one, sharded = (torch.load(folder / f"{model}_{n}.ckpt", weights_only=True) for n in ("one", "fsdp2"))
    assert set(one) == set(sharded)
    ours, theirs = one["optimizer_states"][0], sharded["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in ours["state"].items():
        assert set(state) == set(theirs["state"][i])
        for key, value in state.items():
            torch.testing.assert_close(theirs["state"][i][key], value, rtol=1e-3, atol=1e-5)
    for key, value in one["state_dict"].items():
        assert type(sharded["state_dict"][key]) is torch.Tensor
        torch.testing.assert_close(sharded["state_dict"][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["sd15_lora", "sd15_full"])
def test_reports_exports_and_predictions_are_the_same(model: str, folder: Path, sd15_folder: Path) -> None:
    ours, theirs = (folder / f"{model}_{n}_run" for n in ("one", "fsdp2"))
    one, sharded = (json.loads((root / "report.json").read_text()) for root in (ours, theirs))
    for key in ("reward_base", "reward_tuned", "log_z"):
        assert sharded[key]["mean"] == pytest.approx(one[key]["mean"], rel=1e-4, abs=1e-4)
    validated = [json.loads((root / "validated.json").read_text()) for root in (ours, theirs)]
    assert validated[1] == pytest.approx(validated[0], rel=1e-4, abs=1e-4)
    (file,) = sorted(p.relative_to(ours) for p in (ours / "lora").rglob("*.safetensors"))
    mine, other = load_file(ours / file), load_file(theirs / file)
    assert set(mine) == set(other) and mine
    for key, value in mine.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
    if model == "sd15_full":
        from diffusers import UNet2DConditionModel

        UNet2DConditionModel.from_pretrained(theirs / "lora" / "unet")
        config = json.loads((theirs / "lora" / "unet" / "config.json").read_text())
        assert config["_class_name"] == "UNet2DConditionModel"
    rows = [(theirs / f"predictions_{rank}" / "samples.csv").read_text().splitlines()[1:] for rank in (0, 1)]
    assert sorted(r.split(",")[1:2] for r in rows[0] + rows[1]) == sorted(
        r.split(",")[1:2] for r in (ours / "predictions" / "samples.csv").read_text().splitlines()[1:]
    )


def test_a_sharded_run_s_checkpoint_is_loaded_without_a_trainer(folder: Path, sd15_folder: Path) -> None:
    task = AdjointMatchingTask(predictor=predictor("sd15_full", {"sd15": sd15_folder}), reward=SumReward())
    state = torch.load(folder / "sd15_full_fsdp2.ckpt", weights_only=True)["state_dict"]
    assert isinstance(task, lightning.LightningModule)
    assert task.load_state_dict(state).missing_keys == []
    for name, value in state.items():
        assert torch.equal(task.state_dict()[name], value)
