"""Rewards made of rewards: their formulas, the multiplier that a constraint learns, and what is passed on to parts."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DIGITS, overlay, tilt
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from toys import AffineControl, PromptedNet, SumReward, fit, gaussian, trainer

from lightning_tilt.assets import folder
from lightning_tilt.callbacks import TiltReport, TrajectorySampler
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.data.loader import Loader
from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.loggers import read_metrics
from lightning_tilt.models import GaussianBase, NeuralTilt, StableDiffusion
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards import (
    Clamped,
    Constraint,
    DigitClassifier,
    Ink,
    JPEGCompressibility,
    LinearReward,
    QuadraticReward,
    Smoothed,
    WeightedSum,
)
from lightning_tilt.rewards.density import Density
from lightning_tilt.tasks import AdjointMatchingTask, LogVarianceTask, TiltMatchingTask
from lightning_tilt.transition import DDIM

STATES = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(6, 2)


class Length(Reward):
    """Reads prompts; NaN for the prompt "bad"."""

    needs_prompts = True

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        assert prompts is not None
        lengths = torch.tensor([float("nan") if p == "bad" else len(p) for p in prompts]).to(images)
        return images.flatten(1).sum(1) * 0.01 + lengths


def test_weighted_sum_is_the_sum_and_tells_its_parts() -> None:
    a, b = QuadraticReward([[1.0, 0.0], [0.0, 2.0]], [0.0, 1.0]), LinearReward([1.0, -1.0])
    total, parts = WeightedSum([a, b, b], [2.0, -3.0, 0.5]).measure(STATES, None)
    expected = 2 * a.score(STATES, None) - 2.5 * b.score(STATES, None)
    torch.testing.assert_close(total, expected)
    assert list(parts) == ["reward_QuadraticReward", "reward_LinearReward_1", "reward_LinearReward_2"]
    torch.testing.assert_close(parts["reward_LinearReward_2"], b.score(STATES, None))
    torch.testing.assert_close(WeightedSum([a, b]).score(STATES, None), expected * 0 + sum(parts.values()) - total * 0
                               - parts["reward_LinearReward_2"])  # fmt: skip


def test_traits_are_those_of_the_parts() -> None:
    plain, prompted, blind = Ink(), Length(), JPEGCompressibility()
    for parts, gradient, prompts in (([plain], True, False), ([plain, prompted], True, True),
                                     ([plain, blind], False, False)):  # fmt: skip
        total = WeightedSum([Smoothed(part) for part in parts])
        assert (total.is_differentiable, total.needs_prompts, total.learns) == (gradient, prompts, False)
    assert WeightedSum([Clamped(Constraint(plain, prompted, 1.0), max=1.0)]).learns


@pytest.mark.parametrize("softness", [0.0, 0.3])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.5), (None, 1.5), (-1.0, None)])
def test_clamped_value_and_slope(softness: float, low: float | None, high: float | None) -> None:
    r = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None].requires_grad_()
    held = Clamped(LinearReward([1.0]), low, high, softness).score(r, None)
    (slope,) = torch.autograd.grad(held.sum(), r)
    value, x = r.detach().squeeze(1), slope.squeeze(1)
    hard = value.clamp(low, high)
    if softness == 0:
        assert torch.equal(held.detach(), hard)
        return
    rise = 1.0 if low is None else torch.sigmoid((value - low) / softness)
    fall = 0.0 if high is None else torch.sigmoid((value - high) / softness)
    torch.testing.assert_close(x, rise - fall + 0 * value)
    assert bool((x > 0).all()), "beyond a bound it still knows the way back"
    assert float((held.detach() - hard).abs().max()) <= softness * 0.6932
    assert low is None or bool((held > low).all())
    assert high is None or bool((held < high).all())


def test_clamped_says_how_many_are_beyond() -> None:
    _, parts = Clamped(LinearReward([1.0]), -1.0, 1.5).measure(torch.tensor([[-2.0], [0.0], [2.0], [3.0]]), None)
    assert parts["clamped"].tolist() == [1, 0, 1, 1] and parts["reward_unclamped"].tolist() == [-2, 0, 2, 3]


def test_smoothed_quadratic_is_off_by_half_the_trace_of_its_hessian() -> None:
    """Over 200 seeds, within 4 standard errors; the gradient of a quadratic is exact by the pairs' symmetry."""
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    reward, sigma = QuadraticReward(matrix, [0.0, 1.0]), 0.7
    x = STATES.clone().requires_grad_()
    values = []
    for seed in range(200):
        score = Smoothed(reward, sigma, samples=2, seed=seed).score(x, None)
        (gradient,) = torch.autograd.grad(score.sum(), x)
        torch.testing.assert_close(gradient, -(x.detach() - torch.tensor([0.0, 1.0])) @ matrix)
        values.append((score - reward.score(x, None))[0].detach())
    shift = torch.stack(values)
    assert abs(float(shift.mean()) + sigma**2 / 2 * 3.0) < 4 * float(shift.std()) / 200**0.5
    assert float(shift.std()) > 0.1


