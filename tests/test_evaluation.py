"""Base against tuned model on a test's prompts: the same noise, named failures, files that carry any prompt."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning
import oracles
import pytest
import torch
from command import DIGITS, TOY, overlay, tilt
from matplotlib.image import imread
from quiet import FORKED
from test_report import CHAIN, STEPS, TILT, Bright, Images, Threefold
from torch import Tensor
from torch.utils.data import DataLoader
from toys import AffineControl, SumReward, gaussian, trainer

from lightning_tilt import AdjointMatching, TiltModule
from lightning_tilt.callbacks import Evaluation, TiltReport, TrajectorySampler
from lightning_tilt.data import DrawsDataModule, PromptDataModule
from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards import QuadraticReward
from lightning_tilt.tasks import AdjointMatchingTask

WORDS = ["one", "seven", "eleven"]
FILES = {"evaluation.json", "evaluation.csv", "evaluation_samples.csv", "evaluation.html", "evaluation.png"}
NASTY = [
    "<script>alert('x')</script>", '"><img src=x onerror=alert(1)>', "</bdi></body>", "a, b; \"c\" 'd'\nsecond line",
    "$\\frac{$ & $x^2$", "../../etc/passwd", "/tmp/evil.png", "= 1 + 1", "%s {x} \\N{DASH}", "数字の七 🎲 \u202egnirts",
    "x" * 5000,
]  # fmt: skip


def images(kick: float = 0.0) -> Images:
    torch.manual_seed(7)
    predictor = Images(RectifiedFlow())
    if kick:
        torch.nn.init.normal_(predictor.network[-1].weight, std=kick)
    return predictor


def run(
    folder: Path, predictor: Any, evaluation: Evaluation, data: Any, reward: Reward | None = None, **kwargs: Any
) -> dict[str, Any]:
    """A test in `folder`; returns its report, the samples under "rows", what was logged under "logged"."""
    task = AdjointMatchingTask(predictor=predictor, reward=reward or SumReward(), lam=2.0)
    sampler = TrajectorySampler(steps=STEPS, samples_per_condition=1, seed=3)
    tester = trainer([sampler, evaluation], default_root_dir=folder, **kwargs)
    (logged,) = tester.test(task, datamodule=data, verbose=False)
    report = json.loads((folder / "evaluation.json").read_text())
    with (folder / "evaluation_samples.csv").open(newline="", encoding="utf-8") as file:
        return report | {"rows": list(csv.DictReader(file)), "logged": logged}


def test_an_untouched_model_is_its_base(tmp_path: Path) -> None:
    evaluation = Evaluation(samples=5, rewards={"bright": Bright, "again": Bright()}, embedding=Threefold)
    report = run(tmp_path, images(), evaluation, PromptDataModule(WORDS, batch_size=2))
    for row in (*report["rewards"].values(), report["diversity"]):
        assert row["base"] == row["tuned"] and row["difference"]["mean"] == row["difference"]["se"] == 0
    assert list(report["rewards"]) == ["SumReward", "bright", "again"] and report["trained_reward"] == "SumReward"
    assert report["rewards"]["bright"] == report["rewards"]["again"]
    assert abs(report["distance"]["path_kl"]["mean"]) < 1e-9 and report["distance"]["same_noise"]["mean"] == 0
    assert "Threefold" in report["diversity"]["what"] and "Threefold" in report["distance"]["same_noise"]["what"]
    assert (report["prompts"], report["samples"], report["seed"], report["checkpoint"]) == (3, 15, 3, None)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    base = report["rewards"]["SumReward"]["tuned"]
    assert report["logged"]["test/reward"] == pytest.approx(base["mean"], rel=1e-6)
    assert report["logged"]["test/reward_se"] == pytest.approx(base["se"], rel=1e-6)
    assert {"test/reward_gain", "test/bright", "test/diversity"} <= set(report["logged"])


def test_numbers_are_those_of_the_samples(tmp_path: Path) -> None:
    """Sums by hand; a prompt's noise does not depend on its neighbours, their order or its repeats."""
    evaluation = Evaluation(samples=4, rewards={"bright": Bright}, micro_batch=3)
    report = run(tmp_path / "a", images(0.5), evaluation, PromptDataModule(WORDS, batch_size=2))
    other = run(
        tmp_path / "b",
        images(0.5),
        Evaluation(samples=4),
        PromptDataModule(["new", "seven", "one", "seven"], batch_size=1),
    )
    assert other["prompts"] == 3 and [row["prompt"] for row in other["rows"][::4]] == ["new", "seven", "one"]

    def of(found: dict[str, Any], prompt: str, column: str) -> list[float]:
        return [float(row[column]) for row in found["rows"] if row["prompt"] == prompt]

    for column in ("SumReward_base", "SumReward_tuned", "path_kl", "distance"):
        assert of(report, "seven", column) == pytest.approx(of(other, "seven", column), rel=1e-5)
    assert report["rewards"]["SumReward"]["tuned"] == pytest.approx(report["rewards"]["bright"]["tuned"])
    values = [[of(report, w, f"SumReward_{k}") for w in WORDS] for k in ("base", "tuned")]
    gain = [sum(t - b for b, t in zip(*pair, strict=True)) / 4 for pair in zip(*values, strict=True)]
    difference = report["rewards"]["SumReward"]["difference"]
    assert difference["mean"] == pytest.approx(sum(gain) / 3, rel=1e-9)
    assert difference["se"] == pytest.approx(float(torch.tensor(gain).double().std()) / math.sqrt(3), rel=1e-5)
    assert report["distance"]["path_kl"]["mean"] > 0 and report["distance"]["same_noise"]["mean"] > 0


