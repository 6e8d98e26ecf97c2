"""The two families of Stable Diffusion on random tiny pipelines; diffusers itself is the oracle."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import save_sd15, transformer, unet

from lightning_tilt.interfaces import Condition
from lightning_tilt.models import LatentDiffusion, StableDiffusion, StableDiffusion3
from lightning_tilt.models.lora import add_lora
from lightning_tilt.process import RectifiedFlow, VariancePreserving

FAMILIES = ["sd15", "sd3"]
PROMPTS = ["a seven", "", "b"]


@pytest.fixture
def load(sd15_folder: Path, sd3_folder: Path) -> Any:
    def make(family: str, **kwargs: Any) -> LatentDiffusion:
        if family == "sd15":
            return StableDiffusion(sd15_folder, **kwargs)
        return StableDiffusion3(sd3_folder, **kwargs)

    return make


def plain(family: str, folder: Path, **kwargs: Any) -> Any:
    """The pipeline as a user of diffusers alone has it."""
    import diffusers

    kind = {"sd15": "StableDiffusionPipeline", "sd3": "StableDiffusion3Pipeline"}[family]
    options = {"safety_checker": None, "requires_safety_checker": False} if family == "sd15" else {}
    return getattr(diffusers, kind).from_pretrained(folder, **options, **kwargs)


def bare(family: str, pipeline: Any, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The prediction by a direct call of diffusers' network."""
    if family == "sd15":
        steps = torch.tensor([round(1000 * (1 - float(time))) - 1 for time in t])
        return pipeline.unet(x, steps, condition.tensors["encoder_hidden_states"]).sample
    told = {"encoder_hidden_states": condition.tensors["encoder_hidden_states"]}
    told["pooled_projections"] = condition.tensors["pooled_projections"]
    return -pipeline.transformer(x, timestep=1000 * (1 - t.float()), **told).sample


def batch(predictor: LatentDiffusion) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    x = torch.randn(3, *predictor.state_shape)
    return x, predictor.process.grid(4)[[0, 1, 3]], predictor.encode(PROMPTS, 3)


def kick(predictor: LatentDiffusion) -> None:
    """Move the trained weights away from the base."""
    with torch.no_grad():
        for parameter in predictor.trained_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_predict_is_the_plain_network(family: str, tuning: str, load: Any, sd15_folder: Path, sd3_folder: Path) -> None:
    predictor = load(family, tuning=tuning)
    x, t, condition = batch(predictor)
    expected = bare(family, plain(family, sd15_folder if family == "sd15" else sd3_folder), x, t, condition)
    torch.testing.assert_close(predictor.predict(x, t, condition), expected, rtol=0, atol=0)
    assert predictor.backward_cost == {"lora": 1, "full": 2}[tuning]
    assert predictor.state_shape == (4, 8, 8)


def test_process_and_prediction_type_come_from_the_scheduler(tmp_path: Path, load: Any) -> None:
    assert isinstance(load("sd15").process, VariancePreserving)
    assert load("sd15").prediction_type == "epsilon"
    flow = load("sd3").process
    assert isinstance(flow, RectifiedFlow) and flow.shift == 3.0
    assert load("sd3", shift=1.0).process.shift == 1.0
    folder = save_sd15(tmp_path, prediction_type="v_prediction")
    predictor = StableDiffusion(folder, zero_terminal_snr=True)
    assert predictor.prediction_type == "v_prediction" and predictor.process.is_memoryless_start


