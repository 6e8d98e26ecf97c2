"""The figures of an evaluation against naive sums, and errors that cover."""

import math
from typing import Any

import pytest
import torch

from lightning_tilt.callbacks.evaluation_figures import Pairs, figures
from lightning_tilt.callbacks.evaluation_page import show
from lightning_tilt.identities import clustered

NAN = math.nan


def naive(groups: list[list[float]]) -> tuple[float, float]:
    """The formula of the docstring, by loops."""
    n, g = sum(map(len, groups)), len(groups)
    m = sum(map(sum, groups)) / n
    return m, math.sqrt(g / (g - 1) * sum(sum(y - m for y in group) ** 2 for group in groups)) / n


def test_clustered_error_by_hand() -> None:
    # Means 2 and 5 of two clusters of two: m = 3.5, sums of deviations -3 and 3, se = sqrt(2 (9 + 9))/4 = 1.5.
    found = clustered(torch.tensor([1.0, 3.0, 4.0, 6.0]), torch.tensor([0, 0, 1, 1]))
    assert found.as_dict() == {"mean": 3.5, "se": 1.5, "n": 4}
    # Of equal size: the standard error of the clusters' means.
    means = torch.tensor([2.0, 5.0])
    assert found.se == pytest.approx(float(means.std()) / math.sqrt(2))
    groups = [[1.0], [2.0, 4.0, 3.0], [0.5, 7.0]]
    mixed = clustered(torch.tensor([4.0, 0.5, 1.0, 3.0, 7.0, 2.0]), torch.tensor([5, 9, 2, 5, 9, 5]))
    assert (mixed.mean, mixed.se) == pytest.approx(naive(groups), rel=1e-12)
    # Clusters of one: the plain error.
    values = torch.tensor([1.0, 5.0, 2.0, 2.0], dtype=torch.float64)
    assert clustered(values, torch.arange(4)).se == pytest.approx(float(values.std()) / 2)
    assert math.isnan(clustered(torch.ones(3), torch.zeros(3, dtype=torch.long)).se)
    assert math.isnan(clustered(torch.ones(0), torch.zeros(0, dtype=torch.long)).mean)


def test_clustered_intervals_cover_and_plain_ones_do_not() -> None:
    """30 prompts of 4 samples, half of the variance between prompts; 2000 runs: 95 % is seen within 3 of its errors."""
    generator = torch.Generator().manual_seed(1)
    prompts, each, runs, quantile = 30, 4, 2000, 2.0452  # of Student's t with 29 degrees of freedom
    y = torch.randn(runs, prompts, 1, generator=generator) + torch.randn(runs, prompts, each, generator=generator)
    cluster = torch.arange(prompts).repeat_interleave(each)
    found = [clustered(row.flatten(), cluster) for row in y]
    covered = sum(abs(e.mean) < quantile * e.se for e in found) / runs
    plain = sum(
        abs(e.mean) < quantile * float(row.std()) / math.sqrt(row.numel()) for e, row in zip(found, y, strict=True)
    )
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / runs)
    assert plain / runs < 0.85


def pairs(prompt: str | None, base: list[float], tuned: list[float], **changes: Any) -> Pairs:
    values = torch.tensor([base, tuned], dtype=torch.float64)
    fields: dict[str, Any] = {
        "rewards": {"Ink": values, "other": 10 * values}, "diversity": [1.0, 2.0], "moved": values[1], "kl": values[0],
        "images": None, "is_image": True, "refused": {},
    }  # fmt: skip
    return Pairs(prompt, **(fields | changes))


def test_figures_are_naive_sums() -> None:
    found = [
        pairs("a", [1.0, 2.0], [2.0, 5.0], diversity=[1.0, 3.0]),
        pairs("b", [0.0, NAN], [1.0, 1.0], diversity=[2.0, NAN], refused={"other": "it said so"}),
        pairs("c", [4.0, 1.0], [4.0, NAN], diversity=[4.0, 5.0]),
    ]
    report = figures(found, "Ink", "decoded images")
    ink = report["rewards"]["Ink"]

    def close(estimate: dict[str, Any], groups: list[list[float]]) -> bool:
        mean, se = naive(groups)
        return (estimate["mean"], estimate["se"]) == pytest.approx((mean, se)) and estimate["n"] == sum(
            map(len, groups)
        )

    assert close(ink["base"], [[1, 2], [0], [4, 1]]) and close(ink["tuned"], [[2, 5], [1, 1], [4]])
    assert close(ink["difference"], [[1, 3], [1], [0]])
    assert close(report["rewards"]["other"]["difference"], [[10, 30], [10], [0]])
    assert close(report["diversity"]["base"], [[1], [2], [4]]) and close(report["diversity"]["difference"], [[2], [1]])
    assert close(report["distance"]["path_kl"], [[1, 2], [0], [4, 1]])
    assert (report["prompts"], report["samples"], report["trained_reward"]) == (3, 6, "Ink")
    told = "\n".join(report["warnings"])
    assert "other has no value for 'b': it said so" in told and "3 prompts are few" in told
    assert "Ink: 1 of 6 samples of the base have no finite value, the first of 'b'" in told
    assert "Ink: 1 of 6 samples of the tuned model have no finite value, the first of 'c'" in told
    assert "other: 1 of 4 samples of the tuned model" in told and "other: 1 of 4 samples of the base" not in told


def test_pairing_takes_out_what_a_prompt_and_its_noise_share() -> None:
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(40):
        base = 5 * torch.randn(1, generator=generator) + torch.randn(4, generator=generator)
        gain = 1 + 0.1 * torch.randn(4, generator=generator)
        found.append(pairs(str(number), base.tolist(), (base + gain).tolist()))
    ink = figures(found, "Ink", "")["rewards"]["Ink"]
    assert ink["difference"]["se"] < 0.05 * ink["tuned"]["se"] and abs(ink["difference"]["mean"] - 1) < 0.1


def test_without_prompts_or_with_one_each_sample_is_its_own_cluster() -> None:
    for prompt in (None, "a"):
        report = figures([pairs(prompt, [1.0, 2.0, 3.0], [1.0, 2.0, 6.0], kl=None)], "Ink", "states")
        assert report["rewards"]["Ink"]["base"]["se"] == pytest.approx(1 / math.sqrt(3))
        assert report["distance"]["path_kl"] is None and report["diversity"]["base"]["se"] is None
    assert any("one prompt" in line for line in report["warnings"])
    nothing = figures([pairs("a", [NAN, NAN], [NAN, 1.0])], "Ink", "")
    assert nothing["rewards"]["Ink"]["base"] == {"mean": None, "se": None, "n": 0}


@pytest.mark.parametrize(
    ("mean", "se", "text"),
    [(0.12881, 0.0029, "0.1288 +- 0.0029"), (12.0, 0.0, "12 +- 0"), (1234.4, 35.0, "1234 +- 35"), (0.5, None, "0.5"),
     (None, None, "-"), (1e-9, 2e-9, "1e-09 +- 2.0e-09")],
)  # fmt: skip
def test_numbers_are_shown_to_two_digits_of_their_errors(mean: float | None, se: float | None, text: str) -> None:
    assert show({"mean": mean, "se": se}) == text
