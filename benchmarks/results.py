"""`RESULTS.md`: a section each between two marks of its own, so that a script can write its section anew."""

import argparse
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean

__all__ = ["FILE", "environment", "markdown", "parser", "publish", "span", "write_section"]

FILE = Path(__file__).parent / "RESULTS.md"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def span(values: Sequence[float], shape: str, middle: Callable[[Sequence[float]], float] = mean) -> str:
    """The mean or another middle, in brackets the least and the greatest of several."""
    shown = [format(value, shape) for value in (middle(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})" if len(values) > 1 else shown[0]


def write_section(name: str, text: str, file: Path = FILE) -> None:
    """Put `text` between the marks of `name`, at the end of the file if it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = file.read_text(encoding="utf-8") if file.exists() else "# Results\n"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    if begin in content and end in content:
        content = content[: content.index(begin)] + section + content[content.index(end) + len(end) :]
    else:
        content = content.rstrip() + "\n\n" + section + "\n"
    file.write_text(content, encoding="utf-8")


def parser(doc: str | None, quick: bool = True) -> argparse.ArgumentParser:
    """The arguments that every section has: `--out`, and `--quick` but where there is no quick size."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    if quick:
        shown = "a size that only shows that it runs; written to --out alone"
        made.add_argument("--quick", action="store_true", help=shown)
    else:
        made.set_defaults(quick=False)
    made.add_argument("--out", type=Path, help="the file that takes the section, default benchmarks/RESULTS.md")
    return made


def publish(name: str, title: str, parts: Sequence[str], args: argparse.Namespace, seed: str = "seed 0") -> None:
    """Print a section, and write it with what it was made by.

    Args:
        name: of the section: `make bench ONLY=name`.
        title: its heading.
        parts: paragraphs and tables.
        args: of `parser`; a quick run is not written unless it is told where.
        seed: what the draws were keyed by.
    """
    made_by = f"`make bench ONLY={name}`, {seed}; {environment()}."
    text = "\n\n".join([f"## {title}", *parts, made_by])
    print(text, flush=True)
    out = args.out or (None if args.quick else FILE)
    if out is not None:
        write_section(name, text, out)


def environment() -> str:
    """Machine and versions, in a line."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "diffusers", "numpy"))
    machine = f"{_processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {libraries}"
    return ", ".join([machine, *([f"commit {commit}"] if (commit := _commit()) else [])])


def _commit() -> str:
    """Of the code that was run, with a + where it had been changed; empty outside of a clone."""

    def git(*command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", "-C", str(FILE.parent), *command], capture_output=True, text=True)

    try:
        head, changed = (
            git("rev-parse", "--short=10", "HEAD"),
            git("diff", "--quiet", "HEAD", "--", "../*.py", "../*.yaml"),
        )
    except OSError:
        return ""
    return "" if head.returncode else head.stdout.strip() + "+" * changed.returncode


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
