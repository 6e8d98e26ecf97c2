"""The versions that a number rests on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["versions"]

_PACKAGES = ("lightning-tilt", "torch", "lightning", "diffusers", "transformers", "peft", "torchmetrics")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
