"""The API's pages, a room a page, written from the modules as they are; and the proof that no public name is missing.

Public is what stands in a module's `__all__`.  A name that is defined there is shown there; one that is only handed on
(`lightning_tilt.losses.CMCD`) is a link to where it is defined.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests read this file without Sphinx
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

__all__ = ["ROOMS", "Module", "homeless", "modules", "page", "setup", "undocumented"]

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = "lightning_tilt"
FOLDER = ROOT / "docs" / "generated" / "api"
ROOMS = {
    "losses": ("Losses", ["losses"]),
    "rewards": ("Rewards and densities", ["rewards"]),
    "models": ("Models", ["models"]),
    "callbacks": ("Callbacks", ["callbacks"]),
    "hosts": ("Hosts and tasks", ["", "module", "tasks"]),
    "process": ("Process, transition, trajectory", ["process", "transition", "trajectory", "condition"]),
    "identities": ("Identities", ["identities"]),
    "interfaces": ("Interfaces", ["interfaces", "evaluations", "frozen", "noise", "shards", "references"]),
    "chains": ("Chains, transport, steering", ["chain", "transport", "steering"]),
    "metrics": ("Metrics", ["metrics"]),
    "data": ("Data", ["data"]),
    "strategies": ("Strategies and run folders", ["strategies", "checkpoints", "loggers", "run_folder"]),
    "estimate": ("Estimates of memory", ["estimate"]),
    "cli": ("Command line", ["cli", "__main__"]),
    "assets": ("Embedded models", ["assets"]),
}
"""Page, its title, and the rooms on it; `""` is the package itself."""


@dataclass(frozen=True)
class Module:
    """A module of the package, read from its source.

    Attributes:
        name: dotted.
        path: its file.
    """

    name: str
    path: Path

    @cached_property
    def _body(self) -> list[ast.stmt]:
        return ast.parse(self.path.read_text()).body

    @property
    def room(self) -> str:
        """The first part of its name within the package; the command line's modules are one room."""
        first = self.name.removeprefix(PACKAGE).lstrip(".").partition(".")[0]
        return "cli" if first.startswith("cli") else first

    @property
    def public(self) -> list[str]:
        """What `__all__` lists."""
        values = [value for name, value, _ in self._assignments() if name == "__all__"]
        return list(ast.literal_eval(values[0])) if values and values[0] is not None else []

    @cached_property
    def documented(self) -> dict[str, bool]:
        """Names that are defined here, with whether they have a docstring (of a value: the string below it)."""
        found = {name: text for name, _, text in self._assignments()}
        for node in self._body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[node.name] = ast.get_docstring(node) is not None
        return found

    @property
    def own(self) -> list[str]:
        """Public names that are defined here."""
        return [name for name in self.public if name in self.documented]

    def _assignments(self) -> Iterator[tuple[str, ast.expr | None, bool]]:
        for node, after in zip(self._body, [*self._body[1:], None], strict=True):
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            for target in [name for t in targets for name in (t.elts if isinstance(t, ast.Tuple) else [t])]:
                if isinstance(target, ast.Name):
                    yield target.id, node.value, text  # type: ignore[attr-defined]


def modules() -> dict[str, Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")) + sorted((ROOT / "callbacks").glob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = (PACKAGE, *parts) if parts[0] == "callbacks" else parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


def page(key: str, known: dict[str, Module]) -> str:
    """The reStructuredText of a page of `ROOMS`."""
    title, rooms = ROOMS[key]
    lines = [title, "=" * len(title), ""]
    for module in sorted((m for m in known.values() if m.room in rooms), key=lambda m: rooms.index(m.room)):
        lines += [f"``{module.name}``", "-" * (len(module.name) + 4), "", f".. automodule:: {module.name}"]
        lines += [f"   :members: {', '.join(module.own)}"] if module.own else ["   :no-members:"]
        handed = [name for name in module.public if name not in module.documented]
        links = [f":py:obj:`{name} <{home(module, name, known)}>`" for name in handed]
        lines += ["", *([f"Names: {', '.join(links)}."] if links else []), ""]
    return "\n".join(lines)


def home(module: Module, name: str, known: dict[str, Module]) -> str:
    """The dotted name under which a handed-on name is shown: the nearest module that defines it as its own."""
    near = [m for m in known.values() if name in m.own]
    near = [m for m in near if m.name.startswith(module.name)] or near
    return f"{near[0].name}.{name}" if near else f"{module.name}.{name}"


def homeless(known: dict[str, Module]) -> list[str]:
    """Modules whose room is on no page."""
    rooms = {room for _, there in ROOMS.values() for room in there}
    lost = [m.name for m in known.values() if m.room not in rooms]
    return [f"{name} is on no page of the API: give its room a place in ROOMS" for name in lost]


def undocumented(known: dict[str, Module]) -> list[str]:
    """Public names without a docstring."""
    bare = [f"{m.name}.{name}" for m in known.values() for name in m.own if not m.documented[name]]
    return [f"{name} is public and has no docstring" for name in bare]


def _write(app: "Sphinx") -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    known = modules()
    texts = {key: page(key, known) for key in ROOMS}
    entries = "".join(f"   {key}\n" for key in ROOMS)
    texts["index"] = f"API\n===\n\nA page a room.\n\n.. toctree::\n   :maxdepth: 1\n\n{entries}"
    for key, text in texts.items():
        path = FOLDER / f"{key}.rst"
        if not path.is_file() or path.read_text() != text:  # an unchanged page is not read again
            path.write_text(text)


def _check(app: "Sphinx", env: "BuildEnvironment") -> None:
    """Warn, and so fail a strict build, of every public name that did not arrive on a page."""
    from sphinx.util import logging

    log, known, shown = logging.getLogger(__name__), modules(), env.domaindata["py"]["objects"]
    names = [f"{m.name}.{name}" for m in known.values() for name in m.own]
    lost = [f"{name} is public and on no page" for name in names if name not in shown]
    for complaint in [*homeless(known), *undocumented(known), *lost]:
        log.warning(complaint)


def setup(app: "Sphinx") -> dict[str, Any]:
    """Write the pages before anything is read, and look for what is missing when all is."""
    app.connect("builder-inited", _write)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
