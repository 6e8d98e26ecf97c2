"""What to cite: every class's sources agree with its documentation, and are found from a module, a config and a run."""

import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import pytest
import yaml
from command import CONFIGS, DIGITS, TOY, overlay, tilt
from repository import ROOT

import lightning_tilt
import lightning_tilt.losses
import lightning_tilt.models
import lightning_tilt.rewards
import lightning_tilt.rewards.energies
from lightning_tilt import citation
from lightning_tilt.assets import folder
from lightning_tilt.callbacks import SteeredSampler, TrajectorySampler
from lightning_tilt.cli import TiltCLI
from lightning_tilt.interfaces import Cited, Loss, Predictor, Reward, sources_of
from lightning_tilt.models import EquivariantTilt, GaussianBase, LatentDiffusion, NeuralTilt, StableDiffusion
from lightning_tilt.models.guide import Guide
from lightning_tilt.references import entries
from lightning_tilt.rewards import HPSv2, Ink, JPEGCompressibility, WeightedSum
from lightning_tilt.rewards.energies import GMM40
from lightning_tilt.steering import SMC
from lightning_tilt.tasks import AdjointMatchingTask
from lightning_tilt.transition import DDIM, EulerMaruyama

ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
# Rewards of our own making, and combinations, which are cited by their parts.
OUR_OWN = {
    "Clamped", "Constraint", "DigitAccuracy", "DigitClassifier", "FunctionDensity", "Ink", "LinearReward",
    "QuadraticReward", "Smoothed", "WeightedSum",
}  # fmt: skip
# Papers that a page mentions without building on them.
MENTIONED = {"lightning_tilt.rewards.aesthetic_score": {"2305.13301"}}


def public(room: ModuleType, kind: type) -> list[type[Any]]:
    found = (getattr(room, name) for name in room.__all__)
    return [c for c in found if isinstance(c, type) and issubclass(c, kind) and c is not kind]


LOSSES = public(lightning_tilt.losses, Loss)
REWARDS = [c for room in (lightning_tilt.rewards, lightning_tilt.rewards.energies) for c in public(room, Reward)]
MODELS = [c for c in public(lightning_tilt.models, Predictor) if c.sources]
OTHERS: list[type[Cited]] = [Guide, SMC]
# Of an option: where it is documented, a class, arguments that choose it, and what is added to `sources`.
OPTIONS: list[tuple[str, type[Cited], dict[str, Any], tuple[str, ...]]] = [
    ("lightning_tilt.models.lora", LatentDiffusion, {"tuning": "lora"}, ("hu2021lora",)),
    ("lightning_tilt.callbacks.cited_steps", TrajectorySampler, {"guidance_scale": 2.0}, ("ho2022classifier",)),
    (
        "lightning_tilt.callbacks.cited_steps", TrajectorySampler,
        {"transition": {"class_path": "DDIM", "init_args": {"ddim_eta": 0.5}}}, ("song2020denoising",),
    ),
    ("lightning_tilt.models.guide", NeuralTilt, {"guide": "GMM40"}, Guide.sources),
]  # fmt: skip


def documentation(module: str) -> str:
    """All docstrings of a module and its classes."""
    inside = [c for _, c in inspect.getmembers(sys.modules[module], inspect.isclass) if c.__module__ == module]
    return " ".join(doc for doc in (sys.modules[module].__doc__, *(c.__doc__ for c in inside)) if doc)


def fields(key: str) -> dict[str, str]:
    """The fields of an entry, each in one line, as written."""
    return {m[1]: " ".join(m[2].split()) for m in re.finditer(r"^  (\w+) = \{(.*?)\},?$", entries()[key], re.M | re.S)}


def keys(text: str) -> list[str]:
    return re.findall(r"^@\w+\{(\w+),", text, re.M)


@pytest.mark.parametrize("cited", [*LOSSES, *REWARDS, *MODELS, *OTHERS], ids=lambda c: c.__name__)
def test_sources_and_documentation_agree(cited: type[Cited]) -> None:
    assert bool(cited.sources) == (cited.__name__ not in OUR_OWN)
    assert_documented(cited.sources, documentation(cited.__module__))


def assert_documented(sources: tuple[str, ...], text: str) -> None:
    for key in sources:
        entry = fields(key)
        if "eprint" in entry:
            assert entry["eprint"] in text
        else:
            assert entry["author"].partition(",")[0] in text and entry["year"] in text


@pytest.mark.parametrize(("module", "cited", "arguments", "added"), OPTIONS)
def test_options_are_cited_where_they_are_chosen(
    module: str, cited: type[Cited], arguments: dict[str, Any], added: tuple[str, ...]
) -> None:
    assert cited.sources_with(arguments) == (*cited.sources, *added)
    assert_documented(added, documentation(module))


@pytest.mark.parametrize("module", sorted({c.__module__ for c in [*LOSSES, *REWARDS]}))
def test_every_paper_of_the_documentation_is_cited(module: str) -> None:
    inside = [c for c in [*LOSSES, *REWARDS] if c.__module__ == module]
    cited = {fields(key).get("eprint") for c in inside for key in c.sources}
    assert set(ARXIV.findall(documentation(module))) - MENTIONED.get(module, set()) == cited - {None}


