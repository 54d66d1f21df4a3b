"""FedMira: federated multi-task fine-tuning of language models with LoRA.

One frozen base model, one adapter per client; only adapters travel, and a server pulls the adapters of similar clients
together (MIRA). Everything public is here; see the README for the command line. A name is imported when it is first
used, so `import fedmira` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmira import errors as errors
    from fedmira import methods as methods
    from fedmira.adapters import Adapters, Layout
    from fedmira.config.sections import Config
    from fedmira.errors import FedMiraError
    from fedmira.methods.base import Method
    from fedmira.study.face import (
        Run,
        Study,
        export,
        load_method,
        load_run,
        method_names,
        report,
        resume,
        run,
    )
    from fedmira.study.loading import load_config

__all__ = [
    "Adapters",
    "Config",
    "FedMiraError",
    "Layout",
    "Method",
    "Run",
    "Study",
    "export",
    "load_config",
    "load_method",
    "load_run",
    "method_names",
    "report",
    "resume",
    "run",
]

_HOMES = {
    "Adapters": "fedmira.adapters",
    "Config": "fedmira.config.sections",
    "FedMiraError": "fedmira.errors",
    "Layout": "fedmira.adapters",
    "Method": "fedmira.methods.base",
    "load_config": "fedmira.study.loading",
}
_PACKAGES = ("errors", "methods")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fedmira.{name}")
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "fedmira.study.face")), name)
    raise AttributeError(f"module 'fedmira' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The package of that name would take the place of the function `export` when something imports it later.
importlib.import_module("fedmira.export")
del globals()["export"]
