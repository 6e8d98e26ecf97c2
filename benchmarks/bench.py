"""All sections of `RESULTS.md`, or those that are named, each by its own script in a process of its own.

    python benchmarks/bench.py [names ...] [--quick] [--out FILE] [flags]          make bench ONLY="names ..."

Times are ratios of numbers from one run, so a slower machine gives much the same table.  `smoke` (8 GB of memory) and
`gpu` (a GPU) are run where they are named.  More flags go to the script, where it is one: `--help` of it tells.
"""

import os
import subprocess
import sys
from pathlib import Path

from results import parser

__all__ = ["NAMED", "SECTIONS", "main"]

HERE = Path(__file__).resolve().parent
SECTIONS = (
    "forwards", "losses", "overhead", "published", "growth", "reward_curves", "wasserstein", "imports",
    "full_size",
)  # fmt: skip
"""Sections that any machine can make; each is the name of a script too."""
NAMED = {"smoke": ["--write"], "gpu": []}
"""Sections that ask for more, with the flags that write them."""


def main() -> None:
    """Run what the command line names, all of it even where a section fails."""
    arguments = parser(__doc__)
    known = [*SECTIONS, *NAMED]
    arguments.add_argument("names", nargs="*", metavar="names", help=", ".join(known))
    args, more = arguments.parse_known_args()
    if more and len(args.names) != 1:
        raise SystemExit(f"{' '.join(more)}: name the one section whose flags these are")
    unknown = [name for name in args.names if name not in known]
    if unknown:
        raise SystemExit(f"there is no section {unknown[0]!r}; there are {', '.join(known)}")
    if args.quick and set(args.names) & set(NAMED):
        raise SystemExit(f"{', '.join(NAMED)} have no quick size")
    given = [*(["--quick"] if args.quick else []), *(["--out", str(args.out.resolve())] if args.out else []), *more]
    failed = []
    for name in args.names or SECTIONS:
        command = [sys.executable, str(HERE / f"{name}.py"), *NAMED.get(name, []), *given]
        environment = os.environ if name in NAMED else os.environ | {"OMP_NUM_THREADS": "1"}
        print(f"-- {name}", flush=True)
        if subprocess.run(command, cwd=HERE.parent, env=environment).returncode != 0:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
