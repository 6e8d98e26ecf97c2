"""The commands that make no run: `lightning-tilt configs`, the packaged configurations, and `lightning-tilt cite`.

    lightning-tilt configs                          each with the sentence it begins with
    lightning-tilt configs digits/sd15_long         copied into this folder, with the files that it names
    lightning-tilt configs digits/sd15_long DEST    into DEST
    lightning-tilt cite --config CONFIG             what a run of it should cite; further flags as for a fit
    lightning-tilt cite runs/demo                   what that run should cite

A run needs no copy: `--config configs/digits/sd15_long.yaml` is the package's own where the working directory has no
such file, and so are the prompt files it names.  A copy is for changing, and comes first as soon as it is there.  It
keeps its place below `configs/`, so that the names in it hold.
"""

import re
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from lightning_tilt import __version__
from lightning_tilt.assets import locate

__all__ = ["DESCRIPTION", "copy_config", "list_configs", "summary", "with_packaged", "without_a_run"]

DESCRIPTION = (
    "Tilt a diffusion or flow model with a reward. `lightning-tilt configs` lists the packaged configurations and "
    "copies one; `lightning-tilt cite` prints what a run should cite; `lightning-tilt --version`."
)
"""What `--help` of the command says first."""

COMMANDS = ("fit", "validate", "test", "predict", "configs", "cite")
"""All of them."""

_HOME = Path(__file__).parent
"""What the names `configs/...` of packaged files are relative to."""

_NAMED = re.compile(r"\bconfigs/[\w./-]+\.\w+")


class _Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        sys.stderr.write(f"lightning-tilt: error: {message}\n")
        raise SystemExit(2)


def list_configs() -> list[str]:
    """Names of the packaged configurations and cluster scripts, e.g. `configs/toy/grpo.yaml`, in order."""
    found = (_HOME / "configs").glob("*/*")
    return sorted(path.relative_to(_HOME).as_posix() for path in found if path.suffix in (".yaml", ".sh"))


def summary(name: str) -> str:
    """What a configuration does: the first sentence of the comment that it opens with.

    Args:
        name: as `list_configs` gives it.

    Example:
        >>> summary("configs/sd15/adjoint_matching.yaml")
        'SD 1.5 at 512 x 512, adapters.'
    """
    lines = [line for line in _read(name).splitlines() if not line.startswith("#!")]
    comment = " ".join(" ".join(takewhile(lambda line: line.startswith("# "), lines)).replace("#", "").split())
    return re.split(r"(?<=[a-z\d)]\.) +(?=[A-Z])", comment, maxsplit=1)[0]


def copy_config(name: str, to: Path, force: bool = False) -> list[Path]:
    """Copy a packaged configuration and all files that it names, and that these name, into `to/configs/...`.

    Args:
        name: as `list_configs` gives it; `configs/` and `.yaml` may be left out.
        to: folder; it is made if it is missing.
        force: overwrite files that have another content.

    Returns:
        The copies, the configuration first.

    Raises:
        ValueError: if there is no such configuration; names the nearest.
        FileExistsError: if a file has another content and `force` is not set; nothing is copied then.
    """
    copies = {file: to / file for file in _with_named(_full_name(name))}
    changed = [str(copy) for file, copy in copies.items() if copy.exists() and copy.read_bytes() != _bytes(file)]
    if changed and not force:
        raise FileExistsError(
            f"{', '.join(changed)} would be overwritten, and nothing was copied: --force overwrites, or name another "
            f"folder: lightning-tilt configs {name} DEST"
        )
    for file, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_HOME / file, copy)
    return list(copies.values())


def with_packaged(args: Sequence[str]) -> list[str]:
    """The arguments, every `--config configs/...` that the working directory does not have made the package's own.

    Raises:
        FileNotFoundError: if the package has none of that name either; names the nearest.
        ValueError: if a file is no YAML, or is empty.
    """
    given = list[str]()
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and equals:
            given.append(f"{name}={_settings(value)}")
        else:
            given.append(_settings(arg) if given[-1:] in (["--config"], ["-c"]) else arg)
    return given


