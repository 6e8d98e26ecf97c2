"""A loss dropped into a LightningModule, ours or the user's; what the Trainer offers works unchanged."""

import dataclasses
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import PromptedNet, Recorder, SumReward, fit, trainer

from lightning_tilt import AdjointMatching, TiltModule, TrajectorySampler
from lightning_tilt.callbacks import TiltReport
from lightning_tilt.data.loader import Loader
from lightning_tilt.interfaces import LamSchedule, Prompts, Reward
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt
from lightning_tilt.process import RectifiedFlow, VariancePreserving
from lightning_tilt.tasks import AdjointMatchingTask
from lightning_tilt.transition import DDIM, EulerMaruyama, ExactGaussian

BATCHES = [["one", "three"], ["seven", "nine"], ["two", "eleven"], ["four", "six"]]


class Existing(LightningModule):
    """Somebody's module: own optimiser, own validation, a parameter of its own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.predictor = PromptedNet(RectifiedFlow())
        self.process = self.predictor.process
        self.reward = SumReward()
        self.head = nn.Linear(width, 1)
        self.validated = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("the mixin's training_step comes first")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Mine(AdjointMatching, Existing):
    """The two together."""


def sampler(**kwargs: Any) -> TrajectorySampler:
    return TrajectorySampler(**({"steps": 4, "samples_per_condition": 2} | kwargs))


def task(**kwargs: Any) -> AdjointMatchingTask:
    torch.manual_seed(5)
    defaults: dict[str, Any] = {
        "predictor": PromptedNet(RectifiedFlow()),
        "reward": SumReward(),
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "lam": 2.0,
    }
    return AdjointMatchingTask(**(defaults | kwargs))


def weights(module: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.predictor.named_parameters()}


def test_mixin_in_an_existing_module_trains_it_and_leaves_its_hooks_alone() -> None:
    module = Mine(width=5, lam=2.0)
    before = weights(module)
    run = trainer([sampler()], max_steps=4)
    run.fit(module, DataLoader(BATCHES, batch_size=None), DataLoader(range(3), batch_size=None))
    assert module.validated >= 3 and module.head.in_features == 5
    assert isinstance(run.optimizers[0], torch.optim.AdamW)
    assert any(not torch.equal(before[n], p) for n, p in weights(module).items())
    assert {"train/loss", "train/reward", "train/ess", "train/lam", "train/log_z"} <= set(run.callback_metrics)


@pytest.mark.parametrize("host", [TiltModule, Existing])
def test_wrong_order_of_bases_raises_with_the_mend(host: type) -> None:
    with pytest.raises(TypeError, match=rf"class Wrong\(AdjointMatching, {host.__name__}\)"):
        type("Wrong", (host, AdjointMatching), {})


def test_missing_sampler_raises_at_set_up_with_the_mend() -> None:
    with pytest.raises(RuntimeError, match="needs one TrajectorySampler among the Trainer's callbacks and found 0"):
        trainer([]).fit(task(), DataLoader(BATCHES, batch_size=None))


@pytest.mark.parametrize("missing", ["predictor", "process", "reward"])
def test_incomplete_host_raises_at_set_up_and_names_what_is_missing(missing: str) -> None:
    module = Mine()
    delattr(module, missing)
    with pytest.raises(TypeError, match=rf"Mine needs self\.{missing}"):
        fit(module, sampler(), BATCHES[:1])


def test_sampler_without_a_loss_names_the_mend() -> None:
    class Plain(Existing):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.head.weight.sum()

    with pytest.raises(TypeError, match=r"class Mine\(AdjointMatching, Plain\)"):
        fit(Plain(), sampler(), BATCHES[:1])


def test_reward_without_gradient_is_refused() -> None:
    class Blind(SumReward):
        is_differentiable = False

    with pytest.raises(TypeError, match=r"needs the gradient of the reward, and Blind has none"):
        fit(task(reward=Blind()), sampler(), BATCHES[:1])


@pytest.mark.parametrize("transition", [DDIM(ddim_eta=0.5), EulerMaruyama(sigma=0.7)])
def test_transitions_that_are_not_memoryless_are_refused_unless_asked(transition: Any) -> None:
    # Euler-Maruyama with a bounded noise, from the flow's pure noise.
    with pytest.raises(ValueError, match="allow_non_memoryless"):
        fit(task(), sampler(transition=transition), BATCHES[:1])
    if isinstance(transition, DDIM):
        fit(task(allow_non_memoryless=True), sampler(transition=transition), BATCHES[:1])


def test_start_that_still_knows_the_data_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """SD 1.5's betas leave corr(X_0, X_1) > 0 whatever the transition; the mend is zero_terminal_snr."""
    for zero, said in ((False, True), (True, False)):
        predictor = PromptedNet(VariancePreserving.from_betas(zero_terminal_snr=zero))
        predictor.prediction_type = "v_prediction"
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(task(predictor=predictor), sampler(), BATCHES[:1])
        assert ("zero_terminal_snr: true has no such bias" in caplog.text) == said