@pytest.mark.parametrize("family", FAMILIES)
def test_velocity_and_epsilon_agree_with_diffusers_own_step(
    family: str, load: Any, sd15_folder: Path, sd3_folder: Path
) -> None:
    """The sign and the time: one deterministic step equals that of diffusers' scheduler."""
    from diffusers import DDIMScheduler

    predictor = load(family)
    x, _, condition = batch(predictor)
    t, s = predictor.process.grid(4)[1:3]
    output = predictor.predict(x, t.expand(3), condition).detach()
    prediction = predictor.process.interpret(output, predictor.prediction_type, x, t.expand(3))
    ours = predictor.process.alpha(s) * prediction.x1_hat + predictor.process.beta(s) * prediction.eps_hat
    scheduler = predictor.pipeline.scheduler
    if family == "sd15":
        scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(4)
    else:
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        torch.testing.assert_close(
            scheduler.timesteps.double(), predictor.process.timestep(predictor.process.grid(4)[:-1])
        )
    step = scheduler.timesteps[1]
    theirs = scheduler.step(output if family == "sd15" else -output, step, x).prev_sample
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_is_the_pipelines_own(family: str, load: Any, sd15_folder: Path, sd3_folder: Path) -> None:
    predictor = load(family)
    pipeline = plain(family, sd15_folder if family == "sd15" else sd3_folder)
    ours = predictor.encode(PROMPTS, 3)
    with torch.no_grad():
        if family == "sd15":
            theirs = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        else:
            theirs, _, pooled, _ = pipeline.encode_prompt(
                PROMPTS, PROMPTS, PROMPTS, device="cpu", do_classifier_free_guidance=False, max_sequence_length=8
            )
            torch.testing.assert_close(ours.tensors["pooled_projections"], pooled)
    torch.testing.assert_close(ours.tensors["encoder_hidden_states"], theirs)
    assert ours.prompts == PROMPTS and not any(tensor.requires_grad for tensor in ours.tensors.values())
    # Alone, in another batch, remembered or not: the same bits.
    fresh = load(family).encode(["b"], 1).tensors["encoder_hidden_states"]
    assert torch.equal(ours.tensors["encoder_hidden_states"][2:], fresh)
    empty = predictor.encode(None, 2)
    assert empty.prompts == ["", ""]
    assert torch.equal(empty.tensors["encoder_hidden_states"][1], ours.tensors["encoder_hidden_states"][1])
    with pytest.raises(ValueError, match="3 prompts were given for 2 samples"):
        predictor.encode(PROMPTS, 2)


