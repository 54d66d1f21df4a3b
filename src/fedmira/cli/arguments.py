"""Arguments that are text or paths, read without pydantic.

typer 0.29 checks every argument, also one that is absent, with a validator of pydantic, and imports pydantic for it:
a third of the time of a report. It gets the validator from the parameter's `get_runtime_param()` when it needs it. In
a version without that method nothing is changed here, and typer reads the arguments as it does elsewhere.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup


class PlainGroup(TyperGroup):
    """The commands, whose arguments are read without pydantic where they are text or paths."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _read_plainly(self.get_params(ctx))  # --help among them
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            _read_plainly(command.get_params(ctx))
        return name, command, rest


class PlainValue:
    """Reads the values of one parameter. typers_own: returns what typer would read them with."""

    def __init__(self, annotation: Any, typers_own: Callable[[], Any]) -> None:
        self.read = _READERS.get(annotation)
        self.typers_own = typers_own

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value as the command gets it. Raises BadParameter if it cannot be one."""
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        if self.read is None:
            return self.typers_own().coerce(value, param=param, ctx=ctx)
        return [self.read(item) for item in value] if several else self.read(value)


def _read_plainly(params: Iterable[Any]) -> None:
    for param in params:
        typers_own = getattr(param, "get_runtime_param", None)
        if typers_own is not None and "get_runtime_param" not in vars(param):
            plain = PlainValue(param.type_descriptor.annotation, typers_own)
            vars(param)["get_runtime_param"] = lambda plain=plain: plain


def _read_path(text: str) -> Path:
    path = Path(text)
    if os.path.exists(path) and not os.access(path, os.R_OK):
        raise typer.BadParameter(f"Path '{text}' is not readable.")
    return path


_READERS: Mapping[Any, Callable[[str], Any]] = {str: str, list[str]: str, Path: _read_path, list[Path]: _read_path}
