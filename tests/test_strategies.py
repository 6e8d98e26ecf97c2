"""Strategies by name, what they cut, and what they refuse; one process."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from command import DIGITS, OVERLAYS, TOY, overlay, tilt
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from processes import Gradients
from repository import ROOT
from tiny import batch
from torch import nn
from toys import AffineControl, PromptedNet, SumReward, gaussian, trainer

from lightning_tilt.callbacks import ExponentialMovingAverage, TrajectorySampler
from lightning_tilt.data import PromptDataModule
from lightning_tilt.interfaces import Predictor
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.shards import clip_gradients, dealt, is_sharded, total_norm, whole, wholes
from lightning_tilt.strategies import (
    BLOCKS,
    BlockFSDPStrategy,
    FSDP2Strategy,
    blocks_of,
    shard,
    whole_weights,
    wrap_policy,
)  # fmt: skip
from lightning_tilt.tasks import AdjointMatchingTask

NAMES = {
    f"fsdp2{family}{suffix}"
    for family in ("", "_sd15", "_sd3")
    for suffix in ("", "_checkpoint", "_offload", "_offload_checkpoint")
} | {"fsdp_sd15", "fsdp_sd3"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, taken down again."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # what Lightning sets is taken back
        monkeypatch.delenv(name)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def task(predictor: Predictor, **loss: Any) -> AdjointMatchingTask:
    return AdjointMatchingTask(
        predictor=predictor, reward=SumReward(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), **loss
    )


def fit(host: Any, callbacks: Any = (), **kwargs: Any) -> Any:
    sampler = TrajectorySampler(steps=3, samples_per_condition=2, seed=1)
    run = trainer([sampler, *callbacks], devices=1, **kwargs)
    run.fit(host, datamodule=PromptDataModule(["a", "bb"], batch_size=2))
    return run


def test_every_name_is_registered() -> None:
    assert set(StrategyRegistry.available_strategies()) >= NAMES
    made = StrategyRegistry.get("fsdp2_sd3_offload_checkpoint")
    assert isinstance(made, FSDP2Strategy)
    assert (made.family, made.cpu_offload, made.activation_checkpointing) == ("sd3", True, True)
    assert isinstance(StrategyRegistry.get("fsdp_sd15"), BlockFSDPStrategy)


def test_names_are_known_as_soon_as_the_package_is() -> None:
    program = "import lightning, lightning_tilt\n"
    program += "from lightning.pytorch.strategies import StrategyRegistry as r\nassert 'fsdp2_sd3' in r"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_blocks_are_those_of_the_real_networks(family: Any) -> None:
    """Built from the real sizes, on the meta device: nearly all weights are in blocks."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    with torch.device("meta"):
        network = (
            UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
            if family == "sd15"
            else SD3Transformer2DModel(
                sample_size=128,
                num_layers=24,
                num_attention_heads=24,
                attention_head_dim=64,
                caption_projection_dim=1536,
                pos_embed_max_size=192,
            )
        )
    blocks = blocks_of(network, family)
    assert len(blocks) == {"sd15": 9, "sd3": 24}[family]
    inside, all_of_it = (sum(p.numel() for m in some for p in m.parameters()) for some in (blocks, [network]))
    assert all_of_it == {"sd15": 859_520_964, "sd3": 2_028_328_000}[family]
    assert 0.98 < inside / all_of_it < 1
    policy = wrap_policy(network, family)
    assert [m for m in network.modules() if policy(m)] == blocks


def test_adapters_of_another_dtype_are_wrapped_by_themselves(load: Any) -> None:
    network = load("sd3", dtype="bfloat16").network
    wrapped = [m for m in network.modules() if wrap_policy(network, "sd3")(m)]
    adapters = [m for m in wrapped if type(m).__name__ not in BLOCKS["sd3"]]
    assert adapters and {p.dtype for m in adapters for p in m.parameters()} == {torch.float32}
    held = {id(p) for m in adapters for p in m.parameters()}
    assert held == {id(p) for p in network.parameters() if p.requires_grad}