def without_a_run(args: Sequence[str]) -> list[str] | None:
    """Do what asks for no run; a mistake in it is one line and exit status 2.

    Args:
        args: the whole command line, without the program.

    Returns:
        The arguments of a fit, validation, test or prediction; None if there is nothing left to do.
    """
    command, rest = (args[0], list(args[1:])) if args else ("", [])
    try:
        if command == "configs":
            _list_or_copy(rest)
        elif command == "cite" and (not rest or rest[0] in ("-h", "--help") or not rest[0].startswith("-")):
            _cite(rest)
        elif command == "cite":
            return ["fit", *with_packaged(rest), "--dry_run", "citation"]
        elif command == "--version":
            print(f"lightning-tilt {__version__}")
        elif command[:1] not in ("", "-") and command not in COMMANDS:
            near = get_close_matches(command, COMMANDS, n=2, cutoff=0.5)
            mend = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
            raise ValueError(f"there is no command {command!r}; {mend}")
        else:
            return with_packaged(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        _Parser().error(" ".join(str(error).split()))
    return None


def _list_or_copy(args: list[str]) -> None:
    parser = _Parser(
        "lightning-tilt configs", allow_abbrev=False, description="List the packaged configurations, or copy one."
    )
    parser.add_argument("name", nargs="?", help="the one to copy, e.g. digits/sd15_long; without, all are listed")
    parser.add_argument("dest", nargs="?", default=Path(), type=Path, help="folder to copy it into")
    parser.add_argument("--force", action="store_true", help="overwrite files that were changed")
    given = parser.parse_args(args)
    if given.name is None:
        names = list_configs()
        width = max(map(len, names))
        print("\n".join(f"{name:{width}}  {summary(name)}" for name in names))
        return
    print("\n".join(map(str, copy_config(given.name, given.dest, given.force))))
    if given.dest != Path():  # the names in it are looked for below the working directory
        print(f"the names in it begin at that folder: cd {given.dest}, and run it there")


def _cite(args: list[str]) -> None:
    from lightning_tilt.references import citation

    about = "Print what a run should cite, as BibTeX; before a run: lightning-tilt cite --config CONFIG, and flags."
    parser = _Parser("lightning-tilt cite", description=about)
    parser.add_argument("run", type=Path, help="a run's folder, its config.yaml or its report.json")
    print(citation(parser.parse_args(args).run))


def _settings(value: str) -> str:
    """The value of `--config`: settings that are written out, or a file of the working directory or the package."""
    if "\n" in value or ": " in value or value in ("", "null"):
        return value
    if Path(value).expanduser().exists():
        _check_yaml(Path(value).expanduser())
        return value
    where = next((path for path in map(locate, _spelt_out(value)) if path.is_file()), None)
    if where is None:
        raise FileNotFoundError(f"there is no file {value!r}, nor does the package have one{_nearest(value)}")
    _check_yaml(where)
    return str(where)


def _check_yaml(file: Path) -> None:
    """Refuse a file that holds no settings, and name it, which a parser of texts does not do."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} is no YAML: {error}") from None
    if not isinstance(content, dict):
        what = "it is empty" if content is None else f"it is a {type(content).__name__}"
        raise ValueError(f"--config {file} holds no settings: {what}")


def _full_name(name: str) -> str:
    known = list_configs()
    found = next((n for n in _spelt_out(name) if n in known), None)
    if found is None:
        raise ValueError(f"no packaged configuration is called {name!r}{_nearest(name)}")
    return found


def _spelt_out(name: str) -> tuple[str, str]:
    """What a name may stand for: `configs/` and `.yaml` may be left out."""
    full = name if name.startswith("configs/") else f"configs/{name}"
    return full, f"{full}.yaml"


def _nearest(name: str) -> str:
    near = get_close_matches(_spelt_out(name)[0], list_configs(), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "; `lightning-tilt configs` lists them"


def _with_named(name: str) -> Iterator[str]:
    """A packaged file, and the packaged files named in it outside of comments, each once."""
    seen, todo = set[str](), [name]
    while todo:
        file = todo.pop(0)
        if file not in seen and (_HOME / file).is_file():
            seen.add(file)
            yield file
            code = re.sub(r"^\s*#.*$|\s#.*$", "", _read(file), flags=re.MULTILINE)
            todo += [] if file.endswith(".txt") else _NAMED.findall(code)


def _read(name: str) -> str:
    return _bytes(name).decode("utf-8")


def _bytes(name: str) -> bytes:
    return (_HOME / name).read_bytes()
