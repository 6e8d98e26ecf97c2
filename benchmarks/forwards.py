"""Network forwards a supervised pair, counted: every config of the mixture, and every loss on the digits.

    python benchmarks/forwards.py

A forward of one sample is 1, its VJP to the input 1 more, a backward pass 2 (adapters: 1); rollouts, adjoints, weights
and recomputations are all in it, and divided by the (sample, step) or (sample, time) pairs that the loss looked at.
"""

from collections.abc import Sequence
from typing import Any

import yaml
from digits_losses import LOSSES, config
from results import markdown, parser, publish
from short_fits import ROOT, fit

from lightning_tilt.interfaces import find_sampler

__all__ = ["counted", "main"]


def counted(name: str, content: dict[str, Any], rollouts: int) -> list[str]:
    """A line of the table, from the updates that share so many rollouts."""
    every = content["sampler"].get("rollout_every", 1)
    cli = fit(content, flags=["--trainer.max_steps", str(every * rollouts)])
    sampler = find_sampler(cli.model)
    found, chain = sampler.evaluations, sampler.chain(cli.model, count=False)
    parts = (found.forward, found.vjp, found.backward, found.network, found.reward)
    law = "with noise" if chain.noisy_steps else "ODE"
    row = [name, f"{chain.steps}, {law}", str(every), *(f"{part / found.pairs:.2f}" for part in parts)]
    print(" | ".join(row), flush=True)
    return row


def table(rows: Sequence[Sequence[str]]) -> str:
    """With what the columns are."""
    header = ["loss", "steps of a rollout", "updates on one", "forward", "VJP", "backward", "**all**", "reward scores"]
    return markdown(header, [[*row[:6], f"**{row[6]}**", row[7]] for row in rows])


def main() -> None:
    """Count, and write both tables."""
    args = parser(__doc__).parse_args()
    files = sorted((ROOT / "configs/toy").glob("*.yaml"))
    toy = [counted(f.stem, yaml.safe_load(f.read_text()), 1 if args.quick else 2) for f in files]
    digits = []
    for name in list(LOSSES)[:1] if args.quick else LOSSES:
        content = config(name, updates=1)
        content["data"]["init_args"]["batch_size"] = 1
        digits.append(counted(name, content, 1))
    text = (
        "Evaluations of one sample over supervised pairs: a forward is 1, a VJP to the input 1 more, a backward 2, of "
        "adapters 1; everything an update does is counted, whatever it recomputes included. "
        "The configs of `configs/toy`, all weights of a small network trained:"
    )
    second = "The same on the digits, with LoRA, as `benchmarks/digits_losses.py` sets the losses up:"
    publish("forwards", "Forwards a supervised pair", [text, table(toy), second, table(digits)], args)


if __name__ == "__main__":
    main()
