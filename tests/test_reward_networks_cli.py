"""Reward networks on the command line and in a YAML."""

from pathlib import Path

import pytest
import yaml
from command import DIGITS, tilt


@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_the_version_is_named_on_the_command_line(version: str) -> None:
    args = ["fit", "--config", DIGITS, "--model.reward", "HPSv2", "--model.reward.version", version]
    reward = tilt(*args, "--model.reward.micro_batch", 2, "--print_config").config["model"]["init_args"]["reward"]
    assert reward["class_path"] == "lightning_tilt.rewards.HPSv2"
    assert reward["init_args"]["version"] == version and reward["init_args"]["micro_batch"] == 2


def test_the_version_in_a_yaml_needs_no_quotes(tmp_path: Path) -> None:
    """It gets as far as the Hub, which tests cannot reach, and asks for that version's file."""
    reward = {"class_path": "HPSv2", "init_args": {"version": 2.0}}
    file = tmp_path / "reward.yaml"
    file.write_text(yaml.safe_dump({"model": {"init_args": {"reward": reward}}}))
    result = tilt("fit", "--config", DIGITS, "--config", file, "--trainer.default_root_dir", tmp_path / "run")
    assert result.status == 1 and len(result.errors) == 1
    assert "HPSv2 could not fetch HPS_v2_compressed.pt of 'xswu/HPSv2'" in result.errors[0]
    wrong = tilt("fit", "--config", DIGITS, "--model.reward", "HPSv2", "--model.reward.version", "latest")
    assert wrong.status == 2 and "--model.reward.version" in wrong.errors[0]
