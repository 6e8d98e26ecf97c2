"""Every section of `benchmarks/RESULTS.md` can be made anew, by the command that it names."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = (BENCHMARKS / "RESULTS.md").read_text()
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
import results  # noqa: E402
import reward_curves  # noqa: E402
import torch  # noqa: E402
from published_algorithm import PublishedAdjointMatching  # noqa: E402
from reward_curves import Curve  # noqa: E402

from lightning_tilt.assets import folder  # noqa: E402
from lightning_tilt.rewards import Ink  # noqa: E402


def section(name: str) -> str:
    """What stands between a section's marks."""
    return RESULTS[RESULTS.index(f"<!-- {name}: begin -->") : RESULTS.index(f"<!-- {name}: end -->")]


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    results.write_section("one", "first", file)
    results.write_section("two", "second", file)
    results.write_section("one", "third", file)
    text = file.read_text()
    assert text.startswith("# Results") and "first" not in text
    assert text.index("third") < text.index("second") and text.count("<!-- one: begin -->") == 1


def test_a_quick_run_is_written_nowhere_unless_it_is_told_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "RESULTS.md"
    monkeypatch.setattr(results, "FILE", file)
    results.publish("x", "X", ["body"], results.parser("A.").parse_args(["--quick"]))
    assert not file.exists()
    results.publish("x", "X", ["body"], results.parser("A.").parse_args([]))
    text = file.read_text()
    assert "## X" in text and "body" in text and "`make bench ONLY=x`, seed 0" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and "Python" in text


def test_every_section_has_its_script_its_figures_and_its_command() -> None:
    for name in bench.SECTIONS:
        assert (BENCHMARKS / f"{name}.py").is_file()
        text = section(name)
        assert f"`make bench ONLY={name}`" in text and "torch" in text and "seed" in text
    for name in bench.NAMED:
        assert (BENCHMARKS / f"{name}.py").is_file() and f"`make bench ONLY={name}`" in RESULTS
    assert set(re.findall(r"<!-- (\w+): begin -->", RESULTS)) <= {*bench.SECTIONS, *bench.NAMED}
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", RESULTS):
        assert (BENCHMARKS / picture).is_file()


def table(name: str) -> list[list[str]]:
    """The cells of a section's first table, without its head."""
    lines = re.findall(r"^\| (.+) \|$", section(name), re.MULTILINE)
    return [line.split(" | ") for line in lines[2:]]


OF_CLASS = {
    "TiltMatching": ["tilt_matching_explicit", "tilt_matching_implicit", "tilt_matching_weighted"],
    "CMCD": ["cmcd_log_variance", "cmcd_kl"],
    "NETS": ["nets_pinn", "nets_action_matching"],
    "GRPO": ["grpo"],
}


def configs_of(name: str) -> list[str]:
    """The configs of `configs/toy` behind a class in the README's table."""
    return OF_CLASS.get(name, [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()])


def rounded(figures: list[str]) -> str:
    """To two digits, in the README's manner."""
    return ", ".join(f"{float(figure.split()[0]):.2f}".lstrip("0") for figure in figures)


def test_the_readmes_table_of_losses_is_the_sections() -> None:
    """Cost, ESS with its steps, and distance, each rounded from its section, in the order of the row's names."""
    sections = {cells[0]: cells for cells in table("losses")}
    readme = (ROOT / "README.md").read_text().split("## Which loss", 1)[1].split("## ", 1)[0]
    seen = []
    for line in re.findall(r"^\| (`.+) \|$", readme, re.MULTILINE):
        cells = line.split(" | ")
        configs = [c for name in re.findall(r"`([A-Z]\w+)`", cells[0]) for c in configs_of(name)]
        _, _, chain, _, cost, ess, _, w2, *_ = zip(*(sections[config] for config in configs), strict=True)
        seen += configs
        assert cells[5] == ", ".join(cost[:1] if len(set(cost)) == 1 else cost), line
        assert cells[6] == ("-" if "-" in ess else f"{rounded(list(ess))} ({chain[0].split()[0]})"), line
        assert cells[7] == rounded(list(w2)), line
    assert sorted(seen) == sorted(sections)


def test_a_loss_that_ends_before_the_budget_keeps_what_it_had() -> None:
    """Its last column is where it ended, with its own forwards; a mean over seeds has all of them at every point."""
    seeds = [Curve([0, 4000, 8000, 9000], [0.0, 0.1, 0.2, 0.3], 9), Curve([0, 4000, 8000], [0.0, 0.3, 0.4], 7)]
    assert reward_curves.row("tilt_matching", seeds, 32_000, 0.5) == [
        "tilt_matching", "end points", "60% (40% to 80%)", "", "", "70% (60% to 80%)", "8 - 9", "7 - 9",
    ]  # fmt: skip
    assert reward_curves._together([c.gain for c in seeds]) == [(0.0, 0.0), (0.1, 0.3), (0.2, 0.4), (0.3, 0.4)]


def test_a_section_that_is_not_there_is_named() -> None:
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "forward"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no section 'forward'; there are forwards," in done.stderr


