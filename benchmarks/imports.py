"""What importing the package and asking for help cost, in imports of lightning.

    python benchmarks/imports.py [--repeats 2]

CPU seconds of fresh processes; of each command the least of the repeats, which take turns.
"""

import os
import resource
import subprocess
import sys

from results import markdown, parser, publish

__all__ = ["COMMANDS", "cpu_seconds", "main"]

COMMANDS = {
    "`import lightning`": ["-c", "import lightning"],
    "`import torch`": ["-c", "import torch"],
    "`import lightning_tilt`": ["-c", "import lightning_tilt"],
    "`from lightning_tilt import AdjointMatching`": ["-c", "from lightning_tilt import AdjointMatching"],
    "`lightning-tilt --help`": ["-m", "lightning_tilt", "--help"],
    "`lightning-tilt fit --help`": ["-m", "lightning_tilt", "fit", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of `python COMMAND` in a fresh process, its children's included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=2)
    args = arguments.parse_args()
    turns = [{name: cpu_seconds(c) for name, c in COMMANDS.items()} for _ in range(1 if args.quick else args.repeats)]
    least = {name: min(turn[name] for turn in turns) for name in COMMANDS}
    first = least["`import lightning`"]
    rows = [[name, f"{seconds / first:.2f}"] for name, seconds in least.items()]
    text = (
        f"CPU seconds of a fresh process in those of `import lightning`, the least of {len(turns)}. `import "
        "lightning_tilt` alone loads nothing until a name of it is used."
    )
    publish("imports", "Imports", [text, markdown(["command", "imports of lightning"], rows)], args, "no seed")


if __name__ == "__main__":
    main()
