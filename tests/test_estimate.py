"""The estimate of memory and cost: exact counts of the real networks, and what a real run of the digits needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DIGITS, overlay, tilt

from lightning_tilt.cli import TiltCLI
from lightning_tilt.estimate import Settings, estimate, table
from lightning_tilt.estimate.optimizers import optimizer_cost
from lightning_tilt.estimate.phases import _Run, _WithoutNumbers, simulate
from lightning_tilt.estimate.tracking import AllocationTracker, cuda_autocast, fake_mode
from lightning_tilt.interfaces import find_sampler
from lightning_tilt.interfaces.skeleton import skeleton_device, without_weights
from lightning_tilt.models import StableDiffusion, StableDiffusion3
from lightning_tilt.models.skeletons import build_part, skeleton_configs

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SD35 = "stabilityai/stable-diffusion-3.5-medium"
LARGE = "stabilityai/stable-diffusion-3.5-large"
ENCODERS = {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656}

COUNTS: dict[str, dict[str, int]] = {
    SD15: {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    SD3: {"transformer": 2_028_328_000, "vae": 83_819_683, **ENCODERS},
    SD35: {"transformer": 2_243_171_520, "vae": 83_819_683, **ENCODERS},
    LARGE: {"transformer": 8_056_627_520, "vae": 83_819_683, **ENCODERS},
}
# By hand: rank x (in + out) of every projection.  SD 1.5's UNet has 16 blocks with two attentions of four.
ADAPTERS = {SD15: (128, 199_296), SD3: (191, 586_752), SD35: (243, 746_496), LARGE: (303, 1_473_792)}


@pytest.mark.parametrize("name", list(COUNTS))
def test_the_real_networks_have_their_numbers_of_parameters(name: str) -> None:
    for part, count in COUNTS[name].items():
        network = build_part(skeleton_configs(name)[part], torch.bfloat16, torch.device("meta"))
        assert sum(p.numel() for p in network.parameters()) == count, part
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", list(COUNTS))
def test_adapters_go_where_they_should(name: str) -> None:
    kind: Any = StableDiffusion if name == SD15 else StableDiffusion3
    layers, each = ADAPTERS[name]
    with without_weights():
        predictor = kind(name, rank=4, dtype="bfloat16", height=512, width=512)
    assert skeleton_device() is None
    assert predictor.state_shape == ((4, 64, 64) if name == SD15 else (16, 64, 64))
    assert len(predictor._adapted) == layers
    trained = predictor.trained_parameters()
    assert len(trained) == 2 * layers and sum(p.numel() for p in trained.values()) == 4 * each
    assert {p.dtype for p in trained.values()} == {torch.float32}
    ends = {n.split(".lora_")[0].split("attn")[-1].partition(".")[2].removeprefix("processor.") for n in trained}
    expected = {"to_q", "to_k", "to_v", "to_out.0"}
    assert ends == (expected if name == SD15 else expected | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"})
    if name == SD15:
        # A block of width w has self attention (8 w) and cross attention (q and out: 4 w; k and v: 768 + w each).
        widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
        assert each == sum(8 * w + 4 * w + 2 * (768 + w) for w in widths)


def settings_of(*args: Any) -> Settings:
    cli = _Parser([str(a) for a in args])
    return Settings.from_config(cli.config.as_dict())


class _Parser(TiltCLI):
    def __init__(self, args: list[str]) -> None:
        super().__init__(args, run=False)

    def instantiate_classes(self) -> None:
        pass


SMALL = {"steps": 6, "samples_per_condition": 3, "rollout_micro_batch": 4, "reward_micro_batch": 3}


LBFGS = ["--model.optimizer", "torch.optim.LBFGS", "--model.optimizer.lr", "0.01", "--model.optimizer.max_iter", "3",
         "--model.optimizer.history_size", "2"]  # fmt: skip


@pytest.mark.parametrize(("tuning", "optimizer"), [("lora", []), ("full", []), ("lora", LBFGS)])
@pytest.mark.filterwarnings("ignore:.*starts at alpha_0 > 0")
def test_the_estimate_is_what_a_fit_holds(tuning: str, optimizer: list[str], tmp_path: Path) -> None:
    """All allocations of two updates are counted: their peak is the estimate's without the weights, to 8 %."""
    ema = [{"class_path": "ExponentialMovingAverage"}]
    flags = ["--model.predictor.tuning", tuning, "--model.checkpoint", "true", "--model.adjoint_micro_batch", "4",
             "--model.loss_micro_batch", "8", "--data.batch_size", "4", "--trainer.enable_progress_bar", "false",
             "--trainer.enable_checkpointing", "false", *optimizer]  # fmt: skip
    args = [*overlay(DIGITS, tmp_path, sampler=SMALL, trainer={"callbacks": ema, "logger": False}), *flags]
    cli = TiltCLI(args, run=False)
    found = estimate(Settings.from_config(cli.config.as_dict()))
    host: Any = cli.model
    predictor = host.predictor
    networks = [predictor.network, predictor.vae.module, *(e.module for e in predictor.encoders)]
    networks += [predictor.untuned.module] if tuning == "full" else []
    tracker = AllocationTracker([t for n in networks for t in (*n.parameters(), *n.buffers())])
    with tracker:
        cli.trainer.fit(cli.model, cli.datamodule)
    measured = tracker.peak + sum(found.weights.values())
    assert sum(found.weights.values()) == sum(4 * p.numel() for n in networks for p in n.parameters())
    assert found.peak() == pytest.approx(measured, rel=0.08)
    counted = find_sampler(host).evaluations
    assert found.forwards["total"] == counted.network / 2
    assert found.settings.pairs * (3 if optimizer else 1) == counted.pairs / 2


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_fake_tensors_are_counted_like_real_ones(family: str, tmp_path: Path) -> None:
    """The same calls on numbers: not a byte more or less, saved or at the peak."""
    path = f"lightning_tilt/assets/digits-{family}"
    config = DIGITS if family == "sd15" else DIGITS.replace("sd15", "sd3")
    flags = ["--model.checkpoint", "true", "--model.adjoint_micro_batch", 2, "--model.loss_micro_batch", 3,
             "--sampler.guidance_scale", 2.0]  # fmt: skip
    settings = settings_of(*overlay(config, tmp_path, sampler=SMALL), *flags)
    kind: Any = StableDiffusion if family == "sd15" else StableDiffusion3
    arguments = {**settings.predictor[1], "path": path}
    with without_weights("meta"):
        skeleton = kind(**arguments)
    fake = simulate(settings, skeleton, [])
    with without_weights("cpu"):
        predictor = kind(**arguments)
    predictor.process = _WithoutNumbers()
    run = _Run(settings, predictor, [])
    real = {"rollout": run.rollout(), "reward": run.reward(), "adjoint": run.adjoint(), "loss": run.loss()}
    assert real == fake
    assert all(phase.peak > 0 for phase in real.values()) and real["loss"].saved > 0


