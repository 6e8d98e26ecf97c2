"""The report of a run: its numbers against naive sums and closed forms, its seeds, its files."""

import json
import math
from pathlib import Path
from typing import Any

import lightning
import oracles
import pytest
import torch
from matplotlib.image import imread
from quiet import FORKED
from torch import Tensor
from toys import AffineControl, PromptedNet, SumReward, gaussian, trainer

from lightning_tilt.callbacks import TiltReport, TrajectorySampler
from lightning_tilt.data import DrawsDataModule, PromptDataModule
from lightning_tilt.interfaces import ImageEmbedding, Prompts, Reward
from lightning_tilt.loggers import RunLogger, read_metrics
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards import QuadraticReward
from lightning_tilt.tasks import AdjointMatchingTask

MU, V, LAM, C, STEPS = 0.3, 0.2, 2.0, 1.0, 8
CHAIN = oracles.ddim_chain(oracles.flow_schedule(STEPS), MU, V)
TILT = oracles.Tilt(lam=LAM, q=1.0, c=C)
WORDS = ["one", "seven", "eleven"]
PICTURES = ("before_after.png", "curves.png", "reward_histogram.png")


class Bright(SumReward):
    """A judge."""


class Threefold(ImageEmbedding):
    """A space in which distances are three times as long."""

    def embed_images(self, images: Tensor) -> Tensor:
        return -3 * images


class Images(PromptedNet):
    """States of two numbers, decoded to images of 3 x 4 x 4 that show them."""

    def decode(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)[:, :1, None, None] * torch.linspace(0, 1, 48, dtype=x.dtype).reshape(3, 4, 4)


def run(
    folder: Path, predictor: Any, reward: Reward, data: Any, report: TiltReport, lr: float = 0.0, **kwargs: Any
) -> tuple[AdjointMatchingTask, dict[str, Any]]:
    """A fit of three updates with a report in `folder`."""
    torch.manual_seed(2)
    task = AdjointMatchingTask(
        predictor=predictor, reward=reward, lam=LAM, checkpoint=False, optimizer=lambda p: torch.optim.SGD(p, lr=lr)
    ).double()
    sampler = TrajectorySampler(**({"steps": STEPS, "samples_per_condition": 1, "seed": 3} | kwargs))
    fitter = trainer(
        [sampler, report], max_steps=3, default_root_dir=folder, logger=RunLogger(folder), log_every_n_steps=1,
        limit_val_batches=0,
    )  # fmt: skip
    fitter.fit(task, datamodule=data)
    return task, json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="session")
def density(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdjointMatchingTask, dict[str, Any], Path]:
    """A Gaussian half way to its best control."""
    folder = tmp_path_factory.mktemp("density")
    control = [(g / 2, h / 2) for g, h in oracles.best_control(CHAIN, TILT)]
    predictor = AffineControl(gaussian(MU, V, RectifiedFlow()), STEPS, control)
    report = TiltReport(base_samples=20_000, tuned_samples=10_000, micro_batch=3000, density="gaussian")
    data = DrawsDataModule(samples=4, batches=3, val_samples=8)
    task, written = run(folder, predictor, QuadraticReward([[1.0]], [C]), data, report)
    return task, written, folder


@pytest.fixture(scope="session")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdjointMatchingTask, dict[str, Any], Path]:
    """Images of three prompts, with a judge; the model stays the base."""
    folder = tmp_path_factory.mktemp("prompted")
    report = TiltReport(base_samples=12, tuned_samples=12, micro_batch=5, judges={"bright": Bright()}, shown=3)
    data = PromptDataModule(WORDS, batch_size=2)
    return *run(folder, images(), SumReward(), data, report), folder


def images() -> Images:
    torch.manual_seed(7)
    return Images(RectifiedFlow())


def rewards(task: AdjointMatchingTask, prompt: str | None, number: int, n: int, base: bool) -> list[float]:
    """The rewards of the report's own samples, drawn again."""
    batch: Any = torch.zeros(1) if prompt is None else [prompt]
    path = task.sampler.rollout(task, batch, stream="report", number=number, base=base, samples_per_condition=n)
    return path.reward.tolist()  # type: ignore[no-any-return]


def reweighted(values: list[float]) -> tuple[float, float]:
    """sum exp(lam r) r / sum exp(lam r) and its standard error, jackknifed."""
    w = [math.exp(LAM * r) for r in values]
    n, total = len(w), sum(w)
    whole = sum(a * r for a, r in zip(w, values, strict=True)) / total
    # Without sample i; where it has nearly all the weight, a share of 1/n is left for the others.
    left_out = [whole - a / total * (r - whole) / max(1 - a / total, 1 / n) for a, r in zip(w, values, strict=True)]
    centre = sum(left_out) / n
    return n * whole - (n - 1) * centre, math.sqrt((n - 1) / n * sum((e - centre) ** 2 for e in left_out))


