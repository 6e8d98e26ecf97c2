"""What a process holds under each strategy: options as the strategies have them, shards and blocks as FSDP2's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from command import DIGITS, overlay, tilt
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from repository import ROOT
from test_estimate import settings_of

from lightning_tilt.estimate import Estimate, estimate, table
from lightning_tilt.estimate.sharing import ALONE, AUTO, DDP, Sharing, gathering, read_devices, read_sharing
from lightning_tilt.models import StableDiffusion
from lightning_tilt.strategies import FSDP2Strategy, blocks_of

NAMES = [name for name in StrategyRegistry.available_strategies() if name.startswith(("fsdp2", "ddp"))]
SHARDED = Sharing("fsdp2_sd15", "fsdp2", family="sd15")
FULL = ["--model.predictor.tuning", "full", "--trainer.callbacks+=ExponentialMovingAverage"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_what_its_strategy_does(name: str) -> None:
    """The strategy itself is made, and asked."""
    found, strategy = read_sharing(name, 8), StrategyRegistry.get(name)
    assert found.name == name
    if name.startswith("ddp"):
        assert isinstance(strategy, DDPStrategy) and found == replace(DDP, name=name)
        return
    assert isinstance(strategy, FSDP2Strategy) and found.kind == "fsdp2"
    for option in ("family", "activation_checkpointing", "cpu_offload", "reshard_after_forward"):
        assert vars(found)[option] == vars(strategy)[option], option


def test_strategies_by_class_path_and_those_that_are_not_modelled() -> None:
    overlay = yaml.safe_load((ROOT / "configs/cluster/ddp.yaml").read_text())["trainer"]["strategy"]
    assert read_sharing(overlay, None) == Sharing("DDPStrategy", "ddp", bucket_views=True)
    own = {"class_path": "lightning_tilt.strategies.FSDP2Strategy",
           "init_args": {"family": "sd3", "reshard_after_forward": False, "process_group_backend": None}}  # fmt: skip
    assert read_sharing(own, 2) == Sharing("FSDP2Strategy", "fsdp2", family="sd3", reshard_after_forward=False)
    assert [read_sharing("auto", n) for n in (1, 2, None)] == [ALONE, DDP, AUTO]
    for name in ("fsdp_sd15", "fsdp", "deepspeed_stage_2"):  # some of them are children of DDPStrategy
        assert read_sharing(name, 8) == Sharing(name, None)
    with pytest.raises(ValueError, match="there is no 'fsdp2_sd1'; did you mean fsdp2_sd15"):
        read_sharing("fsdp2_sd1", 8)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"devices": 4, "num_nodes": 2}, (4, 2)),
        ({"devices": "4"}, (4, 1)),
        ({"devices": "0,3"}, (2, 1)),
        ({"devices": "2,"}, (1, 1)),
        ({"devices": [1, 2, 5]}, (3, 1)),
        ({"devices": -1}, (None, 1)),
        ({"devices": "auto", "accelerator": "cpu"}, (1, 1)),
        ({"devices": "auto", "accelerator": "gpu", "num_nodes": 4}, (None, 4)),
    ],
)
def test_devices_as_the_trainer_reads_them(trainer: dict[str, Any], expected: tuple[int | None, int]) -> None:
    assert read_devices(trainer) == expected


@pytest.mark.parametrize("devices", [0, "x", -3, "1,x"])
def test_no_number_of_devices(devices: Any) -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices"):
        read_devices({"devices": devices})


@pytest.fixture
def eight_processes() -> Iterator[None]:
    """One of eight, whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("half", [True, False])
