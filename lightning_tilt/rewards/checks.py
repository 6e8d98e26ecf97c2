"""What every reward that reads prompts, or loads a network, has to refuse; said once."""

from importlib import import_module
from typing import Any

from torch import Tensor

from lightning_tilt.interfaces import Prompts

__all__ = ["mend_missing", "one_prompt_an_image", "optional"]


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


def optional(reward: str, module: str, extra: str) -> Any:
    """A module that comes with an extra of this package.

    Args:
        reward: whose message it is.
        module: its dotted name.
        extra: the extra that brings it.

    Raises:
        ModuleNotFoundError: if the module, or one that it needs, is not installed; with the command that installs it.
        ImportError: if it is installed and cannot be imported.
    """
    mend = f'pip install "lightning-tilt[{extra}]"'
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        needs = f"the package {package}" if error.name == package else f"{error.name}, for the package {package}"
        raise ModuleNotFoundError(f"{reward} needs {needs}; {mend}", name=error.name) from None
    except (ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(
            f"{reward} cannot import the package {package} ({reason}); {mend}, with a torchvision built for the "
            "installed torch"
        ) from None