def test_the_command_prints_a_table_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = overlay(DIGITS, tmp_path)
    result = tilt("fit", *args, "--dry_run", "memory")
    assert result.status == 0, result.err
    for part in ("denoiser", "adapters", "gradients", "AdamW", "average", "rollout", "adjoint", "loss", "peak"):
        assert part in result.out, part
    assert [p.name for p in tmp_path.iterdir()] == ["small.yaml"]  # no run folder
    for flags, culprit in [
        (["--model", "RelativeEntropyTask"], "the estimate does not know what RelativeEntropyTask holds"),
        (["--model.predictor.path", "some/where"], "'some/where' is not known: give a folder"),
    ]:
        refused = tilt("fit", *args, *flags, "--dry_run", "memory")
        assert refused.status == 1 and culprit in refused.errors[0], refused.err
    assert (
        tilt("predict", *args, "--dry_run", "memory").errors[0].startswith("lightning-tilt: error: --dry_run memory is")
    )


def test_rollouts_of_an_update_add_up(tmp_path: Path) -> None:
    found = estimate(settings_of(*overlay(DIGITS, tmp_path), "--model.predictor.tuning", "full",
                                 "--trainer.accumulate_grad_batches", 3))  # fmt: skip
    assert found.optimizer == 2 * found.gradients == 8 * found.trained  # AdamW: two states
    once = estimate(settings_of(*overlay(DIGITS, tmp_path), "--model.predictor.tuning", "full"))
    assert found.forwards["total"] == 3 * once.forwards["total"]
    assert "of each of 3 rollouts" in table(found)


