"""After the build: every link of the site arrives, and nothing asks the network for a script, a font or a picture.

Sphinx checks what it resolves itself; this reads what came out of it, so that raw HTML, copied files and the theme's
own pages are held to the same.
"""

from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from sphinx.application import Sphinx

__all__ = ["Page", "complaints", "setup"]

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
"""Attributes whose address a browser asks for by itself."""


class Page(HTMLParser):
    """Anchors and addresses of one file.

    Attributes:
        anchors: what a fragment may name.
        links: (address, whether it is loaded without a click).
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links = {""}, list[tuple[str, bool]]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note ids, and what is linked to."""
        for key, value in attrs:
            if key == "id" or (tag == "a" and key == "name"):
                self.anchors.add(value or "")
            elif value and ((tag, key) in LOADED or (tag, key) == ("a", "href")):
                self.links.append((value, (tag, key) in LOADED))


def complaints(folder: Path) -> list[str]:
    """What is wrong with the links of a built site, a line each.

    Args:
        folder: with the HTML files.
    """
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        here = path.relative_to(folder.resolve())
        for link, loaded in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                found += [f"{here}: {link} is loaded from the network"] if loaded and parts.scheme != "data" else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{here}: {link} leads nowhere")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{here}: {link} names no anchor there")
    return found


def _check(app: "Sphinx", exception: Exception | None) -> None:
    from sphinx.util import logging

    if exception is None and app.builder.format == "html":
        for complaint in complaints(Path(app.outdir)):
            logging.getLogger(__name__).warning(complaint)


def setup(app: "Sphinx") -> dict[str, Any]:
    """Look when everything is written."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
