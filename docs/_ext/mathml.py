"""Formulas as MathML, which browsers draw by themselves: no script, no network.

    $x$        inline, in the text's own line
    $$x$$      displayed, centred

Indices are where they belong in a font that has measures for mathematics; site.css names those that systems come with.
"""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

__all__ = ["mathml", "setup"]

SPACED = re.compile(r"(<mi>(?:log|exp|min)</mi>)(?!<mo[^>]*>(?:&#x00028;|\()|<mrow><mo[^>]*>)")
"""Names of functions that no bracket follows: TeX sets a thin space there, the converter none."""

BAR = '<mo stretchy="false">&#x0007C;</mo>'
"""In TeX an ordinary sign; in MathML an operator, with space on both sides."""


def mathml(formula: str, display: str = "inline") -> str:
    """A formula of TeX as MathML.

    Args:
        formula: without its dollar signs.
        display: "inline" or "block".
    """
    found = SPACED.sub(r'\1<mspace width="0.17em" />', convert(formula, display=display))
    return found.replace(BAR, BAR.replace(">", ' lspace="0" rspace="0">', 1))


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer; conf.py chooses it by its name."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
