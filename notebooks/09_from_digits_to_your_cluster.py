# %% [markdown]
# # 09 From the digits to Stable Diffusion on your cluster
#
# The digits models are Stable Diffusion 1.5 and 3 made small: the same classes of diffusers, the same kinds of
# scheduler and text encoder, the same command. This notebook walks from one to the other without downloading anything:
#
# 1. what differs between the configurations
# 2. a rehearsal: the real recipe, on the small model, on this CPU
# 3. the real networks, without weights
# 4. what a run needs in memory, before it is queued
# 5. how the work is shared out, and the line that starts it

# %%
import csv
import io
import os
import subprocess
import sys
import tempfile
import textwrap
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from _common import show
from matplotlib.figure import Figure

import lightning_tilt
from lightning_tilt.assets import folder
from lightning_tilt.cli import TiltCLI
from lightning_tilt.estimate import Estimate, Settings, estimate, table
from lightning_tilt.estimate.sharing import Sharing
from lightning_tilt.estimate.table import scaling_rows
from lightning_tilt.interfaces.skeleton import without_weights
from lightning_tilt.models import StableDiffusion, StableDiffusion3

ROOT = Path(lightning_tilt.__file__).resolve().parent.parent
os.chdir(ROOT)  # configurations name their prompts from here
DIGITS = "configs/digits/sd15_adjoint_matching.yaml"
SD15, SD3 = "configs/sd15/adjoint_matching.yaml", "configs/sd3/adjoint_matching.yaml"


def command(*args: str) -> str:
    """What `lightning-tilt ARGS` prints, from the repository's root."""
    line = [sys.executable, "-m", "lightning_tilt", *args]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


# %% [markdown]
# ## 1. What differs
#
# First from Stable Diffusion 1.5 to 3: two recipes, compared key by key.