def test_smoothed_gradient_of_a_sine() -> None:
    """E sin(x + sigma eps) = e^{-sigma^2/2} sin x, and so for its slope: within 4 standard errors over seeds."""
    x, sigma = torch.tensor([[0.3, -1.0]], dtype=torch.float64, requires_grad=True), 0.8
    seen = torch.stack([
        torch.autograd.grad(Smoothed(SumReward(), sigma, samples=4, seed=s).score(x, None).sum(), x)[0][0]
        for s in range(300)
    ])  # fmt: skip
    exact = torch.exp(torch.tensor(-(sigma**2) / 2)) * x.detach().cos()[0]
    assert bool(((seen.mean(0) - exact).abs() < 4 * seen.std(0) / 300**0.5).all())
    plain = x.detach().cos()[0]
    assert bool(((seen.mean(0) - plain).abs() > 4 * seen.std(0) / 300**0.5).all())


def test_shifts_are_those_of_a_naive_loop() -> None:
    class Corner(Reward):
        def score(self, images: Tensor, prompts: Prompts) -> Tensor:
            return images[:, 0, 0, 0]

    image = torch.arange(30, dtype=torch.float64).reshape(1, 1, 5, 6)
    reward = Smoothed(Corner(), sigma=0.0, samples=64, shift=2, seed=3)
    corners = [reward._changed(image, n)[0, 0] for n in range(64)]
    moves = set()
    for one, other in zip(corners[::2], corners[1::2], strict=True):
        found = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if all(
            float(one[a, b]) == float(image[0, 0, min(max(a + i, 0), 4), min(max(b + j, 0), 5)])
            and float(other[a, b]) == float(image[0, 0, min(max(a - i, 0), 4), min(max(b - j, 0), 5)])
            for a in range(5) for b in range(6)
        )]  # fmt: skip
        assert len(found) == 1, "each pair is one move and its opposite"
        moves |= set(found)
    assert len(moves) > 12
    torch.testing.assert_close(reward.score(image, None)[0], torch.stack([c[0, 0] for c in corners]).mean())
    with pytest.raises(ValueError, match=r"shift needs images .* not \(6, 2\): use shift: 0"):
        reward.score(STATES, None)


def test_jpeg_is_the_size_of_the_encoders_file() -> None:
    images = torch.rand(3, 3, 24, 32)
    images[1] *= 0.1
    for quality in (95, 30):
        expected = []
        for image in images:
            file = io.BytesIO()
            pixels = (image * 255).round().byte().movedim(0, 2).numpy()
            Image.fromarray(pixels).save(file, "JPEG", quality=quality)
            expected.append(-len(file.getvalue()) / 1000)
        torch.testing.assert_close(JPEGCompressibility(quality).score(images, None), torch.tensor(expected))
    images[2, 0, 3, 4] = torch.nan
    assert JPEGCompressibility().score(images).isnan().tolist() == [False, False, True]
    assert JPEGCompressibility().score(images[:2, :1]).shape == (2,)
    with pytest.raises(ValueError, match=r"needs images \(B, 3, H, W\), not \(6, 2\)"):
        JPEGCompressibility().score(STATES)


