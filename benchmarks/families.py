"""Losses on paths and losses on noised end points side by side, on the mixture whose tilt is known.

    python benchmarks/families.py [names ...]

Each is its committed config of `configs/toy`, in a fresh process; see `losses.py` for what is read of its report.
"""

import tempfile
from pathlib import Path
from typing import Any

from losses import run
from results import markdown, parser, publish

__all__ = ["FAMILIES", "main"]

FAMILIES = {
    "adjoint_matching": "paths", "log_variance": "paths", "novel_score_matching": "end points",
    "tilt_matching_explicit": "end points",
}  # fmt: skip


def row(name: str, report: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """A line of the table; what is measured in the first one is divided by it."""
    counted, w2, ess = report["evaluations"], report["sliced_w2"], report["ess"]
    network = counted["forward"] + counted["vjp"] + counted["backward"]
    before = first["evaluations"]
    first_network = before["forward"] + before["vjp"] + before["backward"]
    return [
        name, FAMILIES[name], f"{report['updates']}", f"{counted['pairs'] / before['pairs']:.2f}",
        f"{network / first_network:.2f}", f"{counted['forwards_per_pair']:.1f}",
        "-" if ess is None else f"{ess:.3f}", f"{w2['value']:.3f} ({w2['floor']:.3f})", f"{report['way']:.0%}",
    ]  # fmt: skip


def main() -> None:
    """Run what the command line names."""
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", default=list(FAMILIES), metavar="names", help=", ".join(FAMILIES))
    args = arguments.parse_args()
    flags = ["--trainer.max_steps", "4"] if args.quick else []
    rows, first = [], dict[str, Any]()
    for name in args.names[:: 2 if args.quick else 1]:
        with tempfile.TemporaryDirectory() as folder:
            report = run(name, 0, Path(folder), flags)
        first = first or report
        rows.append(row(name, report, first))
        print(" | ".join(rows[-1]), flush=True)
    text = (
        "The two-dimensional mixture, whose tilt is known in closed form, by configs of `configs/toy` as they are. "
        "Pairs and forwards are in those of the first line. ESS is that of the path weights; an ODE's samples have "
        "none. In brackets the floor of sliced W2: truth against truth at the same number of samples."
    )
    header = ["loss", "looks at", "updates", "pairs", "forwards", "forwards a pair", "ESS", "sliced W2", "way"]
    publish("families", "Paths and end points side by side", [text, markdown(header, rows)], args)


if __name__ == "__main__":
    main()
