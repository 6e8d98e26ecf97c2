"""The executed notebooks as pages: text, code, what was printed and the pictures, as they were committed.

Nothing is executed.  What a notebook of this repository holds is Markdown, Python, printed text and PNGs
(tests/test_notebooks.py); each becomes Markdown of the site, with the formulas, links and colours of other pages.
"""

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests read this file without Sphinx
    from sphinx.application import Sphinx

__all__ = ["page", "setup"]

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs" / "generated" / "notebooks"


def page(notebook: dict[str, Any], name: str) -> dict[str, bytes]:
    """Files of a notebook's page: `<name>.md`, and its pictures `<name>_<i>.png`.

    Args:
        notebook: what the file holds, nbformat 4.
        name: of the page.

    Raises:
        ValueError: for an output that is neither printed text nor a PNG.
    """
    parts, files = list[str](), dict[str, bytes]()
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            source = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](\1.md", source)
            parts.append(source.replace("](../docs/", "](../../"))
            continue
        parts += [f"```python\n{source}\n```"] if source else []
        for output in cell["outputs"]:
            data = output.get("data", {})
            if output["output_type"] == "stream":
                text = "".join(output["text"]).rstrip()
                parts.append(f"```text\n{text}\n```")
            elif "image/png" in data:
                picture = f"{name}_{len(files)}.png"
                files[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above draws]({picture})")
            else:
                raise ValueError(f"notebooks/{name}.ipynb: an output of {list(data) or output['output_type']}")
    return {f"{name}.md": ("\n\n".join(parts) + "\n").encode(), **files}


def _write(app: "Sphinx") -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts = dict[str, bytes]()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        texts |= page(json.loads(path.read_text()), path.stem)
    for old in FOLDER.iterdir():
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        path = FOLDER / name
        if not path.is_file() or path.read_bytes() != text:  # an unchanged page is not read again
            path.write_bytes(text)


def _link(app: "Sphinx", path: Path, docname: str, content: list[str]) -> None:
    """The list of notebooks, which a page includes, leads to the pages."""
    if path.name == "README.md" and path.parent.name == "notebooks":
        content[0] = re.sub(r"\]\((\w+)\.ipynb", r"](generated/notebooks/\1.md", content[0])


def setup(app: "Sphinx") -> dict[str, Any]:
    """Write the pages before anything is read."""
    app.connect("builder-inited", _write)
    app.connect("include-read", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