def test_entries_are_whole() -> None:
    text = (ROOT / "lightning_tilt/references.bib").read_text()
    assert len(entries()) == text.count("\n@") == len({fields(key)["title"] for key in entries()})
    named = {key for c in [*LOSSES, *REWARDS, *MODELS, *OTHERS] for key in c.sources}
    named |= {key for *_, added in OPTIONS for key in added}
    assert named == set(entries())  # none is missing, none is left over
    for key, entry in entries().items():
        assert entry.count("{") == entry.count("}") and entry.isascii()
        found = fields(key)
        assert {"author", "title", "year"} <= set(found), key
        assert found["year"] == re.sub(r"\D", "", key)
        if "eprint" in found:
            assert ARXIV.fullmatch(found["eprint"]) and found["archivePrefix"] == "arXiv"
            assert found["eprint"][:2] == found["year"][2:], key
        elif "publisher" in found:
            assert {"version", "doi"} <= set(found), key
        else:
            assert {"journal", "volume", "pages", "doi"} <= set(found), key
        assert "others" not in re.split(r"\s+", found["author"]), key


def test_of_a_module() -> None:
    predictor = EquivariantTilt(GaussianBase([4, 2], mean_free=True), hidden=4, layers=1)
    module = AdjointMatchingTask(predictor=predictor, reward=WeightedSum([Ink(), JPEGCompressibility()]))
    text = citation(module)
    assert keys(text) == ["lightning_tilt", "domingoenrich2024adjoint", "satorras2021en", "black2023training"]
    assert f"version {lightning_tilt.__version__}" in text
    assert entries()["domingoenrich2024adjoint"] in text


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_adapters_are_cited_where_there_are_some(tuning: Any) -> None:
    made = StableDiffusion(folder("digits-sd15"), tuning=tuning)
    arguments = {"path": "", "tuning": tuning}
    assert sources_of([made]) == ["rombach2021high"] + ["hu2021lora"] * (tuning == "lora")
    assert made.own_sources() == StableDiffusion.sources_with(arguments)


def test_a_guide_is_cited_where_there_is_one() -> None:
    base = GaussianBase([2])
    guided, plain = NeuralTilt(base, hidden=4, layers=1, guide=GMM40()), NeuralTilt(base, hidden=4, layers=1)
    assert sources_of(guided.modules()) == list(Guide.sources)
    assert sources_of(plain.modules()) == []
    config: dict[str, Any] = {"class_path": "NeuralTilt", "init_args": {"base": "GaussianBase", "guide": "GMM40"}}
    run = {"model": {"init_args": {"predictor": config}}}
    assert keys(citation(run)) == ["lightning_tilt", *Guide.sources, *GMM40.sources]
    config["init_args"]["guide"] = None
    assert keys(citation(run)) == ["lightning_tilt"]


def test_steps_are_cited() -> None:
    assert sources_of([TrajectorySampler(), TrajectorySampler(transition=EulerMaruyama(0.1))]) == []
    sampler = TrajectorySampler(guidance_scale=3.0, transition=DDIM(ddim_eta=0.5))
    steps = ["ho2022classifier", "song2020denoising"]
    assert sources_of([sampler]) == steps
    assert sources_of([SteeredSampler(sampler, SMC())]) == [*steps, *SMC.sources]


def test_ones_own_entries_and_mistakes() -> None:
    class Mine(Ink):
        sources = ("@misc{mine2030,\n  title = {Mine}\n}", "neal2003slice")

    class Wrong(Ink):
        sources = ("wu2023humane",)

    assert keys(citation(Mine())) == ["lightning_tilt", "mine2030", "neal2003slice"]
    with pytest.raises(ValueError, match="no entry 'wu2023humane'; did you mean 'wu2023human'"):
        citation(Wrong())


def test_of_a_dictionary_short_or_resolved() -> None:
    short = yaml.safe_load((ROOT / "configs/sd3/adjoint_matching.yaml").read_text())
    model = ["lightning_tilt", "domingoenrich2024adjoint", "esser2024scaling", "hu2021lora"]
    wanted = [*model, "wu2023human", "radford2021learning", "ho2022classifier"]
    assert keys(citation(short)) == wanted
    full = tilt("fit", "--config", "configs/sd3/adjoint_matching.yaml", "--print_config").config
    assert keys(citation(full)) == wanted
    short["model"]["init_args"]["reward"] = "PickScore"
    assert keys(citation(short))[4] == "kirstain2023pick"
    short["model"]["init_args"]["reward"] = {"class_path": "not_here.Warmth"}
    text = citation(short)
    assert keys(text) == [*model, "ho2022classifier"]
    assert text.endswith("% not_here.Warmth cannot be imported here: add what it is from")


OWN = """
from lightning_tilt.rewards import Ink
class Warmth(Ink):
    sources = ("@misc{warm2031,\\n  title = {Warmth}\\n}",)
"""


