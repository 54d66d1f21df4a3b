"""Convert one row into records: instructions, prompts, texts, Natural Instructions tasks (conversations: chats.py)."""

import re
from collections.abc import Iterator

from fedmira.data.records import (
    ALIASES,
    Keys,
    Record,
    present,
    required,
    scalars,
    shown,
    take_answers,
    take_columns,
    take_text,
)
from fedmira.data.rows import BadRow, Fault, Place, Row, as_row, kind_of

_PLAIN_ID = re.compile(r"[\w.:#/-]{1,120}")
_HARMLESS = frozenset(  # allowed beside a question and its answer: none of them is part of the question
    {"id", "index", "file", "split", "client", "site", "user", "owner", "group", "source", "subject", "topic", "level"}
    | {"type", "language", "license", "url", *ALIASES}
)


# ---------------------------------------------------------------- instruction, input, answer


def recognises_instruction(row: Row, keys: Keys) -> bool:
    """Every text must be present; the input may be absent, but not under a name that is not read."""
    needed = [name for name in keys if name not in ("input", *ALIASES)]
    return all(present(row, keys[name]) is not None for name in needed) and _unread_input(row, keys) is None


def _unread_input(row: Row, keys: Keys) -> str | None:
    """Return the key of an input that is not read: dropping it silently would change the task."""
    if present(row, keys.get("input", ())) is not None:
        return None
    taken = {key for names in keys.values() for key in names}
    return next((key for key in ("input", "context") if key in row and key not in taken), None)


def convert_instruction(row: Row, keys: Keys, place: Place) -> Iterator[Record]:
    """One example per row: instruction, input if the data has one, answer."""
    instruction = take_text(row, keys, "instruction")
    text = take_text(row, keys, "input") if "input" in keys else ""
    if unread := _unread_input(row, keys):
        raise BadRow(f"'{unread}' would not be read; the first row has no input, or name it: {{input: {unread}}}")
    answers = take_answers(row, keys, "answer", several=False)
    yield Record(instruction, text, answers, take_columns(row, keys), str(place))


# ---------------------------------------------------------------- prompt and completion, text


def recognises_pair(row: Row, keys: Keys) -> bool:
    names = [present(row, keys[name]) for name in ("prompt", "completion")]
    return None not in names and _beside_question(row, keys) is None


def _beside_question(row: Row, keys: Keys) -> str | None:
    """Return a column that may be part of the question; None if there is none.

    Unless the user names them, `question` and `answer` are read as prompt and completion only in rows without a
    passage, choices or the like.
    """
    spelled = (("prompt", "question"), ("completion", "answer"))
    if not any(len(keys[name]) > 1 and present(row, keys[name]) == key for name, key in spelled):
        return None
    named = {names[0] for names in keys.values() if len(names) == 1}  # named by the user
    allowed = {"prompt", "completion", "question", "answer"} | _HARMLESS | named
    return next((key for key in row if key not in allowed), None)


def convert_pair(row: Row, keys: Keys, place: Place) -> Iterator[Record]:
    """One example per row: a prompt, and one or several correct completions."""
    if (beside := _beside_question(row, keys)) is not None:
        raise BadRow(
            f"{shown(beside)} is beside 'question' and 'answer' and would not be read; if it is not needed, name the "
            "two in data.columns: {prompt: question, completion: answer}"
        )
    if isinstance(row.get(key := required(row, keys, "prompt")), list):
        raise BadRow(f"{shown(key)} is a list, not text; lists of turns are read by data.format messages")
    prompt = take_text(row, keys, "prompt")
    answers = take_answers(row, keys, "completion", several=True)
    yield Record(prompt, "", answers, take_columns(row, keys), str(place))


def recognises_text(row: Row, keys: Keys) -> bool:
    return present(row, keys["text"]) is not None


def convert_text(row: Row, keys: Keys, place: Place) -> Iterator[Record]:
    """One example per row: a text to train on, without a prompt."""
    yield Record("", "", take_answers(row, keys, "text", several=False), take_columns(row, keys), str(place))


# ---------------------------------------------------------------- Natural Instructions


def recognises_tasks(row: Row, keys: Keys) -> bool:
    return all(present(row, keys[name]) is not None for name in ("instruction", "instances"))


def convert_tasks(row: Row, keys: Keys, place: Place) -> Iterator[Record | Fault]:
    """One Natural Instructions task per row: a record for each of its instances."""
    definition = take_answers(row, keys, "instruction", several=True)
    instances = row[required(row, keys, "instances")]
    if not isinstance(instances, list) or not instances:
        raise BadRow(f"'{present(row, keys['instances'])}' is {kind_of(instances)}, not a list with an instance")
    columns = _task_columns(row, keys, place)
    for index, instance in enumerate(instances):
        try:
            example = as_row(instance)
            text = take_text(example, keys, "input")
            answers = take_answers(example, keys, "answer", several=True)
        except BadRow as bad:
            yield Fault(f"{place}, instance {index + 1} of {len(instances)}", str(bad))
            continue
        name = example.get("id")
        known = isinstance(name, str) and _PLAIN_ID.fullmatch(name)
        source = f"{place.file}#{name}" if known else f"{place}#{index}"
        yield Record("\n".join(definition), text, answers, columns, source)


def _task_columns(row: Row, keys: Keys, place: Place) -> dict[str, str]:
    """Return a task's fields as text, lists of scalars joined by "; ", with `task` and, where known, `category`."""
    unread = {present(row, keys[name]) for name in ("instruction", "instances")}
    columns: dict[str, str] = {}
    for key, value in row.items():
        words = _scalar_list(value, key)
        if key not in unread and words:
            columns[key] = "; ".join(words)
    for name in ALIASES:
        source = present(row, keys[name])
        if source is not None and (words := _scalar_list(row[source], source)):
            columns[name] = words[0]
    if not columns.get("task"):
        if not place.alone:
            raise BadRow("no 'task': only a .json file with a single task takes its name from the file")
        columns["task"] = place.stem
    return columns


def _scalar_list(value: object, key: str) -> list[str]:
    """Return a scalar, or a list of scalars, as texts; [] for anything else."""
    values = value if isinstance(value, list) else [value]
    words = [text for word in values for text in scalars({key: word}).values()]
    return words if len(words) == len(values) else []
