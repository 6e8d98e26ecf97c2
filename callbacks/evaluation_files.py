"""What an evaluation leaves: tables for people, tables for programs, a picture, a page.

    evaluation.json         the figures, with what they are
    evaluation.csv          a row a measure: base, tuned, difference, each with its standard error
    evaluation_samples.csv  a row a sample
    evaluation.png          base and tuned samples from the same noise
    evaluation.html         all of it on one page that needs no network

The names are these, whatever the prompts are.  Earlier ones are kept under the next free number.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from ..run_folder import set_aside, write_csv, write_json, write_text
from .evaluation_figures import Pairs
from .evaluation_page import page, show
from .pictures import before_after

__all__ = ["measures", "write_evaluation"]

_KINDS = ("base", "tuned", "difference")


def write_evaluation(folder: Path, report: dict[str, Any], found: Sequence[Pairs]) -> None:
    """Write all files into the run's folder and print the table.

    Args:
        folder: of the run.
        report: what `figures` returned, with what else is known of the run.
        found: all prompts.
    """
    write_json(folder / "evaluation.json", report)
    write_csv(folder / "evaluation.csv", _summary_rows(report))
    write_csv(folder / "evaluation_samples.csv", _sample_rows(found))
    pictured = [pairs for pairs in found if pairs.images is not None]
    if pictured:
        set_aside(folder / "evaluation.png")
        base, tuned = ([pairs.images[side] / 255 for pairs in pictured] for side in (0, 1))  # type: ignore[index]
        before_after(folder / "evaluation.png", [pairs.prompt for pairs in pictured], base, tuned)
    write_text(
        folder / "evaluation.html", page(report, pictured, measures(report), folder / "metrics.csv", _fit(folder))
    )
    _print(report)
    rank_zero_info(f"Evaluation: {folder / 'evaluation.html'} (and .json, .csv, _samples.csv)")


def measures(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a table: a name, and estimates by "base", "tuned", "difference"; None where there is none."""
    rows = [(name, estimates) for name, estimates in report["rewards"].items()]
    rows.append(("diversity", report["diversity"]))
    for name, label in (("path_kl", "path KL"), ("same_noise", "distance")):
        if report["distance"][name] is not None:
            rows.append((label, {"base": None, "tuned": report["distance"][name], "difference": None}))
    return rows


def _summary_rows(report: dict[str, Any]) -> Iterable[Sequence[object]]:
    yield ["measure", *(column for kind in _KINDS for column in (kind, f"{kind}_se")), "n"]
    for name, row in measures(report):
        estimates = [row[kind] or {} for kind in _KINDS]
        yield [name, *(e.get(key) for e in estimates for key in ("mean", "se")), row["tuned"]["n"]]


def _sample_rows(found: Sequence[Pairs]) -> Iterable[Sequence[object]]:
    names = list(found[0].rewards)
    columns = [f"{name}_{kind}" for name in names for kind in _KINDS[:2]]
    yield ["number", "prompt", "sample", *columns, "path_kl", "distance"]
    for number, pairs in enumerate(found):
        for i in range(len(pairs)):
            values = [float(pairs.rewards[name][side, i]) for name in names for side in (0, 1)]
            values += [float("nan") if part is None else float(part[i]) for part in (pairs.kl, pairs.moved)]
            yield [number, pairs.prompt or "", i, *("" if v != v else v for v in values)]


def _fit(folder: Path) -> dict[str, Any]:
    """The report of the fit in the same folder, for the lines of its curves; empty without."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    many = f"{report['prompts']} prompts, " if report["prompts"] else ""
    table = Table(title=f"{many}{report['samples']} samples of either model", box=box.SIMPLE_HEAD, title_style="bold")
    for name in ("", *_KINDS):
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name))
    for name, row in measures(report):
        trained = " (trained)" if name == report["trained_reward"] else ""
        table.add_row(Text(name + trained), *(Text(show(row[kind])) for kind in _KINDS))
    console = Console()
    console.print(table)
    for line in report["warnings"]:
        console.print(Text(f"warning: {line}", style="yellow"), soft_wrap=True)
