"""`{loss-table}`: what each loss needs and costs, from its class; `{loss-pictures}`: what each reached on the mixture.

Needs and bias are the traits that set-up and tests hold a class to.  What is measured, cost and ESS, stands in one
place, the README's table of losses, and is read from there.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lightning_tilt import losses
from lightning_tilt.interfaces import Loss

__all__ = ["LossPictures", "LossTable", "measured", "setup", "traits"]

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
    """A panel a configuration of `configs/toy`, with its first line."""

    def run(self) -> list[nodes.Node]:
        """Figures in a row that wraps; a configuration without a picture is an error."""
        box = nodes.container(classes=["panels"])
        for config in sorted((ROOT / "configs/toy").glob("*.yaml")):
            picture = ROOT / "docs/pictures" / f"{config.stem}.png"
            if not picture.is_file():
                raise self.error(f"docs/pictures/{config.stem}.png is missing: make docs-pictures")
            self.env.note_dependency(str(picture))
            figure = nodes.figure(classes=["panel"])
            alternative = f"Samples of {config.stem} on contours of the exact tilt"
            figure += nodes.image(uri=f"pictures/{config.stem}.png", alt=alternative)
            caption = nodes.caption()
            caption += nodes.literal(text=config.stem)
            figure += caption
            box += figure
        return [box]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register both."""
    app.add_directive("loss-table", LossTable)
    app.add_directive("loss-pictures", LossPictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
