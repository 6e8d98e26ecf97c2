"""Compiled denoisers, slices and tiles of the VAE, the small decoder, and the dtypes at every door."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DIGITS, overlay, tilt
from tiny import batch, kick, small_decoder

from lightning_tilt.models import LatentDiffusion
from lightning_tilt.models.lora import adapters_off

FAMILIES = ["sd15", "sd3"]


def gradients(predictor: LatentDiffusion) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Tuned output, the base's product with a vector, and gradients to what is trained."""
    torch.manual_seed(3)
    x, t, condition = batch(predictor)
    x.requires_grad_()
    with predictor.base() as base:
        output = base.predict(x, t, condition)
        (vjp,) = torch.autograd.grad(output, x, torch.ones_like(output))
    tuned = predictor.predict(x.detach(), t, condition)
    trained = list(predictor.trained_parameters().values())
    return tuned.detach(), vjp, list(torch.autograd.grad(tuned.square().sum(), trained))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tuning", "checkpointing"), [("sd15", "lora", False), ("sd15", "full", True), ("sd3", "lora", True)]
)
def test_compiled_is_the_same(family: str, tuning: str, checkpointing: bool, load: Any) -> None:
    """Tuned and base, with adapters on and off, forward, to the input and to the weights."""
    import torch._dynamo as dynamo

    dynamo.reset()
    options = {"tuning": tuning, "gradient_checkpointing": checkpointing}
    plain, compiled = load(family, **options), load(family, **options, compile="aot_eager")
    torch.manual_seed(1)
    kick(plain)
    compiled.load_state_dict(plain.state_dict())  # by the same names
    dynamo.utils.counters.clear()
    for _ in range(2):
        for ours, theirs in zip(gradients(compiled), gradients(plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    frames = dynamo.utils.counters["frames"]
    assert frames["total"] > 0 and frames["ok"] == frames["total"], "a call ran uncompiled"
    assert not dynamo.utils.counters["graph_break"]
    if family == "sd15":  # a T5 that has been called cannot be pickled, whoever holds it
        again = pickle.loads(pickle.dumps(compiled))
        torch.testing.assert_close(gradients(again)[0], gradients(plain)[0])


@pytest.mark.slow
# torch 2.13, upstream: what its compiler imports
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
def test_inductor_is_the_same(load: Any) -> None:
    """The mode that a run takes; it needs a C++ compiler."""
    plain, compiled = load("sd15"), load("sd15", compile="default")
    torch.manual_seed(1)
    kick(plain)
    compiled.load_state_dict(plain.state_dict())
    for ours, theirs in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_modes_that_do_not_fit_are_refused(load: Any) -> None:
    with pytest.raises(ValueError, match="unknown compile mode 'reduce-overhead'; known are off, default"):
        load("sd15", compile="reduce-overhead")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*starts at alpha_0 > 0")
def test_a_compiled_fit_is_the_same_fit(tmp_path: Path) -> None:
    for mode in ("off", "aot_eager"):
        flags = ["--model.predictor.compile", mode, "--trainer.callbacks", "[]", "--model.predictor.targets", "[to_q]"]
        result = tilt("fit", *overlay(DIGITS, tmp_path / mode), *flags)
        assert result.status == 0, result.err
    from lightning_tilt.loggers import read_metrics

    off, on = (read_metrics(tmp_path / mode / "metrics.csv")["train/loss"] for mode in ("off", "aot_eager"))
    torch.testing.assert_close(torch.tensor(on), torch.tensor(off), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_change_nothing(family: str, load: Any) -> None:
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    found = []
    for slicing in (False, True):
        torch.manual_seed(0)
        predictor = load(family, vae_slicing=slicing)
        seen: list[int] = []
        predictor.vae.module.decoder.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        images = predictor.decode(x)
        found.append((images.detach(), torch.autograd.grad(images.square().sum(), x)[0]))
        assert seen == ([1, 1, 1] if slicing else [3])
    torch.testing.assert_close(found[0], found[1])


def test_tiles_are_for_large_images_and_have_their_gradient(load: Any) -> None:
    """Of the size that it was made for, an image is one tile; a larger one is made of several."""
    plain, tiled = load("sd15", height=64, width=64), load("sd15", height=64, width=64, vae_tiling=True)
    small = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(tiled.decode(small), plain.decode(small))
    x = torch.randn(1, *tiled.state_shape, requires_grad=True)
    images = tiled.decode(x)
    assert images.shape == (1, 3, 64, 64)
    assert not torch.equal(images, plain.decode(x))
    # The first tile, of 8 x 8 latents, but for the quarter that is blended with the next.
    torch.testing.assert_close(images[..., :12, :12], plain.decode(x[..., :8, :8])[..., :12, :12])
    (gradient,) = torch.autograd.grad(images.sum(), x)
    assert bool((gradient.abs().flatten(2).sum(2) > 0).all())


def test_the_small_decoder_is_what_the_reward_sees(load: Any, tmp_path: Path, sd15_folder: Path) -> None:
    tiny = small_decoder(tmp_path / "tiny")
    predictor = load("sd15", tiny_vae=tmp_path / "tiny", gradient_checkpointing=True)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    images = predictor.decode(x)
    expected = (tiny.eval().decode(x).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected)
    (ours,), (theirs,) = (torch.autograd.grad(i.sum(), x) for i in (images, expected))
    torch.testing.assert_close(ours, theirs)
    assert not any(p.requires_grad for p in predictor.vae.module.parameters())
    assert type(predictor.pipeline.vae).__name__ == "AutoencoderKL"  # an export of the pipeline has its own
    small_decoder(tmp_path / "other", latent_channels=16)
    with pytest.raises(ValueError, match="latents of 16 channels, and the denoiser's have 4: take the small decoder"):
        load("sd15", tiny_vae=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"tiny_vae .* could not be loaded"):
        load("sd15", tiny_vae=tmp_path / "nowhere")


@pytest.mark.parametrize(("precision", "tuning"), [("32-true", "lora"), ("bf16-mixed", "full")])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*starts at alpha_0 > 0")
def test_what_is_half_and_what_is_not(
    family: str, precision: str, tuning: str, tmp_path: Path, sd15_folder: Path, sd3_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The network computes in bfloat16; states, adjoint, images, reward and loss are float32; timesteps are exact."""
    import lightning_tilt.losses.adjoint_matching as am
    from lightning_tilt.rewards import Ink

    seen: dict[str, set[torch.dtype]] = {}

    def see(name: str, *tensors: torch.Tensor) -> None:
        seen.setdefault(name, set()).update(t.dtype for t in tensors)

    def watched(name: str, function: Any, places: slice = slice(None)) -> Any:
        def call(*args: Any) -> Any:
            out = function(*args)
            see(name, *(a for a in args[places] if isinstance(a, torch.Tensor)), *((out,) if name != "decode" else ()))
            return out

        return call

    def decode(self: LatentDiffusion, x: torch.Tensor, original: Any = LatentDiffusion.decode) -> torch.Tensor:
        images: torch.Tensor = original(self, x)
        see("decode", x, images)
        return images

    def predict(self: Any, x: torch.Tensor, t: torch.Tensor, c: Any, original: Any = LatentDiffusion.predict) -> Any:
        def enter(module: Any, args: Any, kwargs: Any) -> None:
            see("timestep", kwargs["timestep"])

        def leave(module: Any, args: Any, output: Any) -> None:
            see("matmul", output)

        first = next(m for n, m in self.network.named_modules() if n.endswith("to_q"))
        hooks = [self.network.register_forward_pre_hook(enter, with_kwargs=True), first.register_forward_hook(leave)]
        out = original(self, x, t, c)
        for hook in hooks:
            hook.remove()
        see("predict", x, out)
        return out

    monkeypatch.setattr(LatentDiffusion, "decode", decode)
    monkeypatch.setattr(LatentDiffusion, "predict", predict)
    monkeypatch.setattr(Ink, "score", watched("score", Ink.score, slice(1, 2)))
    monkeypatch.setattr(am, "adjoint_matching_terms", watched("terms", am.adjoint_matching_terms))
    config = DIGITS if family == "sd15" else DIGITS.replace("sd15", "sd3")
    flags = ["--model.predictor.path", sd15_folder if family == "sd15" else sd3_folder, "--model.predictor.targets",
             "[to_q]", "--model.predictor.tuning", tuning, "--model.predictor.dtype", "bfloat16",
             "--trainer.precision", precision, "--trainer.callbacks", "[]"]  # fmt: skip
    result = tilt("fit", *overlay(config, tmp_path), *flags)
    assert result.status == 0, result.err
    single = {torch.float32}
    assert {name: seen[name] for name in ("predict", "decode", "score", "terms")} == dict.fromkeys(
        ("predict", "decode", "score", "terms"), single
    )
    assert seen["matmul"] == {torch.bfloat16}
    assert seen["timestep"] <= ({torch.int64} if family == "sd15" else {torch.float32, torch.float64})


def test_adapters_off_nests_under_compilation(load: Any) -> None:
    predictor = load("sd3", compile="aot_eager", text_encoder_3=False)
    kick(predictor)
    x, t, condition = batch(predictor)
    tuned = predictor.predict(x, t, condition)
    with adapters_off(predictor._adapted):
        assert not torch.allclose(predictor.predict(x, t, condition), tuned)
    torch.testing.assert_close(predictor.predict(x, t, condition), tuned)
