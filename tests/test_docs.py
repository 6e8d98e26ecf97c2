"""The site of the documentation: every public name is on a page, formulas and links survive, and it builds strictly.

The small extensions under docs/_ext are read here without Sphinx where they can be; `make docs` runs them all.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT

from lightning_tilt import losses
from lightning_tilt.interfaces import Loss


def extension(name: str) -> ModuleType:
    if name in ("docstrings", "loss_table", "mathml"):
        pytest.importorskip("sphinx", reason="pip install -e '.[docs]'")
    path = ROOT / "docs" / "_ext" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_documented_and_on_a_page() -> None:
    api = extension("api_pages")
    known = api.modules()
    assert api.homeless(known) == []
    assert api.undocumented(known) == []
    text = "\n".join(api.page(key, known) for key in api.ROOMS)
    for module in known.values():
        assert text.count(f".. automodule:: {module.name}\n") == 1, module.name
        members = text.split(f".. automodule:: {module.name}\n")[1].split("\n\n")[0]
        shown = re.findall(r"\w+", members.partition(":members:")[2])
        handed = [name for name in module.public if name not in shown]
        assert all(f":py:obj:`{name} <{api.home(module, name, known)}>`" in text for name in handed), module.name
        for name in handed:
            home, _, last = api.home(module, name, known).rpartition(".")
            assert last in known[home].own, f"{module.name}.{name} is shown nowhere"


def test_what_is_public_and_bare_is_named(tmp_path: Path) -> None:
    api = extension("api_pages")
    source = (
        '__all__ = ["A", "f", "g", "B", "C"]\nfrom os import sep as g\nA = 1\nB, C = 1, 2\n"""Both."""\ndef f(): ...\n'
    )
    path = tmp_path / "bare.py"
    path.write_text(source)
    known = {"lightning_tilt.attic.bare": api.Module("lightning_tilt.attic.bare", path)}
    assert api.undocumented(known) == [
        f"lightning_tilt.attic.bare.{name} is public and has no docstring" for name in ("A", "f")
    ]
    assert [line.split(" is on no page")[0] for line in api.homeless(known)] == ["lightning_tilt.attic.bare"]
    assert known["lightning_tilt.attic.bare"].own == ["A", "f", "B", "C"]


def test_links_of_a_site_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    links = extension("built_links")
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#part">1</a><a href="#top">2</a><a href="https://arxiv.org">3</a>'
        '<img src="picture.png"><img src="data:image/png;base64,AA">'
    )
    (tmp_path / "b.html").write_text('<p id="part"></p><script src="s.js"></script><a href="a.html">4</a>')
    (tmp_path / "picture.png").touch()
    (tmp_path / "s.js").touch()
    assert links.complaints(tmp_path) == []
    (tmp_path / "picture.png").unlink()
    (tmp_path / "b.html").write_text('<script src="https://cdn.example/s.js"></script><a href="a.html#bottom">4</a>')
    assert links.complaints(tmp_path) == [
        "a.html: b.html#part names no anchor there",
        "a.html: picture.png leads nowhere",
        "b.html: https://cdn.example/s.js is loaded from the network",
        "b.html: a.html#bottom names no anchor there",
    ]


def test_docstrings_keep_their_formulas() -> None:
    to_rst = extension("docstrings").to_rst
    text = to_rst(
        "The **lean** `a_k` of |u|^2, p*(x) and x_:\n\n    a_K = -lam grad r\n\nw = exp(r)      weights\n\n"
        "Traits:\n    one: a thing,\n        or two.\n\nArgs:\n    x: |x| is `here`."
    )
    assert text.splitlines() == [
        "The **lean** ``a_k`` of \\|u\\|^2, p\\*(x) and x\\_:", "", "::", "", "    a_K = -lam grad r", "",
        "    w = exp(r)      weights", "", "Traits:", "", "* ``one``: a thing,", "  or two.", "", "Args:",
        "    x: \\|x\\| is ``here``.",
    ]  # fmt: skip


def test_a_notebook_becomes_a_page() -> None:
    page = extension("notebook_pages").page
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["1\n", "2\n"]},
        {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": ["<Figure>"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# One\n", "[two](02_x.ipynb), [many](../docs/cluster.md)"]},
        {"cell_type": "code", "source": ["print(1)\n", "print(2)"], "outputs": outputs},
    ]
    found = page({"cells": cells}, "01_y")
    assert found.pop("01_y_0.png") == bytes(3)
    assert found.pop("01_y.md").decode().split("\n\n") == [
        "# One\n[two](02_x.md), [many](../../cluster.md)", "```python\nprint(1)\nprint(2)\n```", "```text\n1\n2\n```",
        "![What the cell above draws](01_y_0.png)\n",
    ] and not found  # fmt: skip
    cells[1]["outputs"] = [{"output_type": "error"}]
    with pytest.raises(ValueError, match=r"01_y.ipynb: an output of error"):
        page({"cells": cells}, "01_y")
    for path in ROOT.glob("notebooks/*.ipynb"):
        made = page(json.loads(path.read_text()), path.stem)
        assert made[f"{path.stem}.md"].startswith(b"# ") and len(made) > 1


def test_formulas_become_mathml() -> None:
    mathml = extension("mathml").mathml
    assert "<msub><mi>a</mi><mi>t</mi></msub>" in mathml("a_t")
    assert "<mi>log</mi><mspace" in mathml(r"\log h") and "<mi>log</mi><mspace" not in mathml(r"\log (h)")
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/theory/*.md")]
    blocks = [b for page in pages for b in re.findall(r"\$\$\n(.+?)\n\$\$", page.read_text(), re.S)]
    assert len(blocks) > 50
    for block in blocks:
        left = mathml(block, "block")  # what the converter does not know stays as it is
        assert "\\" not in left and "&amp;" not in left and "&#x00026;" not in left, block


def test_the_table_has_every_loss() -> None:
    table = extension("loss_table")
    names = [n for n in losses.__all__ if isinstance(v := getattr(losses, n), type) and issubclass(v, Loss)]
    decisions = (ROOT / "docs/which_loss.md").read_text().partition("\n## ")[0]
    assert [name for name in names if f"`{name}`" not in decisions] == []
    assert set(names) == set(table.measured()) == {loss.__name__ for loss in table.classes()}
    costs = {name: table.measured()[name]["forwards a pair"] for name in ("Reinforce", "GRPO", "CMCD")}
    assert costs == {"Reinforce": "5.0", "GRPO": "4.0", "CMCD": "6.0"}  # two of them share a row
    assert table.traits(losses.AdjointMatching) == ["reward gradient, paths, noise, memoryless", "yes", "none"]
    assert table.traits(losses.ReinforceAdjointMatching)[2] == losses.ReinforceAdjointMatching.bias


def test_every_toy_has_its_picture_and_what_it_reached() -> None:
    configs = {path.stem for path in ROOT.glob("configs/toy/*.yaml")}
    table = extension("loss_table")
    panels, order = table.panels(), list(table.measured())
    assert set(panels) == configs and next(iter(panels)) == "adjoint_matching"
    names = [name.partition(",")[0] for name, _ in panels.values()]
    assert names == sorted(names, key=order.index)
    reached = re.compile(r"(ESS \.\d\d, )?sliced W2 \.\d\d")
    assert [stem for stem, (_, numbers) in panels.items() if not reached.fullmatch(numbers)] == []
    assert panels["nets_pinn"][0] == "NETS, pinn" and panels["nets_pinn"][1] != panels["nets_action_matching"][1]
    pictures = {path.stem: path.stat().st_size for path in ROOT.glob("docs/pictures/*.png")}
    assert set(pictures) == configs | {"variances"}
    assert max(pictures.values()) < 40_000


def build(docs: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", str(docs), str(out)]
    environment = os.environ | {"PYTHONPATH": str(docs.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="pip install -e '.[docs]'")
    run = build(ROOT / "docs", tmp_path / "site")
    assert run.returncode == 0, run.stderr
    panels = re.findall(
        r'<figure class="panel[ "].*?<img[^>]* src="([^"]+)"', (tmp_path / "site/which_loss.html").read_text(), re.S
    )
    assert len(panels) == len(list(ROOT.glob("configs/toy/*.yaml")))
    assert extension("built_links").complaints(tmp_path / "site") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "text", "complaint"),
    [
        ("start.md", "[gone](nowhere.md)", "nowhere"),
        ("start.md", "[gone](rewards.md#no-such-part)", "no-such-part"),
        ("start.md", "![gone](no_picture.png)", "no_picture"),
        ("start.md", "```{include} no_file.md\n```", "no_file"),
        ("start.md", "{py:class}`lightning_tilt.losses.NoSuchLoss`", "NoSuchLoss"),
    ],
)
def test_a_broken_page_fails_the_build(page: str, text: str, complaint: str, tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="pip install -e '.[docs]'")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "conf.py").write_text(
        "extensions = ['myst_parser']\nmyst_heading_anchors = 3\nnitpicky = True\nhtml_theme = 'basic'\n"
    )
    shutil.copy(ROOT / "docs" / "rewards.md", docs)
    (docs / "index.md").write_text("# Index\n\n```{toctree}\nstart\nrewards\n```\n")
    (docs / page).write_text(f"# Page\n\n{text}\n")
    run = build(docs, tmp_path / "site")
    assert run.returncode != 0 and complaint in run.stderr
