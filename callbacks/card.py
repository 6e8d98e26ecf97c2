"""The model card of an exported model: what it is, its figures, how it is loaded, and how it was made.

A card is a README.md with a YAML head, as the Hub reads it.  The licence is left to whoever publishes.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from ..interfaces import ExportablePredictor
from .evaluation_files import measures
from .evaluation_page import show
from .versions import versions

__all__ = ["model_card"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    predictor: ExportablePredictor,
    run: Path,
    since: float,
    *,
    whole: bool,
    chain: str,
    steps: int,
    guidance_scale: float,
    memoryless: bool,
    base_last: bool,
    updates: int | None,
) -> str:
    """The card as text.

    Args:
        predictor: what was exported.
        run: the run's folder, whose `report.json`, `evaluation.json` and `config.yaml` are quoted.
        since: figures of files that are older than this time are another run's, and left out.
        whole: whether the whole pipeline was exported.
        chain: the chain that was tuned, in words.
        steps: of that chain.
        guidance_scale: of that chain.
        memoryless: whether its transitions are the memoryless ones.
        base_last: whether the base makes its last step.
        updates: of the fit; None if unknown.
    """
    fit, test = (_read(run / name, since) for name in ("report.json", "evaluation.json"))
    origin = predictor.origin
    kind = "pipeline" if whole else "weights"
    head: dict[str, Any] = {"library_name": "diffusers", "tags": ["lightning-tilt", "reward-fine-tuning"]}
    if _HUB_NAME.fullmatch(origin) and not Path(origin).exists():
        head["base_model"] = origin
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "# license: the base model's licence binds what is made from it; name yours here",
        "---",
        "",
        f"# {type(predictor).__name__}, tuned ({kind})",
        "",
        f"Tuned from `{origin or 'a base without a name'}` towards a reward r: its law is to be that of the base times "
        "exp(lam r), with lightning_tilt.",
        "",
        *_figures(fit, test, updates),
        *_use(predictor, whole, steps, guidance_scale),
        "## Sampling",
        "",
        f"What was tuned is the chain of {chain}, guidance {guidance_scale:g}"
        + (", whose last step, without noise, the base makes." if base_last else "."),
        *(["Its steps are the memoryless ones: another sampler (an ODE, other steps, other guidance) draws from "
           "another law, near the tilted one and not the same; the figures are of the tuned chain."] if memoryless
          else ["Another sampler draws from another law; the figures are of the tuned chain."]),
        *_decoder(predictor.borrowed_decoder, whole),
        "",
        *_configuration(run / "config.yaml"),
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()) + ".",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _read(path: Path, since: float) -> dict[str, Any]:
    try:
        if path.stat().st_mtime < since - 1:  # clocks of file systems are coarse
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _figures(fit: dict[str, Any], test: dict[str, Any], updates: int | None) -> list[str]:
    if not fit and not test:
        return []
    known = {**test, **fit}
    count = [] if updates is None else [f"{updates} updates"]
    names = [
        ("loss", known.get("loss") or known.get("host")),
        ("reward", known.get("reward", known.get("trained_reward"))),
    ]
    facts = [f"{name} `{value}`" for name, value in names if value] + [f"lam {known['lam']:g}", *count]
    lines = ["## Figures", "", ", ".join(facts) + ".", ""]
    if fit:
        way = "" if fit["way"] is None else f"{fit['way']:.0%} of the way from base to exact tilt. "
        ess = "" if fit["ess"] is None else f"Effective sample size of the path weights {fit['ess']:.2f}."
        lines += [
            "| | base | tuned | exact tilt |",
            "| --- | --- | --- | --- |",
            f"| reward | {show(fit['reward_base'])} | {show(fit['reward_tuned'])} | {show(fit['reward_exact'])} |",
            "",
            *([(way + ess).strip(), ""] if way + ess else []),
        ]
    if test:
        lines += [
            f"On {test['prompts']} test prompts, {test['samples']} samples of either model from the same noise, "
            "standard errors clustered by prompt:",
            "",
            "| | base | tuned | difference |",
            "| --- | --- | --- | --- |",
            *(
                f"| {name} | {' | '.join(show(row[kind]) for kind in ('base', 'tuned', 'difference'))} |"
                for name, row in measures(test)
            ),
            "",
        ]
    return lines


def _use(predictor: ExportablePredictor, whole: bool, steps: int, guidance_scale: float) -> list[str]:
    code = predictor.how_to_load(whole, steps, guidance_scale)
    return ["## Use", "", "```python", code, "```", "", "`FOLDER` is where this file lies.", ""] if code else []


def _decoder(borrowed: str, whole: bool) -> list[str]:
    if not borrowed:
        return []
    where = "the pipeline here has its own VAE" if whole else "the base pipeline has its own VAE"
    text = f"Rewards and figures are of images that the small decoder `{borrowed}` made; {where}, whose images are"
    return ["", f"{text} slightly other ones, and so are their rewards."]


def _configuration(path: Path) -> list[str]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8").rstrip()
    # A fence that is longer than any in the text.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return ["## Configuration", "", f"{fence}yaml", text, fence, ""]
