"""What keeps the project in order is in order itself: make, workflows, the pins of the oldest versions, warnings."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from packaging.requirements import Requirement
from packaging.version import Version
from repository import ROOT, files

from lightning_tilt.interfaces import Reward

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = r"make ([a-z][a-z-]*(?:,? [a-z][a-z-]*)*)"
# A command is a piece of code within a sentence or, but for Python, a line of code; `make` in prose is none.
IN_TICKS = re.compile("`" + TARGETS)
IN_LINES = re.compile(r"(?:^ {4,}|^#   +|\bexec |\brun: )" + TARGETS, re.M)


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", makefile(), re.M))


def runs(workflow: Path) -> Iterator[tuple[str, str]]:
    """Pairs of a job's Python and a command that it runs, those of a matrix filled in."""
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for case in job.get("strategy", {}).get("matrix", {}).get("include", [{}]):
            fill = re.compile(r"\$\{\{ matrix\.(\w+) \}\}")
            steps = [{k: fill.sub(lambda m: case.get(m[1], ""), str(v)) for k, v in s.items()} for s in job["steps"]]  # noqa: B023
            python = next(step["with"] for step in steps if step.get("uses", "").startswith("actions/setup-python"))
            for step in steps:
                if "run" in step:
                    yield yaml.safe_load(python)["python-version"], step["run"]


def test_phony_names_every_target() -> None:
    lines = re.findall(r"^\.PHONY: (.*)$", makefile(), re.M)
    assert set(" ".join(lines).split()) == targets()


def test_every_target_is_known_where_it_is_named() -> None:
    found = set[tuple[str, str]]()
    for page in files("*.md", "*.yml", "*.toml", "*.txt", "*.py", "Makefile", ".ci/run"):
        text = (ROOT / page).read_text()
        commands = IN_TICKS.findall(text) + (IN_LINES.findall(text) if page.suffix != ".py" else [])
        found |= {(str(page), target) for command in commands for target in re.split(",? ", command)}
    assert {target for _, target in found} > {"demo", "test", "faults", "release"}
    assert [place for place in sorted(found) if place[1] not in targets()] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_make(workflow: Path) -> None:
    """Each job runs a target, which `make` itself can plan, and has a time limit; no step runs anything else."""
    jobs = list(runs(workflow))
    assert jobs
    for _, command in jobs:
        assert command.startswith("make ")
        assert command.split()[1] in targets(), command
        subprocess.run(["bash", "-c", f"{command} --dry-run"], cwd=ROOT, capture_output=True, check=True)
    assert all("timeout-minutes" in job for job in yaml.safe_load(workflow.read_text())["jobs"].values())


def test_oldest_and_newest_are_tested() -> None:
    on_change, nightly = ({command.split()[1]: python for python, command in runs(path)} for path in WORKFLOWS)
    assert set(on_change) == {"test", "test-oldest", "test-newest"}
    assert set(nightly) == {"test-slow", "test-parity", "faults", "test-newest", "test-wheel", "test-extras"}
    assert PROJECT["project"]["requires-python"] == f">={on_change['test-oldest']}"


def test_oldest_pins_are_the_floors() -> None:
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if line[0] != "#"]
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert not [name for name in pinned if name.startswith(("nvidia", "triton"))]
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["project"]["dependencies"], *extras["dev"]]):
        (floor,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
        pin = Version(pinned[requirement.name.lower().replace("_", "-")])
        assert pin.release[: len(Version(floor).release)] == Version(floor).release, f"renew {requirement.name}'s pin"


def test_every_ignored_warning_says_why() -> None:
    """A comment with a link to where the warning is from, or is to be mended, stands above each filter."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("filterwarnings = [") + 1
    block = [line.strip() for line in takewhile(lambda line: line != "]", lines[start:])]
    assert block[0] == '"error",'
    for before, line in pairwise(block):
        if line.startswith('"'):
            assert before.startswith("# "), f"say why {line} is ignored"
            assert re.search(r"https://\S+/(issues|pull)/\d+", before), f"link what {line} is from"


def test_no_test_ignores_every_warning() -> None:
    """By its message or its category a warning is ignored; what a new version says beside it is an error."""
    found = []
    for path in files("tests/*.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("filterwarnings", "simplefilter")):
                narrowed = bool(node.keywords) or (len(node.args) > 1 and "mark" not in ast.unparse(node.func))
                if any(ast.unparse(given) == "'ignore'" for given in node.args) and not narrowed:
                    found.append(f"{path}:{node.lineno}")
    assert found == []


def test_old_names_warn_and_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of CONTRIBUTING.md: an old class and an old parameter, as a YAML gives them."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    imports = ["import warnings", "from torch import Tensor", "from typing_extensions import deprecated"]
    imports += ["from lightning_tilt.condition import Prompts", "from lightning_tilt.interfaces import Reward"]
    (tmp_path / "my_warmth.py").write_text("\n".join([*imports, example]))
    monkeypatch.syspath_prepend(str(tmp_path))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")

    def reward(name: str, **given: float) -> Any:
        config = {"reward": {"class_path": f"my_warmth.{name}", "init_args": given}}
        return parser.instantiate(parser.parse_object(config)).reward

    assert reward("Warmth", scale=2.0).scale == 2.0
    with pytest.warns(FutureWarning, match="`strength` is called `scale` since 0.2"):
        assert reward("Warmth", strength=3.0).scale == 3.0
    with pytest.warns(FutureWarning, match="`Warm` is called `Warmth` since 0.2"):
        assert reward("Warm", scale=4.0).scale == 4.0


def test_the_linter_says_the_same_where_there_has_been_a_run(tmp_path: Path) -> None:
    """`tests/faults/runs.py` shares its name with the folder that runs go to."""
    ruff = Path(sys.executable).with_name("ruff")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for name in ("runs", "tests/faults", "lightning_tilt"):
        (tmp_path / name).mkdir(parents=True)
    for file in (ROOT / "tests/faults").glob("*.py"):
        (tmp_path / "tests/faults" / file.name).write_bytes(file.read_bytes())
    done = subprocess.run([ruff, "check", "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