def test_the_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = importlib.reload(importlib.import_module("full_size")).RECIPES
    families = [path for family in ("sd15", "sd3", "sd35") for path in (ROOT / "configs" / family).glob("*.yaml")]
    assert sorted(recipes) == sorted(families) != []


def test_the_published_algorithm_matches_the_base_where_there_is_no_reward() -> None:
    """lam = 0: adjoints vanish and the tuned copy is the base, so no gradient moves it (but for rounding)."""
    torch.manual_seed(0)
    plain = PublishedAdjointMatching(str(folder("digits-sd15")), Ink().score, 0.0, steps=3, supervised=2)
    plain.optimizer = torch.optim.SGD(plain.tuned.parameters(), lr=1.0)
    before = [p.clone() for p in plain.tuned.parameters()]
    assert plain.update(["a handwritten one"]) == 2
    for old, new in zip(before, plain.tuned.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)


def test_the_published_algorithms_adjoint_is_that_of_a_path_with_its_noise_held() -> None:
    """The sweep is the gradient of -lam r through X_{k+1} = X_k + drift_base(X_k) + the path's own residual."""
    torch.manual_seed(0)
    plain = PublishedAdjointMatching(str(folder("digits-sd15")), Ink().score, 5.0, steps=3, supervised=1)
    told = plain._encode(["a handwritten one"])
    states = plain._rollout(told)
    swept, said = plain._sweep(states, told)
    start = states[0].clone().requires_grad_()
    x = start
    for k in range(3):
        residual = (states[k + 1] - states[k] - plain._drift(plain.base, states[k], k, told)).detach()
        x = x + plain._drift(plain.base, x, k, told) + residual
    (expected,) = torch.autograd.grad(-5.0 * plain.reward(plain._decode(x)).sum(), start)
    torch.testing.assert_close(swept[0], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(said[1], plain._eps(plain.base, states[1], 1, told))


@pytest.mark.parametrize("in_one_call", [True, False])
def test_the_published_algorithms_loss_is_that_of_its_drifts(in_one_call: bool) -> None:
    """1/2 |u + sigma a_{k+1}|^2 with u the difference of the drifts over their noise: the same gradient."""
    torch.manual_seed(0)
    plain = PublishedAdjointMatching(
        str(folder("digits-sd15")), Ink().score, 5.0, steps=4, supervised=2, last=1, in_one_call=in_one_call
    )
    plain.optimizer = torch.optim.SGD(plain.tuned.parameters(), lr=0.0)
    with torch.no_grad():
        for p in plain.tuned.parameters():
            p.mul_(1.05)
    found: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        # What the update has summed up, before it is clipped.
        patch.setattr(
            torch.nn.utils,
            "clip_grad_norm_",
            lambda ps, size: found.extend(p.grad.clone() for p in plain.tuned.parameters()),
        )
        state = torch.random.get_rng_state()
        plain.update(["a handwritten one", "a handwritten seven"])
    torch.random.set_rng_state(state)
    told = plain._encode(["a handwritten one", "a handwritten seven"])
    states = plain._rollout(told)
    adjoints, _ = plain._sweep(states, told)
    total = torch.zeros(())
    chosen = plain._draw()
    assert len(chosen) == 2 and 3 in chosen
    for k in chosen:
        sigma = (2 * plain.d[k]).sqrt()
        with torch.no_grad():
            base = plain._drift(plain.base, states[k], k, told)
        u = (plain._drift(plain.tuned, states[k], k, told) - base) / sigma
        total = total + 0.5 * ((u + sigma * adjoints[k + 1]) ** 2).flatten(1).sum(1).mean() / len(chosen)
    expected = torch.autograd.grad(total, list(plain.tuned.parameters()))
    for gradient, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-2, atol=1e-4 * float(exact.abs().max() + 1e-8))


def test_the_published_algorithm_moves_the_reward_upwards() -> None:
    """The gradient of the first update points to more ink: the summed rewards of the same noise rise."""
    plain = PublishedAdjointMatching(str(folder("digits-sd15")), Ink().score, 50.0, steps=6, supervised=6, lr=3e-4)

    def rewards() -> float:
        torch.manual_seed(1)
        plain._rollout(plain._encode(["a handwritten one", "a handwritten seven"] * 2))
        return float(plain.rewards.mean())

    before = rewards()
    torch.manual_seed(0)
    for _ in range(6):
        plain.update(["a handwritten one", "a handwritten seven"] * 2)
    assert rewards() > before


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.SECTIONS)
def test_every_section_runs_at_its_quick_size(name: str, tmp_path: Path) -> None:
    out = tmp_path / "RESULTS.md"
    command = [sys.executable, str(BENCHMARKS / "bench.py"), name, "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    text = out.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert f"`make bench ONLY={name}`" in text and len(rows) >= 2 and "nan" not in text
    assert [p.name for p in tmp_path.glob("*.png")] == (["reward_curves.png"] if name == "reward_curves" else [])
