"""Tables of `RESULTS.md`: each between two marks of its own, so that a script can write its table anew."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["FILE", "markdown", "write_section"]

FILE = Path(__file__).parent / "RESULTS.md"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
