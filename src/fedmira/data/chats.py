"""Conversations: one example per row, whose answer is the assistant's last turn.

The last turn that is not marked to be left untrained. Later turns are left out: no loss is taken on them. Nothing else
is dropped silently: tool calls, parts that are not text, and lists of tools make a row bad (unread.py).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fedmira.data.records import Keys, Record, Turn, check_text, present, required, shown, take_columns
from fedmira.data.rows import BadRow, Place, Row, kind_of
from fedmira.data.unread import SHOWN_KEYS, has_value, is_one_of, is_trained, refuse_turn

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "ai"),
    "tool": ("tool", "function", "observation", "function_response"),
}

_ROLE_OF = {word: role for role, words in ROLES.items() for word in words}
_SPELLINGS = (("role", "content"), ("from", "value"))  # of a turn; both formats accept either
_ANSWERS = ("completion", "answer", "response", "output")  # beside turns: what they lead to
_PLAIN_ROLE = re.compile(r"[A-Za-z_-]{1,20}")


def recognises_chat(row: Row, keys: Keys) -> bool:
    """Is there a list of turns, or (as in TRL) a prompt and a completion that are both lists of turns?"""
    return _holds_turns(row, keys) or ("messages" in keys and _split_chat(row))


def _holds_turns(row: Row, keys: Keys) -> bool:
    return any(present(row, keys[name]) is not None for name in ("messages", "conversations") if name in keys)


def _split_chat(row: Row) -> bool:
    return all(_is_turns(row.get(name)) for name in ("prompt", "completion"))


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def convert_chat(row: Row, keys: Keys, place: Place) -> Iterator[Record]:
    """One record per row: the turns before the assistant's last turn, and the text of that turn as the answer."""
    if _holds_turns(row, keys) or not _split_chat(row):
        turns = _turns(row, required(row, keys, "messages" if "messages" in keys else "conversations"))
        first = 0
        _refuse_answer_beside(row, turns)
    else:
        # as in TRL: loss on the completion only
        prompt_turns = [replace(turn, trained=False) for turn in _turns(row, "prompt")]
        completion_turns = _turns(row, "completion")
        turns, first = [*prompt_turns, *completion_turns], len(prompt_turns)
    spoken = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index >= first]
    if not spoken:
        raise BadRow("no assistant turn to learn from" + (" in 'completion'" if first else ""))
    spoken = [index for index in spoken if turns[index].trained]
    if not spoken:
        raise BadRow("every assistant turn is marked not to be trained on; remove the row")
    before = _with_system(row, keys, turns[: spoken[-1]])
    if not before:
        raise BadRow("no turn precedes the assistant's only turn; use data.format text for texts without a prompt")
    taken = present(row, keys["system"])  # its text is a turn now, and turns are not columns
    columns = {name: text for name, text in take_columns(row, keys).items() if name != taken}
    answer = turns[spoken[-1]]
    yield Record("", "", (answer.text,), columns, str(place), tuple(before), answer.more)


def _refuse_answer_beside(row: Row, turns: list[Turn]) -> None:
    """Raise BadRow if the conversation ends with a question and its answer is in another column."""
    if turns[-1].role == "assistant":
        return
    if key := next((key for key in row if is_one_of(key, _ANSWERS) and has_value(row[key])), None):
        raise BadRow(
            f"'{key}' is not read, and the last turn is the {turns[-1].role}'s: write it as the assistant's last turn, "
            "or rename the column"
        )


def _with_system(row: Row, keys: Keys, turns: list[Turn]) -> list[Turn]:
    """Put the row's `system` text, if it has one, before the turns."""
    key = present(row, keys["system"])
    if key is None or row[key] is None:
        return turns
    text = check_text(row[key], key)
    if not text.strip():
        return turns
    if turns and turns[0].role == "system":
        if turns[0].text != text:
            raise BadRow(f"two system texts: {shown(key)} and the first turn; keep one")
        return turns
    return [Turn("system", text), *turns]


def _turns(row: Row, key: str) -> list[Turn]:
    value = row[key]
    if not isinstance(value, list) or not value:
        hint = " (JSON inside a text is not read; use .jsonl or .parquet)" if isinstance(value, str) else ""
        raise BadRow(f"{shown(key)} is {kind_of(value)}, not a list of turns{hint}")
    turns = []
    for index, entry in enumerate(value):
        try:
            turns.append(_turn(entry))
        except BadRow as bad:
            raise BadRow(f"{shown(key)}, turn {index + 1} of {len(value)}: {bad}") from None
    return turns


def _turn(entry: object) -> Turn:
    if not isinstance(entry, dict):
        raise BadRow(f"found {kind_of(entry)} where a turn (an object with role and content) was expected")
    turn: Row = entry
    refuse_turn(turn)
    spelling = next((pair for pair in _SPELLINGS if turn.get(pair[0]) is not None), None)
    if spelling is None:
        raise BadRow("no 'role' (or 'from')")
    roles = {_role(turn[key], key) for key, _ in _SPELLINGS if has_value(turn.get(key))}
    role = _role(turn[spelling[0]], spelling[0])
    contents = [pair[1] for pair in sorted(_SPELLINGS, key=lambda pair: pair != spelling) if pair[1] in turn]
    if not contents:
        raise BadRow(f"no '{spelling[1]}'")
    # tables write null for missing fields
    filled = [name for name in contents if has_value(turn[name])]
    if len(roles) > 1 or (len(filled) > 1 and turn[filled[0]] != turn[filled[1]]):
        one, other = _SPELLINGS[0][len(roles) < 2], _SPELLINGS[1][len(roles) < 2]
        raise BadRow(f"'{one}' and '{other}' differ; keep one")
    content = (filled or [name for name in contents if turn[name] is not None] or contents)[0]
    text = check_text(turn[content], content)
    if role == "assistant" and not text.strip():
        raise BadRow(f"'{content}' of the assistant is empty")
    more = {key: check_text(turn[key], key) for key in SHOWN_KEYS if has_value(turn.get(key))}
    return Turn(role, text, is_trained(turn, role), more)


def _role(value: object, key: str) -> str:
    word = check_text(value, key).strip()
    if word.lower() not in _ROLE_OF:
        shown_role = f"'{word}'" if _PLAIN_ROLE.fullmatch(word) else "it"  # otherwise it may be a turn's text
        raise BadRow(f"'{key}': {shown_role} is not a known role; known: {', '.join(_ROLE_OF)}")
    return _ROLE_OF[word.lower()]
