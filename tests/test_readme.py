"""The README is true: its Python runs, its commands parse, its links and configs exist."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import trainer

from lightning_tilt.cli import main
from lightning_tilt.rewards import Ink

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    lightning-tilt ")]


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_python_blocks_run(at_root: None) -> None:
    scope: dict[str, Any] = {"prompts": [["seven", "one"], ["two", "three"]]}
    module, reward, energy = BLOCKS
    # The README's Trainer, made quiet.
    scope["quiet"] = trainer
    exec(re.sub(r"L\.Trainer\(max_steps=2, callbacks=(\[.*\])\)", r"quiet(\1, max_steps=2)", module), scope)
    assert scope["trainer"].global_step == 2
    exec(reward, scope)
    images = torch.zeros(2, 3, 4, 4)
    images[0, :, :, :2] = 1
    assert scope["LeftHalf"]().score(images, None).tolist() == [1.0, 0.0]
    assert Ink().score(images, None).tolist() == [0.5, 0.0]
    exec(energy, scope)
    assert scope["energy"](torch.tensor([[2.0, 0.0], [0.0, 0.0]])).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(
    command: str, at_root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_rewards.py").write_text(BLOCKS[1])
    (tmp_path / "my_energies.py").write_text(BLOCKS[2])
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = shlex.split(command)[1:]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code in (None, 0)
    assert "class_path: lightning_tilt.tasks.Adjoint" in capsys.readouterr().out
    for name in ("my_rewards", "my_energies"):
        sys.modules.pop(name, None)


def test_every_named_file_exists() -> None:
    named = {
        *re.findall(r"(?:configs|docs|lightning_tilt)/[\w/.]+\.\w+", TEXT),
        *re.findall(r"\]\((\w[\w./]*)\)", TEXT),
    }
    assert len(named) > 8
    assert [n for n in named if not n.startswith("http") and not (ROOT / n).exists()] == []
