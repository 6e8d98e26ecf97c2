"""What is trained, what is the base, what is saved, of the two families of Stable Diffusion."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import bare, batch, kick, plain, transformer, unet

from lightning_tilt.models import LatentDiffusion, StableDiffusion, StableDiffusion3
from lightning_tilt.models.lora import add_lora

FAMILIES = ["sd15", "sd3"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_base_is_the_untuned_model(family: str, checkpointing: bool, load: Any) -> None:
    predictor = load(family, gradient_checkpointing=checkpointing)
    x, t, condition = batch(predictor)
    untuned = predictor.predict(x, t, condition).detach()
    kick(predictor)
    x.requires_grad_()
    trained = list(predictor.trained_parameters())
    assert trained and all("lora_" in name for name in trained)
    tuned = predictor.predict(x, t, condition)
    assert not torch.allclose(tuned, untuned)
    with predictor.base() as base:
        assert list(predictor.trained_parameters()) == trained
        with base.base() as inner:
            torch.testing.assert_close(inner.predict(x, t, condition), untuned, rtol=0, atol=0)
        output = base.predict(x, t, condition)
        torch.testing.assert_close(output, untuned, rtol=0, atol=0)
        (adjoint,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert adjoint.abs().sum() > 0
    with pytest.raises(RuntimeError, match="in the block"), predictor.base():
        raise RuntimeError("in the block")
    torch.testing.assert_close(predictor.predict(x, t, condition), tuned)
    # The graph was made before the block: its gradients must not have been lost there.
    tuned.sum().backward()
    grads = {name for name, p in predictor.named_parameters() if p.grad is not None}
    assert grads == set(trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_base_is_frozen(family: str, load: Any) -> None:
    predictor = load(family, tuning="full").train()
    x, t, condition = batch(predictor)
    before = predictor.predict(x, t, condition).detach()
    optimizer = torch.optim.SGD(predictor.parameters(), lr=0.1)
    predictor.predict(x, t, condition).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(predictor.predict(x, t, condition), before)
    with predictor.base() as base, base.base() as inner:
        torch.testing.assert_close(base.predict(x, t, condition), before, rtol=0, atol=0)
        torch.testing.assert_close(inner.predict(x, t, condition), before, rtol=0, atol=0)
        assert base is not predictor and not base.trained_parameters()
    assert len(predictor.trained_parameters()) == len(list(predictor.network.parameters()))
    assert set(predictor.state_dict()) == {f"network.{name}" for name, _ in predictor.network.named_parameters()}


class Host(LightningModule):
    def __init__(self, predictor: LatentDiffusion) -> None:
        super().__init__()
        self.predictor = predictor


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_holds_what_is_trained(family: str, tuning: str, load: Any) -> None:
    host, other = Host(load(family, tuning=tuning)), Host(load(family, tuning=tuning))
    kick(host.predictor)
    state = copy.deepcopy(host.state_dict())
    assert set(state) == {f"predictor.{name}" for name in host.predictor.trained_parameters()}
    other.load_state_dict(state, strict=True)
    x, t, condition = batch(host.predictor)
    torch.testing.assert_close(other.predictor.predict(x, t, condition), host.predictor.predict(x, t, condition))
    del state[next(iter(state))]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state, strict=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_work_in_plain_diffusers(
    family: str, tmp_path: Path, load: Any, sd15_folder: Path, sd3_folder: Path
) -> None:
    predictor = load(family, rank=4, alpha=6.0)
    kick(predictor)
    predictor.save(tmp_path)
    pipeline = plain(family, sd15_folder if family == "sd15" else sd3_folder)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    x, t, condition = batch(predictor)
    with torch.no_grad():
        tuned = predictor.predict(x, t, condition)
        torch.testing.assert_close(bare(family, pipeline, x, t, condition), tuned, rtol=0, atol=1e-6)
    assert predictor.pipeline.components[predictor.denoiser] is predictor.network


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_network_works_in_plain_diffusers(family: str, tmp_path: Path, load: Any) -> None:
    predictor = load(family, tuning="full")
    kick(predictor)
    predictor.save(tmp_path)
    network = type(predictor.network).from_pretrained(tmp_path / predictor.denoiser)
    for name, value in network.state_dict().items():
        assert torch.equal(value, predictor.network.state_dict()[name])


def test_it_survives_a_pickle(load: Any) -> None:
    predictor = load("sd15", gradient_checkpointing=True)
    x, t, condition = batch(predictor)
    again = pickle.loads(pickle.dumps(predictor))
    torch.testing.assert_close(again.predict(x, t, condition), predictor.predict(x, t, condition))
    with again.base():
        assert again.network.training and not again.vae.module.training


@pytest.mark.parametrize(
    ("family", "weights", "layers"), [("sd15", 859_520_964, 128), ("sd3", 2_028_328_000, 191)], ids=FAMILIES
)
def test_adapters_fit_the_real_networks(family: str, weights: int, layers: int) -> None:
    """On the meta device: the configurations of SD 1.5 and SD 3 medium (whose last block does not change the text)."""
    config = {"sample_size": 64, "cross_attention_dim": 768}
    kind, network = StableDiffusion, type(unet())
    if family == "sd3":
        kind, network = StableDiffusion3, type(transformer())
        config = {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        }
    with torch.device("meta"):
        model = network(**config)
        assert sum(p.numel() for p in model.parameters()) == weights
        assert len(add_lora(model, 4, 4, kind.attention_projections)) == layers
