"""The README and the pages under docs/ are true: their Python runs, their commands parse, what they name exists.

A block of Python that begins with a comment like `# my_rewards.py` is that file, importable by what follows it; the
blocks of a page run one after the other, in one scope, and assert what they show.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from markdown_it import MarkdownIt
from toys import trainer

import lightning_tilt.references  # noqa: F401  what annotates with Trainer is there before `at_root` replaces it
from lightning_tilt.cli import main
from lightning_tilt.rewards import Ink

ROOT = Path(__file__).parent.parent
FILES = (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/theory/*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
BLOCKS = {page: re.findall(r"```python\n(.*?)```", text, re.S) for page, text in PAGES.items()}


def code(text: str) -> set[int]:
    """Numbers of the lines of a page that Markdown shows as code."""
    blocks = [block for block in MarkdownIt().parse(text) if block.type in ("code_block", "fence")]
    return {number for block in blocks if block.map for number in range(*block.map)}


COMMANDS = [
    (page, line.strip()) for page, text in PAGES.items() for lines in [re.sub(r"\\\n\s*", "", text)]
    for number, line in enumerate(lines.splitlines())
    if number in code(lines) and line.strip().startswith("lightning-tilt ")
]  # fmt: skip
LOADER = [["seven", "one"], ["two", "three"]]
"""What the pages call `prompts`: batches of prompts."""


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the root, with Trainers made quiet."""
    monkeypatch.chdir(ROOT)
    loud = lightning.Trainer

    def quiet(callbacks: list[Any], **kwargs: Any) -> lightning.Trainer:
        with monkeypatch.context() as patch:
            patch.setattr(lightning, "Trainer", loud)
            return trainer(callbacks, **kwargs)

    monkeypatch.setattr(lightning, "Trainer", quiet)


def save_files(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write the files that a page shows; returns the names of their modules, which are not yet imported."""
    shown = {m[1]: block for block in BLOCKS[page] if (m := re.match(r"# (\w+\.py)\n", block))}
    for name, text in shown.items():
        (folder / name).write_text(text)
    names = [path.stem for path in folder.glob("my_*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_blocks_of_a_page_run(page: str, at_root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, scope = save_files(page, tmp_path, monkeypatch), dict[str, Any](prompts=LOADER)
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), scope)
    for name in names:
        sys.modules.pop(name, None)


def test_blocks_do_what_they_say(at_root: None) -> None:
    """What the pages show without an assertion of their own: updates are made, the reward and the energy are right."""
    scope: dict[str, Any] = {"prompts": LOADER}
    task, module, reward = BLOCKS["docs/start.md"]
    exec(task, scope)
    assert scope["task"].trainer.global_step == 2
    exec(module, scope)
    assert scope["trainer"].global_step == 2
    exec(reward, scope)
    images = torch.zeros(2, 3, 4, 4)
    images[0, :, :, :2] = 1
    assert scope["LeftHalf"]().score(images, None).tolist() == [1.0, 0.0]
    assert Ink().score(images, None).tolist() == [0.5, 0.0]
    exec(BLOCKS["docs/densities.md"][0], scope)
    assert scope["energy"](torch.tensor([[2.0, 0.0], [0.0, 0.0]])).tolist() == [0.0, 2.0]


def test_the_five_lines_of_the_readme_are_those_of_the_start() -> None:
    (readme,) = BLOCKS["README.md"]
    code = [line.split("  #")[0] for line in readme.splitlines() if line]
    assert set(code) <= set(BLOCKS["docs/start.md"][0].splitlines())


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(
    page: str, command: str, at_root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = save_files(page, tmp_path, monkeypatch)
    arguments = shlex.split(command)[1:]
    if arguments[0] == "configs":
        monkeypatch.chdir(tmp_path)
        main(arguments)
        assert "configs/" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code in (None, 0)
    assert "class_path: lightning_tilt.tasks." in capsys.readouterr().out
    for name in names:
        sys.modules.pop(name, None)


def test_commands_stand_in_blocks_of_code() -> None:
    """A command that lost its indentation is prose, and its dashes become others."""
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    command = re.compile(rf"\s*(?:lightning-tilt|git|pip|python|source|make (?:{'|'.join(targets)}))(?: |$)")
    pages = PAGES | {name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "notebooks/README.md")}
    found = 0
    for page, text in pages.items():
        inside = code(text)
        for number, line in enumerate(text.splitlines()):
            if command.match(line):
                found += 1
                assert number in inside, f"{page}:{number + 1}: {line}"
            elif number in inside and line.strip().startswith("make "):
                raise AssertionError(f"{page}:{number + 1}: no such target: {line}")
    assert found > 30
    assert code("Run\n\nlightning-tilt fit\n    lightning-tilt test\n") == set()


def test_every_named_file_exists() -> None:
    for page, text in PAGES.items():
        links = re.findall(r"\]\((\w[\w./]*)\)", text)
        here = (ROOT / page).parent
        named = {ROOT / n for n in re.findall(r"(?:configs|docs|lightning_tilt)/[\w/.]+\.\w+", text)}
        named |= {here / n for n in links if not n.startswith("http")}
        assert page != "README.md" or len(named) > 20
        assert [str(path) for path in named if not path.exists()] == [], page
