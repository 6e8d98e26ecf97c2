"""The wheel stands alone: built, installed into an empty environment, and used from an empty folder.

What the package depends on is taken from the running environment, by a path; lightning_tilt itself is the wheel's.  Of
`make test-wheel` (`--with-dependencies`) the environment has what the wheel's metadata ask for, and nothing else.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from command import DIGITS, PICTURES, overlay
from repository import ROOT, files

import lightning_tilt

DEMO = "configs/digits/sd15_adjoint_matching.yaml"


@dataclass
class Built:
    wheel: Path
    sdist: Path
    python: Path


def run(*command: object, cwd: Path) -> str:
    """Run a command as a user would, who knows nothing of the repository; its two streams together."""
    own = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    env = {k: v for k, v in os.environ.items() if k not in own} | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def build(kind: str, source: Path, out: Path) -> Path:
    program = f"from setuptools import build_meta; print('built', build_meta.build_{kind}({str(out)!r}))"
    return out / run(sys.executable, "-c", program, cwd=source).rpartition("built ")[2].split()[0]


def site(python: Path) -> Path:
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run(python, "-c", program, cwd=python.parent).strip())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Built:
    """Wheel and sdist of a clean copy of the repository, and the Python of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source, out, environment = (folder / name for name in ("source", "out", "environment"))
    for path in files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    for room in ("callbacks", "configs"):
        (source / "lightning_tilt" / room).symlink_to(Path("..", room))
    out.mkdir()
    wheel, sdist = build("wheel", source, out), build("sdist", source, out)
    venv.EnvBuilder(symlinks=True).create(environment)
    python = environment / "bin/python"
    given = ["--constraint", ROOT / "constraints.txt"]
    if not pytestconfig.getoption("--with-dependencies"):
        (site(python) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        given = ["--no-deps", "--no-index"]
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *given, wheel, cwd=out)
    return Built(wheel, sdist, python)


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_every_file_once(built: Built) -> None:
    inside = contents(built.wheel)
    wanted = {str(path): path for path in files("lightning_tilt")}
    wanted |= {f"lightning_tilt/{path}": path for path in files("callbacks", "configs")}
    assert {name for name in inside if ".dist-info/" not in name} == set(wanted)
    for name, path in wanted.items():
        assert inside[name] == (ROOT / path).read_bytes(), name
    assert "lightning_tilt/py.typed" in inside  # without it no type checker looks into the package
    metadata = Parser().parsestr(next(text.decode() for name, text in inside.items() if name.endswith("/METADATA")))
    assert metadata["Version"] == lightning_tilt.__version__
    assert {"openclip", "hpsv2", "hub"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_sdist_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = contents(build("wheel", source, tmp_path))
    assert again == contents(built.wheel)


def test_commands_from_an_empty_folder(built: Built, tmp_path: Path) -> None:
    program = "from importlib.util import find_spec; print(*(find_spec(n).origin for n in {}))"
    rooms = ["lightning_tilt", "lightning_tilt.callbacks", "lightning_tilt.losses"]
    for file in run(built.python, "-c", program.format(rooms), cwd=tmp_path).split():
        assert Path(file).is_relative_to(site(built.python)), file
    told = run(built.python, "-m", "lightning_tilt", "--help", cwd=tmp_path)
    assert "lightning-tilt configs" in " ".join(told.split())
    listed = run(built.python.parent / "lightning-tilt", "configs", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in listed] == sorted(
        str(path) for path in files("configs") if path.suffix != ".txt"
    )
    assert list(tmp_path.iterdir()) == []
    run(built.python.parent / "lightning-tilt", "configs", DEMO, "there", cwd=tmp_path)
    copied = [path.relative_to(tmp_path / "there") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(copied) == 3 and Path(DEMO) in copied  # and its prompts
    for path in copied:
        assert (tmp_path / "there" / path).read_bytes() == (ROOT / path).read_bytes(), path


def test_the_demo_from_an_empty_folder(built: Built, tmp_path: Path) -> None:
    small = overlay(DIGITS, tmp_path / "small", trainer={"default_root_dir": "runs/demo"})[-1]
    here = tmp_path / "empty"
    here.mkdir()
    run(built.python.parent / "lightning-tilt", "fit", "--config", DEMO, "--config", small, cwd=here)
    made = {path.name for path in (here / "runs/demo").iterdir()}
    assert {"report.json", "metrics.csv", "config.yaml", "checkpoints", "lora", *PICTURES} <= made
    saved = yaml.safe_load((here / "runs/demo/config.yaml").read_text())
    assert saved["model"]["init_args"]["predictor"]["init_args"]["path"] == "lightning_tilt/assets/digits-sd15"
    assert saved["data"]["init_args"]["prompts"] == "configs/digits/prompts.txt"


USER = """from lightning_tilt import AdjointMatching, TiltModule, citation
from lightning_tilt.callbacks import TrajectorySampler
class Mine(AdjointMatching, TiltModule): ...
sampler, text = TrajectorySampler(steps="ten"), citation(Mine)
"""


@pytest.mark.slow
def test_type_checkers_see_the_package(built: Built, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", built.python, "--cache-dir", tmp_path]
    told = subprocess.run(
        [str(part) for part in [*mypy, "user.py"]], cwd=tmp_path, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    ).stdout.splitlines()  # fmt: skip
    assert len(told) == 3, told  # two mistakes on purpose, and nothing else
    assert told[0].startswith('user.py:4: error: Argument "steps" to "TrajectorySampler" has incompatible type "str"')
    assert told[1].startswith('user.py:4: error: Argument 1 to "citation" has incompatible type "type[Mine]"')
