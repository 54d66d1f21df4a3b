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
NOT_METHODS = ("base", "wrappers")


class MethodModule(Protocol):
    """What a method file must offer."""

    __doc__: str | None
    Config: type[Settings]

    def build(self, config: Any, cohort: Cohort) -> Method: ...


def names() -> list[str]:
    """List the methods in the tree, by their file names."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in NOT_METHODS)


def load(name: str) -> MethodModule:
    """Import a method by id (hyphens read as underscores) or by dotted path.

    A dotted path is looked up as Python does, then in the current folder. Raises MethodError naming the nearest id if
    there is none, the file and line if a file of the user's cannot be imported, or if it has no Config and build.
    """
    wanted = name.replace("-", "_")
    wanted = ALIASES.get(wanted, wanted)
    known = names()
    if wanted in known:
        module: Any = importlib.import_module(f"{__name__}.{wanted}")
    elif "." in wanted:
        try:
            module = _import_from_anywhere(wanted)
        except Exception as error:  # the user's own code, which may raise anything
            raise MethodError(f"method '{name}' cannot be imported: {_told(error, wanted)}") from error
    else:
        raise MethodError(f"unknown method '{name}'{nearest(wanted, known)}; known: {', '.join(known)}")
    settings = getattr(module, "Config", None)
    fits = isinstance(settings, type) and issubclass(settings, Settings)
    if not fits or not callable(getattr(module, "build", None)):
        place = _near(module.__file__) if module.__file__ else "a folder"
        raise MethodError(
            f"method '{name}' ({place}) needs a class Config(Settings) and a "
            f"build(config, cohort); Settings is in {Settings.__module__}"
        )
    return module


def _import_from_anywhere(path: str) -> ModuleType:
    """Import a dotted path; the command `fedmira` has its own folder on sys.path, and not the one it was called in."""
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
    """Let imports find files of the current folder for a while, last of all: there they shadow nothing."""
    folder = str(Path.cwd())
    importlib.invalidate_caches()  # the file may be younger than the last look into the folder
    sys.path.append(folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the file itself may have changed sys.path
            sys.path.remove(folder)


def _told(error: Exception, path: str) -> str:
    """Say where in the user's files an import failed, and why; no data have been read yet that words could tell of."""
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
    own = Path(frames[0].filename).parent  # below it the user's files lie; a library deeper down tells less
    place = [frame for frame in frames if Path(frame.filename).is_relative_to(own)][-1]
    return f"{_near(place.filename)}:{place.lineno}: {words}"


def _near(file: str) -> str:
    """Write a path as seen from the current folder, where it lies below it."""
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
    found = _check(entry, prefix=f"methods.{index}.")
    return [] if isinstance(found, Recipe) else found


def _check(entry: MethodEntry, *, prefix: str) -> Recipe | list[str]:
    """Return the entry's recipe, or its faults, each with its place after `prefix`."""
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
    for index, given in enumerate(entry.wrappers):
        place, options = f"{prefix}with.{index}.", {key: value for key, value in given.items() if key != "name"}
        name = str(given.get("name", ""))
        name = WRAPPER_ALIASES.get(name, name)
        if name not in WRAPPERS:
            known = ", ".join(WRAPPERS)
            faults.append(f"{place}name: unknown wrapper '{name}'{nearest(name, list(WRAPPERS))}; known: {known}")
            continue
        kind = WRAPPERS[name][0]
        try:
            wrappers.append((name, dict(kind.model_validate(options))))
        except ValidationError as error:
            faults += [describe_fault(fault, kind, options, prefix=place) for fault in error.errors()]
    return faults if faults or settings is None else Recipe(entry, module, settings, tuple(wrappers))


def build(name: str, settings: Mapping[str, Any], cohort: Cohort) -> Method:
    """Build a method for a federation from its YAML settings, `with` among them.

    Raises ConfigError for settings it does not know, MethodError for settings that cannot work on this cohort.
    """
    return recipe_of(MethodEntry.model_validate({"name": name, **settings})).build(cohort)