def test_path_kl_is_that_of_known_controls(tmp_path: Path) -> None:
    """u_k(x) = g_k x + h_k: half its square along each path, and no difference of pictures for a density."""
    control = [(g / 2, h / 2) for g, h in oracles.best_control(CHAIN, TILT)]
    predictor = AffineControl(gaussian(0.3, 0.2, RectifiedFlow()), STEPS, control)
    seen: list[Any] = []

    class Keep(TrajectorySampler):
        def rollout(self, *args: Any, **kwargs: Any) -> Any:
            path = super().rollout(*args, **kwargs)
            seen.append(path)
            return path

    task = AdjointMatchingTask(predictor=predictor, reward=QuadraticReward([[1.0]], [1.0]), lam=2.0).double()
    tester = trainer([Keep(steps=STEPS, seed=3), Evaluation()], default_root_dir=tmp_path)
    tester.test(task, datamodule=DrawsDataModule(samples=50, val_samples=100), verbose=False)
    tuned = [path for path in seen[1::2]]
    kl = torch.cat([
        sum((g * path.states[k, :, 0] + h) ** 2 / 2 for k, (g, h) in enumerate(control[: STEPS - 1])) for path in tuned
    ])  # fmt: skip
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["distance"]["path_kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-6)
    assert report["distance"]["path_kl"]["se"] == pytest.approx(float(kl.std()) / 10, rel=1e-6)
    moved = torch.cat([(b.end - t.end).abs()[:, 0] for b, t in zip(seen[::2], tuned, strict=True)])
    assert report["distance"]["same_noise"]["mean"] == pytest.approx(float(moved.mean()), rel=1e-6)
    assert (
        report["prompts"] == 0 and report["samples"] == 100 and report["rewards"]["QuadraticReward"]["base"]["n"] == 100
    )
    assert {p.name for p in tmp_path.iterdir()} == FILES - {"evaluation.png"}


class Sometimes(SumReward):
    """Not finite where the first pixel is dark."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return torch.where(images[:, 1, 0, 0] < 0.15, torch.nan, super().score(images, prompts))


class Picky(SumReward):
    """Has nothing to say of one prompt."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        if "seven" in (prompts or []) or len((prompts or [""])[0]) > 1000:
            raise ValueError("sevens are beyond me")
        return super().score(images, prompts)


@pytest.mark.parametrize("trained", [True, False])
def test_failures_of_rewards_are_named_and_the_rest_goes_on(trained: bool, tmp_path: Path) -> None:
    rewards: dict[str, Any] = {"picky": Picky} if trained else {"picky": Picky, "Sometimes": Sometimes}
    reward = Sometimes() if trained else SumReward()
    evaluation = Evaluation(samples=8, rewards=rewards)
    report = run(tmp_path, images(), evaluation, PromptDataModule(WORDS, batch_size=2), reward)
    told = "\n".join(report["warnings"])
    assert "picky has no value for 'seven': sevens are beyond me" in told
    assert re.search(r"Sometimes: \d+ of 24 samples of the base have no finite value, the first of '\w+'", told)
    some = report["rewards"]["Sometimes"]["base"]
    assert 0 < some["n"] < 24 and math.isfinite(some["mean"])
    assert report["rewards"]["picky"]["base"]["n"] == (
        24 - 8 if not trained else report["rewards"]["picky"]["tuned"]["n"]
    )
    blank = [row for row in report["rows"] if row["Sometimes_base"] == ""]
    assert len(blank) == 24 - some["n"]
    if not trained:  # what is not trained on spoils no other figure
        assert report["rewards"]["SumReward"]["base"]["n"] == 24


class Lumped(SumReward):
    """One number for the whole batch, which would pass for everybody's, or several for each sample."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return {"mean": images.mean(), "one": images.mean()[None], "columns": images.flatten(1)}[self.way]


@pytest.mark.parametrize(("way", "shape"), [("mean", r"\(\)"), ("one", r"\(1,\)"), ("columns", r"\(4, \d+\)")])
def test_further_rewards_give_one_number_a_sample(way: str, shape: str, tmp_path: Path) -> None:
    told = rf"Lumped\.score returned shape {shape} for 4 samples; it should be \(4,\): one number a sample"
    data = PromptDataModule(WORDS, batch_size=2)
    with pytest.raises(ValueError, match=told):
        run(tmp_path, images(), Evaluation(samples=4, rewards={"lumped": lambda: Lumped(way)}), data)
    report = TiltReport(base_samples=4, tuned_samples=4, judges={"lumped": Lumped(way)})
    task = AdjointMatchingTask(predictor=images(), reward=SumReward())
    fitter = trainer([TrajectorySampler(steps=STEPS, seed=3), report], default_root_dir=tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=told):
        fitter.fit(task, datamodule=data)
    assert list(tmp_path.iterdir()) == []


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.prompts: list[str] = []
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "bdi":
            self.prompts.append("")
            self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "bdi":
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in:
            self.prompts[-1] += data


def test_any_prompt_is_text_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    evaluation = Evaluation(samples=2, rewards={"picky": Picky}, shown=1, shown_prompts=50)
    report = run(folder, images(0.5), evaluation, PromptDataModule([*NASTY, "seven"], batch_size=4))
    # In the table for spreadsheets what looks like a formula is marked as a text.
    told = [f"'{prompt}" if prompt.startswith("=") else prompt for prompt in NASTY]
    assert [row["prompt"] for row in report["rows"][::2]] == [*told, "seven"]
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        f"deep/run/{name}" for name in FILES
    }
    assert max(map(len, report["warnings"])) < 300  # which name the longest prompt too
    text = (folder / "evaluation.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.prompts == [*NASTY, "seven"]
    known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "table", "tr", "th", "td", "label",
             "input", "section", "bdi", "figure", "img", "figcaption", "p", "script"}  # fmt: skip
    assert {tag for tag, _ in page.tags} == known
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 2 * 12 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not any(name.startswith("on") or name == "href" for _, attrs in page.tags for name in attrs)
    assert "://" not in text and len([tag for tag, _ in page.tags if tag == "script"]) == 1
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert imread(folder / "evaluation.png").shape[0] > 500


def test_curves_of_the_fit_stand_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,train/reward,train/loss\n0,1.0,2.0\n1,2.0,1.0\n,,\n".replace(",,", "2,,")
    )
    (tmp_path / "report.json").write_text("not JSON")
    run(tmp_path, images(), Evaluation(samples=2), PromptDataModule(WORDS))
    assert 'class="curves"' in (tmp_path / "evaluation.html").read_text()


def test_earlier_evaluations_are_kept(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path, images(), Evaluation(samples=2), PromptDataModule(WORDS))
    kept = {f"{Path(name).stem}.1{Path(name).suffix}" for name in FILES}
    assert {p.name for p in tmp_path.iterdir()} == FILES | kept


def test_only_the_first_prompts_are_pictured(tmp_path: Path) -> None:
    evaluation = Evaluation(samples=3, shown=2, shown_prompts=2)
    run(tmp_path, images(), evaluation, PromptDataModule(WORDS, batch_size=1))
    page = Page((tmp_path / "evaluation.html").read_text())
    assert page.prompts == WORDS[:2] and len([t for t, _ in page.tags if t == "img"]) == 8


def test_a_host_of_ones_own_is_served(tmp_path: Path) -> None:
    class Existing(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.predictor, self.reward = images(), SumReward()
            self.process = self.predictor.process

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mine", float(len(batch)), batch_size=1)

    class Mine(AdjointMatching, Existing): ...

    tester = trainer([TrajectorySampler(steps=3, seed=1), Evaluation(samples=2)], default_root_dir=tmp_path)
    (logged,) = tester.test(Mine(), DataLoader([["one", "two"], ["three"]], batch_size=None), verbose=False)
    assert logged["mine"] == 1.5 and "test/reward" in logged
    assert json.loads((tmp_path / "evaluation.json").read_text())["prompts"] == 3


def test_mistakes_are_named(tmp_path: Path) -> None:
    data = PromptDataModule(WORDS)
    with pytest.raises(ValueError, match=r"the trained reward is called 'SumReward'"):
        run(tmp_path, images(), Evaluation(rewards={"SumReward": Bright}), data)
    with pytest.raises(ValueError, match=r"a figure of the report is called 'diversity'"):
        run(tmp_path, images(), Evaluation(rewards={"diversity": Bright}), data)
    with pytest.raises(TypeError, match=r"'bright' makes a int, which is no Reward"):
        run(tmp_path, images(), Evaluation(rewards={"bright": int}), data)
    with pytest.raises(TypeError, match=r"int has no embed_images"):
        run(tmp_path, images(), Evaluation(embedding=int), data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"evaluation\.samples must be at least 1, not 0"):
        Evaluation(samples=0)
    with pytest.raises(ValueError, match=r"limit_test_batches: 0 leaves nothing to evaluate"):
        run(tmp_path, images(), Evaluation(), data, limit_test_batches=0)
    module = TiltModule(images(), SumReward())
    tester = trainer([TrajectorySampler(steps=2), Evaluation()], default_root_dir=tmp_path)
    with pytest.raises(TypeError, match=r"serves the host of a loss, and TiltModule is none"):
        tester.test(module, datamodule=data, verbose=False)
    assert list(tmp_path.iterdir()) == []


@FORKED
def test_two_processes_evaluate_what_one_does(tmp_path: Path) -> None:
    """Five prompts on two processes, the last of them dealt out twice; the pictures are of the first three."""
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        evaluation = Evaluation(samples=3, rewards={"bright": Bright}, shown_prompts=3)
        tester = trainer([TrajectorySampler(steps=3, seed=3), evaluation], default_root_dir=tmp_path / name, **options)
        task = AdjointMatchingTask(predictor=images(0.5), reward=SumReward())
        tester.test(task, datamodule=PromptDataModule([*WORDS, "four", "five"], batch_size=2), verbose=False)
    one, two = ((tmp_path / name / "evaluation.json").read_text() for name in ("one", "two"))
    assert json.loads(one)["prompts"] == 5
    for old, new in zip(re.findall(r"[-\d.e]+", one), re.findall(r"[-\d.e]+", two), strict=True):
        assert old == new or float(new) == pytest.approx(float(old), rel=1e-5, abs=1e-9)
    pages = [Page((tmp_path / name / "evaluation.html").read_text()).prompts for name in ("one", "two")]
    assert pages == [WORDS, WORDS]


def test_the_command_of_a_density(tmp_path: Path) -> None:
    result = tilt("test", *overlay(TOY, tmp_path))
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["rewards"]["QuadraticReward"]["difference"]["mean"] == pytest.approx(0, abs=1e-6)
    assert all(word in result.out for word in ("QuadraticReward", "(trained)", "path KL", "difference"))
    assert "<table>" in (tmp_path / "evaluation.html").read_text() and not (tmp_path / "evaluation.png").exists()


def test_the_command_of_images_needs_no_yaml_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text('number,caption\n1,"a ""three"", please"\n2,a cat\n')
    args = ["--config", DIGITS, "--trainer.default_root_dir", tmp_path / "run", "--sampler.steps", 3]
    result = tilt("test", *args, "--data.test_prompts", f"{tmp_path}/mine.csv:caption", "--evaluation.samples", 2)
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert list(report["rewards"]) == ["Ink", "accuracy", "clip"] and report["prompts"] == 2
    assert report["rewards"]["Ink"]["difference"]["mean"] == 0
    assert any("accuracy has no value for 'a cat'" in line for line in report["warnings"])
    again = tilt("test", *args, "--data.test_prompts", tmp_path / "mine.csv")
    assert again.status == 1 and "has no column 'prompt'; its first line names 'number', 'caption'" in again.err
    wrong = tilt("test", *args, "--evaluation.rewards.clip", "ClipScore")
    assert wrong.status == 2 and len(wrong.errors) == 1 and "CLIPScore" in wrong.err
    assert tilt("test", *args, "--evaluation.sample", 2).status == 2