@pytest.mark.parametrize(
    ("kind", "arguments", "cost"),
    [
        (torch.optim.AdamW, {"lr": 1e-3, "fused": True}, (2, 1, 1)),
        (torch.optim.SGD, {}, (0, 0, 1)),
        (torch.optim.SGD, {"momentum": 0.9}, (1, 0, 1)),
        # The history's pairs, the direction and the last gradient; an evaluation for each iteration.
        (torch.optim.LBFGS, {"max_iter": 3, "history_size": 5}, (2 * 5 + 2, 5, 3)),
    ],
)
def test_optimisers_are_tried(kind: Any, arguments: dict[str, Any], cost: tuple[int, int, int]) -> None:
    found = optimizer_cost(kind, arguments)
    assert (found.state, found.closures) == (cost[0], cost[2])
    assert found.passing == pytest.approx(cost[1], abs=0.01)


def test_an_optimiser_that_does_not_work_is_named(tmp_path: Path) -> None:
    refused = tilt("fit", *overlay(DIGITS, tmp_path), "--model.optimizer", "SparseAdam", "--dry_run", "memory")
    assert refused.status == 1
    assert "the optimiser SparseAdam fails on a small trial" in refused.errors[0], refused.err
    with pytest.raises(ValueError, match=r"the optimiser Adam fails .* Invalid learning rate: -1"):
        optimizer_cost(torch.optim.Adam, {"lr": -1})


def test_a_tracker_counts_storages_once_and_forgets_what_is_freed() -> None:
    known = torch.zeros(100)
    with AllocationTracker([known]) as tracker:
        view = known.reshape(10, 10)
        a = known + 1
        b = a.t()
        assert (tracker.live, tracker.peak) == (400, 400)
        c = a * 2
        del a
        assert (tracker.live, tracker.peak) == (800, 800)  # b holds it
        del b, c
        assert (tracker.live, tracker.peak) == (0, 800)
    assert view.sum() == 0


def test_normalisation_under_autocast_is_in_float32_as_on_a_gpu() -> None:
    x = torch.randn(2, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, (3,)).dtype == torch.bfloat16
        with cuda_autocast():
            assert torch.nn.functional.layer_norm(x, (3,)).dtype == torch.float32
    with cuda_autocast():
        assert torch.nn.functional.layer_norm(x, (3,)).dtype == torch.bfloat16
    with fake_mode():
        assert torch.nn.functional.layer_norm(torch.empty(2, 3), (3,)).shape == (2, 3)


def test_a_skeleton_of_a_folder_needs_no_weights(sd3_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(sd3_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with without_weights():
        bare = StableDiffusion3(tmp_path / "bare")
    whole = StableDiffusion3(sd3_folder)
    shapes = [{n: p.shape for n, p in m.network.named_parameters()} for m in (bare, whole)]
    assert shapes[0] == shapes[1] and bare.state_shape == whole.state_shape
    assert next(bare.network.parameters()).is_meta and not next(whole.network.parameters()).is_meta
    index = json.loads((tmp_path / "bare/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    with without_weights(), pytest.raises(ValueError, match="does not hold the components of a StableDiffusionPipel"):
        StableDiffusion(tmp_path / "bare")
