"""`python -m lightning_tilt.assets.training [vae|classifier|clip|sd15|sd3|page|all] [--seed 0] [--out DIR]`.

Each part trains, rounds to float16, is judged as rounded, and is saved with its card into `--out`. What parts hand to
one another (the float32 autoencoder, the figures) waits in `--scratch`. `page` writes the cards of the two diffusion
models, which need the classifier, and the picture of samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .cards import write_cards_and_page, write_classifier_card, write_clip_card
from .data import load_digits
from .save import forget_padding, remember, round_to_half, save_pipeline

__all__ = ["main"]

PARTS = ("vae", "classifier", "clip", "sd15", "sd3", "page")


def make(part: str, seed: int, steps: int | None, out: Path, scratch: Path) -> None:
    """Train and save one part; `steps` of None are as many as the part asks for."""
    digits = load_digits()
    options = {"seed": seed} if steps is None else {"seed": seed, "steps": steps}
    if part == "vae":
        from .vae import train_vae

        train_vae(digits, scratch / "vae", **options)
    elif part == "classifier":
        from .classifier import judge_classifier, train_classifier

        classifier, figures = train_classifier(digits, scratch / "vae", **options)
        round_to_half(classifier)
        remember(scratch, part, figures | judge_classifier(classifier, digits, scratch / "vae"))
        classifier.half().save_pretrained(out / "digit-classifier")
        write_classifier_card(out, scratch, seed)
    elif part == "clip":
        from .clip import save_preprocessor, train_clip, zero_shot_accuracy

        model, tokenizer, figures = train_clip(digits, **options)
        round_to_half(model)
        held_out = (digits.held_out_images + 1) / 2
        figures["held_out_zero_shot"] = zero_shot_accuracy(model, tokenizer, held_out, digits.held_out_labels)
        remember(scratch, part, figures)
        model.half().save_pretrained(out / "digits-clip")
        forget_padding(tokenizer)
        tokenizer.save_pretrained(out / "digits-clip")
        save_preprocessor(out / "digits-clip")
        write_clip_card(out, scratch, seed)
    elif part == "sd15":
        from .sd15 import train_sd15

        sd15, figures = train_sd15(digits, scratch / "vae", **options)
        remember(scratch, part, figures)
        save_pipeline(sd15, out / "digits-sd15")
    elif part == "sd3":
        from .sd3 import train_sd3

        sd3, figures = train_sd3(digits, scratch / "vae", **options)
        remember(scratch, part, figures)
        save_pipeline(sd3, out / "digits-sd3")
    else:
        write_cards_and_page(out, scratch, seed)


def main() -> None:
    """Read the command line and make what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m lightning_tilt.assets.training", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"], nargs="?", default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1], help="folder of the finished models")
    parser.add_argument("--scratch", type=Path, default=Path("build/assets"), help="folder of what parts share")
    parser.add_argument("--steps", type=int, help="fewer steps, to see that it runs")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    for part in PARTS if arguments.part == "all" else (arguments.part,):
        make(part, arguments.seed, arguments.steps, arguments.out, arguments.scratch)


if __name__ == "__main__":
    main()
