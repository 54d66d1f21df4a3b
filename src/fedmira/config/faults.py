"""Check a raw mapping against the config, and report all faults together: where, what was found, what is allowed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedmira.config.meanings import meant
from fedmira.config.partitioners import PARTITIONERS, partitioner_name
from fedmira.config.sections import Config, MethodEntry
from fedmira.config.strict import short
from fedmira.errors import ConfigError


def check_config(
    raw: Mapping[str, Any],
    source: str = "config",
    method_faults: Callable[[int, MethodEntry], list[str]] | None = None,
) -> Config:
    """Turn a raw mapping into a Config. Raises one ConfigError that lists every fault.

    method_faults: checks one entry of `methods:` against that method's own settings; passed by the layer above.
    """
    faults: list[str] = []
    config: Config | None = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        for fault in error.errors():
            described = describe_fault(fault, Config, raw)
            faults += [described] if fault["loc"] else described.split("\n")  # one line each, of several methods
    if method_faults is not None:
        entries = raw.get("methods")
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, Mapping):  # its faults are known, and hide none of the method's own settings
                entry = {key: value for key, value in entry.items() if key != "training"}
            try:
                faults += method_faults(index, MethodEntry.model_validate(entry))
            except ValidationError:
                continue  # already among the faults above
    if faults or config is None:
        raise ConfigError(faults, source)
    return config


def describe_fault(fault: Any, model: type[BaseModel], raw: Any, prefix: str = "") -> str:
    """Turn one pydantic error into a line: where, what was found, what is allowed."""
    loc = [
        word
        for word in fault["loc"]
        if not (isinstance(word, str) and word.startswith(("list[", "literal[", "constrained-", "function-")))
    ]
    where = ".".join(str(word) for word in loc)
    where = f"{prefix}{where}" if loc else prefix.rstrip(".")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        owner = _section(model, loc[:-1], raw)
        beside = _keys(MethodEntry) if prefix and len(loc) == 1 else []  # beside a method's own settings
        beside = ["name"] if beside and ".with." in prefix else beside
        allowed = sorted({*_keys(owner), *beside})
        if why := getattr(owner, "refused", {}).get(str(loc[-1])):
            return f"{where}: not offered: {why}"
        elsewhere = {} if prefix else _sections()
        return f"{where}: unknown key{meant(str(loc[-1]), allowed, elsewhere)}; allowed here: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"{where}: missing; it has no default"
    if fault["type"] == "value_error" and not loc:
        return message
    value = fault["input"]
    plain = isinstance(value, str | int | float | bool | None)
    if fault["type"] == "value_error" and not plain:
        return f"{where}: {message}"
    shown = f"found {short(value)}" if plain else f"found a {type(value).__name__}"
    return f"{where}: {shown}: {message[0].lower()}{message[1:]}"


def _sections() -> dict[str, list[str]]:
    """Return the keys of a config's sections, by the section's name and a dot."""
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    return {"": _keys(Config)} | {f"{name}.": _keys(model) for name, model in sections.items()}


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _section(model: type[BaseModel], loc: Sequence[Any], raw: Any) -> type[BaseModel]:
    """Follow a location through nested sections to the model that owns the last key."""
    for word in loc:
        raw = raw.get(word) if isinstance(raw, Mapping) else None
        field = next((f for name, f in model.model_fields.items() if word in (name, f.alias)), None)
        if field is None:
            continue
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        sections = [kind for kind in kinds if issubclass(kind, BaseModel)]
        if len(sections) > 1:
            sections = [kind for name, kind in PARTITIONERS.items() if name == partitioner_name(raw)]
        model = sections[0] if sections else model
    return model
