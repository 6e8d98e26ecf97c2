"""The class that a configuration names."""

from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from typing import Any, cast

__all__ = ["class_of"]


def class_of(config: Mapping[str, Any]) -> type:
    """The class that a `class_path` names.

    Raises:
        ValueError: if there is none.
    """
    if "class_path" not in config:
        raise ValueError(f"the estimate needs a class_path in {sorted(config)}")
    module, _, name = str(config["class_path"]).rpartition(".")
    found: type = reduce(getattr, name.split("."), cast(Any, import_module(module)))
    return found