def close(estimate: dict[str, float], true: float, errors: float = 3.0) -> bool:
    return abs(estimate["mean"] - true) < errors * estimate["se"]


def test_exact_reward_is_a_naive_reweighting(density: Any, prompted: Any) -> None:
    task, report, _ = density
    centre, se = reweighted(rewards(task, None, 0, 20_000, base=True))
    assert (report["reward_exact"]["mean"], report["reward_exact"]["se"]) == pytest.approx((centre, se), rel=1e-9)
    task, report, _ = prompted
    each = [reweighted(rewards(task, word, i, 12, base=True)) for i, word in enumerate(WORDS)]
    assert report["reward_exact"]["mean"] == pytest.approx(sum(m for m, _ in each) / 3, rel=1e-9)
    assert report["reward_exact"]["se"] == pytest.approx(math.sqrt(sum(se**2 for _, se in each)) / 3, rel=1e-9)
    assert report["reward_exact"]["n"] == 36


def test_numbers_are_those_of_the_chains_own_law(density: Any) -> None:
    """Within 3 standard errors of closed forms: base, exact tilt, and log Z by both ways."""
    _, report, _ = density

    def reward(law: tuple[float, float]) -> float:
        return -((law[0] - C) ** 2 + law[1]) / 2

    assert close(report["reward_base"], reward(oracles.laws(CHAIN)[-1]))
    assert close(report["reward_exact"], reward(oracles.tilted_end_law(CHAIN, TILT)))
    half = oracles.controlled(CHAIN, [(g / 2, h / 2) for g, h in oracles.best_control(CHAIN, TILT)])
    assert close(report["reward_tuned"], reward(oracles.laws(half)[-1]))
    assert close(report["log_z"], oracles.log_z(CHAIN, TILT))
    assert close(report["log_z_base"], oracles.log_z(CHAIN, TILT))
    # Half of the control is worth more than none.
    assert report["log_z"]["se"] / report["log_z_base"]["se"] < 1 and report["ess"] > report["reward_exact"]["ess"]
    way = report["reward_exact"]["mean"] - report["reward_base"]["mean"]
    assert report["way"] == pytest.approx((report["reward_tuned"]["mean"] - report["reward_base"]["mean"]) / way)


def test_keys_and_counts(density: Any, prompted: Any) -> None:
    for _, report, _ in (density, prompted):
        for key in ("reward_base", "reward_tuned", "reward_exact", "log_z"):
            assert {"mean", "se", "n"} <= set(report[key])
        assert set(report["evaluations"]) == {"forward", "vjp", "backward", "pairs", "reward", "forwards_per_pair"}
        assert {"diversity_base", "diversity_tuned", "ess", "seconds", "versions", "seed"} <= set(report)
        assert (report["seed"], report["updates"], report["lam"]) == (3, 3, LAM)
        assert {"python", "torch", "lightning"} <= set(report["versions"]) and report["seconds"] > 0
    _, report, _ = density
    # Three rollouts of 4 paths, a sweep and a loss over 7 steps of them: the report's own samples are not training's.
    forward = 3 * 4 * (STEPS + STEPS + (STEPS - 1))
    assert report["evaluations"]["forward"] == forward and report["evaluations"]["pairs"] == 3 * 4 * (STEPS - 1)
    assert report["evaluations"]["reward"] == report["energy_evaluations"] == 3 * 4
    assert report["density"] == "gaussian" and report["reward"] == "QuadraticReward"
    assert report["loss"] == "adjoint_matching" and report["reward_base"]["n"] == 20_000
    _, report, _ = prompted
    assert {"bright_base", "bright_tuned", "bright_base_se", "bright_tuned_se"} <= set(report)
    assert "density" not in report
    # 36 samples are too few for intervals of 95 %.
    assert len(report["warnings"]) == 2 and all("36 samples" in text for text in report["warnings"])


def test_base_and_tuned_come_from_the_same_noise(prompted: Any) -> None:
    """An untouched model is the base: every number agrees, and log w = lam r."""
    _, report, folder = prompted
    assert report["reward_tuned"] == report["reward_base"]
    assert report["bright_tuned"] == report["bright_base"] == pytest.approx(report["reward_base"]["mean"])
    assert report["diversity_tuned"] == report["diversity_base"] > 0
    assert report["way"] == 0 and report["ess"] == pytest.approx(report["reward_exact"]["ess"])
    assert report["log_z"] == pytest.approx(report["log_z_base"])
    picture = imread(folder / "before_after.png")
    assert picture.shape[1] > picture.shape[0]