def test_another_family_is_named(load: Any) -> None:
    with pytest.raises(ValueError, match=r"fsdp2_sd3 gathers JointTransformerBlock, .* none of them: take fsdp2_sd15"):
        blocks_of(load("sd15").network, "sd3")
    with pytest.raises(ValueError, match=r"take fsdp2$"):
        blocks_of(nn.Linear(2, 2), "sd15")
    with pytest.raises(ValueError, match="family is one of any, sd15, sd3, not 'sd4'"):
        FSDP2Strategy("sd4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="knows the families sd15, sd3, not 'any'"):
        BlockFSDPStrategy("any")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_one_process_cuts_blocks_and_keeps_the_gradient(tuning: str, load: Any, alone: None, tmp_path: Path) -> None:
    found = {}
    for strategy in ("auto", "fsdp2_sd3_checkpoint"):
        torch.manual_seed(0)
        host = task(load("sd3", tuning=tuning))
        seen = Gradients(tmp_path / f"{strategy}.ckpt", 1)
        fit(host, [seen, ExponentialMovingAverage(0.5)], strategy=strategy, gradient_clip_val=1e-3)
        found[strategy] = seen.found[0]
    assert found["auto"]
    for name, gradient in found["auto"].items():
        torch.testing.assert_close(found["fsdp2_sd3_checkpoint"][name], gradient, rtol=1e-5, atol=1e-6)
    network, predictor = host.predictor.network, host.predictor
    assert network.gradient_checkpointing and all(is_sharded(p) for p in network.parameters())
    assert not any(is_sharded(p) for p in predictor.vae.module.parameters())
    kinds = [type(m).__name__ for m in network.modules() if type(m).__name__.startswith("FSDP")]
    assert sorted(kinds) == ["FSDPJointTransformerBlock"] * 2 + ["FSDPSD3Transformer2DModel"]
    if tuning == "full":
        assert all(is_sharded(p) and not p.requires_grad for p in predictor.untuned.module.parameters())
    shard(host)  # again: nothing is cut twice
    state = torch.load(tmp_path / "fsdp2_sd3_checkpoint.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"predictor." + n for n in predictor.trained_parameters()}
    assert {type(v) for v in state.values()} == {torch.Tensor}
    with whole_weights(predictor) as writes:
        assert writes and type(network).__name__ == "SD3Transformer2DModel"
        assert not any(is_sharded(p) for p in network.parameters())
        predictor.save(tmp_path / "saved")
    assert type(network).__name__ == "FSDPSD3Transformer2DModel" and any((tmp_path / "saved").iterdir())


def test_half_precision_is_that_of_blocks_alone(load: Any, alone: None) -> None:
    """bf16-mixed: parameters and gradients are float32; inputs, timesteps among them, arrive as they are."""
    host = task(load("sd3"))
    asked = []
    handle = host.predictor.network.register_forward_pre_hook(
        lambda m, args, kwargs: asked.append((kwargs["timestep"].dtype, args[0].dtype)), with_kwargs=True
    )
    fit(host, strategy="fsdp2_sd3", precision="bf16-mixed")
    handle.remove()
    assert {state for _, state in asked} == {torch.float32}
    assert {t for t, _ in asked} <= {torch.float32, torch.float64}
    inner = []
    block = host.predictor.network.transformer_blocks[0].attn.to_q.base_layer
    block.register_forward_hook(lambda m, args, out: inner.append((m.weight.dtype, out.dtype)))
    x, t, condition = batch(host.predictor)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert host.predictor.predict(x, t, condition).dtype == torch.float32
    assert set(inner) == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in host.predictor.trained_parameters().values()} == {torch.float32}


def test_a_norm_is_that_of_sharded_and_ordinary_tensors_together(alone: None) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    a, b = torch.randn(5, 3), torch.randn(4)
    cut = distribute_tensor(a.clone(), mesh, [Shard(0)])
    norm = torch.cat([a.flatten(), b]).norm()
    torch.testing.assert_close(total_norm([cut, b]), norm)
    clipped = [cut, b.clone()]
    clip_gradients(clipped, 0.5)
    torch.testing.assert_close(whole(clipped[0]), a * 0.5 / norm, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(clipped[1], b * 0.5 / norm, rtol=1e-4, atol=1e-6)
    assert torch.equal(whole(dealt(a, cut)), a) and is_sharded(dealt(a, cut)) and dealt(b, b) is b
    assert list(wholes({"cut": cut, "n": 3}, keep=False)) == ["n"] and set(wholes({"cut": cut, "n": 3})) == {"cut", "n"}
    torch.testing.assert_close(total_norm([b]), b.norm())


class Bare(AdjointMatchingTask):
    """A host that forgets to shard."""

    def configure_model(self) -> None:
        pass


def test_what_cannot_be_is_refused(alone: None, load: Any) -> None:
    small = PromptedNet(RectifiedFlow())
    with pytest.raises(ValueError, match=r"trainer.precision: bf16-true does not: use 32-true or bf16-mixed"):
        fit(task(small), strategy="fsdp2", precision="bf16-true")
    with pytest.raises(TypeError, match=r"nothing of Bare is sharded: .*shard\(self\) in configure_model"):
        fit(Bare(small, SumReward()), strategy="fsdp2")
    with pytest.raises(ValueError, match="PromptedNet cannot recompute activations: take the strategy without"):
        fit(task(small), strategy="fsdp2_checkpoint")
    with pytest.raises(TypeError, match="Lightning's ModelParallelStrategy does not know what to shard"):
        fit(task(PromptedNet(RectifiedFlow())), strategy=ModelParallelStrategy(1, 1))
    with pytest.raises(TypeError, match="a predictor without a network of its own is for ddp"):
        fit(task(AffineControl(gaussian(0.0, 1.0, RectifiedFlow()), 3)), strategy="fsdp2")
    with pytest.raises(ValueError, match="strategy fsdp_sd3 needs GPUs: on the cpu use fsdp2_sd3 or ddp"):
        fit(task(load("sd3")), strategy="fsdp_sd3")
    with pytest.raises(ValueError, match="PromptedNet does not let the classic fsdp wrap its network"):
        small.replace_networks(lambda network: network)


@pytest.mark.parametrize("name", ["fsdp2_sd4", "fsdp_sd3"])
def test_a_mistaken_strategy_is_one_line(name: str, tmp_path: Path) -> None:
    result = tilt("fit", *overlay(TOY, tmp_path), "--trainer.strategy", name)
    assert result.status == 1 and len(result.errors) == 1
    assert name in result.errors[0]


@pytest.mark.parametrize("path", OVERLAYS, ids=str)
def test_every_overlay_is_parsed_on_top_of_a_recipe(path: Path) -> None:
    given = yaml.safe_load((ROOT / path).read_text())["trainer"]
    parsed = tilt("fit", "--config", DIGITS, "--config", path, "--print_config").config["trainer"]
    for key, value in given.items():
        if key != "plugins":
            class_path = value["class_path"] if isinstance(value, dict) else value
            assert class_path == (parsed[key]["class_path"] if isinstance(value, dict) else parsed[key])
    if isinstance(given.get("strategy"), str):
        assert given["strategy"] in NAMES


@pytest.mark.parametrize("path", sorted((ROOT / "configs/cluster").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    for word in path.read_text().split():
        file = word.strip('"}').rpartition("-")[2] if ":-configs" in word else word
        if file.startswith("configs/cluster/"):
            assert (ROOT / file).is_file(), file
