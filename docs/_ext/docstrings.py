"""Docstrings of this package are plain text that reads like Markdown; autodoc wants reStructuredText.

    an indented paragraph, or one with columns      a block of code, as it stands: formulas keep their letters
    a line that ends in `:`, indented `name: ...`    a list of names
    `name`                                          code
    **word**                                        bold
    everything else                                 text: `|u|`, `p*` and `x_` mean nothing but themselves

Sections of the Google style (`Args:`, `Returns:`, ...) are napoleon's; their descriptions are treated as text.
"""

import re
from typing import Any

from sphinx.application import Sphinx

__all__ = ["setup", "to_rst"]

SECTIONS = {"Args:", "Attributes:", "Example:", "Raises:", "Returns:", "Yields:"}
INLINE = re.compile(r"``?(.+?)``?|\*\*(?=\S)(.+?)(?<=\S)\*\*")
COLUMNS = re.compile(r"\S {3,}\S")


def to_rst(text: str) -> str:
    r"""A docstring as reStructuredText that napoleon still understands.

    Args:
        text: dedented, as `inspect.getdoc` gives it.

    Example:
        >>> print(to_rst("Norm |u| of `u`:\n\n    |u|^2 = u.u"))
        Norm \|u\| of ``u``:
        <BLANKLINE>
        ::
        <BLANKLINE>
            |u|^2 = u.u
    """
    paragraphs, section, out = re.split(r"\n\s*\n", text), "", list[str]()
    for paragraph in paragraphs:
        lines = paragraph.split("\n")
        section = lines[0] if lines[0] in SECTIONS else "" if not lines[0].startswith(" ") else section
        if section == "Example:":
            out.append(paragraph)
        elif section:
            out.append("\n".join(_inline(line) for line in lines))
        elif lines[0].endswith(":") and len(lines) > 1 and all(line.startswith("    ") for line in lines[1:]):
            out.append(f"{_inline(lines[0])}\n\n{_list(lines[1:])}")
        elif lines[0].startswith(" ") or any(COLUMNS.search(line) for line in lines):
            block = "\n".join("    " + line for line in lines) if not lines[0].startswith(" ") else paragraph
            out.append(block if out and out[-1].rpartition("\n")[2].startswith("    ") else f"::\n\n{block}")
        else:
            out.append(_inline(paragraph))
    return "\n\n".join(out)


def _list(lines: list[str]) -> str:
    """Indented lines `name: text`, of which those that go on are indented further, as a list."""
    items = [re.sub(r"^    (\w+): ", r"* `\1`: ", line) for line in lines]
    return "\n".join(
        "* " + _inline(item[2:]) if item.startswith("*") else "  " + _inline(item.strip()) for item in items
    )


def _inline(text: str) -> str:
    """One paragraph: code and bold stay, what else reStructuredText would read is escaped."""
    parts, end = list[str](), 0
    for match in INLINE.finditer(text):
        parts += [_escaped(text[end : match.start()])]
        code, bold = match.groups()
        # Characters beside an inline mark must not be letters for reStructuredText: `\\ ` is nothing there.
        before = "\\ " if text[max(match.start() - 1, 0) : match.start()].strip(" \n([-") else ""
        after = "\\ " if text[match.end() : match.end() + 1].isalnum() else ""
        parts += [before, f"``{code}``" if code is not None else f"**{_escaped(bold.replace('`', ''))}**", after]
        end = match.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    return re.sub(r"([\\*|])|(_)(?=\W|$)", lambda m: "\\" + m[0], text)


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = to_rst("\n".join(lines).strip("\n")).split("\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Before napoleon: its own handler has priority 500."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