@pytest.mark.parametrize(
    "named",
    [
        {"reward": "cited_warmth.Warmth"},
        {"reward": {"class_path": "WeightedSum", "init_args": {"rewards": ["Ink", "cited_warmth.Warmth"]}}},
        {"predictor": "cited_warmth.Warmth", "reward": "not_here.Cold"},
    ],
)
def test_ones_own_class_by_its_path_alone(
    named: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cited_warmth.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "cited_warmth", raising=False)
    arguments = {"optimizer": "torch.optim.AdamW", "note": "Not.Here"} | named
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": arguments}}))
    run = tilt("cite", "config.yaml", cwd=tmp_path)
    assert run.status == 0 and keys(run.out) == ["lightning_tilt", "warm2031"]
    told = [line for line in run.out.splitlines() if line.startswith("%")]
    assert told == (["% not_here.Cold cannot be imported here: add what it is from"] if "predictor" in named else [])


def test_judges_by_their_paths_alone() -> None:
    text = citation({"evaluation": {"rewards": {"cold": "not_here.Cold"}, "embedding": "not_here.Eye"}})
    assert [line.split()[1] for line in text.splitlines() if line[:1] == "%"] == ["not_here.Cold", "not_here.Eye"]


def test_a_run_its_trainer_and_its_config_agree(tmp_path: Path) -> None:
    """On the demo, whose report measures diversity by CLIP, and whose evaluation judges by CLIPScore."""
    found: list[str] = []

    class Asked(TiltCLI):
        def after_fit(self) -> None:
            found.extend([citation(self.model), citation(self.trainer)])

    Asked(["fit", *overlay(DIGITS, tmp_path / "run")])
    wanted = keys(tilt("cite", "--config", DIGITS).out)
    assert "hessel2021clipscore" in wanted
    assert [set(keys(text)) for text in found] == [set(wanted)] * 2
    assert {"lightning_tilt", *json.loads((tmp_path / "run/report.json").read_text())["sources"]} == set(wanted)
    with pytest.raises(ValueError, match="this Trainer has no module yet; fit first, or give the module"):
        citation(lightning.Trainer(logger=False, accelerator="cpu"))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_of_every_config(config: Path) -> None:
    content = yaml.safe_load((ROOT / config).read_text())
    text = citation(content)
    loss = getattr(lightning_tilt.losses, content["model"]["class_path"].rpartition(".")[2].removesuffix("Task"))
    assert set(keys(text)) >= {"lightning_tilt", *loss.sources}
    assert "%" not in text


def test_on_the_command_line() -> None:
    run = tilt("cite", "--config", DIGITS, "--model.reward", "HPSv2", "--model.reward.version", "2.1")
    assert run.status == 0
    wanted = ["lightning_tilt", "domingoenrich2024adjoint", "rombach2021high", "hu2021lora", "wu2023human"]
    assert keys(run.out)[:5] == wanted
    assert {"radford2021learning", "hessel2021clipscore"} <= set(keys(run.out))
    full = tilt("cite", "--config", "configs/digits/sd15_full.yaml")
    assert "rombach2021high" in keys(full.out) and "hu2021lora" not in keys(full.out)
    steered = tilt("cite", "--config", TOY, "--steering", "smc")
    assert keys(steered.out) == ["lightning_tilt", "domingoenrich2024adjoint", *SMC.sources]
    assert keys(tilt("cite", "--config", TOY).out) == ["lightning_tilt", "domingoenrich2024adjoint"]
    assert tilt("cite", "--config", DIGITS, "--model.rewart", "HPSv2").status == 2
    assert "arguments are required: run" in tilt("cite").err
    assert "lightning-tilt cite --config CONFIG" in " ".join(tilt("cite", "--help").out.split())


def test_of_a_run(tmp_path: Path) -> None:
    assert tilt("fit", *overlay(TOY, tmp_path / "run")).status == 0
    wanted = ["lightning_tilt", "domingoenrich2024adjoint"]
    assert keys(tilt("cite", tmp_path / "run").out) == wanted
    report = tmp_path / "run/report.json"
    assert json.loads(report.read_text())["sources"] == wanted[1:]
    alone = shutil.copy(report, tmp_path / "report.json")
    assert keys(citation(alone)) == keys(citation(tmp_path)) == wanted
    for culprit, told in ((tmp_path / "none", "it has neither"), (tmp_path / "run/metrics.csv", "is neither")):
        run = tilt("cite", culprit)
        assert (run.status, run.err.count("\n")) == (2, 1)
        assert told in run.err


def test_the_software_is_cited_as_its_own_file_says() -> None:
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    text = citation({}).replace("\\", "").replace("{", "").replace("}", "")
    assert told["title"] in text and told["authors"][0]["name"] in text


def test_networks_are_cited_without_being_made() -> None:
    assert HPSv2.sources == ("wu2023human", "radford2021learning")
    assert keys(citation({"model": {"reward": "HPSv2"}})) == ["lightning_tilt", *HPSv2.sources]
