"""Every loss on the two-dimensional mixture: the rows of the README's table.

    python benchmarks/losses.py                                  all of configs/toy, seeds 0 1 2
    python benchmarks/losses.py cmcd_kl nets_pinn --seeds 0      some of them

Each run is the committed config in a fresh process on one thread; its report is read back.  ESS and log Z belong to the
chain that the report names; `z` is (log Z - exact)/s.e., with the chain's own log Z where the estimator is of the
control form, else that of the density.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, seed: int, folder: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """One config, one seed: its report, and the CPU seconds of the whole command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(
        [
            sys.executable, "-m", "lightning_tilt", "fit", "--config", f"configs/toy/{name}.yaml",
            "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), *flags,
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report | {"cpu": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before}


def row(report: dict[str, Any], seed: int) -> str:
    """A line of the table."""
    log_z = report["log_z"]
    shown = "   -       -    "
    if log_z is not None:
        own = log_z["exact"] is not None
        target, error = (log_z["exact"], log_z["exact_se"] or 0.0) if own else (log_z["continuous"], 0.0)
        z = (log_z["mean"] - target) / (log_z["se"] ** 2 + error**2) ** 0.5
        shown = f"{log_z['mean']:7.3f} {z:5.1f}   "
    ess = "  - " if report["ess"] is None else f"{report['ess']:.3f}"
    w2 = report["sliced_w2"]
    cost = report["evaluations"]["forwards_per_pair"]
    return (
        f"{report['loss']:34s} {seed:4d}  {ess:5s} {shown}{w2['value']:.3f} ({w2['floor']:.3f})  {report['way']:6.0%}"
        f"  {cost:6.2f}  {report['cpu']:5.0f}  {report['chain']}"
    )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(p.stem for p in (ROOT / "configs/toy").glob("*.yaml")))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    print(
        "loss                               seed  ESS    log Z     z   sliced W2 (floor)  way    F/pair  CPU s  chain"
    )
    for name in args.names:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                print(row(run(name, seed, Path(folder)), seed), flush=True)


if __name__ == "__main__":
    main()