def test_gradient_clip_val_clips() -> None:
    free, clipped = task(), task()
    start = weights(free)
    fit(free, sampler(), BATCHES[:1])
    fit(clipped, sampler(), BATCHES[:1], gradient_clip_val=1e-3)
    moved = torch.cat([(weights(clipped)[n] - start[n]).flatten() for n in start]).norm()
    assert float(moved) == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert float(torch.cat([(weights(free)[n] - start[n]).flatten() for n in start]).norm()) > 1e-3


def test_accumulation_averages_rollouts_of_one_and_the_same_model() -> None:
    whole, parts = task(), task()
    recorder = fit(whole, sampler(), BATCHES[:2], max_steps=1, accumulate_grad_batches=2)
    assert whole.trainer.global_step == 1 and len(recorder.trajectories) == 2
    single = [task(), task()]
    gradients = []
    for i in (0, 1):
        callback = sampler()
        callback.load_state_dict(callback.state_dict() | {"rollouts": i})
        gradients.append(fit(single[i], callback, [BATCHES[i]]).gradients[0])
    expected = {
        n: p - 0.1 * (gradients[0][f"predictor.{n}"] + gradients[1][f"predictor.{n}"]) / 2
        for n, p in weights(parts).items()
    }
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_precision_bf16_runs_the_network_in_bf16_and_keeps_states_in_float32() -> None:
    seen: list[torch.dtype] = []
    module = task()
    module.predictor.network.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    recorder = fit(module, sampler(), BATCHES[:2], precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}
    path = recorder.trajectories[0]
    assert {path.states.dtype, path.adjoint.dtype, path.reward.dtype} == {torch.float32}
    exact = fit(task(), sampler(), BATCHES[:1]).gradients[0]
    for name, gradient in recorder.gradients[0].items():
        assert torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), 0) > 0.98


def test_learning_rate_scheduler_steps_with_the_updates() -> None:
    module = task(lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5))
    fit(module, sampler(), BATCHES)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)


def test_other_callbacks_and_max_epochs_work() -> None:
    class Count(lightning.Callback):
        ends = 0

        def on_train_epoch_end(self, *args: Any) -> None:
            self.ends += 1

    count = Count()
    fit(task(), sampler(), BATCHES, callbacks=[count], max_epochs=3, max_steps=-1)
    assert count.ends == 3


def test_lam_schedule_warms_up_and_scales_the_adjoint_not_the_loss() -> None:
    recorder = fit(task(lam=LamSchedule(lam=4.0, warmup=2)), sampler(), BATCHES[:3])
    assert [p.lam for p in recorder.trajectories] == [0.0, 2.0, 4.0]
    assert float(recorder.trajectories[0].adjoint.abs().max()) == 0
    # lam = 0 at the base: control and adjoint are 0, so is the gradient - up to the rounding of batches of other sizes.
    assert all(float(g.abs().max()) < 1e-6 for g in recorder.gradients[0].values())
    assert all(float(g.abs().max()) > 1e-4 for g in recorder.gradients[1].values())


def test_rollout_every_shares_a_rollout() -> None:
    recorder = fit(task(), sampler(rollout_every=2), BATCHES)
    a, b, c, d = recorder.trajectories
    assert a is b and c is d and a is not c and (a.rollout, c.rollout) == (0, 1)


