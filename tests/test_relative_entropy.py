"""Relative entropy through the path, and its truncations, against naive loops and a Gaussian oracle."""

import oracles
import pytest
import torch
from path_losses import (
    Jagged,
    SmoothWithNaN,
    at_control,
    gradient_with_error,
    naive_path,
    net_update,
    problem,
    relative_entropy_gradient,
    same_gradient,
    same_whatever_the_micro_batches,
)  # fmt: skip
from repository import ROOT
from toys import fit

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.models import StableDiffusion
from lightning_tilt.rewards import Ink
from lightning_tilt.tasks import LogVarianceTask, RelativeEntropyTask

DIGITS = ROOT / "lightning_tilt/assets/digits-sd15"


@pytest.mark.parametrize("last_steps", [None, 2, 1])
def test_gradient_equals_autograd_through_a_naive_simulation(last_steps: int | None) -> None:
    """The reward is differentiated through the whole simulation, not by its recorded gradient."""
    task, path, gradient = net_update(RelativeEntropyTask, last_steps=last_steps)
    first = 0 if last_steps is None else 4 - last_steps
    total = torch.zeros((), dtype=torch.float64)
    for n in range(9):
        one = naive_path(task.predictor, path, n, simulate=True, first=first)
        torch.testing.assert_close(one.after, path.states[-1, n], rtol=1e-10, atol=1e-10)
        total = total + (sum((u**2).sum() / 2 for u in one.u) - 2.0 * one.after.sin().sum()) / 9
    same_gradient(gradient, total, task.predictor)
    assert float(task.trainer.callback_metrics["train/loss"]) == pytest.approx(float(total.detach()), rel=1e-9)


def test_expected_gradient_is_the_oracles_and_vanishes_at_the_best_control() -> None:
    chain, tilt = problem()
    best = oracles.best_control(chain, tilt)
    for control, optimal in ((best, True), ([(0.5 * g, h + 0.1) for g, h in best], False)):
        task, path, _ = at_control(RelativeEntropyTask, control)
        got, se = gradient_with_error(task, path)
        expected = relative_entropy_gradient(chain, control, tilt)
        assert ((got - expected).abs() <= 4 * se).all()
        assert ((got / se).abs() > 6).any() != optimal


def test_truncation_is_biased() -> None:
    """Its stationary point leaves the early steps at the base, and falls short of the tilted mean.

    The best control of the last two steps with noise, none before: zero gradient of the truncated loss within 4 s.e.,
    not of the whole one.
    """
    chain, tilt = problem()
    best = oracles.best_control(chain, tilt)
    truncated = [(0.0, 0.0)] * 5 + best[5:]
    task, path, _ = at_control(RelativeEntropyTask, truncated, last_steps=2)
    got, se = gradient_with_error(task, path)
    assert bool((got[:5] == 0).all()) and ((got[5:]).abs() <= 4 * se[5:]).all()
    whole, path, _ = at_control(RelativeEntropyTask, truncated)
    got, se = gradient_with_error(whole, path)
    assert ((got / se).abs() > 6).any()
    base, short = oracles.laws(chain)[-1][0], oracles.laws(oracles.controlled(chain, truncated))[-1][0]
    exact = oracles.tilted_end_law(chain, tilt)[0]
    assert base < short < base + 0.5 * (exact - base)
    one = oracles.laws(oracles.controlled(chain, [(0.0, 0.0)] * 6 + best[6:]))[-1][0]
    assert base < one < short  # ReFL is shorter still


def test_micro_batches_change_nothing() -> None:
    same_whatever_the_micro_batches(RelativeEntropyTask)
    same_whatever_the_micro_batches(RelativeEntropyTask, last_steps=2)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("last_steps", [None, 2])
def test_evaluations_are_counted(checkpoint: bool, last_steps: int | None) -> None:
    """Both branches: rollout; model and base at steps with noise, base at the last; again if checkpointed."""
    task, path, _ = net_update(RelativeEntropyTask, checkpoint=checkpoint, last_steps=last_steps)
    e, n, steps = task.sampler.evaluations, len(path), path.steps
    seen = last_steps or steps - 1
    assert e.pairs == n * seen
    assert e.forward == 2 * n * (steps + (2 * seen + 1) * (2 if checkpoint else 1))
    assert (e.backward, e.vjp) == (2 * 2 * n * seen, 2 * n * seen)


def test_weights_of_the_path_are_free() -> None:
    """ESS and log Z are those that the log-variance's record has of the same rollout; a truncation has none."""
    task, _, _ = net_update(RelativeEntropyTask)
    other, _, _ = net_update(LogVarianceTask)
    for name in ("train/ess", "train/log_z", "train/kl"):
        value = float(task.trainer.callback_metrics[name])
        assert value == pytest.approx(float(other.trainer.callback_metrics[name]), rel=1e-9)
    short, _, _ = net_update(RelativeEntropyTask, last_steps=1)
    assert "train/ess" not in short.trainer.callback_metrics


def test_bad_samples_are_left_out() -> None:
    task, path, gradient = net_update(RelativeEntropyTask, SmoothWithNaN(), sampler={"on_bad_reward": "skip"})
    assert path.weight.tolist() == [1, 0, 1, 1, 1, 1, 1, 1, 1]
    total = torch.zeros((), dtype=torch.float64)
    for n in (0, 2, 3, 4, 5, 6, 7, 8):
        one = naive_path(task.predictor, path, n, simulate=True)
        total = total + (sum((u**2).sum() / 2 for u in one.u) - 2.0 * one.after.sin().sum()) / 8
    same_gradient(gradient, total, task.predictor)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(TypeError, match="needs the gradient of the reward"):
        net_update(RelativeEntropyTask, Jagged())
    with pytest.raises(ValueError, match="last_steps"):
        net_update(RelativeEntropyTask, last_steps=0)
    with pytest.raises(ValueError, match="base_last_step: true"):
        net_update(RelativeEntropyTask, sampler={"base_last_step": False})


@pytest.mark.parametrize("kind", [RelativeEntropyTask, LogVarianceTask])
def test_latent_diffusion_with_adapters(kind: type) -> None:
    """One update on the digits of SD 1.5's kind: a checkpointed, guided LoRA has the gradient of a plain one."""
    gradients = []
    for kwargs in ({"checkpoint": False}, {"checkpoint": True, "loss_micro_batch": 3}):
        torch.manual_seed(0)
        predictor = StableDiffusion(DIGITS, rank=2)
        for name, parameter in predictor.trained_parameters().items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)  # away from the base, where half of the gradients are 0
        task = kind(
            predictor=predictor, reward=Ink(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), lam=10.0, **kwargs
        )
        sampler = TrajectorySampler(steps=3, samples_per_condition=2, guidance_scale=2.0)
        recorder = fit(task, sampler, [["a photo of the digit three", "seven"]])
        assert 0 < float(task.trainer.callback_metrics["train/kl"]) < 1e3
        gradients.append(recorder.gradients[0])
    plain, cut = gradients
    assert plain.keys() == cut.keys() and all("lora_" in name for name in plain)
    norm = torch.stack([g.norm() for g in plain.values()]).norm()
    difference = torch.stack([(plain[name] - cut[name]).norm() for name in plain]).norm()
    assert norm > 0 and difference < 1e-3 * norm
