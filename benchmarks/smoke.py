"""One update of SD 1.5 at its real size, 64 x 64 latents, with random weights on the CPU: its peak of memory.

    python benchmarks/smoke.py [--steps 2] [--write]

It prints a line of JSON: the peak of the process's memory, without what Python and the libraries had before, beside the
estimate.  `--write` puts it into benchmarks/RESULTS.md.
"""

import json
import resource

import torch
from random_weights import FullSizeRun
from results import markdown, parser, publish

__all__ = ["main"]


def _rss() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run and print."""
    arguments = parser(__doc__, quick=False)
    arguments.add_argument("--path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    arguments.add_argument("--steps", type=int, default=2)
    arguments.add_argument("--write", action="store_true", help="the section, into --out")
    args = arguments.parse_args()
    torch.manual_seed(0)
    run = FullSizeRun(args.path, "cpu", steps=args.steps, samples=1, micro_batch=1, rank=4, gradient_checkpointing=True)
    found, before = run.estimate(), _rss()
    module = run.fit(1)
    loss = float(module.trainer.callback_metrics["train/loss"])
    counted = module.trainer.callbacks[0].evaluations
    result = {
        "denoiser": found.counts["denoiser"], "peak": _rss() - before, "estimate": found.peak(),
        "loss": loss, "forwards": counted.network, "forwards_estimate": found.forwards["total"],
    }  # fmt: skip
    if args.write:
        row = ["SD 1.5, adapters, float32", f"{args.steps}", f"{counted.network}"]
        row += [f"{result['peak'] / 1e9:.2f}", f"{result['estimate'] / 1e9:.2f}"]
        header = ["random weights, one sample", "steps", "forwards", "GB at the peak", "GB estimated"]
        publish("smoke", "Real size on the CPU", ["The process's memory.", markdown(header, [row])], args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
