"""The demo with every other loss that fits it: LoRA on the digits model, the same prompts, the same reward.

    python benchmarks/digits_losses.py [names ...] [--updates 80] [--seed 0] [--threads 1]

The config is the demo's, `configs/digits/sd15_adjoint_matching.yaml`, with another `class_path` and what that loss asks
of the sampler.  All are judged by the memoryless chain of 16 steps, whatever they trained on.  `way`: how far of
the way from base to exact tilt the mean reward went.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lightning_tilt import losses

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs/digits/sd15_adjoint_matching.yaml"

MICRO: dict[str, Any] = {"loss_micro_batch": 64}
PATHS = MICRO | {"checkpoint": True}
EIGHT: dict[str, Any] = {"samples_per_condition": 8}
WEIGHTED = MICRO | {"noisings": 4, "path_weights": "self_normalised"}
ODE: dict[str, Any] = {
    "steps": 10, "transition": {"class_path": "DDIM", "init_args": {"ddim_eta": 0.0}}, "base_last_step": False,
}  # fmt: skip
# name: (class, arguments of the loss, of the sampler, learning rate)
LOSSES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "adjoint_matching": ("AdjointMatchingTask", MICRO | {"checkpoint": False}, {}, 2e-3),
    "log_variance": ("LogVarianceTask", PATHS, EIGHT, 2e-3),
    "relative_entropy": ("RelativeEntropyTask", {"loss_micro_batch": 24}, {}, 2e-3),
    "draft_3": ("RelativeEntropyTask", {"loss_micro_batch": 24, "last_steps": 3}, {}, 2e-3),
    "grpo": ("GRPOTask", PATHS, EIGHT | {"rollout_every": 2}, 2e-3),
    "reinforce": ("ReinforceTask", PATHS, EIGHT, 2e-3),
    "reinforce_adjoint_matching": ("ReinforceAdjointMatchingTask", MICRO | {"noisings": 4}, ODE | EIGHT, 1e-3),
    "tilt_matching": (
        "TiltMatchingTask",
        MICRO | {"variant": "explicit", "level_ess": 0.9, "noisings": 4},
        ODE | EIGHT | {"rollout_every": 8},
        1e-3,
    ),
    "efficient_adjoint_matching": ("EfficientAdjointMatchingTask", MICRO | {"noisings": 8}, ODE, 1e-3),
    "cross_entropy": ("CrossEntropyTask", PATHS, EIGHT, 2e-3),
    "exact_reinforce_adjoint_matching": (
        "ExactReinforceAdjointMatchingTask", MICRO | {"noisings": 4}, ODE | EIGHT, 1e-3,
    ),
    "conditional_score_matching": ("ConditionalScoreMatchingTask", WEIGHTED, EIGHT, 1e-3),
    "target_score_matching": ("TargetScoreMatchingTask", WEIGHTED, EIGHT, 1e-3),
    "novel_score_matching": ("NovelScoreMatchingTask", WEIGHTED, EIGHT, 1e-3),
    "mixed_score_matching": ("MixedScoreMatchingTask", WEIGHTED, EIGHT, 1e-3),
}  # fmt: skip


def looks_at(task: str) -> str:
    """What the loss of a task is made of: the steps of paths, or noised end points."""
    return "paths" if getattr(losses, task.removesuffix("Task")).needs_path else "end points"


def config(name: str, updates: int) -> dict[str, Any]:
    """The demo's config with another loss."""
    made: dict[str, Any] = yaml.safe_load(DEMO.read_text())
    kind, loss, sampler, lr = LOSSES[name]
    model = made["model"]["init_args"]
    made["model"]["class_path"] = kind
    for own in ("checkpoint", "adjoint_micro_batch", "loss_micro_batch"):
        del model[own]
    model |= loss
    model["optimizer"]["init_args"]["lr"] = lr
    model["lr_scheduler"]["init_args"]["total_iters"] = updates
    made["sampler"] |= sampler
    made["trainer"]["max_steps"] = updates
    (report,) = (c for c in made["trainer"]["callbacks"] if c["class_path"] == "TiltReport")
    report["init_args"] |= {"steps": 16, "transition": {"class_path": "DDIM"}}
    return made


def run(name: str, updates: int, seed: int, threads: int) -> dict[str, Any]:
    """One loss, in a fresh process: its report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config(name, updates), sort_keys=False))
        subprocess.run(
            [
                sys.executable, "-m", "lightning_tilt", "fit", "--config", str(path), "--seed_everything", str(seed),
                "--trainer.default_root_dir", folder,
            ],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        report: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
        return report


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(LOSSES), metavar="names", help=", ".join(LOSSES))
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(
        "loss                         updates  reward            way    ESS   read as asked  network  a pair  seconds"
    )
    for name in args.names:
        report = run(name, args.updates, args.seed, args.threads)
        reward, counted = report["reward_tuned"], report["evaluations"]
        network = counted["forward"] + counted["vjp"] + counted["backward"]
        print(
            f"{name:28s} {report['updates']:7d}  {reward['mean']:.4f} +- {reward['se']:.4f}  {report['way']:4.0%}  "
            f"{report['ess']:.2f}  {report['accuracy_tuned']:13.1%}  {network:7.0f}  "
            f"{counted['forwards_per_pair']:6.1f}  {report['seconds']:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
