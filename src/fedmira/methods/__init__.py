"""Methods, one file each; `load("mira")` imports methods/mira.py, a dotted path loads one from outside the tree."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from fedmira.config import MethodEntry, describe_fault
from fedmira.errors import ConfigError, MethodError, nearest
from fedmira.methods.base import Cohort, Method, Settings

ALIASES = {"fedit": "fedavg"}


class MethodModule(Protocol):
    """What a method file must offer."""

    __doc__: str | None
    Config: type[Settings]

    def build(self, config: Any, cohort: Cohort) -> Method: ...


def names() -> list[str]:
    """List the methods in the tree, by their file names."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base")


def load(name: str) -> MethodModule:
    """Import a method by id (hyphens read as underscores) or by dotted path.

    Raises MethodError naming the nearest id if there is none, or if the file has no Config and build.
    """
    wanted = name.replace("-", "_")
    wanted = ALIASES.get(wanted, wanted)
    known = names()
    if wanted in known:
        module: Any = importlib.import_module(f"{__name__}.{wanted}")
    elif "." in wanted:
        try:
            module = importlib.import_module(wanted)
        except ImportError as error:
            raise MethodError(f"method '{name}' cannot be imported: {error}") from None
    else:
        raise MethodError(f"unknown method '{name}'{nearest(wanted, known)}; known: {', '.join(known)}")
    if not hasattr(module, "Config") or not hasattr(module, "build"):
        raise MethodError(f"method '{name}' ({module.__file__}) needs a Config and a build(config, cohort)")
    return module


def entry_faults(index: int, entry: MethodEntry) -> list[str]:
    """List the faults of one entry of `methods:` against that method's own settings."""
    try:
        module = load(entry.name)
        module.Config.model_validate(entry.settings)
    except MethodError as error:
        return [f"methods.{index}.name: {error}"]
    except ValidationError as error:
        return [
            describe_fault(fault, module.Config, entry.settings, prefix=f"methods.{index}.") for fault in error.errors()
        ]
    return []


def build(name: str, settings: Mapping[str, Any], cohort: Cohort) -> Method:
    """Build a method for a federation from its YAML settings.

    Raises ConfigError for settings it does not know, MethodError for settings that cannot work on this cohort.
    """
    faults = entry_faults(0, MethodEntry(name=name, **settings))
    if faults:
        raise ConfigError(faults, f"method {name}")
    module = load(name)
    return module.build(module.Config.model_validate(dict(settings)), cohort)
