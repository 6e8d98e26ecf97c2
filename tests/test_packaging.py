"""What is installed is what is in the repository, and importing it is light."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from repository import ROOT, files

import lightning_tilt

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


NAMED_IN = {"import_module": 0, "optional": 1}
"""Functions that import what they are told, and which argument tells them."""


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): Version(number) for name, number in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: Iterable[str]) -> set[str]:
    return {canonical(Requirement(requirement).name) for requirement in requirements}


def test_every_package_on_disk_is_listed() -> None:
    packages = {".".join(path.parent.parts) for path in files("lightning_tilt/*__init__.py", "callbacks/*__init__.py")}
    packages = {"lightning_tilt." + name if name.startswith("callbacks") else name for name in packages}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | {"lightning_tilt.configs"}  # no Python in it


def test_every_module_is_in_a_package() -> None:
    homes = {path.parent for path in files("lightning_tilt/*.py", "callbacks/*.py")}
    assert [str(home) for home in homes if not (ROOT / home / "__init__.py").is_file()] == []


@pytest.mark.parametrize("room", ["callbacks", "configs"])
def test_links(room: str) -> None:
    link = ROOT / "lightning_tilt" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..", room)
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"lightning_tilt.{room}"] == room


@pytest.mark.parametrize(("package", "folder"), [("assets", "lightning_tilt/assets"), ("configs", "configs")])
def test_every_file_is_package_data(package: str, folder: str) -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"][f"lightning_tilt.{package}"]
    suffixes = {Path(pattern).suffix for pattern in patterns}
    found = [path for path in files(folder) if path.suffix != ".py"]
    assert {path.suffix for path in found} <= suffixes


def test_version_has_one_source() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_tilt.__version__
    try:
        assert version("lightning-tilt") == lightning_tilt.__version__
    except PackageNotFoundError:
        pytest.skip("not installed")


def test_constraints_pin_every_requirement_within_its_floor() -> None:
    pinned = pins()
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["docs"]]):
        assert pinned[canonical(requirement.name)] in requirement.specifier, requirement.name


def imported(tree: ast.AST, lazily: bool = False) -> Iterator[tuple[str, bool]]:
    """The packages that a module asks for, and whether only when a function is called."""
    for node in ast.iter_child_nodes(tree):
        asked: list[Any] = []
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            asked = [node.module]
        elif isinstance(node, ast.Call) and (called := ast.unparse(node.func).rpartition(".")[2]) in NAMED_IN:
            asked = [given.value for given in node.args[NAMED_IN[called] :][:1] if isinstance(given, ast.Constant)]
        yield from ((name.partition(".")[0], lazily) for name in asked)
        yield from imported(node, lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def test_what_is_imported_is_declared() -> None:
    """By the dependencies, whatever else they bring; by an extra too where a function alone imports it."""
    needed, extras = PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"].values()
    declared = {False: names(needed), True: names([*needed, *chain.from_iterable(extras)])}
    brought = packages_distributions()
    found = {
        (name, lazily, path)
        for path in files("lightning_tilt/*.py", "callbacks/*.py")
        for name, lazily in imported(ast.parse((ROOT / path).read_text()))
        if name not in sys.stdlib_module_names and name != "lightning_tilt"
    }
    assert {("yaml", False), ("scipy", True), ("open_clip", True), ("datasets", True)} <= {case[:2] for case in found}
    for name, lazily, path in sorted(found):
        homes = {canonical(home) for home in brought.get(name, ())}
        if not homes:  # an extra's, which is not installed: open_clip is of open-clip-torch
            homes = {home for home in declared[lazily] if home.startswith(canonical(name))}
        assert homes & declared[lazily], f"{path} imports {name}; pyproject.toml does not ask for it"


def test_importing_the_package_is_light() -> None:
    """The package itself brings nothing, its rooms no diffusers and no peft, beyond what lightning loads anyway."""
    program = """
import sys
import lightning
before = set(sys.modules)
import lightning_tilt
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
for room in ("callbacks", "losses", "models", "module", "rewards"):
    __import__("lightning_tilt." + room)
print(*({"diffusers", "peft", "matplotlib"} & (set(sys.modules) - before)))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    package, rooms = run.stdout.split("\n")[:2]
    assert package.split() == ["lightning_tilt"]
    assert rooms.split() == []


def test_configurations_are_listed_without_a_library() -> None:
    program = """
import sys
sys.argv[1:] = ["configs"]
from lightning_tilt.__main__ import main
main()
assert not {"torch", "lightning", "yaml"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "configs/toy/grpo.yaml" in run.stdout


def test_lazy_names() -> None:
    assert set(lightning_tilt._HOMES) == set(lightning_tilt.__all__) - {"__version__"}
    assert dir(lightning_tilt) == sorted(lightning_tilt.__all__)
    for name in lightning_tilt.__all__:
        assert getattr(lightning_tilt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'TiltModul'; did you mean 'TiltModule'"):
        lightning_tilt.TiltModul  # noqa: B018