def test_replay_buffer_draws_from_the_last_rollouts_and_respects_passes() -> None:
    recorder = fit(task(), sampler(rollout_every=2, buffer_size=2), BATCHES * 4)
    numbers = [p.rollout for p in recorder.trajectories]
    assert numbers[::2] == list(range(8))
    # In between one of the last two rollouts, either of them at some time.
    ages = [numbers[i] - numbers[i + 1] for i in range(2, 15, 2)]
    assert set(ages) == {0, 1}
    once = fit(task(), sampler(rollout_every=4, buffer_size=1, passes=1), BATCHES)
    assert [p.rollout for p in once.trajectories] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"sampler\.passes must be at least 1"):
        sampler(passes=0)


def test_second_fit_begins_with_a_fresh_rollout() -> None:
    callback, module = sampler(rollout_every=3), task()
    first = fit(module, callback, BATCHES[:2]).trajectories[-1]
    second = fit(module, callback, BATCHES[2:3]).trajectories[0]
    assert second is not first and second.prompts == ["two", "two", "eleven", "eleven"] and second.rollout == 1


def test_buffer_survives_a_checkpoint(tmp_path: Path) -> None:
    straight = fit(task(), sampler(rollout_every=3, buffer_size=2), BATCHES)
    keep = ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=2)
    run = trainer([sampler(rollout_every=3, buffer_size=2), keep], max_steps=2, enable_checkpointing=True)
    run.fit(task(), Loader(dataset=BATCHES, batch_size=None))
    recorder, resumed = Recorder(), task()
    run = trainer([sampler(rollout_every=3, buffer_size=2), recorder, keep], max_steps=4, enable_checkpointing=True)
    run.fit(resumed, Loader(dataset=BATCHES, batch_size=None), ckpt_path=tmp_path / "a.ckpt")
    for ours, theirs in zip(recorder.trajectories, straight.trajectories[2:], strict=True):
        assert ours.rollout == theirs.rollout and torch.equal(ours.states, theirs.states)


def test_seed_everything_after_the_sampler_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    late = sampler()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    a, b = fit(task(), late, BATCHES[:1]), fit(task(), sampler(seed=7), BATCHES[:1])
    assert torch.equal(a.trajectories[0].states, b.trajectories[0].states)


def test_each_step_logs_what_one_needs_to_trust_it() -> None:
    module = task()
    recorder = fit(module, sampler(), BATCHES[:1])
    logged = module.trainer.callback_metrics
    expected = {
        "loss", "reward", "reward_se", "lam", "ess", "log_z", "term_max", "control_norm", "adjoint_norm_noise",
        "adjoint_norm_data", "gradient_norm", "seconds/rollout", "seconds/adjoint", "seconds/loss",
        "evaluations/forward", "evaluations/vjp", "evaluations/backward", "evaluations/pairs",
        "evaluations/forwards_per_pair",
    }  # fmt: skip
    assert {f"train/{name}" for name in expected} <= set(logged)
    path, gradients = recorder.trajectories[0], recorder.gradients[0]
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    torch.testing.assert_close(logged["train/gradient_norm"], norm)
    torch.testing.assert_close(logged["train/adjoint_norm_data"], 2.0 * path.reward_gradient.norm(dim=1).mean())
    assert float(logged["train/control_norm"]) < 1e-6  # the tuned model is the base, up to rounding
    assert float(logged["train/reward_se"]) == pytest.approx(float(path.reward.std()) / 2)


def test_dropout_rests_while_the_sampler_works_and_modes_are_restored() -> None:
    module = task()
    module.predictor.network.insert(1, nn.Dropout(0.5))
    module.predictor._twin[0].insert(1, nn.Identity())
    module.predictor.network[0].eval()
    modes: list[tuple[bool, ...]] = []

    class Watch(lightning.Callback):
        def on_after_backward(self, run: Any, pl_module: Any) -> None:
            modes.append(tuple(m.training for m in pl_module.predictor.network))

    recorder = fit(module, sampler(), BATCHES[:1], callbacks=[Watch()])
    # The untuned model's weight is exp(lam r): the dropout of its twin would show as a ratio.
    path = recorder.trajectories[0]
    torch.testing.assert_close(path.log_w, path.lam * path.reward, atol=1e-5, rtol=0)
    assert modes == [(False, True, True, True)]


