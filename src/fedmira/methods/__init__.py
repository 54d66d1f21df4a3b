"""Methods, one file each; `load("mira")` imports methods/mira.py, a dotted path loads one from outside the tree."""

import importlib
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from pydantic import ValidationError

from fedmira.config.faults import describe_fault
from fedmira.config.sections import MethodEntry
from fedmira.errors import ConfigError, MethodError, nearest
from fedmira.methods.base import Cohort, Method, Settings
from fedmira.methods.wrappers import ALIASES as WRAPPER_ALIASES
from fedmira.methods.wrappers import WRAPPERS, wrap

ALIASES = {"fedit": "fedavg"}
NOT_METHODS = ("base", "choosing", "means", "wrappers")


class MethodModule(Protocol):
    """What a method file must define."""

    __doc__: str | None
    Config: type[Settings]

    def build(self, config: Any, cohort: Cohort) -> Method: ...


def names() -> list[str]:
    """List the methods in the tree, by their file names."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in NOT_METHODS)


def load(name: str) -> MethodModule:
    """Import a method by id (hyphens read as underscores) or by dotted path.

    A dotted path is looked up as Python does, then in the current folder. Raises MethodError naming the nearest id if
    the id is unknown, the file and line if a file of the user's cannot be imported, or if it has no Config and build.
    """
    module_name = name.replace("-", "_")
    module_name = ALIASES.get(module_name, module_name)
    known = names()
    if module_name in known:
        module: Any = importlib.import_module(f"{__name__}.{module_name}")
    elif "." in module_name:
        try:
            module = _import_from_anywhere(module_name)
        except Exception as error:  # the user's own code, which may raise anything
            raise MethodError(f"method '{name}' cannot be imported: {_import_fault(error, module_name)}") from error
    else:
        raise MethodError(f"unknown method '{name}'{nearest(module_name, known)}; known: {', '.join(known)}")
    settings = getattr(module, "Config", None)
    fits = isinstance(settings, type) and issubclass(settings, Settings)
    if not fits or not callable(getattr(module, "build", None)):
        file = _near(module.__file__) if module.__file__ else "a folder"
        raise MethodError(
            f"method '{name}' ({file}) needs a class Config(Settings) and a "
            f"build(config, cohort); Settings is in {Settings.__module__}"
        )
    return module


def _import_from_anywhere(path: str) -> ModuleType:
    """Import a dotted path; the command `fedmira` has its own folder on sys.path, not the current one."""
    top = path.partition(".")[0]
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != top:
            raise
    with _current_folder_searched():
        return importlib.import_module(path)


@contextmanager
def _current_folder_searched() -> Iterator[None]:
    """Add the current folder to the end of sys.path for a while; there its files shadow no others."""
    folder = str(Path.cwd())
    importlib.invalidate_caches()  # the file may be newer than Python's list of the folder
    sys.path.append(folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the file itself may have changed sys.path
            sys.path.remove(folder)


def _import_fault(error: Exception, path: str) -> str:
    """Say where in the user's files an import failed, and why; no data have been read that the text could reveal."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_near(error.filename)}:{error.lineno}: {type(error).__name__}: {error.msg}"
    words = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and frame.filename not in (__file__, importlib.__file__)
    ]
    if not frames:
        file = f"{path.replace('.', '/')}.py"
        return f"{words}; it is {file} below the current folder ({Path.cwd()}), or a module of an installed package"
    folder = Path(frames[0].filename).parent  # of the user's files; a frame inside a library says less
    frame = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)][-1]
    return f"{_near(frame.filename)}:{frame.lineno}: {words}"


def _near(file: str) -> str:
    """Write a path relative to the current folder, if it is inside it."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@dataclass(frozen=True, eq=False)
class Recipe:
    """One entry of `methods:`, checked once: what to build, and the wrappers around it, the first innermost."""

    entry: MethodEntry
    module: MethodModule
    settings: Settings
    wrappers: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def build(self, cohort: Cohort) -> Method:
        """Build the method for a federation. Raises MethodError for settings that cannot work on this cohort."""
        return wrap(self.module.build(self.settings, cohort), self.wrappers)


def recipe_of(entry: MethodEntry) -> Recipe:
    """Check an entry against its method's own settings. Raises ConfigError that lists every fault."""
    recipe = _check(entry, prefix="")
    if isinstance(recipe, Recipe):
        return recipe
    raise ConfigError(recipe, f"method {entry.name}")


def entry_faults(index: int, entry: MethodEntry) -> list[str]:
    """List the faults of one entry of `methods:` against that method's own settings."""
    checked = _check(entry, prefix=f"methods.{index}.")
    return [] if isinstance(checked, Recipe) else checked


def _check(entry: MethodEntry, *, prefix: str) -> Recipe | list[str]:
    """Return the entry's recipe, or its faults, each with its key after `prefix`."""
    try:
        module = load(entry.name)
    except MethodError as error:
        return [f"{prefix}name: {error}"]
    settings: Settings | None = None
    faults: list[str] = []
    try:
        settings = module.Config.model_validate(entry.settings)
    except ValidationError as error:
        faults += [describe_fault(fault, module.Config, entry.settings, prefix=prefix) for fault in error.errors()]
    wrappers = []
    for index, item in enumerate(entry.wrappers):
        item_prefix, options = f"{prefix}with.{index}.", {key: value for key, value in item.items() if key != "name"}
        name = str(item.get("name", ""))
        name = WRAPPER_ALIASES.get(name, name)
        if name not in WRAPPERS:
            known = ", ".join(WRAPPERS)
            faults.append(f"{item_prefix}name: unknown wrapper '{name}'{nearest(name, list(WRAPPERS))}; known: {known}")
            continue
        kind = WRAPPERS[name][0]
        try:
            wrappers.append((name, dict(kind.model_validate(options))))
        except ValidationError as error:
            faults += [describe_fault(fault, kind, options, prefix=item_prefix) for fault in error.errors()]
    return faults if faults or settings is None else Recipe(entry, module, settings, tuple(wrappers))


def build(name: str, settings: Mapping[str, Any], cohort: Cohort) -> Method:
    """Build a method for a federation from its YAML settings, `with` among them.

    Raises ConfigError for settings it does not know, MethodError for settings that cannot work on this cohort.
    """
    return recipe_of(MethodEntry.model_validate({"name": name, **settings})).build(cohort)
