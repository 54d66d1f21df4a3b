"""The base of every section of a config, and the kinds of value that keys take."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fedmira.errors import nearest

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]  # longer arrays would overflow
Count = Annotated[Whole, Field(ge=1)]
Length = Annotated[int, Field(ge=1, le=1_000_000)]  # of a run or a phase: its schedule is in memory
PATHS = frozenset({"path", "base_model", "output_dir", "template"})  # keys of any section whose text may be a path
NAME_BYTES, PATH_LETTERS = 255, 4000  # limits of Linux and macOS, with room for the names inside a study


class Strict(BaseModel):
    """Base of every section: unknown keys are refused, values cannot change once checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_is_read_as_something_else(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1, "3" as 3 and "no" as false; in a config each of them is a mistake.

        Its own strict mode would refuse a list of YAML where a tuple is kept.
        """
        key = str(info.field_name)
        annotation = cls.model_fields[key].annotation
        if annotation is bool and not isinstance(value, bool):
            raise ValueError("should be true or false")
        for item in value if isinstance(value, list | tuple) else [value]:
            _check_kind(item, annotation)
        if key in PATHS and isinstance(value, str):
            _check_path(value)
        return value


def _check_kind(value: Any, annotation: Any) -> None:
    """Raise ValueError for a value of a kind that its key does not have, though pydantic would convert it."""
    if not isinstance(value, bool | int | float | str | list | tuple | Mapping | BaseModel | None):
        raise ValueError("is not text, a number, a list or a mapping")
    if isinstance(value, bool) and annotation is not bool and not any(value is one for one in _kinds(annotation)[1]):
        raise ValueError("true and false are not allowed here")
    kinds, choices = _kinds(annotation)
    if type(value) in (int, float) and any(type(one) is bool for one in choices) and not kinds & {int, float}:
        raise ValueError(f"should be {' or '.join(str(one).lower() for one in choices)}, not a number")
    if not isinstance(value, str):
        return
    if str not in kinds and value not in choices and kinds & {int, float}:
        raise ValueError(f"should be a number{''.join(f', or {choice}' for choice in choices)}, not text")
    if str in kinds and not value:
        raise ValueError("is empty; write null, or leave the key out")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError("contains half a character (a lone surrogate)")


def _kinds(annotation: Any) -> tuple[set[Any], list[Any]]:
    """Return the types that occur in an annotation, and the choices of its Literals."""
    if get_origin(annotation) is Literal:
        return set(), list(get_args(annotation))
    inner = [_kinds(part) for part in get_args(annotation)]
    return {annotation}.union(*(kinds for kinds, _ in inner)), [choice for _, choices in inner for choice in choices]


def _check_path(path: str) -> None:
    """Raise ValueError for a path that no file can have, before the system raises an error of another kind."""
    longest = max(len(name.encode(errors="surrogatepass")) for name in path.split("/"))
    if "\0" in path or longest > NAME_BYTES or len(path) > PATH_LETTERS:
        raise ValueError(f"is not a path: at most {PATH_LETTERS} letters, {NAME_BYTES} bytes between two /, and no NUL")


def check_encoding(name: str) -> None:
    """Raise ValueError unless Python has a text encoding of this name."""
    try:
        b"a".decode(name, "replace")  # no byte at all would be decoded by anything
    except (LookupError, ValueError):
        usual = ("utf-8", "utf-16", "latin-1", "cp1252", "cp1250", "iso-8859-15", "mac-roman", "shift_jis", "gb18030")
        raise ValueError(f"is not an encoding of text{nearest(name, usual)}; such as {', '.join(usual)}") from None


def short(value: Any) -> str:
    """Return a wrong value for one line of an error; Python refuses to print more than 4300 digits."""
    text = "a huge number" if isinstance(value, int) and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def slip(value: Any) -> str:
    """Return a hint for a mapping that has a key like `name` instead of it, else an empty string."""
    keys = [str(key) for key in value] if isinstance(value, Mapping) and "name" not in value else []
    similar = get_close_matches("name", keys, n=1, cutoff=0.7)
    return f": '{similar[0]}' is an unknown key (did you mean 'name'?)" if similar else ""
