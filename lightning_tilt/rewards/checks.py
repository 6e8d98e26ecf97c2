"""What every reward that reads prompts, or loads a network, has to refuse; said once."""

from torch import Tensor

from lightning_tilt.interfaces import Prompts

__all__ = ["mend_missing", "one_prompt_an_image"]


def one_prompt_an_image(reward: str, images: Tensor, prompts: Prompts) -> list[str]:
    """The prompts as a list.

    Args:
        reward: whose message it is.
        images: (B, ...).
        prompts: should be B strings.

    Raises:
        ValueError: if there are none, or another number.
    """
    if prompts is None or len(prompts) != len(images):
        given = "no prompts" if prompts is None else f"{len(prompts)} prompts"
        raise ValueError(f"{reward} needs one prompt an image: {len(images)} images came with {given}")
    return list(prompts)


def mend_missing(path: str | None, wanted: str) -> str:
    """What to do about a network that is not there: the embedded one (`path` None), or the user's."""
    return "install the package again, or run `make models`" if path is None else f"give {wanted}"
