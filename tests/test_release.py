"""A release changes three files and no more, builds what it commits, and is refused where it would be wrong."""

import importlib.util
import re
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from repository import ROOT, files

import lightning_tilt

SPEC = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
assert SPEC is not None and SPEC.loader is not None
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)

EDITED = ["CHANGELOG.md", "CITATION.cff", "lightning_tilt/__init__.py"]
NOTES = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- One.\n\n## [0.1.0] - 2025-01-02\n\n### Added\n\n- Zero.\n"


def git(root: Path, *args: str) -> str:
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    done = subprocess.run(["git", *identity, *args], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository of its own with the files of this one, as they lie here, and one commit."""
    root = tmp_path / "clone"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch", "main")
    git(root, "config", "user.name", "Somebody")
    git(root, "config", "user.email", "somebody@example.org")
    for path in files():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes((ROOT / path).read_bytes())
    for link in (link for link in (ROOT / "lightning_tilt").iterdir() if link.is_symlink()):
        (root / "lightning_tilt" / link.name).symlink_to(link.readlink())
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "all")
    return root


def cut(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "scripts/release.py", *args], cwd=root, capture_output=True, text=True)


def metadata(wheel: Path) -> str:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return str(Parser().parsestr(archive.read(name).decode())["Version"])


def test_a_dry_run_changes_nothing(clone: Path) -> None:
    run = cut(clone, "7.8.9")
    assert run.returncode == 0, run.stderr
    assert '+__version__ = "7.8.9"' in run.stdout
    assert "+## [7.8.9] - " in run.stdout
    assert (
        "tags v7.8.9 and builds lightning_tilt-7.8.9-py3-none-any.whl and lightning_tilt-7.8.9.tar.gz.\n" in run.stdout
    )
    assert git(clone, "status", "--porcelain", "--ignored") == ""
    assert git(clone, "tag") == ""


def test_a_release(clone: Path) -> None:
    run = cut(clone, "7.8.9", "--yes", "--check", "git diff --exit-code HEAD -- README.md")
    assert run.returncode == 0, run.stderr
    assert sorted(git(clone, "diff", "--name-only", "HEAD~1").splitlines()) == EDITED
    assert git(clone, "describe", "--exact-match") == "v7.8.9"
    assert git(clone, "status", "--porcelain") == ""
    citation = yaml.safe_load((clone / "CITATION.cff").read_text())
    assert citation["version"] == "7.8.9"
    headings = re.findall("^## (.*)$", (clone / "CHANGELOG.md").read_text(), re.M)
    assert headings[:2] == ["[Unreleased]", f"[7.8.9] - {citation['date-released']}"]
    assert {path.name for path in (clone / "dist").iterdir()} == {
        "lightning_tilt-7.8.9-py3-none-any.whl", "lightning_tilt-7.8.9.tar.gz"
    }  # fmt: skip
    assert metadata(clone / "dist" / "lightning_tilt-7.8.9-py3-none-any.whl") == "7.8.9"

    assert cut(clone, "7.8.9").stderr == (
        "release: error: 7.8.9 does not come after 7.8.9, which is released; take a higher version\n"
    )
    assert cut(clone, "7.9.0").stderr == (
        "release: error: CHANGELOG.md tells nothing under Unreleased; write what a user will see\n"
    )


def test_refusals(clone: Path) -> None:
    for version in ("7.8", "v7.8.9", "7.8.9rc1", "7.08.9", ""):
        assert f"{version!r} is no version; write three numbers" in cut(clone, version).stderr
    assert "0.0.1 is lower than " in cut(clone, "0.0.1").stderr
    failed = cut(clone, "7.8.9", "--yes", "--check", "git diff --exit-code --quiet HEAD")
    assert failed.returncode == 1
    assert failed.stderr.endswith("`git diff --exit-code --quiet HEAD` failed; nothing was changed\n")
    assert git(clone, "status", "--porcelain", "--ignored") == ""
    assert git(clone, "log", "--format=%s") == "all"

    (clone / "new.py").write_text("")
    assert "error: 1 files are not committed, new.py first; commit or stash them" in cut(clone, "7.8.9").stderr
    (clone / "new.py").unlink()
    git(clone, "switch", "--quiet", "--create", "other")
    assert "this is branch other; releases are cut on main" in cut(clone, "7.8.9").stderr


def test_a_tag_that_fails_takes_the_commit_back(clone: Path) -> None:
    git(clone, "config", "tag.gpgSign", "true")
    git(clone, "config", "gpg.program", "false")
    failed = cut(clone, "7.8.9", "--yes", "--check", "true")
    assert (failed.returncode, failed.stderr.startswith("release: error: git tag: ")) == (1, True), failed.stderr
    assert git(clone, "log", "--format=%s") == "all"
    assert git(clone, "status", "--porcelain", "--ignored") == ""


def test_what_the_remote_has_is_not_left_out(clone: Path, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch", "main", "remote.git")
    git(clone, "remote", "add", "origin", "../remote.git")
    git(clone, "push", "--quiet", "--set-upstream", "origin", "main")
    git(clone, "commit", "--quiet", "--allow-empty", "--message", "not pushed yet")
    assert cut(clone, "0.0.1").stderr.startswith("release: error: 0.0.1 is lower than ")  # being ahead is no harm
    git(clone, "push", "--quiet")
    git(clone, "reset", "--quiet", "--hard", "HEAD~1")
    wanted = "release: error: main lacks commits that origin has: git pull --rebase origin main\n"
    assert cut(clone, "7.8.9").stderr == wanted


def test_changelogs() -> None:
    dated = release.date_changelog(NOTES, "0.2.0", "2026-03-04")
    assert "## [Unreleased]\n\n## [0.2.0] - 2026-03-04\n\n### Added\n\n- One.\n\n## [0.1.0]" in dated
    assert dated.replace("\n\n## [0.2.0] - 2026-03-04", "") == NOTES
    with pytest.raises(release.Refused, match="tells nothing under Unreleased"):
        release.date_changelog(dated, "0.3.0", "2026-03-05")
    with pytest.raises(release.Refused, match=r"has a section 'New' under Unreleased; sections are Added, Changed"):
        release.date_changelog(NOTES.replace("### Added", "### New", 1), "0.2.0", "2026-03-04")
    with pytest.raises(release.Refused, match=r"has 0 headings '## \[Unreleased\]'"):
        release.date_changelog(NOTES.replace("[Unreleased]", "[Unreleased] 0.2.0"), "0.2.0", "2026-03-04")


def test_one_line_has_the_version() -> None:
    with pytest.raises(release.Refused, match=r"lightning_tilt/__init__.py has 2 lines that name the version"):
        release.bump_package('__version__ = "1"\n__version__ = "2"\n', "3.0.0")
    text = 'version: 1.0.0\ndate-released: "2025-01-01"\ntype: software\n'
    again = release.bump_citation(text, "1.1.0", "2026-01-01")
    assert yaml.safe_load(again) == {"version": "1.1.0", "date-released": "2026-01-01", "type": "software"}


def test_the_changelog_is_kept() -> None:
    """Headings are Unreleased and then released versions, newest first, with a date and known sections."""
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *released = re.findall(r"^## (.*)$", text, re.M)
    assert first == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", heading) for heading in released]
    assert all(found), released
    versions = [tuple(map(int, match[1].split("."))) for match in found if match]
    assert versions == sorted(set(versions), reverse=True)
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= set(release.KINDS)
    last = ".".join(map(str, versions[0])) if versions else "0.1.0"
    assert lightning_tilt.__version__ == last  # which a first release does not change


def test_the_first_release_has_the_version_of_the_code(clone: Path) -> None:
    for name, text in (("CHANGELOG.md", NOTES.partition("\n## [0.1.0]")[0]), ("CITATION.cff", "version: 0.1.0\n")):
        (clone / name).write_text(text)
    (clone / "lightning_tilt/__init__.py").write_text('__version__ = "0.1.0"\n')
    git(clone, "commit", "--quiet", "--all", "--message", "before the first release")
    run = cut(clone, "0.1.0")
    assert run.returncode == 0, run.stderr
    assert "+## [0.1.0] - " in run.stdout and "__version__" not in run.stdout
