"""Write a first config for a user: every key, with a comment, filled in from their data and their overrides."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmira import bundled
from fedmira.cli.show import override, visible
from fedmira.config.edits import add_comment, set_value
from fedmira.config.faults import check_config
from fedmira.config.sections import INSTEAD, Config, DataConfig
from fedmira.config.yaml_text import apply_overrides, parse_yaml
from fedmira.data.formats import Reading, UnreadRows, read_records
from fedmira.data.owners import FIRST, LAST, Owner, find_owners
from fedmira.data.splits import find_splits, read_splits
from fedmira.data.templates import PLAIN
from fedmira.disk.files import write_atomic
from fedmira.errors import ConfigError, DataError, StoreError
from fedmira.methods import entry_faults
from fedmira.names import shown_name

MOST_PARTITIONS = 10  # clients of a partitioner, where no column names them
PARTITION_SIZE = 20  # examples of each of them, at least
OWNERS_LISTED = 6
UNDECIDED = "CHOOSE"  # what `by` is where several columns fit: a run then says which columns there are
CLIENTS = ("data", "clients")
DECISIVE = ((*CLIENTS, "by"), (*CLIENTS, "partitioner"))  # who sets one of them has decided who the clients are


@dataclass
class Draft:
    """What is written into a config: values found in the data, remarks on what could not be found, and notes."""

    values: dict[tuple[str, ...], Any] = field(default_factory=dict)
    remarks: dict[tuple[str, ...], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def draft_config(
    file: Path, *, data: str | None = None, model: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a commented config to a new file; return what was found in the data, and notes.

    data: path or hub name, read once to find its format and clients; None = data.path of the overrides, or the bundled
    tasks. overrides: a.b=c, as of `run`; they are used for reading, and written.
    Raises StoreError if the file exists, ConfigError if its folder does not or an override is wrong, DataError if there
    is no such data. Data that is there, but cannot be read as it is, gets a config with a comment on what is missing.
    """
    if file.exists():
        raise StoreError(f"'{file}' exists already; choose another name: fedmira init my_study.yaml")
    if not file.absolute().parent.is_dir():
        raise ConfigError([f"no such folder: '{file.parent}'; create it, or choose another folder"], str(file))
    text = _template(file)
    given: dict[tuple[str, ...], Any] = {}
    if data is not None:
        given["data", "path"] = data
    if model is not None:
        given["model", "base_model"] = model
    for words, value in given.items():
        text = set_value(text, words, value)
    raw = parse_yaml(text, "init")
    chosen = apply_overrides(raw, overrides)
    fixed = [tuple(path) for path, _ in chosen]
    for path, value in chosen:
        text = set_value(text, path, value)  # apply_overrides has refused what leads nowhere
        if value and (replaced := INSTEAD.get(tuple(path))) is not None:
            other, neutral = replaced
            if other not in fixed and _value(raw, other) not in (None, neutral):
                text = set_value(text, other, neutral)
    config = check_config(parse_yaml(text, "init"), "overrides", entry_faults)
    decided = any(path == CLIENTS[: len(path)] or path in DECISIVE for path in fixed)
    draft = Draft() if config.data.path == bundled.TASKS else _read(config, file, decided=decided)
    for words, value in draft.values.items():
        if not any(words[: len(path)] == path for path in fixed):
            text = set_value(text, words, value)
    for words, remark in draft.remarks.items():
        text = add_comment(text, words, remark)
    if given or chosen:
        text = re.sub(r"# As it is, it runs .*\n", "", text)
    written = check_config(parse_yaml(text, "init"), "init")
    write_atomic(file, text.encode(), shared=True)
    return _summary(written, draft.notes)


def _value(raw: Any, path: Sequence[str]) -> Any:
    """Return what a mapping of mappings has at a path; None if it has nothing there."""
    for word in path:
        raw = raw.get(word) if isinstance(raw, Mapping) else None
    return raw


def _template(file: Path) -> str:
    """Return the text of the config for the bundled tasks."""
    text = (Path(bundled.__file__).parent / "init.yaml").read_text(encoding="utf-8")
    name = re.sub(r"[^\w-]", "-", file.stem)
    return text.replace("@NAME@", name).replace("@FILE@", re.sub(r"[^\w./ -]", "?", str(file)))


def _summary(config: Config, notes: Sequence[str]) -> dict[str, Any]:
    partitioner = config.data.clients.partitioner
    return {
        "format": config.data.format,
        "by": config.data.clients.by,
        "split_column": config.data.split_column,
        "max_length": config.data.max_length,
        "template": config.data.template,
        "partitioner": None if partitioner is None else partitioner.model_dump(exclude_defaults=True),
        "notes": list(notes),
    }


