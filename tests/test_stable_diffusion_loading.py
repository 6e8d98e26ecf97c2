"""What a wrong path or option of a Stable Diffusion predictor says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import save_sd15

from lightning_tilt.models import StableDiffusion


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A folder with nothing but a changed model_index.json."""
    index = json.loads((folder / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, **changes}))
    return target


def test_wrong_paths_are_told_in_one_line(tmp_path: Path, sd15_folder: Path, sd3_folder: Path) -> None:
    for path, culprit in [
        (tmp_path / "nowhere", "there is no folder"),
        ("nowhere", r"there is no folder 'nowhere'; .* or a Hub name \(owner/name\)"),
        (tmp_path, "has no model_index.json"),
        ("nobody/nothing", "'nobody/nothing' is neither a folder nor reachable on the Hub"),
    ]:
        with pytest.raises(FileNotFoundError, match=culprit) as caught:
            StableDiffusion(path)
        assert "\n" not in str(caught.value) and (caught.value.__context__ is None or caught.value.__suppress_context__)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline, not a StableDiffusionPipeline; load it with"):
        StableDiffusion(sd3_folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(ValueError, match="unknown scheduler 'MyScheduler'"):
        StableDiffusion(edited(sd15_folder, broken, scheduler=["diffusers", "MyScheduler"]))
    with pytest.raises(FileNotFoundError, match="has no folder 'scheduler', which its model_index"):
        StableDiffusion(edited(sd15_folder, broken))
    (broken / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        StableDiffusion(broken)


def test_wrong_options_are_refused(tmp_path: Path, load: Any) -> None:
    with pytest.raises(ValueError, match="unknown tuning 'lorra'"):
        load("sd15", tuning="lorra")
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        load("sd3", dtype="half")
    with pytest.raises(ValueError, match=r"targets \['to_z'\] match no layer of UNet2DConditionModel"):
        load("sd15", targets=["to_q", "to_z"])
    with pytest.raises(ValueError, match="at least 1, not 0"):
        load("sd15", rank=0)
    with pytest.raises(ValueError, match="zero_terminal_snr needs a v-prediction model"):
        load("sd15", zero_terminal_snr=True)
    with pytest.raises(TypeError, match="rnk"):
        load("sd15", rnk=4)
    with pytest.raises(ValueError, match="unknown prediction type 'flow_prediction'"):
        StableDiffusion(save_sd15(tmp_path, prediction_type="flow_prediction"))


def test_importing_the_room_loads_no_diffusers() -> None:
    code = (
        "import sys; from lightning_tilt.models import StableDiffusion, StableDiffusion3;"
        "assert not {'diffusers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