# %%
def flat(content: Any, name: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    if not isinstance(content, dict):
        return {name.removeprefix("."): content}
    return {key: value for part, inner in content.items() for key, value in flat(inner, f"{name}.{part}").items()}


def compared(one: str, other: str) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations differ; lists of callbacks are left out."""
    a, b = (flat(yaml.safe_load((ROOT / name).read_text())) for name in (one, other))
    keys = [key for key in {**a, **b} if key != "trainer.callbacks" and a.get(key) != b.get(key)]
    return {key.replace("init_args.", ""): (a.get(key, "-"), b.get(key, "-")) for key in keys}


swapped = compared(SD15, SD3)
for key, (a, b) in swapped.items():
    print(f"{key:36s} {a!s:44s} {b!s}")
assert set(swapped) <= {
    "model.predictor.class_path", "model.predictor.path", "model.predictor.height", "model.predictor.width",
    "model.adjoint_micro_batch", "model.loss_micro_batch", "sampler.guidance_scale", "sampler.reward_micro_batch",
    "trainer.default_root_dir",
}  # fmt: skip

# %% [markdown]
# Another predictor, another folder, micro-batches for the larger network: loss, optimiser, data and sampler are the
# same. From the digits to Stable Diffusion 1.5 more is different, and every line has a reason: a large network is
# tuned in bfloat16 with checkpoints inside, prompts are encoded ahead, twenty of forty steps are supervised.

# %%
for key, (a, b) in compared(DIGITS, SD15).items():
    columns = [textwrap.wrap(str(v), 46, break_on_hyphens=False) or [""] for v in (a, b)]
    for i, (one, other) in enumerate(zip_longest(*columns, fillvalue="")):
        print(f"{key if i == 0 else '':38s} {one:46s} {other}".rstrip())

# %% [markdown]
# ## 2. A rehearsal
#
# The recipe for Stable Diffusion 1.5 on this CPU: flags put the small model, its prompts and a small reward into it,
# and halve the steps. Its callbacks stay, but for the bar, and a checkpoint is written after every update in place of
# every tenth. One update, the report, the exported weights; then the same command goes on from the checkpoint to a
# second update. A misspelt key, a path, a reward without gradient fail here in a minute, and not on a cluster at night.

# %%
run = Path(tempfile.mkdtemp())
callbacks = yaml.safe_load((ROOT / SD15).read_text())["trainer"]["callbacks"]
callbacks = [c for c in callbacks if c["class_path"] != "TiltProgressBar"]
callbacks[-1]["init_args"]["every_n_train_steps"] = 1
(run / "small.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
(run / "report.txt").write_text("a handwritten three\n")
recipe = (
    "fit", "--config", SD15, "--config", str(run / "small.yaml"), "--model.predictor.path", str(folder("digits-sd15")),
    "--model.predictor.embeddings", str(run / "embeddings"), "--model.reward", "Ink", "--model.lam", "50",
    "--data.prompts", "configs/digits/prompts.txt", "--data.val_prompts", str(run / "report.txt"),
    "--data.batch_size", "1", "--sampler.steps", "20", "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(run / "out"),
)  # fmt: skip
said = command(*recipe, "--trainer.max_steps", "1")
print(*(line for line in said.splitlines() if "One update" in line), sep="\n")
last = next((run / "out").rglob("last.ckpt"))
command(*recipe, "--trainer.max_steps", "2", "--ckpt_path", str(last))
with (run / "out" / "metrics.csv").open() as file:
    rows = [row for row in csv.DictReader(file) if row["train/loss"]]
for row in rows:
    print(*(f"{key} {float(row['train/' + key]):.4f}  " for key in ("loss", "reward", "evaluations/forwards_per_pair")))
left = sorted(str(path.relative_to(run / "out")) for path in (run / "out").rglob("*") if path.is_file())
print(*left, sep="\n")

# %%
assert "One update trains on 8 samples" in said
assert len(rows) == 2  # the second is of the resumed run
for row in rows:
    assert float(row["train/loss"]) > 0 and 0 < float(row["train/reward"]) < 1
for name in ("report.json", "before_after.png", "lora/pytorch_lora_weights.safetensors", "checkpoints/last.ckpt"):
    assert name in left, name

# %% [markdown]
# Not rehearsed, since it takes the card, the weights or both: HPSv2 and its gradient, images of 512 x 512, bfloat16 on
# a GPU, the memory and the time of a real update, several processes, and what two hundred updates make of the images.
# For memory there is section 4, for several processes section 5; a first real run of ten updates answers the rest.

# %% [markdown]
# ## 3. The real networks, without weights
#
# Inside `without_weights` predictors are built by their usual code at their real size and hold no numbers. Names of
# the Hub are known to the package by their configurations; nothing is fetched.

# %%
HUB = {
    "SD 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD 3": "stabilityai/stable-diffusion-3-medium-diffusers",
}
models = {
    "digits, SD 1.5's kind": (StableDiffusion, str(folder("digits-sd15"))),
    "SD 1.5": (StableDiffusion, HUB["SD 1.5"]),
    "digits, SD 3's kind": (StableDiffusion3, str(folder("digits-sd3"))),
    "SD 3": (StableDiffusion3, HUB["SD 3"]),
}
counts, classes = {}, {}
for name, (kind, path) in models.items():
    with without_weights("meta"):
        predictor = kind(path, rank=16)
    network = predictor.network
    counts[name] = sum(p.numel() for key, p in network.named_parameters() if "lora_" not in key)
    classes[name] = type(network).__name__
    trained = sum(p.numel() for p in predictor.trained_parameters().values())
    assert all(p.device.type == "meta" for p in network.parameters())
    print(f"{name:22s} {classes[name]:22s} {counts[name]:>13,} parameters, {trained:>11,} trained")
assert counts["SD 1.5"] == 859_520_964 and counts["SD 3"] == 2_028_328_000
assert classes["SD 1.5"] == classes["digits, SD 1.5's kind"] and classes["SD 3"] == classes["digits, SD 3's kind"]

# %% [markdown]
# ## 4. What a run needs
#
# `lightning-tilt fit --config ... --dry_run memory` builds the run of a configuration without weights, follows the
# tensors of each phase and prints what is in memory when. Any flag can be tried. From Python it is
# `estimate(Settings.from_config(...))`, of a configuration as `--print_config` prints it.


# %%
def estimated(*args: str) -> Estimate:
    """The estimate of `lightning-tilt fit ARGS`."""
    resolved = io.StringIO()
    try:
        with redirect_stdout(resolved):
            TiltCLI(["fit", *args, "--print_config"])
    except SystemExit:
        return estimate(Settings.from_config(yaml.safe_load(resolved.getvalue())))
    raise AssertionError("--print_config ends a run")


recipes = {
    "SD 1.5, LoRA, 512": SD15,
    "SD 1.5, all weights, 512": "configs/sd15/adjoint_matching_full.yaml",
    "SD 3, LoRA, 512": SD3,
    "SD 3, all weights, 512": "configs/sd3/adjoint_matching_full.yaml",
}
found = {name: estimated("--config", config) for name, config in recipes.items()}
print(table(found["SD 1.5, LoRA, 512"]))

# %% [markdown]
# Four recipes beside each other: on one GPU, and cut over eight by FSDP2.

# %%
GB = 1e9
parts = {}
for name, e in found.items():
    denoisers = sum(size for (part, _), size in e.weights.items() if part in ("denoiser", "adapters", "frozen copy"))
    others = sum(size for (part, _), size in e.weights.items()) - denoisers
    others -= e.encoders if e.settings.drops_encoders else 0
    row = {"denoiser and its copy": denoisers, "VAE, encoders, reward": others, "gradients": e.gradients}
    row |= {"optimiser and average": e.optimizer + e.average}
    parts[name] = row | {"paths, activations, CUDA": e.peak() - sum(row.values())}
sharded = {name: e.peak(8, Sharing("fsdp2", "fsdp2", family=e.family)) for name, e in found.items()}

figure = Figure(figsize=(9.6, 3.8), layout="constrained")
axis = figure.subplots()
colours = {"denoiser and its copy": ("#2b6777", ""), "VAE, encoders, reward": ("#7fa8b3", "//")}
colours |= {"gradients": ("#7f8c99", ""), "optimiser and average": ("#c3cad1", "..")}
colours |= {"paths, activations, CUDA": ("#c8553d", "")}
for i, (name, row) in enumerate(parts.items()):
    left = 0.0
    for part, size in row.items():
        colour, hatch = colours[part]
        axis.barh(-i, size / GB, 0.6, left, color=colour, hatch=hatch, edgecolor="white", label=None if i else part)
        left += size / GB
    axis.plot(sharded[name] / GB, -i, "D", color="black", ms=5, label=None if i else "peak of each of 8, FSDP2")
for card in (24, 40, 80):
    axis.axvline(card, color="black", lw=0.8, ls=":")
    axis.text(card, 0.55, f"{card} GB", ha="center", fontsize=8)
axis.set_yticks([-i for i in range(len(parts))], list(parts))
axis.set_xlabel("GB of one device at the fullest moment (10^9 bytes, computed)")
figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
axis.spines[["top", "right"]].set_visible(False)
show(figure, "09_memory")

# %%
for name, e in found.items():
    print(f"{name:26s} {e.peak() / GB:6.2f} GB; each of eight, FSDP2: {sharded[name] / GB:6.2f} GB")
    assert e.peak() == sum(parts[name].values())
lora, full = found["SD 3, LoRA, 512"], found["SD 3, all weights, 512"]
assert lora.peak() < 24 * GB < full.peak()
assert sharded["SD 3, all weights, 512"] < 0.6 * full.peak()

# %% [markdown]
# LoRA's peak is weights and activations: more devices cut little of it, so `ddp` is the strategy and more devices mean
# more samples. With all weights trained, gradients, optimiser, average and the frozen copy are what is large, and
# those are what FSDP2 cuts.
#
# ## 5. The line that starts it
#
# | from | to | what is added |
# | --- | --- | --- |
# | the digits | Stable Diffusion 1.5 | `--config configs/sd15/adjoint_matching.yaml` |
# | one GPU | all GPUs of a node | `--config configs/cluster/ddp.yaml` |
# | LoRA | all weights | `configs/sd15/adjoint_matching_full.yaml`, `--config configs/cluster/fsdp2_sd15.yaml` |
# | Stable Diffusion 1.5 | 3, 3.5 | `configs/sd3/...`, `configs/sd35/...`, `fsdp2_sd3.yaml` |
# | a node | several | `bash configs/cluster/sd15_torchrun.sh`, `sbatch configs/cluster/sd3_slurm.sh` |
#
# What an update of two recipes is, on one device, eight and sixty-four:

# %%
for name in ("SD 3, LoRA, 512", "SD 3, all weights, 512"):
    print(name)
    for devices, samples, forwards, ddp, fsdp2 in scaling_rows(found[name]):
        print(
            f"  {devices:>2s} devices: {samples:>5s} samples, {forwards:>9s} forwards; GB each {ddp} ddp, {fsdp2} fsdp2"
        )

# %% [markdown]
# `data.batch_size` counts the prompts of one process: eight devices train on eight times the samples unless it is
# divided by eight. The same samples on any number of processes make the same update: each is numbered among those of
# all processes, and all of its noise is drawn from that number.
#
# Before the weights are there, three things can be done: this notebook, `--dry_run memory` for the cards you have, and
# `--dry_run prompts`, which encodes the prompts ahead where the text encoders are. The last step is the only one that
# needs a download: the predictor's `path` is a folder or a name of the Hub. [docs/cluster.md](../docs/cluster.md) has
# strategies, checkpoints and pre-emption.