def test_reward_that_cuts_its_own_gradient_is_named() -> None:
    class Cut(SumReward):
        def score(self, images: Tensor, prompts: Prompts) -> Tensor:
            return super().score(images.detach(), prompts)

    with pytest.raises(TypeError, match=r"Cut\.score has no gradient in the images"):
        fit(task(reward=Cut()), sampler(), BATCHES[:1])


@pytest.mark.parametrize(
    "wrong", [{"step_weight": "kontrol"}, {"supervised_steps": "al"}, {"last_steps": 3}, {"last_steps": -1}]
)
def test_wrong_settings_are_refused_when_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        task(**wrong)
    with pytest.raises(ValueError, match=r"sampler\.on_bad_reward"):
        sampler(on_bad_reward="raise")
    with pytest.raises(ValueError, match="needs a step with noise"):
        fit(task(), sampler(steps=1), BATCHES[:1])


class Broken(Reward):
    """NaN for one prompt, or only in the gradient."""

    def __init__(self, where: str = "value", prompts: tuple[str, ...] = ("three",)) -> None:
        super().__init__()
        self.where, self.bad = where, prompts

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        assert prompts is not None
        good = images.flatten(1).sin().sum(1)
        hit = torch.tensor([p in self.bad for p in prompts])
        if self.where == "value":
            return good * torch.where(hit, torch.nan, 1.0)
        return good + torch.where(hit[:, None], images * 0, 1.0).sqrt().sum(1)


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_nan_reward_stops_and_names_rollout_and_prompt(where: str) -> None:
    with pytest.raises(FloatingPointError, match=r"2 of 4 samples of train rollout 0 .*'three'.*on_bad_reward: skip"):
        fit(task(reward=Broken(where)), sampler(), BATCHES[:1])


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_nan_reward_skipped_equals_a_batch_without_it(where: str) -> None:
    skipped = fit(task(reward=Broken(where)), sampler(on_bad_reward="skip"), BATCHES[:1])
    alone = fit(task(reward=Broken(where)), sampler(), [["one"]])
    assert skipped.trajectories[0].weight.tolist() == [1, 1, 0, 0]
    for name, gradient in alone.gradients[0].items():
        torch.testing.assert_close(skipped.gradients[0][name], gradient, rtol=1e-5, atol=1e-7)


def test_batch_without_one_good_sample_moves_nothing_not_even_by_momentum() -> None:
    module = task(reward=Broken(prompts=("two", "eleven")), optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    seen: list[dict[str, Tensor]] = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, run: Any, pl_module: Any, *args: Any) -> None:
            seen.append(weights(pl_module))

    fit(module, sampler(on_bad_reward="skip"), BATCHES, callbacks=[Watch()])
    assert all(torch.equal(seen[1][n], seen[2][n]) for n in seen[1])
    assert any(not torch.equal(seen[2][n], seen[3][n]) for n in seen[1])


def test_checkpoint_holds_what_was_trained_and_resumes(tmp_path: Any) -> None:
    straight, first, resumed = (task(optimizer=lambda p: torch.optim.Adam(p, lr=0.05)) for _ in range(3))
    fit(straight, sampler(), BATCHES)
    keep = ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=2)
    run = trainer([sampler(), keep], max_steps=3, enable_checkpointing=True)
    run.fit(first, Loader(dataset=BATCHES, batch_size=None))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"predictor.{n}" for n in weights(first)}
    run = trainer([sampler(), keep], max_steps=4, enable_checkpointing=True)
    run.fit(resumed, Loader(dataset=BATCHES, batch_size=None), ckpt_path=tmp_path / "a.ckpt")
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=0)


def test_same_samples_whatever_the_micro_batch_and_another_seed_gives_others() -> None:
    a = fit(task(), sampler(seed=1), BATCHES[:1]).trajectories[0]
    b = fit(task(), sampler(seed=1, rollout_micro_batch=1), BATCHES[:1]).trajectories[0]
    c = fit(task(), sampler(seed=2), BATCHES[:1]).trajectories[0]
    torch.testing.assert_close(a.states, b.states)
    assert not torch.allclose(a.states, c.states)
    assert len({tuple(x.tolist()) for x in a.states[0]}) == 4


