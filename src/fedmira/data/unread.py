"""Keys of rows and turns beside the texts of an example: what is refused, what marks loss, what is only listed.

What changes the meaning of an example is never dropped: it is read, or its row is a bad row. Any other key that has a
value and is not read is listed once per study. docs/data.md has the table of keys.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from fedmira.data.records import scalars, shown
from fedmira.data.rows import BadRow, Row, kind_of

LOSS_MARKS = ("weight", "loss", "train", "trainable", "training")  # 0 or false: no loss is taken
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
_OF_CHATS = ("system_prompt", "system_message", "documents", "chat_template_kwargs", "chat_template", "prefix")
_OF_TURNS = ("tool_calls", "function_call", "tool_call_id", "prefix", "prefill", "refusal", *_MEDIA)
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
    if marks := [key for key in LOSS_MARKS if key in beside and _says_no(beside[key])]:
        raise BadRow(f"'{marks[0]}' says that the row is not trained on; remove the row, or rename the column")
    label = beside.get("label")
    if kind in ("request", "chat") and (label is False or (isinstance(label, str) and label.lower() == "false")):
        raise BadRow("'label' is false: the row is an example of a bad answer; remove the row, or rename the column")
    if kind == "chat":
        _refuse(beside, _OF_CHATS, "remove the column")
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
    for key in _OF_TURNS:
        if has_value(turn.get(key)) and turn[key] is not False:
            raise BadRow(f"'{key}' is not read: only text is; remove the row, or the key")


def _refuse(beside: Row, keys: Sequence[str], what: str) -> None:
    if key := next((key for key in keys if key in beside), None):
        raise BadRow(f"'{key}' is not read: {what}")


def _says_no(value: object) -> bool:
    """Is this 0 or false, in any spelling that a table may have?"""
    if isinstance(value, str):
        return value.strip().lower() in ("0", "0.0", "false")
    return value is False or (isinstance(value, int | float) and value == 0)


def is_trained(turn: Row, role: str) -> bool:
    """Return whether a turn's marks allow loss on it. Raises BadRow for a mark that is neither yes nor no."""
    trained = True
    for key in LOSS_MARKS:
        value = turn.get(key)
        if not has_value(value):
            continue
        yes = value is True or value == 1 or (isinstance(value, str) and value.strip().lower() in ("1", "1.0", "true"))
        if not yes and not _says_no(value):
            found = value if isinstance(value, int | float) else kind_of(value)
            raise BadRow(f"'{key}' is {found}: a turn is trained on (1 or true) or not (0 or false)")
        if yes and key != "weight" and role != "assistant":
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
    known = {*_TURN_TEXTS, *_METADATA, *LOSS_MARKS, *SHOWN_KEYS, *_OF_TURNS}
    keys = dict.fromkeys(key for turn in turns if isinstance(turn, Mapping) for key in turn if key not in known)
    for key in keys:
        if any(isinstance(turn, Mapping) and has_value(turn.get(key)) for turn in turns):
            yield f"{shown(key)} of turns"
