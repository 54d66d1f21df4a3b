"""Keys of rows and turns beside the texts of an example: what is refused, what marks loss, what is only listed.

What changes the meaning of an example is never dropped: it is read, or its row is a bad row. Any other key that has a
value and is not read is listed once per study. docs/data.md has the table of keys.
"""

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from fedmira.data.records import letters_of, scalars, shown
from fedmira.data.rows import BadRow, Row, kind_of

LOSS_MARKS = ("weight", "loss", "train", "trainable", "training", "loss_mask", "loss_weight")  # 0, false: no loss
REASONING = ("reasoning_content", "reasoning", "thinking")
SHOWN_KEYS = (*REASONING, "name")  # of turns: given to the chat template

_EMPTY = ("", "[]", "{}")
_MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio", "files", "attachments")
_PAIRS = ("chosen", "rejected")
_TOOLS = ("tools", "functions")
# Beside one request and its answer: what other programs show to the model with them.
_BESIDE = (
    *("system", "system_prompt", "system_message", "history", "chat_history", "context", "input", "passage"),
    *("document", "documents", "choices", "options", "prefix", "suffix", *REASONING),
)
# The same, where it is not a part of a text that is read: a formatted prompt may contain it.
_UNLESS_REPEATED = {
    "request": ("instruction", "instructions"),
    "chat": ("context", "passage", "document", "history", "chat_history"),
}
_OF_CHATS = (
    "system",
    "system_prompt",
    "system_message",
    "documents",
    "chat_template_kwargs",
    "chat_template",
    "prefix",
)
_OF_TURNS = (
    *("tool_calls", "function_call", "tool_call_id", "prefix", "prefill", "refusal"),
    *("train_detail", "training_detail", *_MEDIA),
)
_METADATA = frozenset(  # of turns: who wrote them and when
    {"id", "turn_id", "message_id", "parent_id", "index", "turn", "lang", "language", "model", "model_name", "source"}
    | {"timestamp", "created_at", "date", "time", "tokens", "token_count", "hash"}
)
_TURN_TEXTS = frozenset({"role", "content", "from", "value"})
_TASK_LISTS = frozenset({"Positive Examples", "Negative Examples"})  # of Natural Instructions: not a part of the prompt


def has_value(value: object) -> bool:
    """Is this more than null, NaN, an empty text, an empty list or an empty object?"""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return value not in _EMPTY if isinstance(value, str) else value not in ([], {})


def refuse_row(row: Row, taken: Collection[str], *, kind: str, named: bool) -> None:
    """Raise BadRow if a key that is not read changes what the row means.

    taken: the keys that are read. kind: request, chat, text or tasks. named: data.columns names texts, so the user has
    said which are needed.
    """
    beside = {key: value for key, value in row.items() if key not in taken and has_value(value)}
    _refuse(beside, _MEDIA, "only text is; remove the column")
    _refuse(
        {key: value for key, value in beside.items() if kind == "chat" or not isinstance(value, str)},
        _TOOLS,
        "conversations with tools are not supported; remove the column",
    )
    if marks := [key for key in beside if is_one_of(key, LOSS_MARKS) and _says_no(beside[key])]:
        raise BadRow(f"'{marks[0]}' says that the row is not trained on; remove the row, or rename the column")
    labels = [value for key, value in beside.items() if is_one_of(key, ("label",))]
    if kind in ("request", "chat") and any(str(label).strip().lower() == "false" for label in labels):
        raise BadRow("'label' is false: the row is an example of a bad answer; remove the row, or rename the column")
    if kind == "chat":
        _refuse(beside, _OF_CHATS, "remove the column")
    if kind in _UNLESS_REPEATED and not named:
        read = [_words(text) for key in taken for text in _texts(row.get(key))]
        new = {key: value for key, value in beside.items() if not any(_words(value) in text for text in read)}
        _refuse(
            new,
            _UNLESS_REPEATED[kind],
            "no text that is read contains it; if it is needed, write it there, else rename the column",
        )
    if kind != "text" and not named:
        _refuse(
            beside,
            _PAIRS,
            "there is no training on preferences; to train on chosen texts: data.columns {prompt: prompt, "
            "completion: chosen}, or {messages: chosen} for lists of turns",
        )
    if kind == "request" and not named:
        _refuse(
            beside,
            _BESIDE,
            "if it is part of the request, write it in the prompt, or the row as a conversation (data.format "
            "messages); if it is not needed, name the two texts, as in data.columns {prompt: prompt, completion: "
            "completion}",
        )


def refuse_turn(turn: Row) -> None:
    """Raise BadRow if a key of a turn changes its meaning and is not read."""
    for key, value in turn.items():
        if is_one_of(key, _OF_TURNS) and has_value(value) and value is not False:
            raise BadRow(f"'{key}' is not read: only text is; remove the row, or the key")


def is_one_of(key: str, names: tuple[str, ...]) -> bool:
    """Is this key one of the names, in any spelling: `System Prompt`, `systemPrompt`, `SYSTEM-PROMPT`?"""
    return letters_of(key) in _all_letters(names)


@functools.cache
def _all_letters(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(letters_of, names))


def _refuse(beside: Row, keys: tuple[str, ...], what: str) -> None:
    if key := next((key for key in beside if is_one_of(key, keys)), None):
        raise BadRow(f"'{key}' is not read: {what}")


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a value, also those in lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(entry)


def _words(value: object) -> str:
    return " ".join(str(value).split())


def _says_no(value: object) -> bool:
    """Is this 0 or false, in any spelling that a table may have?"""
    if isinstance(value, str):
        return value.strip().lower() in ("0", "0.0", "false")
    return value is False or (isinstance(value, int | float) and value == 0)


def is_trained(turn: Row, role: str) -> bool:
    """Return whether a turn's marks allow loss on it. Raises BadRow for a mark that is neither yes nor no."""
    trained = True
    for key, value in turn.items():
        if not is_one_of(key, LOSS_MARKS) or not has_value(value):
            continue
        yes = value is True or value == 1 or (isinstance(value, str) and value.strip().lower() in ("1", "1.0", "true"))
        if not yes and not _says_no(value):
            found = value if isinstance(value, int | float) else kind_of(value)
            raise BadRow(f"'{key}' is {found}: a turn is trained on (1 or true) or not (0 or false)")
        if yes and not is_one_of(key, ("weight", "loss_weight")) and role != "assistant":
            raise BadRow(f"'{key}' is true in a turn of the {role}: loss is taken on the assistant's turns only")
        trained = trained and yes
    return trained


def list_unread(row: Row, taken: Collection[str], turns: Sequence[object], *, kind: str) -> Iterator[str]:
    """Yield the names of keys with a value that is neither read nor a column: of the row, and of its turns."""
    for key, value in row.items():
        if key not in taken and has_value(value) and not scalars({key: value}):
            joined = isinstance(value, list) and all(scalars({key: entry}) for entry in value)
            if kind != "tasks" or not (joined or key in _TASK_LISTS):
                yield shown(key)
    known = {*_TURN_TEXTS, *_METADATA, *SHOWN_KEYS}
    names = [key for turn in turns if isinstance(turn, Mapping) for key in turn if key not in known]
    keys = dict.fromkeys(key for key in names if not is_one_of(key, (*LOSS_MARKS, *_OF_TURNS)))
    for key in keys:
        if any(isinstance(turn, Mapping) and has_value(turn.get(key)) for turn in turns):
            yield f"{shown(key)} of turns"
