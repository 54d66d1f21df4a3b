"""Change values in the text of a config and keep its comments."""

from collections.abc import Sequence
from typing import Any

import yaml

from fedmira.config.yaml_text import Dumper, Loader, find_entry, parse_yaml


def set_value(text: str, words: Sequence[str], value: Any) -> str:
    """Return the text with one key, given as its path, set to a value; every comment stays.

    A key that a section does not have becomes its first line. Raises ValueError if the path leads into a plain value or
    past the end of a list.
    """
    node = _compose(text)
    for depth, word in enumerate(words):
        inner = _child(node, word, text)
        if inner is None:
            return _add(text, node, words[depth:], value)
        node = inner
    return _replace(text, node, value)


def add_comment(text: str, words: Sequence[str], comment: str) -> str:
    """Return the text with a comment on the line above a key, given as its path, in the key's indentation."""
    node = _compose(text)
    for word in words[:-1]:
        node = _child(node, word, text)
    key = next(key for key, _ in node.value if key.value == words[-1])
    start = key.start_mark.index - key.start_mark.column
    line = f"{' ' * key.start_mark.column}# {' '.join(comment.split())}\n"
    return text[:start] + line + text[start:]


def _compose(text: str) -> Any:
    return yaml.compose(text, Loader=Loader)


def _child(node: Any, word: str, text: str) -> Any:
    """Return the value of a key or the entry of a list, None for a mapping or an empty value without it."""
    if isinstance(node, yaml.SequenceNode):
        found = find_entry(_read(node, text), word)
        if isinstance(found, str):
            raise ValueError(found)
        return node.value[found]
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == word), None)
    if node.tag.endswith(":null"):
        return None
    raise ValueError(f"'{word}' is inside a plain value")


def _read(node: Any, text: str) -> Any:
    """Return a node's value; its first line begins in a column, and its text there."""
    start = node.start_mark
    return parse_yaml(" " * start.column + text[start.index : node.end_mark.index], "config")


def _add(text: str, node: Any, words: Sequence[str], value: Any) -> str:
    """Add a key to a mapping, or make an empty value a mapping with it."""
    for word in reversed(words[1:]):
        value = {word: value}
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        first = node.value[0][0].start_mark
        line = f"{' ' * first.column}{_flow(words[0])}: {_flow(value)}\n"
        start = first.index - first.column
        return text[:start] + line + text[start:]
    return _replace(text, node, {**(_read(node, text) or {}), words[0]: value})


def _replace(text: str, node: Any, value: Any) -> str:
    """Write a value instead of a node; a comment behind it stays in its column where there is room."""
    start, end = node.start_mark.index, node.end_mark.index
    written = _flow(value)
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:  # it ends where the next key begins
        return f"{text[:start]}{written}\n{text[end - node.end_mark.column :]}"
    line_end = text.find("\n", end)
    rest = text[end : line_end if line_end >= 0 else len(text)]
    room = len(rest) - len(rest.lstrip(" "))
    if rest.lstrip(" ").startswith("#"):
        rest = " " * max(2, room - len(written) + end - start) + rest.lstrip(" ")
    gap = "" if start == 0 or text[start - 1] in " \n" else " "
    return text[:start] + gap + written + rest + (text[line_end:] if line_end >= 0 else "")


def _flow(value: Any) -> str:
    """Write a value on one line."""
    written = yaml.dump([value], Dumper=Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1e9)
    return written.strip()[1:-1]