def test_validation_does_not_disturb_training_draws() -> None:
    plain = fit(task(), sampler(), BATCHES[:2]).trajectories[1]
    module, recorder = task(), Recorder()
    run = trainer([sampler(), recorder], max_steps=2, val_check_interval=1)
    run.fit(module, DataLoader(BATCHES[:2], batch_size=None), DataLoader(BATCHES[:1], batch_size=None))
    assert torch.equal(recorder.trajectories[1].states, plain.states)
    assert {"val/reward", "val/reward_se", "val/diversity"} <= set(run.callback_metrics)


def test_trajectory_indexes_moves_saves_and_refuses(tmp_path: Any) -> None:
    path = fit(task(), sampler(), BATCHES[:1]).trajectories[0]
    some = path[torch.tensor([2, 0])]
    assert len(some) == 2 and some.steps == 4 and some.prompts == ["three", "one"]
    assert torch.equal(some.adjoint, path.adjoint[:, [2, 0]])
    part = path.between(1, 3)
    assert part.steps == 2 and torch.equal(part.states, path.states[1:4]) and part.log_w is None
    with pytest.raises(IndexError, match="trajectory of 4 steps"):
        path.between(2, 9)
    path.save(tmp_path / "t.pt")
    again = type(path).load(tmp_path / "t.pt")
    assert torch.equal(again.states, path.states) and again.prompts == path.prompts
    wide = path.to(torch.float64)
    assert wide.states.dtype == torch.float64 and wide.index.dtype == torch.int64
    with pytest.raises(dataclasses.FrozenInstanceError):
        path.lam = 3.0
    with pytest.raises(ValueError, match="steps of"):
        dataclasses.replace(path, noise=path.noise[1:])


def test_unconditional_draws_and_mappings_are_batches_too() -> None:
    base = GaussianMixturePredictor([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    from lightning_tilt.models import NeuralTilt

    module = task(predictor=NeuralTilt(base, hidden=8, layers=1))
    path = fit(module, sampler(samples_per_condition=1), [torch.arange(5)]).trajectories[0]
    assert len(path) == 5 and path.prompts is None
    assert fit(task(), sampler(), [{"prompt": ["one"], "id": 3}]).trajectories[0].prompts == ["one", "one"]
    for wrong in (3, [], [1, 2], {"text": ["a"]}):
        with pytest.raises(TypeError, match="a batch is a list of prompts"):
            fit(task(), sampler(), [wrong])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_half_precision_is_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=f"{precision}.*bf16-mixed"):
        fit(task(), sampler(), BATCHES[:1], precision=precision)


def test_exact_steps_of_another_base_are_refused() -> None:
    """For every loss: they would be another chain, and nothing would say so."""
    base = GaussianBase([2], scale=2.0)
    for precision, fits in ((0.25, True), (1.0, False)):
        module = AdjointMatchingTask(NeuralTilt(base, hidden=4, layers=1), SumReward(), checkpoint=False)
        steps = sampler(transition=ExactGaussian(precision), samples_per_condition=1)
        if fits:
            fit(module, steps, [torch.zeros(4)])
        else:
            with pytest.raises(
                ValueError, match=r"exact for another base: the precision of this one is 1/scale\^2 = 0.25"
            ):
                fit(module, steps, [torch.zeros(4)])
    with pytest.raises(ValueError, match="use DDIM"):
        fit(task(), sampler(transition=ExactGaussian(1.0)), [["one"]])
    report = TiltReport(prompts=["one"], transition=ExactGaussian(1.0))
    with pytest.raises(ValueError, match="use DDIM"):
        fit(task(), sampler(), [["one"]], callbacks=[report])


def test_a_buffer_that_will_be_drawn_from_again_is_saved() -> None:
    """Also where the next batch makes a fresh rollout: the older ones stay beside it."""
    for size, kept in ((1, 0), (3, 1)):
        steps = sampler(rollout_every=2, buffer_size=size)
        fit(task(), steps, BATCHES[:2])
        assert len(steps.state_dict()["buffer"]) == kept


def test_replaying_an_on_policy_loss_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(task(), sampler(rollout_every=2), BATCHES[:2])
    assert "is on policy, and the sampler replays" in caplog.text
