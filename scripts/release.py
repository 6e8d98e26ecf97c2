"""Cut a release: one version in three files, a commit, a tag, a wheel and an sdist.

    make release VERSION=0.2.0               builds it and says what would change, but changes nothing
    make release VERSION=0.2.0 ARGS=--yes    edits, runs `make test`, builds into dist/, commits and tags

The version stands in `lightning_tilt/__init__.py`; CITATION.cff repeats it with the date, and the notes of
CHANGELOG.md that stood under Unreleased go under both.  Between releases the code has the version of the last one, and
before the first one that of the first, 0.1.0.  Refused are a version that is not X.Y.Z or not a later one, a tree that
is not clean, a branch other than main or one that lacks what its remote has, and a changelog with nothing to tell.  If
a test, the build or the tag fails, the three files and the branch are put back.  What is built is what is committed:
the commit's own files in a folder of their own, without leftovers of earlier builds.  Pushing and uploading stay with a
person.
"""

import argparse
import datetime
import difflib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from packaging.version import Version

__all__ = ["Refused", "bump_citation", "bump_package", "check", "date_changelog", "main"]

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
"""The sections that Keep a Changelog knows."""


class Refused(Exception):
    """Why there is no release, in one line."""


def bump_package(text: str, version: str) -> str:
    """`lightning_tilt/__init__.py` with the version."""
    return _replace(r'^__version__ = ".*"$', f'__version__ = "{version}"', text, "lightning_tilt/__init__.py")


def bump_citation(text: str, version: str, date: str) -> str:
    """CITATION.cff with the version and the date (ISO) of its release."""
    text = re.sub(r"^date-released: .*\n", "", text, flags=re.M)
    return _replace(r"^version: .*$", f'version: {version}\ndate-released: "{date}"', text, "CITATION.cff")


def date_changelog(text: str, version: str, date: str) -> str:
    """CHANGELOG.md with what was Unreleased under the version and the date (ISO), and an empty Unreleased above it.

    Raises:
        Refused: nothing is written under Unreleased, or under a heading that Keep a Changelog does not know.
    """
    parts = re.split(r"^## \[Unreleased\]\n", text, flags=re.M)
    if len(parts) != 2:
        raise Refused(f"CHANGELOG.md has {len(parts) - 1} headings '## [Unreleased]'; one is needed")
    notes = re.split(r"^## ", parts[1], flags=re.M)[0]
    if not re.search(r"^- ", notes, re.M):
        raise Refused("CHANGELOG.md tells nothing under Unreleased; write what a user will see")
    if unknown := set(re.findall(r"^### (.*)$", notes, re.M)) - set(KINDS):
        raise Refused(f"CHANGELOG.md has a section {min(unknown)!r} under Unreleased; sections are {', '.join(KINDS)}")
    return f"{parts[0]}## [Unreleased]\n\n## [{version}] - {date}\n{parts[1]}"