def test_embeddings_are_remembered_within_bounds_and_fit_for_training(load: Any) -> None:
    predictor = load("sd15", cached_prompts=2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = predictor.encode(["a", "b"], 2)
    predictor.encode(["a"], 1)
    predictor.encode(["c"], 1)
    assert list(predictor._embeddings) == ["a", "c"]
    again = predictor.encode(["a"], 1)
    assert torch.equal(first.tensors["encoder_hidden_states"][:1], again.tensors["encoder_hidden_states"])
    predictor.predict(torch.randn(1, 4, 8, 8), predictor.process.grid(4)[:1], again).sum().backward()


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
def test_decode_is_the_pipelines_and_has_its_gradient(family: str, load: Any) -> None:
    predictor = load(family).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    images = predictor.decode(x)
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    pipeline, vae = predictor.pipeline, predictor.pipeline.vae
    shift = 0.1 if family == "sd3" else 0.0
    theirs = pipeline.image_processor.postprocess(vae.decode(x.detach() / 0.9 + shift).sample, output_type="pt")
    torch.testing.assert_close(images.detach(), theirs)
    weight = torch.randn_like(images)
    (grad,) = torch.autograd.grad((images * weight).sum(), x)
    direction, h = torch.randn_like(x), 1e-6
    with torch.no_grad():
        rise = ((predictor.decode(x + h * direction) - predictor.decode(x - h * direction)) * weight).sum() / (2 * h)
    torch.testing.assert_close((grad * direction).sum(), rise, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_keeps_adapters_and_vae_in_float32(family: str, dtype: str, load: Any) -> None:
    predictor = load(family, dtype=dtype)
    assert predictor.network.dtype == getattr(torch, dtype)
    assert {p.dtype for p in predictor.trained_parameters().values()} == {torch.float32}
    assert predictor.vae.module.dtype == torch.float32
    x, t, condition = batch(predictor)
    exact = load(family).predict(x, t, condition)
    with torch.autocast("cpu", getattr(torch, dtype)):
        mixed = predictor.predict(x, t, condition)
        images = predictor.decode(x)
    assert mixed.dtype == images.dtype == torch.float32
    assert torch.equal(images, predictor.decode(x))
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.05)
    mixed.sum().backward()
    full = load(family, tuning="full", dtype=dtype)
    assert {p.dtype for p in full.trained_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_work_in_plain_diffusers(
    family: str, tmp_path: Path, load: Any, sd15_folder: Path, sd3_folder: Path
) -> None:
    predictor = load(family, rank=4, alpha=6.0)
    kick(predictor)
    predictor.save(tmp_path)
    pipeline = plain(family, sd15_folder if family == "sd15" else sd3_folder)
    pipeline.load_lora_weights(tmp_path)
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


def test_sd3_without_the_third_encoder(load: Any, sd3_folder: Path) -> None:
    predictor = load("sd3", text_encoder_3=False)
    told = predictor.encode(PROMPTS, 3).tensors["encoder_hidden_states"]
    assert told.shape == (3, 16, 32) and told[:, 8:].abs().max() == 0
    pipeline = plain("sd3", sd3_folder, text_encoder_3=None, tokenizer_3=None)
    options = {"device": "cpu", "do_classifier_free_guidance": False, "max_sequence_length": 5}
    with torch.no_grad():
        theirs = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, **options)[0]
    short = load("sd3", text_encoder_3=False, max_sequence_length=5)
    torch.testing.assert_close(short.encode(PROMPTS, 3).tensors["encoder_hidden_states"], theirs)


def test_size_in_pixels(load: Any) -> None:
    predictor = load("sd15", height=24, width=16)
    assert predictor.state_shape == (4, 12, 8)
    x = torch.randn(1, *predictor.state_shape)
    assert predictor.predict(x, predictor.process.grid(2)[:1], predictor.encode(None, 1)).shape == x.shape
    assert predictor.decode(x).shape == (1, 3, 24, 16)
    with pytest.raises(ValueError, match="height must be a multiple of 2 pixels for this model, not 25"):
        load("sd3", height=25)


def test_it_survives_a_pickle(load: Any) -> None:
    predictor = load("sd15", gradient_checkpointing=True)
    x, t, condition = batch(predictor)
    again = pickle.loads(pickle.dumps(predictor))
    torch.testing.assert_close(again.predict(x, t, condition), predictor.predict(x, t, condition))
    with again.base():
        assert not again.network.training


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A folder with nothing but a changed model_index.json."""
    index = json.loads((folder / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, **changes}))
    return target


def test_wrong_paths_are_told_in_one_line(tmp_path: Path, sd15_folder: Path, sd3_folder: Path) -> None:
    for path, culprit in [
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path, "has no model_index.json"),
        ("nobody/nothing", "'nobody/nothing' is neither a folder nor reachable on the Hub"),
    ]:
        with pytest.raises(FileNotFoundError, match=culprit) as caught:
            StableDiffusion(path)
        assert "\n" not in str(caught.value) and (caught.value.__context__ is None or caught.value.__suppress_context__)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline, not a StableDiffusionPipeline; load it with"):
        StableDiffusion(sd3_folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(ValueError, match="unknown scheduler 'MyScheduler'"):
        StableDiffusion(edited(sd15_folder, broken, scheduler=["diffusers", "MyScheduler"]))
    with pytest.raises(FileNotFoundError, match="could not be loaded"):
        StableDiffusion(edited(sd15_folder, broken))
    (broken / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        StableDiffusion(broken)


def test_wrong_options_are_refused(tmp_path: Path, load: Any) -> None:
    with pytest.raises(ValueError, match="unknown tuning 'lorra'"):
        load("sd15", tuning="lorra")
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        load("sd3", dtype="half")
    with pytest.raises(ValueError, match=r"targets \['to_z'\] match no layer of UNet2DConditionModel"):
        load("sd15", targets=["to_q", "to_z"])
    with pytest.raises(ValueError, match="at least 1, not 0"):
        load("sd15", rank=0)
    with pytest.raises(ValueError, match="zero_terminal_snr needs a v-prediction model"):
        load("sd15", zero_terminal_snr=True)
    with pytest.raises(TypeError, match="rnk"):
        load("sd15", rnk=4)
    with pytest.raises(ValueError, match="unknown prediction type 'flow_prediction'"):
        StableDiffusion(save_sd15(tmp_path, prediction_type="flow_prediction"))


def test_importing_the_room_loads_no_diffusers() -> None:
    code = (
        "import sys; from lightning_tilt.models import StableDiffusion, StableDiffusion3;"
        "assert not {'diffusers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


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