def test_shards_and_gathered_blocks_are_those_of_fsdp2(half: bool, eight_processes: None) -> None:
    """The real network is sharded, called, and looked at before each of its blocks: what is no shard is gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    predictor = StableDiffusion("lightning_tilt/assets/digits-sd15", tuning="full")
    network = predictor.network
    found = gathering(predictor.sharded_networks(), "sd15", half)
    whole = sum(4 * p.numel() for p in network.parameters())
    assert found.moved == whole and found.whole == 2 * whole // (2 if half else 1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, cast_forward_inputs=False)
    mesh, blocks, seen = init_device_mesh("cpu", (8,)), blocks_of(network, "sd15"), []
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)

    def look(*_: object) -> None:
        seen.append(sum(p.numel() * p.element_size() for p in network.parameters() if not isinstance(p, DTensor)))

    for block in blocks:
        block.register_forward_pre_hook(look)
    text = torch.zeros(1, 77, network.config["cross_attention_dim"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        network(torch.zeros(1, *predictor.state_shape), timestep=torch.tensor([5]), encoder_hidden_states=text)
    assert len(seen) == len(blocks) > 3 and max(seen) == found.outside + found.block
    shards = sum(p.to_local().numel() * 4 for p in network.parameters() if isinstance(p, DTensor))
    assert shards == pytest.approx(whole / 8, rel=0.01)  # rows are not cut: the first process has those left over


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Estimate:
    args = overlay(DIGITS, tmp_path_factory.mktemp("full"))
    return estimate(settings_of(*args, *FULL, "--trainer.strategy", "fsdp2_sd15_offload", "--trainer.devices", 4))


def test_ddp_keeps_everything_and_its_buckets(full: Estimate) -> None:
    assert full.optimizer == 2 * full.gradients == 8 * full.trained  # AdamW: two states
    assert full.peak() == full.peak(1, ALONE) == full.peak(8, replace(DDP, bucket_views=True))
    assert full.peak(8) == full.peak(1, DDP) == full.peak() + full.gradients


def test_fsdp2_deals_out_what_belongs_to_the_denoiser(full: Estimate) -> None:
    gathers = full.gathers["sd15"]
    denoiser = 2 * 4 * full.trained + full.gradients + full.optimizer + full.average
    for n in (1, 8, 64):
        shared = full.resident(n, SHARDED) - gathers.outside - 2 * gathers.block
        assert full.resident() - shared == pytest.approx(denoiser * (n - 1) / n, abs=1)
    kept = replace(SHARDED, reshard_after_forward=False)
    assert full.resident(8, kept) - full.resident(8, SHARDED) == (
        2 * 4 * full.trained + gathers.block - gathers.outside - 2 * gathers.block
    )


def test_fsdp2_of_any_network_gathers_it_whole(tmp_path: Path) -> None:
    found = estimate(settings_of(*overlay(DIGITS, tmp_path), *FULL, "--trainer.strategy", "fsdp2"))
    blocks, whole = (replace(SHARDED, family=family) for family in ("sd15", "any"))
    assert found.resident(8, whole) - found.gathers["any"].held(whole) == (
        found.resident(8, blocks) - found.gathers["sd15"].held(blocks)
    )
    assert found.gathers["any"].held(whole) == 2 * 4 * found.trained  # the buffer, and what is copied out of it
    assert found.gathers["any"].reduced == 2 * 4 * found.trained


def test_offload_moves_the_shards_off_the_device(full: Estimate) -> None:
    offload = replace(SHARDED, cpu_offload=True)
    assert full.resident(8, SHARDED) - full.resident(8, offload) == full.shards(8) > 0
    assert full.resident(64, offload) == full.resident(8, offload)
    assert full.shards(8) * 8 == pytest.approx(
        2 * 4 * full.trained + full.gradients + full.optimizer + full.average, abs=8
    )
    assert table(full).splitlines()[0].startswith("This run: fsdp2_sd15_offload on 4 devices: ")
    assert table(full).splitlines()[0].endswith(f"{full.shards(4) / 1e9:.2f} GB of the CPU's memory a process")


def test_a_network_is_whole_on_the_device_before_it_is_cut(full: Estimate) -> None:
    large = replace(full, gathers={"sd15": replace(full.gathers["sd15"], moved=10**12)})
    assert large.peak(8, SHARDED) == 10**12 and large.peak(8, replace(SHARDED, cpu_offload=True)) < 10**12


@pytest.mark.parametrize("name", ["fsdp2_sd15_checkpoint", "fsdp2_sd15_offload_checkpoint"])
def test_activation_checkpointing_is_that_of_the_denoiser(name: str, tmp_path: Path) -> None:
    args = overlay(DIGITS, tmp_path)
    plain = estimate(settings_of(*args, "--trainer.strategy", name.replace("_checkpoint", "")))
    found = estimate(settings_of(*args, "--trainer.strategy", name))
    same = estimate(settings_of(*args, "--model.predictor.gradient_checkpointing", "true"))
    assert {n: found.phases[n] for n in ("adjoint", "loss")} == {n: same.phases[n] for n in ("adjoint", "loss")}
    assert found.phases["loss"].peak < 0.6 * plain.phases["loss"].peak
    assert {n: found.phases[n] for n in ("rollout", "reward")} == {n: plain.phases[n] for n in ("rollout", "reward")}
    assert found.forwards["recomputed"] == same.forwards["recomputed"] > plain.forwards["recomputed"] == 0


def test_the_run_comes_first(tmp_path: Path) -> None:
    args = overlay(DIGITS, tmp_path)
    gpu = ["--trainer.accelerator", "gpu", "--trainer.strategy"]
    for flags, told in [
        ([], "This run: one device: 0.02 GB a device\n"),
        ([*gpu, "ddp", "--trainer.devices", 4, "--trainer.num_nodes", 2], "This run: ddp on 4 devices of each of 2"),
        ([*gpu, "fsdp2_sd15"], "This run: fsdp2_sd15 on all devices that it finds: "),
        ([*gpu, "deepspeed"], "This run: not modelled: the strategy deepspeed; known are "),
    ]:  # fmt: skip
        result = tilt("fit", *args, *flags, "--dry_run", "memory")
        assert result.status == 0 and result.out.startswith(told), result.out + result.err
    for name, culprit in [("fsdp2_sd1", "did you mean fsdp2_sd15"), ("fsdp2_sd3", "take fsdp2_sd15")]:
        refused = tilt("fit", *args, *gpu, name, "--dry_run", "memory")
        assert refused.status == 1 and culprit in refused.errors[0], refused.err
