"""Every loss on the two-dimensional mixture, whose tilt is known in closed form: the figures of the README's table.

Losses on paths come first, those on noised end points after them.

    python benchmarks/losses.py                                  all of configs/toy, seeds 0 1 2
    python benchmarks/losses.py cmcd_kl nets_pinn --seeds 0      some of them

Each run is the committed config in a fresh process on one thread; its report is read back.  ESS and log Z belong to the
chain that the report names; log Z is shown as (log Z - exact)/s.e., with the chain's own log Z where the estimator is
of the control form, else that of the density.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from digits_losses import looks_at
from results import markdown, parser, publish, span

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "config", "looks at", "chain", "1,000 pairs", "forwards a pair", "**ESS**", "log Z", "**sliced W2**", "floor",
    "way",
)  # fmt: skip


def family(name: str) -> str:
    """What the loss of a config of `configs/toy` looks at."""
    return looks_at(yaml.safe_load((ROOT / f"configs/toy/{name}.yaml").read_text())["model"]["class_path"])


def run(name: str, seed: int, folder: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """One config, one seed: its report."""
    subprocess.run(
        [
            sys.executable, "-m", "lightning_tilt", "fit", "--config", f"configs/toy/{name}.yaml",
            "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), *flags,
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def deviation(log_z: dict[str, Any]) -> float:
    """How many standard errors log Z is from the exact one."""
    own = log_z["exact"] is not None
    target, error = (log_z["exact"], log_z["exact_se"] or 0.0) if own else (log_z["continuous"], 0.0)
    return float((log_z["mean"] - target) / (log_z["se"] ** 2 + error**2) ** 0.5)


def row(name: str, reports: Sequence[dict[str, Any]]) -> list[str]:
    """A line of the table: one loss at all seeds."""
    first = reports[0]
    weighted = first["ess"] is not None and first["log_z"] is not None
    cost = mean(r["evaluations"]["forwards_per_pair"] for r in reports)
    return [
        name, family(name), first["chain"].replace(" steps of ", " x "),
        f"{mean(r['evaluations']['pairs'] for r in reports) / 1e3:,.0f}", f"{cost:.1f}",
        span([r["ess"] for r in reports], ".3f") if weighted else "-",
        ", ".join(f"{deviation(r['log_z']):+.1f}" for r in reports) if weighted else "-",
        span([r["sliced_w2"]["value"] for r in reports], ".3f"), f"{first['sliced_w2']['floor']:.3f}",
        span([r["way"] for r in reports], ".0%"),
    ]  # fmt: skip


def main() -> None:
    """Run what the command line names."""
    arguments = parser(__doc__)
    stems = sorted(p.stem for p in (ROOT / "configs/toy").glob("*.yaml"))
    known = sorted(stems, key=family, reverse=True)
    arguments.add_argument("names", nargs="*", default=known, metavar="names", help=", ".join(known))
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    args = arguments.parse_args()
    seeds, names = ([0], args.names[::7]) if args.quick else (args.seeds, args.names)
    flags = ["--trainer.max_steps", "4"] if args.quick else []

    def report(name: str, seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return run(name, seed, Path(folder), flags)

    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        started = {name: [pool.submit(report, name, seed) for seed in seeds] for name in names}
        for name, runs in started.items():
            rows.append(row(name, [one.result() for one in runs]))
            print(" | ".join(rows[-1]), flush=True)
    text = (
        "The two-dimensional mixture by the configs of `configs/toy` as they are, about a minute on one core each: "
        f"the mean of seeds {', '.join(map(str, seeds))}, in brackets the least and the greatest. ESS is that of the "
        "path weights of the chain that is named, log Z how many of its standard errors it is from the exact one, seed "
        "by seed (the exact one of a chain is from base samples that all losses share, so a seed's go together). "
        "Sliced W2 is that of the tuned samples to the exact tilt, the base is at about .5; its floor is that of truth "
        "against truth at the same number of samples. Way: how far the mean reward went from base to exact tilt. An "
        "ODE has no path weights."
    )
    publish(
        "losses",
        "Every loss on the mixture, paths and end points side by side",
        [text, markdown(HEADER, rows)],
        args,
        f"seeds {' '.join(map(str, seeds))}",
    )


if __name__ == "__main__":
    main()
