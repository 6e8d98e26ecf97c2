"""Every example in a docstring is a test."""

import doctest
import importlib
import pkgutil

import pytest

import lightning_tilt

OPTIONAL = {"mlxtend"}
MODULES = sorted(info.name for info in pkgutil.walk_packages(lightning_tilt.__path__, "lightning_tilt."))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{name} needs {error.name}")
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.failed == 0