def check(version: str) -> None:
    """Refuse a version, a tree or a branch that cannot be released.

    Raises:
        Refused: with the reason and the mend.
    """
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise Refused(f"{version!r} is no version; write three numbers, VERSION=0.2.0")
    if changed := _git("status", "--porcelain").splitlines():
        raise Refused(f"{len(changed)} files are not committed, {changed[0][3:]} first; commit or stash them")
    if (branch := _git("branch", "--show-current")) != "main":
        raise Refused(f"this is branch {branch or '(none)'}; releases are cut on main: git switch main")
    _check_remote()
    tags = [tag[1:] for tag in _git("tag", "--list", "v*").splitlines() if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    last = max(tags, key=Version, default="")
    if last and Version(version) <= Version(last):
        raise Refused(f"{version} does not come after {last}, which is released; take a higher version")
    (now,) = re.findall(r'^__version__ = "(.*)"$', (ROOT / "lightning_tilt/__init__.py").read_text(), re.M)
    if Version(version) < Version(now):
        raise Refused(f"{version} is lower than {now} in lightning_tilt/__init__.py; take a higher version")


def _check_remote() -> None:
    """Refuse a main that lacks commits of its remote: they would not be built, and the push would fail."""
    if remote := _git("config", "--get", "--default", "", "branch.main.remote"):
        told = _git("ls-remote", remote, _git("config", "--get", "--default", "refs/heads/main", "branch.main.merge"))
        command = ["git", "merge-base", "--is-ancestor", told.split("\t")[0] or "HEAD", "HEAD"]
        if subprocess.run(command, cwd=ROOT, capture_output=True).returncode != 0:
            raise Refused(f"main lacks commits that {remote} has: git pull --rebase {remote} main")


def main(args: list[str] | None = None) -> None:
    """Cut a release, or say what it would be; exit status 1 and one line where there can be none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="X.Y.Z")
    parser.add_argument("--yes", action="store_true", help="do it; without this nothing is changed")
    parser.add_argument("--check", default="make test", help="what has to pass first (default: %(default)s)")
    given = parser.parse_args(args)
    try:
        check(given.version)
        edits = _edits(given.version, datetime.date.today().isoformat())
        with tempfile.TemporaryDirectory() as folder:
            if not given.yes:
                built = _build(edits, Path(folder))
                _tell(edits)
                print(f"\n--yes runs `{given.check}`, commits, tags v{given.version} and builds {_names(built)}.")
                return
            built = _release(given.version, edits, given.check, Path(folder))
    except Refused as reason:
        sys.exit(f"release: error: {reason}")
    print(f"Committed, tagged v{given.version} and built {_names(built)}.  What is left:")
    print(f"    git push origin main v{given.version}\n    twine upload " + " ".join(f"dist/{b.name}" for b in built))


def _edits(version: str, date: str) -> dict[str, str]:
    changes: dict[str, Callable[[str], str]] = {
        "lightning_tilt/__init__.py": lambda text: bump_package(text, version),
        "CITATION.cff": lambda text: bump_citation(text, version, date),
        "CHANGELOG.md": lambda text: date_changelog(text, version, date),
    }
    return {name: change((ROOT / name).read_text()) for name, change in changes.items()}


def _release(version: str, edits: dict[str, str], command: str, folder: Path) -> list[Path]:
    start = _git("rev-parse", "HEAD")
    try:
        _write(edits, ROOT)
        if subprocess.run(shlex.split(command), cwd=ROOT).returncode != 0:
            raise Refused(f"`{command}` failed; nothing was changed")
        built = _build(edits, folder)
        _git("commit", "--quiet", "--message", f"Release {version}", "--", *edits)
        _git("tag", "--annotate", f"v{version}", "--message", f"Release {version}")
    except BaseException:
        _git("reset", "--quiet", start)
        _git("checkout", "--quiet", "HEAD", "--", *edits)
        raise
    (ROOT / "dist").mkdir(exist_ok=True)
    return [Path(shutil.copy(path, ROOT / "dist")) for path in built]


def _build(edits: dict[str, str], folder: Path) -> list[Path]:
    """Wheel and sdist of the last commit with the edits, their metadata checked."""
    source, out = folder / "source", folder / "dist"
    out.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(source, filter="data")
    _write(edits, source)
    for kind in ("wheel", "sdist"):
        program = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        run = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
        if run.returncode != 0:
            raise Refused(f"the {kind} could not be built: {run.stderr.strip().splitlines()[-1]}")
    built = sorted(out.iterdir())
    if importlib.util.find_spec("twine") is None:
        print("The metadata were not checked: twine is not installed (pip install twine).")
    elif (run := subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built])).returncode != 0:
        raise Refused("twine refuses the metadata; see above")
    return built


def _tell(edits: dict[str, str]) -> None:
    for name, text in edits.items():
        old = (ROOT / name).read_text()
        diff = difflib.unified_diff(old.splitlines(), text.splitlines(), name, name, n=1, lineterm="")
        print("\n".join(diff))


def _write(edits: dict[str, str], root: Path) -> None:
    for name, text in edits.items():
        (root / name).write_text(text)


def _names(built: list[Path]) -> str:
    return " and ".join(path.name for path in built)


def _replace(pattern: str, new: str, text: str, name: str) -> str:
    replaced, times = re.subn(pattern, lambda _: new, text, flags=re.M)
    if times != 1:
        raise Refused(f"{name} has {times} lines that name the version; one is needed")
    return replaced


def _git(*args: str) -> str:
    run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise Refused(f"git {args[0]}: {run.stderr.strip()}")
    return run.stdout.rstrip("\n")


if __name__ == "__main__":
    main()
