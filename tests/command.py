"""The command line within the test's own process: as it is typed, without the seconds that a fresh Python takes."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

YAMLS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in YAMLS if "cluster" in path.parts]  # no runs of their own: they go on top of one
CONFIGS = [path for path in YAMLS if path not in OVERLAYS]
TOY = str(ROOT / "configs/toy/adjoint_matching.yaml")
DIGITS = str(ROOT / "configs/digits/sd15_adjoint_matching.yaml")
PICTURES = ("before_after.png", "curves.png", "reward_histogram.png")


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def config(self) -> dict[str, Any]:
        """What `--print_config` printed."""
        assert self.status == 0, self.err
        return dict(yaml.safe_load(self.out))

    @property
    def errors(self) -> list[str]:
        """Lines of the error stream that are the command's own."""
        return [line for line in self.err.splitlines() if line.startswith("lightning-tilt: ")]


def tilt(*args: object, cwd: Path = ROOT) -> Result:
    """`lightning-tilt ARGS` in the folder `cwd`; what it sets for its process is taken back."""
    from lightning_tilt.cli import main

    status = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        patch.chdir(cwd)
        patch.setattr(sys, "path", sys.path.copy())
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "TRANSFORMERS_VERBOSITY"):
            patch.setenv(name, os.environ.get(name, "0" if name.startswith("PL") else "error"))
        try:
            main([str(a) for a in args])
        except SystemExit as exit:
            status = int(exit.code or 0)
    return Result(status, out.getvalue(), err.getvalue())


def overlay(config: Path | str, folder: Path, **sections: dict[str, Any]) -> list[str]:
    """Arguments that run a config for two small updates into `folder`: the YAML, and a second one on top of it."""
    callbacks = yaml.safe_load((ROOT / config).read_text())["trainer"]["callbacks"]
    for callback in callbacks:
        if callback["class_path"] == "TiltReport":
            callback["init_args"] |= {"base_samples": 6, "tuned_samples": 4, "micro_batch": 4}
        if callback["class_path"] == "ModelCheckpoint":
            callback["init_args"]["every_n_train_steps"] = 1
    if "digits" in str(config):
        data = {"class_path": "PromptDataModule", "init_args": {"batch_size": 1, "val_prompts": ["two", "the digit 1"]}}
    else:
        data = {"class_path": "DrawsDataModule", "init_args": {"samples": 8, "batches": 4, "val_samples": 12}}
    small: dict[str, Any] = {
        "trainer": {"max_steps": 2, "log_every_n_steps": 1, "callbacks": callbacks, "default_root_dir": str(folder)},
        "data": data,
        "sampler": {"steps": 3, "samples_per_condition": 2},
    }
    for name, values in sections.items():
        small[name] = small.get(name, {}) | values
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(small))
    return ["--config", str(ROOT / config), "--config", str(file)]
