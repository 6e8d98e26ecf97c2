"""One line for a mistake on the command line or in a YAML: the culprit, what was wrong, the nearest valid names.

jsonargparse reports a mistake deep inside `model` as a tree of attempts, one for every type it tried, with the key in
its last lines.  Read here, the tree gives the path of keys, the class at its end, and the reason.

A mistake that shows only later (an empty prompt file, a reward that is not finite) arrives as an exception that this
package raised on purpose, perhaps inside others: its message is the line.
"""

import dis
import errno
import importlib
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["one_line", "users_mistake"]

_KEY = re.compile(r'^\s*(?:- )?(?:error: )?Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_OPTION = re.compile(r"Option '([^']+)' is not accepted|Key '([^']+)' is not expected")
_NAME = re.compile(r"Expected a dot import path string: (\S+)")
_UNRECOGNISED = re.compile(r"[Uu]nrecognized arguments: (\S+)|does not accept option '([^']+)'")
_LACKING = re.compile(r"argument (\S+): expected one argument")
_OWNER = re.compile(r"Option '[^']+' is not accepted\. Got value: Namespace\(class_path='([^']+)'")
_ROOMS = (
    "tasks", "rewards", "rewards.energies", "rewards.mixture_density", "data", "callbacks", "models", "models.neural",
    "models.closed_form", "models.gaussian_base", "models.equivariant", "models.transport", "transition", "process",
)  # fmt: skip
_RAISERS = ("lightning_tilt.", "lightning.pytorch.trainer.")


def one_line(message: str, options: Iterable[str]) -> str:
    """Condense jsonargparse's report of a mistake.

    Args:
        message: what the parser would print.
        options: the option strings it knows.

    Returns:
        One line; the last reason of the report where it is of no known kind.
    """
    unknown = _UNRECOGNISED.search(message)
    if unknown:
        given, options = (unknown[1] or "--" + unknown[2]).split("=")[0], set(options)
        if given.endswith(".help"):
            return f"{given} needs to know its class: lightning-tilt fit --config FILE --model.reward.help HPSv2"
        if given.endswith("+") and given[:-1] in options:
            return (
                f"{given} is not an option: {given[:-1]} is no list; a named entry is added by {given[:-1]}.NAME VALUE"
            )
        return f"{given} is not an option{_nearest(given, options)}"
    if "arguments are required" in message:
        return f"{' '.join(message.split())}; give --config FILE: `lightning-tilt configs` lists the packaged ones"
    if lacking := _LACKING.search(message):
        return f"{lacking[1]} expects a value (an option that ends in .help expects a class: --model.reward.help HPSv2)"
    keys = [m[1] for line in message.splitlines() if (m := _KEY.match(line))]
    where = "--" + ".".join(keys) if keys else "the configuration"
    option, name, owner = _OPTION.search(message), _NAME.search(message), None
    for match in _CLASS.finditer(message, 0, option.start() if option else len(message)):
        owner = match[1]
    if made := _OWNER.search(message):  # of an optimiser, which is made later, the message names only the value
        owner = made[1]
    if option:
        wrong = option[1] or option[2]
        known = _parameters(owner) if owner else [o.removeprefix("--") for o in options]
        of = owner.rpartition(".")[2] if owner else "it"
        return f"{where}: {of} does not take {wrong!r}{_nearest(wrong, known)}"
    if name:
        near = get_close_matches(name[1], _class_names(), n=3, cutoff=0.6)
        if name[1] in near:
            return f"{where}: {name[1]} is a class, but not of the kind that is wanted here"
        if not near:
            return f"{where}: {name[1]!r} is neither a valid value nor the path of a class that can be imported"
        return f"{where}: no class is called {name[1]!r}; did you mean {' or '.join(near)}?"
    reasons = [line.strip(" -") for line in message.splitlines() if line.strip() and "NoneType" not in line]
    reasons = [r for r in reasons if not r.startswith(("Given value", "Subtypes", "Errors", "Does not validate"))]
    if not reasons or not keys:
        return " ".join(message.split())
    named = f"; it takes names: {where}.NAME VALUE" if reasons[-1].endswith("Expected a <class 'dict'>") else ""
    return f"{where}: {_KEY.sub('', reasons[-1]).lstrip(': ')}{named}"


def users_mistake(error: BaseException) -> str | None:
    """The message of a mistake that the user can mend, or None for what is a defect and needs its traceback.

    Args:
        error: what was raised; the causes behind it are looked through too.

    Returns:
        One line: of the first exception that a `raise` of this package made, of a missing file, of a full disk, or of a
        setting that the Trainer refuses.
    """
    cause: BaseException | None = error
    while cause is not None:
        no_room = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if isinstance(cause, (FileNotFoundError, MisconfigurationException)) or no_room or _raised_here(cause):
            return re.sub(r"^\[Errno \d+\] ", "", " ".join(str(cause).split()))
        cause = cause.__cause__
    return None


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` statement of this package or of the Trainer made it, and not an expression that went wrong."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not str(last.tb_frame.f_globals.get("__name__", "")).startswith(_RAISERS):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _nearest(wrong: str, known: Iterable[str]) -> str:
    known = sorted(set(known))
    near = get_close_matches(wrong, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; it takes {', '.join(known)}" if 0 < len(known) <= 40 else ""


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    owner = vars(importlib.import_module(module)).get(name) if module else None
    if owner is None and module:
        owner = importlib.import_module(module).__getattr__(name)
    found: list[str] = []
    for base in inspect.getmro(owner) if inspect.isclass(owner) else ():
        if "__init__" in vars(base) and base.__module__.startswith(owner.__module__.split(".")[0]):
            kinds = inspect.signature(vars(base)["__init__"]).parameters.values()
            found += [p.name for p in kinds if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [n for n in dict.fromkeys(found) if n != "self"]


def _class_names() -> list[str]:
    from lightning.pytorch import callbacks

    ours = [n for room in _ROOMS for n in importlib.import_module(f"lightning_tilt.{room}").__all__]
    return [n for n in (*ours, *callbacks.__all__) if n[0].isupper()]