def _read(config: Config, file: Path, *, decided: bool) -> Draft:
    """Look at the data. decided: an override says who the clients are. Raises DataError if there is none."""
    data, draft = config.data, Draft()
    if not decided:
        draft.values[(*CLIENTS, "by")] = UNDECIDED
    try:
        reading = _records(data)
    except UnreadRows as error:
        try:
            reading = _records(data, on_bad_row="skip")
        except DataError:  # all rows are bad, or where the next one begins is not known
            _remark_unread(draft, str(error), file, data.path)
            return draft
        draft.notes.append(f"{error}\n(with data.on_bad_row=skip, bad rows are left out and counted)")
    draft.values["data", "format"] = reading.format
    if not decided:
        _find_clients(draft, reading)
    own = find_splits(reading.records, tables=reading.splits)
    if own is not None:
        column, values = own
        if set(read_splits(values)) == set(values):
            draft.values["data", "split_column"] = column
        else:
            few = ", ".join(map(shown_name, values[:8]))
            draft.remarks["data", "split_column"] = f"splits of '{shown_name(column)}', not all known: {few}"
    if reading.template == "chat" and data.template == "auto":
        _find_template(draft, config)
    return draft


def _records(data: DataConfig, **changes: Any) -> Reading:
    return read_records(bundled.resolve(data.path), **{**data.reading, **changes})


def _remark_unread(draft: Draft, error: str, file: Path, path: str) -> None:
    """Say in the file and on the terminal why the data cannot be read yet, and what init can be given instead."""
    head, _, faults = error.partition("\n")
    first = visible(faults.strip().splitlines()[0].removeprefix("- ")) if faults else visible(head)
    draft.remarks["data", "format"] = f"the data cannot be read as it is: {first}"
    if said := re.search(r"data\.(encoding|delimiter): ('.+?'|[\w-]+)", first):
        missing = f"data.{said[1]}={said[2]}".replace("'\\t'", "tab")
    elif "data.columns" in first:
        missing = "data.columns={prompt: ..., completion: ...}"
    else:
        draft.notes.append(f"{error}\nthe file is written, with a comment there; correct the data")
        return
    command = shlex.join(["fedmira", "init", str(file), "--data", path, missing])
    draft.notes.append(
        f"{error}\nthe file is written, with a comment there; complete it, or remove it and give init what is missing: "
        f"{command}"
    )


def _find_clients(draft: Draft, reading: Reading) -> None:
    """Decide who the clients are: a column, or a question where several fit; parts only where no column fits."""
    owners = find_owners(reading.records)
    others = [owner for owner in owners.fitting if owner.column != owners.chosen]
    by = (*CLIENTS, "by")
    if owners.chosen is not None:
        draft.values[by] = owners.chosen
        if owners.chosen.lower() not in (*FIRST, *LAST):
            count = next(owner.values for owner in owners.fitting if owner.column == owners.chosen)
            draft.notes.append(
                f"the clients are the {count} values of '{shown_name(owners.chosen)}'; if they are others, change "
                "data.clients.by"
            )
        if others:
            draft.remarks[by] = f"other columns that may name the clients: {_listed(others)}"
    elif others:
        draft.remarks[by] = f"choose one: {_listed(others)}"
        draft.notes.append(
            f"several columns may name the clients: {_listed(others)}; write one of them: "
            f"{override('data.clients.by', others[0].column)}"
        )
    else:
        partitions = min(MOST_PARTITIONS, max(1, len(reading.records) // PARTITION_SIZE))
        draft.values[by] = "task"
        draft.values[(*CLIENTS, "partitioner")] = {"name": "iid", "num_partitions": partitions}
        if owners.partial:
            column = owners.partial[0].column
            without = sum(not record.columns.get(column, "").strip() for record in reading.records)
            draft.remarks[by] = f"may name the clients, if every example had a value: {_listed(owners.partial)}"
            draft.notes.append(
                f"'{shown_name(column)}' ({owners.partial[0].values} values) may name the clients, but {without} of "
                f"{len(reading.records)} examples have none, so examples are dealt at random; fill it in and write "
                f"{override('data.clients.by', column)} data.clients.partitioner=null"
            )


def _listed(owners: Sequence[Owner]) -> str:
    listed = ", ".join(f"{shown_name(owner.column)} ({owner.values} values)" for owner in owners[:OWNERS_LISTED])
    return listed + (", ..." if len(owners) > OWNERS_LISTED else "")


def _find_template(draft: Draft, config: Config) -> None:
    """Choose how conversations are shown: by the base's chat template, or by a plain one if it has none."""
    has = _has_chat_template(config.model.base_model)
    if has is False:
        draft.values["data", "template"] = PLAIN
        draft.remarks["data", "template"] = (
            f"the data is conversations, and this base has no chat template: {PLAIN} is one (docs/data.md); with a "
            "base that has one: auto"
        )
        draft.notes.append(f"the base has no chat template; data.template is '{PLAIN}', see docs/data.md")
    elif has is None:
        draft.remarks["data", "template"] = (
            f"conversations: auto is the base's chat template; if it has none, write {PLAIN}, chatml, zephyr or a file"
        )


def _has_chat_template(base_model: str) -> bool | None:
    """Has the base's tokenizer a chat template? None if its files are not on this machine."""
    folder = Path(bundled.resolve(base_model))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(base_model, name) for name in ("tokenizer_config.json", "chat_template.jinja")]
        here = next((Path(path).parent for path in cached if isinstance(path, str)), None)
        if here is None:
            return None
        folder = here
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