@pytest.mark.parametrize("kind", [LogVarianceTask, TiltMatchingTask])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_jpeg_tunes_the_digits_without_a_gradient(kind: type[Any]) -> None:
    digits = StableDiffusion(str(folder("digits-sd15")), rank=4)
    start = {name: p.detach().clone() for name, p in digits.trained_parameters().items()}
    module = kind(digits, JPEGCompressibility(), lam=5.0, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    ode = {"transition": DDIM(0.0), "base_last_step": False} if kind is TiltMatchingTask else {}
    recorder = fit(module, TrajectorySampler(steps=3, samples_per_condition=3, **ode), [["seven", "one"]] * 2)
    rewards = recorder.trajectories[0].reward
    assert bool((rewards < -0.5).all()) and float(rewards.std()) > 0 and not module.reward.is_differentiable
    assert any(not torch.equal(p, start[name]) for name, p in digits.trained_parameters().items())


WRONG: list[tuple[Any, str]] = [
    (lambda: WeightedSum([]), "at least one reward"),
    (lambda: WeightedSum([Ink()], [1.0, 2.0]), "1 rewards, 2 weights"),
    (lambda: WeightedSum([Ink()], [float("nan")]), "finite numbers"),
    (lambda: Clamped(Ink()), "needs a bound"),
    (lambda: Clamped(Ink(), 1.0, 0.5), "min 1.0 must be below max 0.5"),
    (lambda: Clamped(Ink(), 1.0, softness=-1.0), "softness"),
    (lambda: Constraint(Ink(), Ink(), float("inf")), "at_least"),
    (lambda: Constraint(Ink(), Ink(), 0.5, step=0.0), "step is a positive number"),
    (lambda: Constraint(Ink(), Ink(), 0.5, start=2.0, limit=1.0), "between 0 and limit 1.0"),
    (lambda: Smoothed(Ink(), sigma=-0.1), "sigma is at least 0"),
    (lambda: Smoothed(Ink(), samples=3), "an even number, not 3"),
    (lambda: Smoothed(Ink(), sigma=0.0), "smooth nothing"),
    (lambda: JPEGCompressibility(0), "between 1 and 100"),
]


@pytest.mark.parametrize(("make", "line"), WRONG)
def test_wrong_settings_are_named(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make()
    with pytest.raises(TypeError, match="reward_unclamped is a float"):
        Clamped(3.0, max=1.0)  # type: ignore[arg-type]


def test_a_part_without_the_gradient_that_it_promises_is_named() -> None:
    """In a sum with another one nobody would notice."""

    class Cut(Reward):
        def score(self, images: Tensor, prompts: Prompts) -> Tensor:
            return images.detach().flatten(1).mean(1)

    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(TypeError, match=r"^Cut\.score has no gradient in the images"):
        WeightedSum([Ink(), Cut()]).score(images, None)
    with torch.no_grad():
        assert WeightedSum([Ink(), Cut()]).score(images, None).shape == (2,)
    with pytest.raises(TypeError, match=r"and JPEGCompressibility in Clamped in WeightedSum has none"):
        blind = WeightedSum([Ink(), Clamped(JPEGCompressibility(), max=0.0)])
        fit(AdjointMatchingTask(PromptedNet(RectifiedFlow()), blind), TrajectorySampler(steps=3), [["one"]])


def test_parts_learn_which_model_is_tilted() -> None:
    class Well(Density):
        def energy(self, x: Tensor) -> Tensor:
            return (x**2).sum(1)

    base = GaussianBase([2])
    reward = WeightedSum([Clamped(Well(), max=0.0), SumReward()])
    with pytest.raises(RuntimeError, match="Well does not know its base yet"):
        reward.score(STATES, None)
    reward.bind(NeuralTilt(base, hidden=4, layers=1))
    expected = (-(STATES**2).sum(1) - base.log_prob(STATES)).clamp(max=0.0) + STATES.sin().sum(1)
    torch.testing.assert_close(reward.score(STATES, None), expected)


# -- the multiplier of a constraint


def constrained(**kwargs: Any) -> AdjointMatchingTask:
    """A one-dimensional Gaussian whose optimum, for any multiplier, is in the family."""
    settings: dict[str, Any] = {"at_least": 0.5, "step": 0.1} | kwargs
    reward = Constraint(LinearReward([-1.0]), LinearReward([1.0]), **settings)
    return AdjointMatchingTask(
        AffineControl(gaussian(0.3, 0.8, RectifiedFlow()), 5), reward, lam=2.0, checkpoint=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=2.0),
    ).double()  # fmt: skip


def law_of_the_base(module: AdjointMatchingTask) -> tuple[float, float]:
    """Mean and variance of the end point of the base's chain, whose steps are affine."""
    chain, base = module.sampler.chain(module), module.predictor._base[0]
    step = chain.mean(base, base.encode(None, 2), 1.0)
    m, v = 0.0, 1.0
    for k in range(chain.steps):
        at_0, at_1 = step(torch.tensor([[0.0], [1.0]], dtype=torch.float64), k).flatten().tolist()
        m, v = at_0 + (at_1 - at_0) * m, (at_1 - at_0) ** 2 * v + float(chain.stds[k]) ** 2
    return m, v


def test_the_multiplier_converges_to_its_closed_form_and_the_bound_is_met() -> None:
    """E_mu[c] = m + lam v (mu - 1) = c_0.  Both within 4 standard errors of their noise."""
    step, n = 0.05, 256
    module = constrained(step=step)
    sampler = TrajectorySampler(steps=5, samples_per_condition=1, seed=0)
    fit(module, sampler, [torch.zeros(n)] * 120)
    m, v = law_of_the_base(module)
    slope = 2.0 * v
    exact = 1 + (0.5 - m) / slope
    # mu is an autoregression with the factor 1 - step slope, driven by step times the noise of a mean of c.
    noise = step * (v / n) ** 0.5 / (1 - (1 - step * slope) ** 2) ** 0.5
    assert abs(float(module.reward.multiplier) - exact) < 4 * noise
    end = sampler.rollout(module, torch.zeros(4000), stream="report", number=0).end
    model = slope * 4 * noise  # the model follows mu
    assert abs(float(end.mean()) - 0.5) < 4 * float(end.std()) / 4000**0.5 + model
    logged = module.trainer.callback_metrics
    assert {"train/constraint_multiplier", "train/constraint_objective", "train/constraint_value"} <= set(logged)
    assert float(logged["train/constraint_objective"]) == pytest.approx(-float(logged["train/constraint_value"]))


def test_a_bound_that_holds_by_itself_costs_nothing() -> None:
    module = constrained(at_least=-5.0, start=0.3)
    fit(module, TrajectorySampler(steps=5, samples_per_condition=1), [torch.zeros(64)] * 2)
    assert float(module.reward.multiplier) == 0.0
    limited = constrained(at_least=50.0, limit=1.5)
    fit(limited, TrajectorySampler(steps=5, samples_per_condition=1), [torch.zeros(64)] * 2)
    assert float(limited.reward.multiplier) == 1.5


def test_it_learns_once_a_fresh_training_rollout_and_never_elsewhere() -> None:
    seen: list[float] = []
    module = constrained()
    learn = module.reward.learn

    def watched(means: Any) -> Any:
        seen.append(float(means["constraint_value"]))
        return learn(means)

    module.reward.learn = watched
    batches = DataLoader([torch.zeros(16)] * 4, batch_size=None)
    sampler = TrajectorySampler(steps=5, samples_per_condition=2, rollout_every=2)
    run = trainer([sampler], max_steps=4, val_check_interval=1)
    run.fit(module, batches, DataLoader([torch.zeros(8)], batch_size=None))
    assert len(seen) == 2
    before = float(module.reward.multiplier)
    run.validate(module, DataLoader([torch.zeros(8)], batch_size=None), verbose=False)
    run.predict(module, DataLoader([torch.zeros(8)], batch_size=None))
    sampler.rollout(module, torch.zeros(8), stream="report", number=0)
    assert len(seen) == 2 and float(module.reward.multiplier) == before
    accumulated = constrained()
    fit(accumulated, TrajectorySampler(steps=5, samples_per_condition=2), [torch.zeros(16)] * 2, max_steps=1,
        accumulate_grad_batches=2)  # fmt: skip
    assert abs(float(accumulated.reward.multiplier) - 0.04) < 0.05


def test_its_mean_is_of_good_samples_alone() -> None:
    reward = Constraint(SumReward(), Length(), at_least=10.0, step=1.0)
    module = AdjointMatchingTask(PromptedNet(RectifiedFlow()), reward, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    sampler = TrajectorySampler(steps=3, samples_per_condition=2, on_bad_reward="skip")
    with pytest.warns(UserWarning, match="'bad'; they are left out"):
        path = fit_loudly(module, sampler, [["one", "bad", "seven"]])
    assert path.weight.tolist() == [1, 1, 0, 0, 1, 1] and path.parts is None
    expected = 4 + 0.01 * float(path.end[path.weight > 0].sum(1).mean())
    assert float(reward.multiplier) == pytest.approx(10 - expected, rel=1e-5)
    assert float(module.trainer.callback_metrics["train/bad_samples"]) == 2


def fit_loudly(module: Any, sampler: TrajectorySampler, batches: list[Any]) -> Any:
    trainer([sampler], max_steps=len(batches)).fit(module, DataLoader(batches, batch_size=None))
    return sampler.trajectory


def test_the_multiplier_is_in_the_checkpoint_and_resumes_exactly(tmp_path: Path) -> None:
    batches = [torch.zeros(32)] * 6
    straight, first, resumed = constrained(), constrained(), constrained()
    fit(straight, TrajectorySampler(steps=5, samples_per_condition=1), batches)
    keep = ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=3)
    for module, steps, path in ((first, 3, None), (resumed, 6, tmp_path / "a.ckpt")):
        sampler = TrajectorySampler(steps=5, samples_per_condition=1)
        run = trainer([sampler, keep], max_steps=steps, enable_checkpointing=True)
        run.fit(module, Loader(dataset=batches, batch_size=None), ckpt_path=path)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved["reward.multiplier"].dtype == torch.float64 and 0 < float(first.reward.multiplier) < 0.3
    assert float(resumed.reward.multiplier) == float(straight.reward.multiplier) != float(first.reward.multiplier)
    assert torch.equal(resumed.predictor.control, straight.predictor.control)


def test_base_and_tuned_are_reported_by_one_and_the_same_reward(tmp_path: Path) -> None:
    module = constrained(step=1.0, start=0.0)
    report, sampler = TiltReport(base_samples=200, tuned_samples=100), TrajectorySampler(steps=5, seed=1)
    run = trainer([sampler, report], max_steps=3, default_root_dir=tmp_path)
    run.fit(module, datamodule=DrawsDataModule(samples=16, batches=3, val_samples=16))
    base = sampler.rollout(
        module, torch.zeros(1), stream="report", number=0, base=True, samples_per_condition=200, world=(1, 0)
    )
    assert float(module.reward.multiplier) > 0.1
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["reward_base"]["mean"] == pytest.approx(float(base.reward.mean()), rel=1e-6)


def test_combinations_nest_on_the_command_line(tmp_path: Path) -> None:
    """As a list in a YAML, with the rewards by their short names."""
    reward = {
        "class_path": "WeightedSum",
        "init_args": {
            "rewards": [
                {"class_path": "Constraint", "init_args": {
                    "reward": "Ink", "constraint": "DigitClassifier", "at_least": -0.1, "step": 0.5}},
                {"class_path": "Smoothed", "init_args": {
                    "reward": {"class_path": "Clamped", "init_args": {"reward": "Ink", "max": 0.3}}, "shift": 1}},
            ],
            "weights": [1.0, 0.5],
        },
    }  # fmt: skip
    keep = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "every_n_train_steps": 1}}
    args = overlay(DIGITS, tmp_path / "run", model={"init_args": {"reward": reward}}, trainer={"callbacks": [keep]})
    result = tilt("fit", *args)
    assert result.status == 0, result.err
    metrics = read_metrics(tmp_path / "run/metrics.csv")
    below = "train/reward_Constraint/constraint_"
    value, before, after = metrics[below + "value"][0], *metrics[below + "multiplier"]
    assert before == 0 and after == pytest.approx(0.5 * max(0.0, -0.1 - value), rel=1e-5)
    objective = metrics[below + "objective"][0] + 0.5 * metrics["train/reward_Smoothed"][0]
    assert metrics["train/reward"][0] == pytest.approx(objective, rel=1e-5)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    rewards = {name for name in saved["state_dict"] if name.startswith("reward")}
    assert rewards == {"reward.parts.0.multiplier"}
    wrong = tilt("fit", "--config", DIGITS, "--model.reward", "WeightedSum", "--model.reward.rewards", "[Ink, Inc]")
    assert wrong.status == 2 and "Inc" in wrong.errors[0]


def test_parts_move_with_the_combination() -> None:
    total = WeightedSum([DigitClassifier(), Constraint(Ink(), Ink(), 0.5, start=1.0)])
    assert list(total.parameters()) == []
    total.to("meta")
    part: Any = total.parts[0]
    assert {p.device.type for p in part.network.module.parameters()} == {"meta"}
    assert total.parts[1].multiplier.device.type == "meta"
