"""A reward that has no number for one prompt, whoever samples: stop is one error, skip is one warning and the rest."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_two
from test_not_finite import Bad, make
from toys import trainer

from lightning_tilt.callbacks import Evaluation, PredictionWriter, SteeredSampler, TiltReport, TrajectorySampler
from lightning_tilt.data import PromptDataModule
from lightning_tilt.interfaces import BadPolicy
from lightning_tilt.steering import SMC

WORDS = ["a", "bb", "ccc", "dddd", "eeeee"]
STEER = {
    "steered": SMC(particles=8, replicates=2),
    "guided": SMC(particles=8, replicates=2, guided=True),
    "untwisted": SMC(particles=8, replicates=2, twist="none"),
}
LEFT_OUT = r"is not finite( for 8 of \d+ particles .*)? \(optimiser step 0, rank 0\).*; they are left out\.$"

pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*many workers")


def run(folder: Path, policy: BadPolicy, how: str = "plain", more: tuple[Any, ...] = (), **kwargs: Any) -> Any:
    sampler = TrajectorySampler(steps=3, samples_per_condition=2, seed=1, on_bad_reward=policy)
    chosen = SteeredSampler(sampler, STEER[how]) if how in STEER else sampler
    return trainer([chosen, *more], default_root_dir=folder, inference_mode=how != "guided", **kwargs)


def data(batch_size: int = 5) -> PromptDataModule:
    return PromptDataModule(WORDS, batch_size=batch_size, shuffle=False)


def fit(folder: Path, policy: BadPolicy) -> int:
    fitted = run(folder, policy, limit_val_batches=0)
    fitted.fit(make(reward=Bad("bb")), datamodule=data())
    return int(fitted.callback_metrics["train/bad_samples"])


def validate(folder: Path, policy: BadPolicy) -> int:
    (found,) = run(folder, policy).validate(make(reward=Bad("bb")), datamodule=data(), verbose=False)
    return 2 if math.isfinite(found["val/reward"]) else 0


def judge_test(folder: Path, policy: BadPolicy) -> int:
    (found,) = run(folder, policy).test(make(reward=Bad("bb")), datamodule=data(), verbose=False)
    return 2 if math.isfinite(found["test/reward"]) else 0


def predict(how: str) -> Callable[[Path, BadPolicy], int]:
    def predicted(folder: Path, policy: BadPolicy) -> int:
        (found,) = run(folder, policy, how).predict(make(reward=Bad("bb")), datamodule=data())
        assert found["prompts"][2:4] == ["bb", "bb"] and bool(found["images"].isfinite().all())
        good = found["reward"].isfinite()
        assert good.tolist() == [p != "bb" for p in found["prompts"]]
        return int((~good).sum())

    return predicted


STREAMS = {"fit": fit, "validate": validate, "test": judge_test} | {
    f"predict {n}": predict(n) for n in ("plain", *STEER)
}


@pytest.mark.parametrize("stream", STREAMS)
def test_stop_is_one_error_and_skip_a_warning_and_the_rest(stream: str, tmp_path: Path) -> None:
    said = r"is not finite.* \(optimiser step 0, rank 0\).*\. Mend the reward, or pass sampler\.on_bad_reward: skip\.$"
    with pytest.raises(FloatingPointError, match=said) as told:
        STREAMS[stream](tmp_path, "stop")
    assert "'bb'" in str(told.value) and not any(repr(word) in str(told.value) for word in WORDS if word != "bb")
    with pytest.warns(UserWarning, match=LEFT_OUT) as warned:
        assert STREAMS[stream](tmp_path, "skip") == 2
    assert sum("left out" in str(w.message) for w in warned) == 1


def test_a_report_warns_and_refuses_a_prompt_without_a_good_sample(tmp_path: Path) -> None:
    def reported(policy: BadPolicy) -> None:
        report = TiltReport(base_samples=4, tuned_samples=4, prompts=["a", "bb"])
        run(tmp_path, policy, more=(report,), limit_val_batches=0).fit(make(reward=Bad("bb")), datamodule=data())

    with pytest.raises(
        FloatingPointError, match=r"4 of 4 samples of report rollout 1 .*'bb'\. Mend the reward, or pass"
    ):
        reported("stop")
    with (
        pytest.warns(UserWarning, match=r"4 of 4 samples of report .*'bb'; they are left out\.$"),
        pytest.raises(
            FloatingPointError, match=r"not one of 4 .* for 'bb' .*\. Mend the reward, or remove the prompt\."
        ),
    ):
        reported("skip")


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("how", ["plain", "steered"])
def test_an_evaluation_names_what_it_leaves_out(policy: BadPolicy, how: str, tmp_path: Path) -> None:
    """Under either policy, without a warning: its report says so."""
    run(tmp_path, policy, how, more=(Evaluation(samples=4),)).test(
        make(reward=Bad("bb")), datamodule=data(), verbose=False
    )
    report = json.loads((tmp_path / "evaluation.json").read_text())
    told = "\n".join(report["warnings"])
    assert "Bad: 4 of 20 samples of the base have no finite value, the first of 'bb'" in told
    assert "Bad: 4 of 20 samples of the tuned model have no finite value, the first of 'bb'" in told
    assert report["rewards"]["Bad"]["tuned"]["n"] == 16


def test_steering_says_log_z_of_the_prompts_that_have_one(tmp_path: Path) -> None:
    found = {}
    for name, reward, words in (("all", Bad("bb"), WORDS), ("good", Bad(), ["a"]), ("none", Bad("a"), ["a"])):
        fitted = run(tmp_path / name, "skip", "steered")
        with pytest.warns(UserWarning) if name != "good" else pytest.MonkeyPatch.context():
            fitted.predict(make(reward=reward), datamodule=PromptDataModule(words, batch_size=5))
        file = tmp_path / name / "steering.json"
        found[name] = json.loads(file.read_text())["batches"][0]["log_z"] if file.exists() else None
    assert found["all"]["n"] == 8 and math.isfinite(found["all"]["mean"]) and math.isfinite(found["all"]["se"])
    assert found["good"]["n"] == 2 and found["none"] is None


# -- two processes, of which the first has three batches and the second two

CASES = [("bb", "plain"), ("eeeee", "plain"), ("bb", "steered"), ("eeeee", "steered")]


def predicted_by_two(rank: int, folder: Path) -> None:
    said = {}
    for bad, how in CASES:
        kwargs = {"strategy": "ddp", "devices": 2, "num_nodes": 1, "more": (PredictionWriter(),)}
        with pytest.raises(FloatingPointError) as told:
            run(folder / f"{bad}_{how}", "stop", how, **kwargs).predict(make(reward=Bad(bad)), datamodule=data(1))
        said[f"{bad} {how}"] = str(told.value)
    found = run(folder / "skip", "skip", **kwargs).predict(make(reward=Bad("bb")), datamodule=data(1))
    rewards = torch.cat([batch["reward"] for batch in found]).tolist()
    (folder / f"{rank}.json").write_text(json.dumps([said, [math.isfinite(r) for r in rewards]]))


def test_two_processes_that_predict_stop_together(tmp_path: Path) -> None:
    """Also where the last batch is one process's alone."""
    in_two(predicted_by_two, tmp_path)
    (first, some), (second, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first) == len(CASES)
    for bad, how in CASES:
        line = first[f"{bad} {how}"]
        assert f"rank {int(bad == 'bb')})" in line and line.count("rank") == 1 and f"'{bad}'" in line
        assert not list((tmp_path / f"{bad}_{how}").rglob("samples.csv"))
    assert some == [True] * 6 and others == [False] * 2 + [True] * 2
