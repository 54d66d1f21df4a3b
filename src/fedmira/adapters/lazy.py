"""`torch`, `numpy` and `scipy.sparse`, imported when something of them is first used, and `Tensor` for annotations.

Method settings are checked, and help is printed, without waiting seconds for libraries that only computing needs.
A module that uses `Tensor` from here begins with `from __future__ import annotations`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse as sparse
    import torch as torch
    from torch import Tensor as Tensor
else:

    def _import_on_use(name: str) -> ModuleType:
        """A module that imports the real one when it is first asked for an attribute, and then has all of its names."""
        module = ModuleType(name)

        def load(attribute: str) -> Any:
            real = importlib.import_module(name)
            vars(module).update(vars(real), __getattr__=load)
            return getattr(real, attribute)

        vars(module)["__getattr__"] = load
        return module

    np = _import_on_use("numpy")
    torch = _import_on_use("torch")
    sparse = _import_on_use("scipy.sparse")

    class _TensorKind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, torch.Tensor)

    class Tensor(metaclass=_TensorKind):
        """Stands for torch.Tensor in annotations and in isinstance()."""


__all__ = ["Tensor", "np", "sparse", "torch"]
