"""The rooms of the package: who may import whom, and how a module looks.

    mathematics  <-  interfaces  <-  {models, rewards, metrics, callbacks}  <-  losses
                     {models, rewards, metrics}  <-  module          {losses, module}  <-  tasks  <-  cli

Only the source is read here; nothing is imported.  Imports for type checkers alone count as well.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from repository import ROOT, files

LONGEST = 260

MATHEMATICS = {"condition", "identities", "process", "trajectory", "transition"}
INTERFACES = {"chain", "evaluations", "frozen", "interfaces", "noise", "shards", "steering", "transport"}
SHARED = {"mathematics", "interfaces"}
RUN = {"checkpoints", "loggers", "run_folder", "strategies"}

# A room may import itself and these.  A new room takes its line here, and CONTRIBUTING.md says how to choose.
MAY_IMPORT: dict[str, set[str]] = {
    "mathematics": set(),
    "interfaces": {"mathematics"},
    "assets": set(),
    "training": {"models", "rewards", "assets", *SHARED},
    "models": {"rewards", "assets", *SHARED},
    "rewards": {"models", "assets", *SHARED},
    "metrics": SHARED,
    "data": {"assets", *SHARED},
    "callbacks": {"models", "rewards", "metrics", "data", "assets", "run", *SHARED},
    "losses": {"models", "rewards", "metrics", "callbacks", *SHARED},
    "module": {"models", "rewards", "metrics", "run", *SHARED},
    "run": SHARED,
    "estimate": {"models", "rewards", "losses", "data", "assets", "run", *SHARED},
    "references": {"__init__", *SHARED},  # the version
    "tasks": {"losses", "module"},
}
# What ties everything together: the command line, and the package's own lazy names.
TOP = {"cli", "__init__", "__main__"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in files("lightning_tilt/*.py", "callbacks/*.py"):
        parts = path.with_suffix("").parts
        parts = ("lightning_tilt", *parts) if parts[0] == "callbacks" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ROOT / path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


def room(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 1:
        return "__init__"
    if parts[:3] == ["lightning_tilt", "assets", "training"]:
        return "training"
    if parts[1] in MATHEMATICS:
        return "mathematics"
    if parts[1] in INTERFACES:
        return "interfaces"
    if parts[1].startswith("cli"):
        return "cli"
    return "run" if parts[1] in RUN else parts[1]


def imports(name: str, body: Iterator[ast.AST]) -> set[str]:
    """Dotted names of the modules that the nodes of `body` import, relative ones resolved."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            inner = {f"{origin}.{alias.name}" for alias in node.names}
            found |= (inner & set(modules())) or {origin}
    return found


def at_import_time(name: str) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: not those in functions or for type checkers."""
    stack: list[ast.AST] = list(tree(name).body)
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack += ast.iter_child_nodes(node)


def test_imports_run_one_way() -> None:
    wrong = []
    for name in modules():
        here = room(name)
        if here in TOP:
            continue
        assert here in MAY_IMPORT, f"{name} is a new room: give it a line in MAY_IMPORT"
        for other in imports(name, ast.walk(tree(name))):
            if other.partition(".")[0] == "lightning_tilt" and room(other) not in {here, *MAY_IMPORT[here]}:
                wrong.append(f"{name} imports {other}: {here} may not import {room(other)}")
    assert wrong == []


def test_mathematics_imports_torch_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "lightning_tilt"}
    for name in modules():
        if room(name) == "mathematics":
            outside = {other.partition(".")[0] for other in imports(name, ast.walk(tree(name)))} - allowed
            assert outside == set(), name


def test_no_module_imports_itself_through_others() -> None:
    """Raises CycleError, with the modules in its message, if the imports at import time are no acyclic graph."""
    graph = {}
    for name in modules():
        # A package's __init__ re-exports what its own modules define, and they may ask for each other by full name.
        graph[name] = {other for other in imports(name, at_import_time(name)) if other in modules()} - {name}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_callbacks_import_relatively() -> None:
    """An absolute import would make two classes of one file where the folder itself is on the path."""
    for name, path in modules().items():
        if path.is_relative_to(ROOT / "callbacks"):
            for node in ast.walk(tree(name)):
                assert not (isinstance(node, ast.ImportFrom) and not node.level and "tilt" in (node.module or "")), name


def test_no_module_is_long() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_every_module_says_what_is_public() -> None:
    silent = []
    for name in modules():
        targets = [
            target.id
            for node in tree(name).body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        ]
        silent += [name] if "__all__" not in targets else []
    assert silent == []


def test_everything_public_is_documented() -> None:
    bare = []
    for name in modules():
        bare += [] if ast.get_docstring(tree(name)) else [name]
        stack = [(name, node) for node in tree(name).body]
        while stack:
            owner, node = stack.pop()
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
                "_"
            ):
                bare += [] if ast.get_docstring(node) else [f"{owner}.{node.name}"]
                if isinstance(node, ast.ClassDef):
                    stack += [(f"{owner}.{node.name}", child) for child in node.body]
    assert bare == []
