"""A config as YAML text: read without YAML's traps, changed by dotted overrides, written so that it runs again."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedmira.bundled import presets
from fedmira.config.sections import Config
from fedmira.errors import ConfigError, nearest, resume_command


class Loader(yaml.SafeLoader):
    """YAML without its traps: `3e-4` is a number, `007` and `no` are text, a repeated key is a fault."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the base class's are the traps

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError([f"line {node.start_mark.line + 1}: key '{key}' is given twice; keep one"])
        return super().construct_mapping(node, deep)


_FLOAT = r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
):
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(_pattern),
        list(_first.replace("\0", "")) + ([""] if _tag == "null" else []),
    )


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML text safely. Raises ConfigError with file and line."""
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506 - Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError([f"{where}not valid YAML: {getattr(error, 'problem', error)}"], source) from None
    except ConfigError as error:
        raise ConfigError(error.faults, source) from None
    except (ValueError, RecursionError) as error:  # a tag such as !!int on text, 5000 digits, a thousand brackets
        raise ConfigError([f"a value cannot be read: {error}"], source) from None


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply `a.b=c` overrides (lists by index: `methods.2.lambda=0.3`).

    Raises ConfigError if the file is missing or is not a mapping, or an override does not lead to a key.
    """
    if path.is_dir():
        raise ConfigError([_about_folder(path)], str(path))
    if not path.is_file():
        raise ConfigError(
            [
                f"no such config file{nearest(str(path), presets())} (current folder: {Path.cwd()}); 'fedmira init' "
                f"writes one, and bundled are {', '.join(presets())}"
            ],
            str(path),
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"byte {error.start} is not UTF-8; save the file as UTF-8"], str(path)) from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(
            [f"found {kind}: a config is a mapping with the keys {', '.join(Config.model_fields)}"], str(path)
        )
    apply_overrides(raw, overrides)
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Apply `a.b=c` overrides to a raw mapping; return the path and the value of each.

    Raises ConfigError that lists every override that does not lead to a key.
    """
    faults = [fault for override in overrides if (fault := _override(raw, override))]
    if faults:
        raise ConfigError(faults, "overrides")
    return [
        (key.split("."), parse_yaml(value, "overrides"))
        for key, _, value in (text.partition("=") for text in overrides)
    ]


def _about_folder(path: Path) -> str:
    """Say what to do with a folder that was given as a config."""
    if (path / "run.json").is_file() or next(path.glob("*/seed-*"), None) is not None:
        return f"is the folder of a study, not a config; to continue it: {resume_command(path)}"
    inside = next((found for found in (path / "config.yaml", path / "fedmira.yaml") if found.is_file()), None)
    meant = f"; did you mean '{inside}'?" if inside else "; 'fedmira init' writes a config"
    return f"is a folder, not a config{meant}"


def _override(raw: dict[str, Any], override: str) -> str | None:
    """Apply one `a.b=c` to the raw mapping; return the fault, or None."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        return f"'{override}': an override is written a.b=c"
    node: Any = raw
    words = key.split(".")
    for depth, word in enumerate(words):
        if isinstance(node, list):
            found = find_entry(node, word)
            if isinstance(found, str):
                return f"'{override}': {found}"
            index: Any = found
            if depth < len(words) - 1 and isinstance(node[index], str) and key.startswith("methods."):
                node[index] = {"name": node[index]}  # `- mira` is `- {name: mira}`
        elif isinstance(node, dict):
            index = word
        else:
            return f"'{override}': '{word}' is inside a plain value"
        if depth == len(words) - 1:
            try:
                node[index] = parse_yaml(value, "overrides")
            except ConfigError as error:
                return f"'{override}': {error.faults[0]}"
            return None
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]
    return None


def find_entry(entries: list[Any], word: str) -> int | str:
    """Return the index of a list's entry: a number, or the label or name of one alone; else what is wrong."""
    if word.isascii() and word.isdecimal() and int(word) < len(entries):
        return int(word)
    names = [
        [str(entry.get(key)) for key in ("label", "name") if entry.get(key) is not None]
        if isinstance(entry, dict)
        else [str(entry)]
        for entry in entries
    ]
    plain = [[name.replace("-", "_") for name in own] for own in names]
    asked = word.replace("-", "_")
    matches = [index for index, own in enumerate(plain) if own and own[0] == asked]
    matches = matches or [index for index, own in enumerate(plain) if asked in own]
    if len(matches) == 1:
        return matches[0]
    if matches:
        labels = ", ".join(f"{index} ({names[index][0]})" for index in matches)
        return f"{len(matches)} entries are called '{word}': say which by its label or index, {labels}"
    known = list(dict.fromkeys(name for own in names for name in own))
    called = f", nor the label or name of an entry{nearest(word, known)}: {', '.join(known)}" if known else ""
    return f"'{word}' is not an index of a list of {len(entries)}{called}"


class Dumper(yaml.SafeDumper):
    """Quotes text that we would read as a number (`1e5`), or that other readers of YAML would convert (`no`, `007`)."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Only double quotes preserve the rarer line breaks of Unicode, which a reader otherwise folds into spaces."""
    style = '"' if any(letter in text for letter in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)


def dump_config(config: Config) -> str:
    """Write a Config as YAML that runs again as it is."""
    return dump_yaml(config.model_dump(mode="json", by_alias=True))


def dump_yaml(content: Any) -> str:
    """Write plain values as YAML, each text on one line, so that any reader of YAML gets them back to the letter."""
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**9)
