"""The repository as git sees it."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def files(*patterns: str) -> list[Path]:
    """Paths, relative to the root, that git tracks or would track; a copy without git (an unpacked sdist) skips."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
