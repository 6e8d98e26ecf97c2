"""What to cite: `lightning_tilt.citation`, the papers behind a run's loss, rewards, model and sampler, and itself.

Each class says what it is from (`Cited`), in keys of `references.bib`; here they are looked up.  An own loss or
reward is found too, with whole entries in its `sources`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from torch import nn

from lightning_tilt.interfaces.cited import Cited, sources_of_run

__all__ = ["citation", "entries"]

_SOFTWARE = """@misc{{lightning_tilt,
  author = {{{{The lightning\\_tilt developers}}}},
  title = {{lightning\\_tilt: exponential tilting of diffusion and flow models in {{PyTorch}} {{Lightning}}}},
  howpublished = {{Software, version {version}}}
}}"""

_ROOMS = ("tasks", "losses", "rewards", "rewards.energies", "models")
"""Whose names stand without their paths in a configuration, outermost first."""

_BLOCKS = {"sampler": "lightning_tilt.callbacks.TrajectorySampler", "smc": "lightning_tilt.steering.SMC"}
"""Blocks of a configuration that name no class, for there is one alone."""


_SLOTS = {
    "model", "predictor", "base", "guide", "reward", "rewards", "judges", "embedding", "transition", "callbacks"
}  # fmt: skip
"""Where the path of a class may stand alone, without `class_path`, or several of them."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def citation(run: nn.Module | Trainer | Mapping[str, Any] | str | Path) -> str:
    """What a run should cite, as BibTeX: this software, its loss, rewards, model and sampler, and what judges it.

    Args:
        run: the Trainer, once it has a module; or the module that is trained, a loss and host in one, which knows
            sampler and judges once it has a Trainer; or a configuration as a dictionary, with class paths in full or
            short; or a run's folder, its `config.yaml`, `report.json` or `steering.json`.

    Returns:
        Entries, a blank line between them.  A class of a configuration that cannot be imported here is named in a
        comment.

    Raises:
        FileNotFoundError: if a folder has none of the files, or there is nothing of the name.
        ValueError: if a file is none of them, a Trainer has no module yet, or a class names a source that
            `references.bib` does not have.

    Example:
        >>> text = citation({"model": {"class_path": "TargetScoreMatchingTask"}})
        >>> print(text[text.index("@misc{debortoli") :])
        @misc{debortoli2024target,
          author = {De Bortoli, Valentin and Hutchinson, Michael and Wirnsberger, Peter and Doucet, Arnaud},
          title = {Target Score Matching},
          year = {2024},
          eprint = {2402.08667},
          archivePrefix = {arXiv}
        }
    """
    from lightning_tilt import __version__

    sources, missing = _sources(run)
    comments = [f"% {path} cannot be imported here: add what it is from" for path in missing]
    return "\n\n".join([_SOFTWARE.format(version=__version__), *map(_entry, sources), *comments])


@cache
def entries() -> dict[str, str]:
    """The entries of `references.bib` by their keys.

    Example:
        >>> "Tilt Matching for Scalable" in entries()["potaptchik2025tilt"]
        True
    """
    text = (Path(__file__).parent / "references.bib").read_text(encoding="utf-8")
    found = [part.strip() for part in re.split(r"^(?=@)", text, flags=re.MULTILINE)[1:]]
    return {part[part.index("{") + 1 : part.index(",")]: part for part in found}


def _entry(source: str) -> str:
    if source.startswith("@"):
        return source.strip()
    if source not in entries():
        near = get_close_matches(source, entries(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "give the whole entry, @misc{...}"
        raise ValueError(f"references.bib has no entry {source!r}; {hint}")
    return entries()[source]


def _sources(run: nn.Module | Trainer | Mapping[str, Any] | str | Path) -> tuple[list[str], list[str]]:
    """Sources, each once, and the paths of classes that cannot be imported."""
    if isinstance(run, Trainer):
        if run.lightning_module is None:
            raise ValueError("this Trainer has no module yet; fit first, or give the module")
        return sources_of_run(run.lightning_module, run.callbacks), []  # type: ignore[attr-defined]
    if isinstance(run, nn.Module):
        trainer = run._trainer if isinstance(run, LightningModule) else None
        return sources_of_run(run, [] if trainer is None else trainer.callbacks), []  # type: ignore[attr-defined]
    sources, missing = list[str](), list[str]()
    for content in [run] if isinstance(run, Mapping) else _read(Path(run).expanduser()):
        if isinstance(content.get("sources"), list):  # a report, or of steering
            sources += content["sources"]
            continue
        for found, arguments in _classes(_with_blocks(content)):
            if isinstance(found, str):
                missing.append(found)
            elif issubclass(found, Cited):
                sources += found.sources_with(arguments)
    return list(dict.fromkeys(sources)), list(dict.fromkeys(missing))


def _with_blocks(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its data, its model first, its blocks with their classes if they are used."""
    used = {"model": content.get("model"), **content}
    unused = {"data"} | ({"smc"} if content.get("steering") != "smc" else set())
    made = {
        name: {"class_path": path, "init_args": used.get(name) or {}} for name, path in _BLOCKS.items() if name in used
    }
    return {name: made.get(name, value) for name, value in used.items() if name not in unused}


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    """A run's configuration, report and steering, as far as they are there."""
    files = [path / name for name in ("config.yaml", "report.json", "steering.json")] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(f"{str(path)!r} is no folder of a run: it has neither a config.yaml nor a report.json")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):
            content = None
        if not isinstance(content, Mapping) or not ("model" in content or "sources" in content):
            raise ValueError(f"{str(file)!r} is neither a run's config.yaml nor its report.json")
        yield content


def _classes(
    config: Any, key: str = "", arguments: Mapping[str, Any] | None = None
) -> Iterator[tuple[type | str, Mapping[str, Any]]]:
    """The classes that a configuration names and their arguments; as text those that cannot be imported."""
    if isinstance(config, Mapping):
        named = key in ("rewards", "judges") and "class_path" not in config  # by names of the user's own
        for name, value in config.items():
            yield from _classes(value, key if named else name, config.get("init_args"))
    elif isinstance(config, list):
        for value in config:
            yield from _classes(value, key)
    elif isinstance(config, str):
        is_path = key == "class_path" or (key in _SLOTS and _DOTTED.fullmatch(config) is not None)
        if (found := _class(config, is_path)) is not None:
            yield found, (arguments or {}) if key == "class_path" else {}


def _class(name: str, is_path: bool) -> type | str | None:
    """The class called `name`; `name` itself if it is a path of one that cannot be imported; None if it is no name."""
    module, _, short = name.rpartition(".")
    try:
        if module and (is_path or name.startswith("lightning_tilt.")):
            found = getattr(import_module(module), short)
        elif name.isidentifier():
            rooms = (import_module(f"lightning_tilt.{room}") for room in _ROOMS)
            found = next((getattr(room, name) for room in rooms if name in room.__all__), None)
        else:
            return None
    except Exception:  # of a user's own module: whatever it raises
        return name if is_path else None
    return found if isinstance(found, type) else None
