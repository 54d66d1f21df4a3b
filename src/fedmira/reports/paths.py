"""Absolute paths shortened to their last name: what is passed on to others says nothing of a machine's folders."""

import re
from collections.abc import Mapping
from pathlib import PurePath, PureWindowsPath
from typing import Any

# what a path begins with: / or ~ or ~user/ or file:/// or a drive of Windows
_ROOT = r"(?:file://)?(?:~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\\\\)"
_FOLDERS = re.compile(
    rf"(?:(?<=^)|(?<=[\s\"'=,(\[{{])){_ROOT}(?:[^/\\\s\"',\]}})]*[/\\]+)*(?=[^/\\\s\"',\]}})])",
    re.MULTILINE,
)
_WHOLE = re.compile(rf"([\w.-]+=)?({_ROOT}.*)", re.DOTALL)  # also where an override sets it: data.path=/a b/c.jsonl


# a line of YAML that is one path without spaces or quotes, and does not go on in the next line
_LINE = re.compile(rf"^( *(?:- )*(?:[\w.-]+: )?)({_ROOT}\S*)$(?=\n(?: *- | *[\w.-]+:)|\n?\Z)", re.MULTILINE)


def without_folders(value: Any) -> Any:
    """Shorten every absolute path in a text, or in the texts of a mapping or list, to its last name.

    A text that is one path may contain spaces; inside a text a path ends at a space.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    whole = _WHOLE.fullmatch(value)
    return (whole[1] or "") + last_name(whole[2]) if whole else _FOLDERS.sub("", value)


def last_name(path: str) -> str:
    """Return the last name of an absolute path of any system."""
    return (PureWindowsPath if "\\" in path else PurePath)(path).name


def config_without_folders(text: str) -> str:
    """Shorten the absolute paths of a config.yaml; its other values and their order stay, comments go.

    Text that is not YAML is shortened word by word.
    """
    shortened = _LINE.sub(lambda line: line[1] + last_name(line[2]), text)
    if not _FOLDERS.search(shortened):
        return shortened
    import yaml  # few configs of a report need it, and its import takes as long as all templates

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _shorten(node)
        return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=10**6)
    except (yaml.YAMLError, RecursionError):
        return str(without_folders(text))


def _shorten(node: Any) -> None:
    """Shorten the texts of a YAML node in place."""
    for child in node.value if isinstance(node.value, list) else []:
        for part in child if isinstance(child, tuple) else (child,):
            _shorten(part)
    if isinstance(node.value, str):
        node.value = without_folders(node.value)
