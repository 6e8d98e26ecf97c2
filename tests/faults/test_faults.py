"""Runs that are killed at random moments go on and end bit for bit where a run that was left alone does."""

import signal
from pathlib import Path

import pytest
from runs import RUNS, Fault, faults, survive, whole


def test_a_run_survives(tmp_path: Path) -> None:
    series = [Fault("write", 3, signal.SIGKILL), Fault("rollout", 30, signal.SIGTERM)]
    outcomes, found = survive(
        "Adjoint Matching", tmp_path / "killed", series, whole("Adjoint Matching", tmp_path / "alone")
    )
    assert found is None, found
    assert [(o.status, o.at) for o in outcomes] == [(-signal.SIGKILL, 1), (128 + signal.SIGTERM, 2)]
    assert outcomes[1].said.startswith("lightning-tilt: stopped by SIGTERM after update 2; go on with")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_survive_faults_at_random_moments(name: str, tmp_path: Path) -> None:
    series = faults(name, 0, 5)
    outcomes, found = survive(name, tmp_path / "killed", series, whole(name, tmp_path / "alone"))
    assert found is None, found
    for fault, outcome in zip(series, outcomes, strict=True):
        expected = -signal.SIGKILL if fault.number == signal.SIGKILL else 128 + signal.SIGTERM
        # The clock may strike when the run is over already.
        assert outcome.status == expected or (fault.place == "clock" and outcome.status in (0, -fault.number)), fault
