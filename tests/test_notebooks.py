"""The notebooks run, from any folder, and what is committed of them is theirs.

A notebook asserts its claims itself; here it is run as a script, in a copy, so that its committed pictures stay.
"""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("[0-9]*.py"))
FAST = "04"  # the one that `make test` runs
CPU_SECONDS = 240  # two minutes on two cores, however busy they are

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def cells(script: Path) -> list[tuple[str, str]]:
    """Kind and text of a script's cells, comments of markdown taken away."""
    parts = re.split(r"^# %%( \[markdown\])?[ ]*\n", script.read_text(), flags=re.M)
    assert parts[0].strip() == "", "something stands before the first cell"
    found = []
    for mark, text in zip(parts[1::2], parts[2::2], strict=True):
        shown = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines()) if mark else text
        found.append(("markdown" if mark else "code", shown.strip()))
    return found


def executed(script: Path) -> dict[str, Any]:
    """The committed notebook."""
    return dict(json.loads(script.with_suffix(".ipynb").read_text()))


def cpu_seconds() -> float:
    """Of all processes that have been started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_there_are_notebooks() -> None:
    assert [script.name[:2] for script in SCRIPTS] == [f"{i:02d}" for i in range(1, len(SCRIPTS) + 1)]
    assert sum(script.name.startswith(FAST) for script in SCRIPTS) == 1


@each
def test_a_notebook_tells_a_story_and_asserts_it(script: Path) -> None:
    kinds, texts = zip(*cells(script), strict=True)
    assert kinds[0] == "markdown" and texts[0].startswith(f"# {script.name[:2]} ")
    assert kinds.count("markdown") >= 3
    code = "\n".join(text for kind, text in cells(script) if kind == "code")
    assert re.search(r"^\s*assert ", code, re.M)


@each
def test_what_is_committed_is_of_this_script_and_small(script: Path) -> None:
    notebook = executed(script)
    assert [(c["cell_type"], "".join(c["source"]).strip()) for c in notebook["cells"]] == cells(script), (
        f"`make notebooks` was not run after the last change of {script.name}"
    )
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert script.with_suffix(".ipynb").stat().st_size < 400_000


@each
def test_pictures_are_shown_in_the_index(script: Path) -> None:
    number = script.name[:2]
    pictures = sorted((NOTEBOOKS / "pictures").glob(f"{number}_*.png"))
    drawn = sorted(re.findall(rf'"({number}_\w+)"\)', script.read_text()))
    assert [picture.stem for picture in pictures] == drawn
    assert pictures and max(picture.stat().st_size for picture in pictures) < 150_000
    index = (NOTEBOOKS / "README.md").read_text()
    assert f"({script.stem}.ipynb)" in index and f"({script.name})" in index
    assert len(re.findall(rf"!\[[^]]+\]\(pictures/({number}_\w+)\.png\)", index)) == 1


def test_the_index_names_nothing_that_is_not_there() -> None:
    named = re.findall(r"\]\(([\w./]+)\)", (NOTEBOOKS / "README.md").read_text())
    assert [name for name in named if not (NOTEBOOKS / name).exists()] == []


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=() if s.name.startswith(FAST) else pytest.mark.slow, id=s.stem) for s in SCRIPTS],
)
def test_a_notebook_runs(script: Path, tmp_path: Path) -> None:
    before = cpu_seconds()
    home = tmp_path / "notebooks"
    home.mkdir()
    for file in (script, NOTEBOOKS / "_common.py"):
        copy(file, home)
    result = subprocess.run(
        [sys.executable, str(home / script.name)],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert cpu_seconds() - before < CPU_SECONDS, "notebooks/README.md promises two minutes on two cores"
    committed = {path.name for path in (NOTEBOOKS / "pictures").glob(f"{script.name[:2]}_*.png")}
    assert {path.name for path in (home / "pictures").iterdir()} == committed