def test_diversity_is_measured_in_the_space_of_the_embedding(prompted: Any, tmp_path: Path) -> None:
    data = PromptDataModule(WORDS, batch_size=2)
    report = TiltReport(base_samples=12, tuned_samples=4, embedding=Threefold())
    _, written = run(tmp_path, images(), SumReward(), data, report)
    assert written["diversity_base"] == pytest.approx(3 * prompted[1]["diversity_base"], rel=1e-6)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_something(name: str, density: Any, prompted: Any) -> None:
    for _, _, folder in (density, prompted):
        pixels = torch.from_numpy(imread(folder / name)).flatten(0, 1)
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and len(pixels) > 50_000
        assert len(pixels.unique(dim=0)) > 20


def test_report_does_not_disturb_training(tmp_path: Path) -> None:
    class Nothing(TiltReport):
        def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None: ...
        def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
            (tmp_path / "without/report.json").write_text("{}")

    trained = []
    for name, kind in (("with", TiltReport), ("without", Nothing)):
        data = PromptDataModule(WORDS, batch_size=2)
        report = kind(base_samples=4, tuned_samples=3)
        task, _ = run(tmp_path / name, images(), SumReward(), data, report, lr=0.05)
        trained.append({n: p.detach().clone() for n, p in task.predictor.named_parameters()})
    assert all(torch.equal(value, trained[1][n]) for n, value in trained[0].items())
    logged = [read_metrics(tmp_path / name / "metrics.csv") for name in ("with", "without")]
    with_it, without = ({k: v for k, v in found.items() if "seconds" not in k} for found in logged)
    assert with_it == without


class Sometimes(SumReward):
    """Not finite where the first coordinate is negative."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return torch.where(images[:, 0] < 0, torch.nan, super().score(images, prompts))


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_skipped_samples_are_left_out_of_every_mean(tmp_path: Path) -> None:
    data = PromptDataModule(WORDS, batch_size=2)
    report = TiltReport(base_samples=20, tuned_samples=20)
    task, written = run(tmp_path, PromptedNet(RectifiedFlow()), Sometimes(), data, report, on_bad_reward="skip")
    task.reward = SumReward()
    total = 0
    means = []
    for i, word in enumerate(WORDS):
        path = task.sampler.rollout(task, [word], stream="report", number=i, base=True, samples_per_condition=20)
        good = path.reward[path.end[:, 0] >= 0]
        total += len(good)
        means.append(float(good.mean()))
    assert 0 < total < 60
    assert written["reward_base"]["n"] == total
    assert written["reward_base"]["mean"] == pytest.approx(sum(means) / 3, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_validation_leaves_skipped_samples_out_too() -> None:
    sampler = TrajectorySampler(steps=STEPS, samples_per_condition=20, seed=3, on_bad_reward="skip")
    task = AdjointMatchingTask(predictor=PromptedNet(RectifiedFlow()), reward=Sometimes())
    fitter = trainer([sampler])
    (found,) = fitter.validate(task, datamodule=PromptDataModule(["one"]), verbose=False)
    task.reward = SumReward()
    path = sampler.rollout(task, ["one"], stream="validate", number=0)
    good = path.end[:, 0] >= 0
    assert 0 < int(good.sum()) < 20
    assert found["val/reward"] == pytest.approx(float(path.reward[good].mean()))
    assert found["val/diversity"] == pytest.approx(float(torch.pdist(path.end[good]).mean()))


class Constant(SumReward):
    """Nothing to gain."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return 0 * images.flatten(1).sum(1) + 1


def test_reward_without_a_way_to_go(tmp_path: Path) -> None:
    data = PromptDataModule(WORDS, batch_size=2)
    report = TiltReport(base_samples=8, tuned_samples=8)
    _, written = run(tmp_path, PromptedNet(RectifiedFlow()), Constant(), data, report)
    assert written["way"] is None and written["reward_exact"]["mean"] == 1 and written["ess"] == pytest.approx(1)
    assert all((tmp_path / name).is_file() for name in PICTURES)


