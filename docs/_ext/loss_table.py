"""`{loss-table}`: what each loss needs and costs, from its class; `{loss-pictures}`: what each reached on the mixture.

Needs and bias are the traits that set-up and tests hold a class to.  What is measured is read from the README's table
of losses and from the section of `benchmarks/RESULTS.md` behind it.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lightning_tilt import losses
from lightning_tilt.interfaces import Loss

__all__ = ["LossPictures", "LossTable", "measured", "panels", "setup", "traits"]

ROOT = Path(__file__).resolve().parent.parent.parent
HEAD = ["loss", "needs", "on policy", "bias of its fixed point", "noise of its gradient", "forwards a pair"]


def classes() -> list[type[Loss]]:
    """All losses that the package exports, in the README's order."""
    found = [getattr(losses, name) for name in losses.__all__]
    order = list(measured())
    found = [value for value in found if isinstance(value, type) and issubclass(value, Loss)]
    return sorted(found, key=lambda loss: order.index(loss.__name__) if loss.__name__ in order else -1)


def measured() -> dict[str, dict[str, str]]:
    """Rows of the README's table of losses by the names of the classes that a row begins with."""
    section = (ROOT / "README.md").read_text().split("## Which loss", 1)[1].split("\n\n| loss", 1)[1]
    head, _, *rows = ("| loss" + section.split("\n\n", 1)[0]).splitlines()
    columns, found = [cell.strip() for cell in head.strip("| ").split("|")], dict[str, dict[str, str]]()
    for row in rows:
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        names = re.findall(r"`([A-Z]\w+)`", cells[0])
        for i, name in enumerate(names):
            # Where a row of several losses has a number each, they stand in the order of the names.
            each = [cell.split(", ") for cell in cells]
            own = [part[i] if 1 < len(names) == len(part) else cell for part, cell in zip(each, cells, strict=True)]
            found[name] = dict(zip(columns, own, strict=True))
    return found


def traits(loss: type[Loss]) -> list[str]:
    """What a class says of itself, as cells of the table: its needs, whether it is on policy, and its bias in words."""
    needs = {
        "reward gradient": loss.needs_reward_gradient,
        "paths": loss.needs_path,
        "noise": loss.needs_noise,
        "memoryless": loss.needs_memoryless,
    }
    found = ", ".join(name for name, needed in needs.items() if needed) or "end points"
    return [found, "yes" if loss.on_policy else "any policy", loss.bias or "none"]


def reached() -> dict[str, dict[str, str]]:
    """Rows of the section `losses` of `benchmarks/RESULTS.md` by configuration."""
    text = (ROOT / "benchmarks/RESULTS.md").read_text().split("<!-- losses: begin -->", 1)[1]
    head, _, *rows = (re.split(r" ?\| ?", line)[1:-1] for line in re.findall(r"^\|.+", text.split("<!--")[0], re.M))
    return {row[0]: dict(zip((cell.strip("*") for cell in head), row, strict=True)) for row in rows}


def panels() -> dict[str, tuple[str, str]]:
    """What stands under the picture of a configuration of `configs/toy`: its class with the variant, what it reached.

    In the README's order; of an ODE, which has no path weights, the sliced W2 to the exact tilt alone.
    """
    rows, figures, found = measured(), reached(), dict[tuple[int, int], tuple[str, str, str]]()
    for path in (ROOT / "configs/toy").glob("*.yaml"):
        model = yaml.safe_load(path.read_text())["model"]
        name, variant = model["class_path"].removesuffix("Task"), _variant(model["init_args"])
        variants = re.findall(r"\w+", rows[name]["loss"].partition("(")[2]) if variant else [""]
        means = ((kind, figures[path.stem][kind].partition(" ")[0]) for kind in ("ESS", "sliced W2"))
        words = [f"{kind} {float(mean):.2f}".replace(" 0.", " .") for kind, mean in means if mean != "-"]
        place = list(rows).index(name), variants.index(variant)
        found[place] = (path.stem, name + (variant and f", {variant}"), ", ".join(words))
    return {stem: (name, words) for _, (stem, name, words) in sorted(found.items())}


def _variant(arguments: dict[str, Any]) -> str:
    return str(arguments.get("variant", arguments.get("objective", "")))


class LossTable(SphinxDirective):
    """A row a loss."""

    def run(self) -> list[nodes.Node]:
        """A table of the page's own markup, so that names become links."""
        known, lines = measured(), ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
        for loss in classes():
            name = loss.__name__
            if name not in known:
                raise self.error(f"README's table of losses has no row for `{name}`")
            row = known[name]
            link = f"{{py:obj}}`{name} <{loss.__module__}.{name}>`"
            cells = [link, *traits(loss), row["noise of its gradient"], row["forwards a pair"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        found = self.parse_text_to_nodes("\n".join(lines))
        for table in found:
            table["classes"].append("losses")
        return found


class LossPictures(SphinxDirective):
    """A panel a configuration of `configs/toy`, with its class and what it reached."""

    def run(self) -> list[nodes.Node]:
        """Figures in a row that wraps; a configuration without a picture is an error."""
        box = nodes.container(classes=["panels"])
        for stem, (name, reached) in panels().items():
            picture = ROOT / "docs/pictures" / f"{stem}.png"
            if not picture.is_file():
                raise self.error(f"docs/pictures/{stem}.png is missing: make docs-pictures")
            self.env.note_dependency(str(picture))
            figure = nodes.figure(classes=["panel"])
            figure += nodes.image(uri=f"pictures/{stem}.png", alt=f"Samples of {name} on contours of the exact tilt")
            caption = nodes.caption()
            caption += [nodes.strong(text=name), nodes.Text(f" {reached} "), nodes.literal(text=stem)]
            figure += caption
            box += figure
        return [box]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register both."""
    app.add_directive("loss-table", LossTable)
    app.add_directive("loss-pictures", LossPictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
