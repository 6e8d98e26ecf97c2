"""Memory and network evaluations of every recipe at its real size, on 1, 8 and 64 GPUs, computed without weights.

    python benchmarks/full_size.py [--config configs/sd15/adjoint_matching.yaml ...]

The numbers are those of `lightning-tilt fit --dry_run memory`; they go into benchmarks/RESULTS.md.
"""

from pathlib import Path
from typing import Any

import torch
from results import markdown, parser, publish

from lightning_tilt.cli import TiltCLI
from lightning_tilt.estimate import Estimate, Settings, estimate
from lightning_tilt.estimate.phases import condition_shapes
from lightning_tilt.estimate.table import gigabytes, scaling_rows
from lightning_tilt.estimate.tracking import count_flops
from lightning_tilt.interfaces.skeleton import without_weights

__all__ = ["forward_flops", "main", "read_config"]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RECIPES = [p for family in ("sd15", "sd3", "sd35") for p in sorted((CONFIGS / family).glob("*.yaml"))]
PARTS = ["weights", "others", "gradients", "optimiser", "average", "paths", "rollout", "reward", "adjoint", "loss"]


class _Parsed(Exception):
    """Carries a resolved configuration out of the command line."""


class _ParserAlone(TiltCLI):
    def before_instantiate_classes(self) -> None:
        """Stop before anything is built."""
        raise _Parsed(self.config["fit"].as_dict())


def read_config(*args: str) -> dict[str, Any]:
    """The resolved configuration of `lightning-tilt fit ARGS`."""
    try:
        _ParserAlone(["fit", *args])
    except _Parsed as parsed:
        config: dict[str, Any] = parsed.args[0]
        return config
    raise AssertionError("the command line built something")


def forward_flops(settings: Settings) -> int:
    """Floating-point operations of one forward of one sample."""
    kind, arguments = settings.predictor
    with without_weights("meta"):
        predictor = kind(**{**arguments, "compile": "off"})
    network, dtype = predictor.network, next(predictor.network.parameters()).dtype
    x = torch.empty(1, *predictor.state_shape, dtype=dtype, device="meta")
    told = {n: torch.empty(1, *s, dtype=dtype, device="meta") for n, s in condition_shapes(predictor).items()}
    with torch.no_grad():
        return count_flops(lambda: network(x, timestep=torch.zeros(1, device="meta"), **told, return_dict=False))


def _parts(name: str, found: Estimate, flops: int) -> list[str]:
    """A row of the first table."""
    by = {p: sum(b for (q, _), b in found.weights.items() if p in q) for p in ("denoiser", "adapters", "frozen copy")}
    frozen = sum(b for (q, _), b in found.weights.items() if q not in (*by, "text encoders"))
    frozen += 0 if found.settings.drops_encoders else found.encoders
    update = flops * (found.forwards["total"] + found.forwards["recomputed"])
    sizes = [sum(by.values()), frozen, found.gradients, found.optimizer, found.average, found.trajectory]
    passing = [found.phases[p].peak for p in ("rollout", "reward", "adjoint", "loss")]
    return [
        name,
        f"{found.counts['denoiser'] / 1e6:,.1f} M",
        f"{found.trained / 1e6:,.1f} M",
        *(gigabytes(b) for b in (*sizes, *passing)),
        gigabytes(found.peak()),
        f"{flops / 1e12:.2f}",
        f"{update / 1e15:,.1f}",
    ]


def main() -> None:
    """Estimate every recipe and write the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("--config", nargs="*", default=[str(p) for p in RECIPES])
    args = arguments.parse_args()
    first, second = [], []
    for config in args.config[: 1 if args.quick else None]:
        settings = Settings.from_config(read_config("--config", config))
        found, flops = estimate(settings), forward_flops(settings)
        file = Path(config).resolve()
        name = file.relative_to(CONFIGS).with_suffix("").as_posix() if file.is_relative_to(CONFIGS) else config
        first.append(_parts(name, found, flops))
        print(" ".join(first[-1]), flush=True)
        second += [[name, *row] for row in scaling_rows(found)]
    text = (
        "Computed without weights, by the code of `lightning-tilt fit --dry_run memory`: GB are 10^9 bytes of tensors "
        "of one process, with 1 GB allowed for CUDA. `weights` are those of the denoiser with its adapters or its "
        "frozen copy, `others` VAE and rewards; `rollout`, `reward`, `adjoint` and `loss` are what a micro-batch of "
        "each needs in passing. The fullest of these moments (or a step of the optimiser, or the start, before the "
        "text encoders leave) is in the peak. TFLOP are of one forward of one sample, PFLOP of an update of one "
        "process with everything recomputed; the reward's network and the VAE are not in them."
    )
    parts = markdown(["recipe", "denoiser", "trained", *PARTS, "**peak**", "TFLOP a forward", "PFLOP an update"], first)
    scaling = (
        "One to sixty-four GPUs, each with the recipe's micro-batches and its own prompts: samples and network "
        "evaluations an update of all GPUs together, and GB on each."
    )
    gpus = markdown(["recipe", "GPUs", "samples", "forwards", "GB each, ddp", "GB each, fsdp2"], second)
    publish("full_size", "Full size on paper", [text, parts, scaling, gpus], args, "no seed")


if __name__ == "__main__":
    main()
