"""Libraries that are imported when they are first used."""

import subprocess
import sys

import torch

from fedmira.adapters import lazy

ROOMS = """
import importlib, pkgutil, sys
for room in ("config", "adapters", "graphs", "methods"):
    package = importlib.import_module(f"fedmira.{room}")
    for file in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{file.name}")
heavy = ("torch", "numpy", "scipy", "transformers", "peft", "datasets", "pandas")
print([name for name in heavy if name in sys.modules])
"""


def test_what_is_read_of_the_lazy_module_is_what_the_real_one_has() -> None:
    assert lazy.torch.zeros is torch.zeros
    assert lazy.torch.float32 is torch.float32
    assert lazy.torch.nn.functional is torch.nn.functional


def test_a_name_that_the_real_module_gets_later_is_found() -> None:
    assert lazy.torch.zeros is torch.zeros
    torch.made_by_a_test = 1
    try:
        assert lazy.torch.made_by_a_test == 1
    finally:
        del torch.made_by_a_test


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(lazy.torch, "no_such_name")


def test_tensors_are_told_from_other_values() -> None:
    assert isinstance(torch.zeros(1), lazy.Tensor)
    assert not isinstance([0.0], lazy.Tensor)


def test_settings_rows_graphs_and_methods_are_imported_without_the_libraries_that_compute() -> None:
    done = subprocess.run([sys.executable, "-c", ROOMS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
