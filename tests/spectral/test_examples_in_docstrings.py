"""The example in every docstring of the package runs as it stands, and every public name has one or is a record."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import rankwise.spectral

MODULES = [module.name for module in pkgutil.iter_modules(rankwise.spectral.__path__, "rankwise.spectral.")]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    import torch

    found = doctest.testmod(importlib.import_module(module), extraglobs={"torch": torch})
    assert found.failed == 0


@pytest.mark.parametrize("name", rankwise.spectral.__all__)
def test_public_functions_have_an_example(name: str) -> None:
    public = getattr(rankwise.spectral, name)
    assert inspect.isclass(public) or ">>> " in (public.__doc__ or "")