def test_no_datamodule_names_the_mend(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    task = AdjointMatchingTask(predictor=PromptedNet(RectifiedFlow()), reward=SumReward())
    fitter = trainer([TrajectorySampler(steps=2), TiltReport()], default_root_dir=tmp_path)
    with pytest.raises(TypeError, match=r"datamodule=PromptDataModule"):
        fitter.fit(task, DataLoader([["one"]], batch_size=None))


def test_prompts_of_its_own_serve_a_plain_loader(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    (tmp_path / "prompts.txt").write_text("one\n\nseven\n")
    found = []
    for prompts in (["one", "seven"], str(tmp_path / "prompts.txt")):
        task = AdjointMatchingTask(predictor=images(), reward=SumReward(), checkpoint=False)
        report = TiltReport(base_samples=5, tuned_samples=4, prompts=prompts)
        folder = tmp_path / type(prompts).__name__
        sampler = TrajectorySampler(steps=2, samples_per_condition=1, seed=1)
        trainer([sampler, report], default_root_dir=folder).fit(task, DataLoader([["one"]], batch_size=None))
        found.append(json.loads((folder / "report.json").read_text()))
    assert found[0]["reward_base"]["n"] == 10 and found[0]["reward_base"] == found[1]["reward_base"]


class Counted(SumReward):
    """Remembers how many images it was shown at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        assert prompts is not None and len(prompts) == len(images)
        self.sizes.append(len(images))
        return super().score(images, prompts)


class CountedEmbedding(Threefold):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def embed_images(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return super().embed_images(images)


def test_micro_batches_bound_what_is_judged_at_once(prompted: Any, tmp_path: Path) -> None:
    judge, embedding = Counted(), CountedEmbedding()
    report = TiltReport(
        base_samples=12, tuned_samples=12, micro_batch=5, judges={"bright": judge}, embedding=embedding,
        diversity_samples=7,
    )  # fmt: skip
    _, written = run(tmp_path, images(), SumReward(), PromptDataModule(WORDS, batch_size=2), report)
    assert judge.sizes == [5, 5, 2] * 6 and embedding.sizes == [5, 2] * 6
    assert written["bright_base"] == pytest.approx(prompted[1]["bright_base"], rel=1e-12)


class Never(SumReward):
    """Nothing finite for one prompt."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        assert prompts is not None
        return torch.where(torch.tensor([p == "seven" for p in prompts]), torch.nan, super().score(images, prompts))


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_a_prompt_without_a_good_sample_is_named(tmp_path: Path) -> None:
    data = PromptDataModule(WORDS, batch_size=2)
    with pytest.raises(FloatingPointError, match=r"not one of 6 samples of the base for 'seven' has a finite reward"):
        run(tmp_path, images(), Never(), data, TiltReport(base_samples=6), on_bad_reward="skip")


class SometimesBright(SumReward):
    """Not finite for bright images."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        bright = images.flatten(1).amax(1)
        return torch.where(bright > 0.5, torch.nan, bright)


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_pictures_stand_by_their_noise_where_samples_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("lightning_tilt.callbacks.report.before_after", lambda *args: drawn.append(args))
    report = TiltReport(base_samples=12, tuned_samples=9, micro_batch=2, shown=5)
    data = PromptDataModule(WORDS, batch_size=2)
    task, _ = run(tmp_path, images(), SometimesBright(), data, report, on_bad_reward="skip")
    ((_, prompts, base, tuned),) = drawn
    assert prompts == WORDS and all(torch.equal(b, t) and len(b) == 5 for b, t in zip(base, tuned, strict=True))
    task.reward = SumReward()
    blank = 0
    for i, word in enumerate(WORDS):
        path = task.sampler.rollout(task, [word], stream="report", number=i, base=True, samples_per_condition=12)
        decoded = task.predictor.decode(path.end[:5]).float()
        bad = decoded.flatten(1).amax(1) > 0.5
        blank += int(bad.sum())
        assert torch.equal(base[i], torch.where(bad[:, None, None, None], 1.0, decoded))
    assert 0 < blank < 15


@FORKED
def test_two_processes_report_what_one_does(tmp_path: Path) -> None:
    """The prompts are dealt out; the model does not move, so every number but times and counts is the same."""
    reports = []
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        torch.manual_seed(2)
        task = AdjointMatchingTask(
            predictor=images(), reward=SumReward(), checkpoint=False, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
        )
        callbacks = [TrajectorySampler(steps=3, samples_per_condition=1, seed=3), TiltReport(12, 7, micro_batch=5)]
        fitter = trainer(callbacks, default_root_dir=tmp_path / name, limit_val_batches=0, max_steps=1, **options)
        fitter.fit(task, datamodule=PromptDataModule(WORDS, batch_size=1))
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    one, two = reports
    assert two["evaluations"]["pairs"] == 2 * one["evaluations"]["pairs"] > 0
    for key in set(one) - {"seconds", "seconds_by_part", "evaluations", "versions"}:
        assert two[key] == (pytest.approx(one[key], rel=1e-6) if isinstance(one[key], (float, dict)) else one[key]), key
