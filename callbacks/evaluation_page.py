"""The page of an evaluation: one HTML file with everything in it, opened without a network.

Images are data URIs, style and script are inline, and the page's own policy (Content-Security-Policy) forbids every
request and every script but the one whose hash it names: text that came from a prompt could not run even if it were
not escaped, and all of it is.
"""

import base64
import io
import math
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from .evaluation_figures import Pairs
from .pictures import curves

__all__ = ["page", "show"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --tuned: #c8553d; --base: #7f8c99 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2.5rem }
.facts, figcaption, .note { color: #888; font-size: .85rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem 1rem .3rem 0; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid var(--line) }
td { font-variant-numeric: tabular-nums } .warning { color: #b58900 }
.prompts { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.5rem }
.prompt > bdi { display: block; max-height: 4.5em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: .5rem } figure { margin: .4rem 0 }
.pair { position: relative; width: 9rem; --cut: 50% } .pair img { display: block; width: 100% }
.pair .base { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--cut)) 0 0) }
.pair::after { content: ""; position: absolute; inset: 0 auto 0 var(--cut); border-left: 2px solid var(--tuned) }
.pair input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize }
.pair input { z-index: 1 }
.pair:focus-within { outline: 2px solid var(--tuned) }
.small { image-rendering: pixelated } .curves { max-width: 100%; background: #fff }
"""

_SCRIPT = """
const cut = (input) => input.parentNode.style.setProperty("--cut", input.value + "%");
const all = document.querySelector("#all");
for (const input of document.querySelectorAll(".pair input")) input.addEventListener("input", () => cut(input));
if (all) all.addEventListener("input", () => {
  for (const input of document.querySelectorAll(".pair input")) { input.value = all.value; cut(input); }
});
"""

_SMALL = 128
"""Pixels: up to here an image is kept pixel for pixel, above it becomes a JPEG."""


def page(
    report: dict[str, Any],
    pictured: Sequence[Pairs],
    rows: Sequence[tuple[str, dict[str, Any]]],
    metrics: Path,
    fit: dict[str, Any],
) -> str:
    """The page as text.

    Args:
        report: the figures.
        pictured: prompts with images.
        rows: of the table.
        metrics: the run's metrics.csv; without one there are no curves.
        fit: the fit's report, whose base and exact reward are lines among the curves.
    """
    script = base64.b64encode(sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Evaluation</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *_head(report),
            *_table(report, rows),
            *_pictures(report, pictured),
            *_curves(metrics, fit),
            f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def show(estimate: dict[str, Any] | None) -> str:
    """An estimate as a table has it, to two digits of its error: `0.1290 +- 0.0011`; a hyphen for none."""
    if estimate is None or estimate["mean"] is None:
        return "-"
    mean, se = estimate["mean"], estimate["se"]
    if not se:
        return f"{mean:.4g}" + ("" if se is None else " +- 0")
    decimals = max(0, 1 - math.floor(math.log10(se)))
    if decimals > 6 or se >= 1e6:
        return f"{mean:.3g} +- {se:.1e}"
    return f"{mean:.{decimals}f} +- {se:.{decimals}f}"


def _head(report: dict[str, Any]) -> list[str]:
    many = f"{report['prompts']} prompts, " if report["prompts"] else ""
    facts = [
        f"{many}{report['samples']} samples of either model from the same noise, seed {report['seed']}",
        f"{report['host']} on {report['model']}, lam {report['lam']:g}, checkpoint {report['checkpoint'] or 'none'}",
        f"{report['chain']}, guidance {report['guidance_scale']:g}",
    ]
    return ["<h1>Base and tuned model</h1>", *(f'<div class="facts">{escape(fact)}</div>' for fact in facts)]


def _table(report: dict[str, Any], rows: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    lines = ["<table>\n<tr><th></th><th>base</th><th>tuned</th><th>difference</th></tr>"]
    for name, row in rows:
        trained = " (trained)" if name == report["trained_reward"] else ""
        cells = "".join(f"<td>{show(row[kind]).replace('+-', '±')}</td>" for kind in ("base", "tuned", "difference"))
        lines.append(f"<tr><td>{escape(name + trained)}</td>{cells}</tr>")
    errors = "clustered by prompt" if report["prompts"] > 1 else "those of the samples"
    notes = [f"± standard errors, {errors}; differences are of pairs from the same noise", report["diversity"]["what"]]
    notes += [f"{key}: {found['what']}" for key, found in report["distance"].items() if found is not None]
    lines += ["</table>", *(f'<div class="note">{escape(note)}</div>' for note in notes)]
    return [*lines, *(f'<div class="warning">{escape(warning)}</div>' for warning in report["warnings"])]


def _pictures(report: dict[str, Any], pictured: Sequence[Pairs]) -> list[str]:
    if not pictured:
        return []
    name = report["trained_reward"]
    lines = [
        "<h2>Before and after</h2>",
        '<label class="note">base on the left of the line, tuned on the right; all of them: '
        '<input id="all" type="range" min="0" max="100" value="50"></label>',
        '<div class="prompts">',
    ]
    for pairs in pictured:
        assert pairs.images is not None
        lines.append(f'<section class="prompt"><bdi dir="auto">{escape(pairs.prompt or "")}</bdi><div class="row">')
        for i, (base, tuned) in enumerate(pairs.images.transpose(0, 1)):
            before, after = pairs.rewards[name][:, i].tolist()
            lines.append(f"<figure>{_pair(base, tuned)}<figcaption>{before:.4g} → {after:.4g}</figcaption></figure>")
        lines.append("</div></section>")
    return [*lines, "</div>", f'<p class="note">Below each pair: {escape(name)} before → after.</p>']


def _pair(base: Tensor, tuned: Tensor) -> str:
    small = " small" if max(base.shape[1:]) <= _SMALL else ""
    return (
        f'<div class="pair"><img class="tuned{small}" alt="tuned" src="{_uri(tuned)}">'
        f'<img class="base{small}" alt="base" src="{_uri(base)}">'
        '<input type="range" min="0" max="100" value="50" aria-label="base and tuned"></div>'
    )


def _uri(image: Tensor) -> str:
    """An image (3, H, W), uint8, as a data URI."""
    from PIL import Image

    kind = "png" if max(image.shape[1:]) <= _SMALL else "jpeg"
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _curves(metrics: Path, fit: dict[str, Any]) -> list[str]:
    file = io.BytesIO()
    if not metrics.is_file() or not curves(file, metrics, fit):
        return []
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return ["<h2>The fit in this folder</h2>", f'<img class="curves" alt="reward, ESS and loss" src="{uri}">']
