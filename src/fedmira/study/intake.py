"""A study's data: read, dealt to clients, split, and encoded with the base's tokenizer. No weights are read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedmira import bundled
from fedmira.config.partitioners import NaturalIdPartitioner, Partitioner
from fedmira.config.sections import Config, EvaluationConfig
from fedmira.data import partitioners
from fedmira.data.batches import ClientData, Encoded, Truncation
from fedmira.data.encode import encode_client
from fedmira.data.formats import Reading, Record, read_records
from fedmira.data.owners import Owner, find_owners
from fedmira.data.partition import column_values, form_clients
from fedmira.data.rows import Fault
from fedmira.data.special import as_text, count_special, special_names
from fedmira.data.splits import SPLITS, find_splits, read_splits
from fedmira.data.templates import Template, make_template
from fedmira.engine.events import Observer
from fedmira.errors import ConfigError
from fedmira.evaluation.rouge import rouge_words
from fedmira.model.base.source import find_folder, load_config, load_tokenizer, positions, vocabulary_of
from fedmira.model.base.vocabulary import check_end, check_ids
from fedmira.names import ClientNames, lookalikes
from fedmira.study.events import ClientsEncoded, DataRead

SHORTEST = 4  # tokens of a text, as data.max_length has it


class Unknown(NamedTuple):
    """What the tokenizer does not know in a split."""

    share: float  # of the tokens
    answers: int  # with such a token
    examples: int


@dataclass(frozen=True, eq=False)
class Intake:
    """A study's data as token ids, and what was done to it on the way."""

    clients: list[ClientData]
    truncation: Truncation
    format: str
    keys: Mapping[str, str]  # our name -> the data's key
    template: Template  # as questions to exported adapters are asked: special tokens in them are control tokens
    examples: int  # read
    found: Sequence[str]  # what was found of text files that are not UTF-8 with the usual separator
    others: int  # files in the folder that are of another kind, and not read
    empty: int  # files or splits without an example, with on_bad_row: skip
    skipped: Sequence[Fault]  # bad rows, with on_bad_row: skip
    left_out: int  # examples that the partitioner gives to nobody
    unknown: Mapping[str, Unknown]  # split -> what the tokenizer does not know in it; splits with such tokens only
    glued: int  # prompts that end, and whose answers begin, without a space or line break
    special: Mapping[str, int]  # special token -> examples whose own texts have it
    special_as_text: bool  # these are plain text
    special_in_template: Sequence[str]  # special tokens that a template file for single requests writes
    unread: Mapping[str, tuple[int, str]]  # key that is not read -> examples with it, the place of the first
    pooled: tuple[str, Sequence[str]] | None  # column and names of splits that the data has, and that are not used
    alike: Mapping[str, Sequence[tuple[str, ...]]]  # column of clients or groups -> its values that look alike
    mixed: Sequence[Owner]  # columns that may name the clients, and whose values a partitioner mixes
    spelled: Mapping[str, str]  # a value of data.split_column -> the split that it names, where it is spelled otherwise
    asked: int  # test examples that answers are generated for; 0 if no metric needs them
    too_long: Sequence[int]  # of these, tokens of the answers longer than evaluation.max_new_tokens
    wordless: int  # of these, those whose answers have no word that rouge_l knows; 0 if that is not a metric

    @property
    def names(self) -> ClientNames:
        """Names of the clients in the data, by id."""
        return ClientNames({client.id: client.name for client in self.clients})


def take_in(config: Config, observer: Observer, *, whole: str | None = None) -> tuple[Any, Intake]:
    """Read the data and encode every client with the base's tokenizer; return tokenizer and intake.

    whole: the name of the only client, which has all data, instead of `data.clients`. Raises DataError, ConfigError or
    ModelError.
    """
    base_path, revision = bundled.resolve(config.model.base_model), config.model.revision
    tokenizer = load_tokenizer(base_path, revision=revision)
    base_config = load_config(base_path, find_folder(base_path, revision=revision))
    max_question = _check_positions(config, positions(base_config))
    vocabulary = vocabulary_of(base_config)
    if vocabulary is not None:
        check_end(tokenizer, vocabulary=vocabulary, name=config.model.base_model)
    intake = _read_clients(config, tokenizer, max_question, observer, whole)
    if vocabulary is not None:
        check_examples(intake, tokenizer, vocabulary=vocabulary, name=config.model.base_model)
    observer(DataRead(intake))
    return tokenizer, intake


def check_examples(intake: Intake, tokenizer: Any, *, vocabulary: int, name: str) -> None:
    """Raise ModelError if an example, or the prompt that asks for its answer, has an id that the base cannot read."""
    texts = (
        (*example.ids, *(example.own_question or ()))
        for client in intake.clients
        for split in (client.train, client.validation, client.test)
        for example in split
    )
    where = f"examples (data.template {intake.template.name})"
    check_ids(texts, tokenizer, vocabulary=vocabulary, name=name, where=where)


def _read_clients(
    config: Config, tokenizer: Any, max_question: int | None, observer: Observer, whole: str | None
) -> Intake:
    section = config.data
    reading = read_records(bundled.resolve(section.path), **section.reading)
    template = plain = make_template(section.template, usual=reading.template, tokenizer=tokenizer)
    names = special_names(tokenizer)
    if section.special_tokens == "text":
        template, tokenizer = as_text(template, tokenizer)
    if reading.format == "text":
        _check_text(config, template)
    chosen = section.clients.partitioner if whole is None else None
    by = chosen.partition_by if isinstance(chosen, NaturalIdPartitioner) else section.clients.by
    parts = _partition(reading.records, chosen, section.seed)
    formed = form_clients(
        reading.records,
        by=by,
        per_group=section.clients.per_group,
        parts=parts,
        whole=whole,
        first=section.clients.first,
        groups=section.clients.groups,
        subsample=section.subsample,
        validation=section.split.validation,
        test=section.split.test,
        split_column=section.split_column,
        seed=section.seed,
    )
    clients = []
    for done, client in enumerate(formed, 1):
        clients.append(
            encode_client(
                client, tokenizer, template=template, max_length=section.max_length, max_question=max_question
            )
        )
        observer(ClientsEncoded(done, len(formed)))
    asked = _asked(clients, config.evaluation)
    lengths = [_answer_length(example, tokenizer.eos_token_id) for example in asked]
    return Intake(
        clients=clients,
        truncation=sum((client.truncation for client in clients), Truncation()),
        format=reading.format,
        keys=reading.keys,
        template=plain,
        examples=len(reading.records),
        found=reading.found,
        others=reading.counts["others"],
        empty=reading.counts["empty"],
        skipped=reading.skipped,
        unknown=_find_unknown(clients, getattr(tokenizer, "unk_token_id", None), end=tokenizer.eos_token_id),
        glued=_count_glued(reading.records) if template.name == "none" and reading.format != "text" else 0,
        special=count_special(reading.records, names),
        special_as_text=section.special_tokens == "text",
        special_in_template=[] if template.complete else [name for name in names if name in template.source],
        unread=_count_unread(reading.records),
        pooled=_unused_splits(reading, section.split_column, by),
        alike=_lookalikes(
            reading.records, (None if parts is not None or whole is not None else by, section.clients.groups)
        ),
        mixed=() if parts is None else _mixed(reading.records, chosen),
        spelled=_spelled_otherwise(reading.records, section.split_column),
        left_out=0 if parts is None else len(reading.records) - sum(len(part) for part in parts),
        asked=len(asked),
        too_long=[length for length in lengths if length > config.evaluation.max_new_tokens],
        wordless=sum(not any(map(rouge_words, example.answers)) for example in asked)
        if "rouge_l" in config.evaluation.metrics
        else 0,
    )


def _asked(clients: Sequence[ClientData], evaluation: EvaluationConfig) -> list[Encoded]:
    """Return the test examples that answers are generated for and scored."""
    if all(metric == "loss" for metric in evaluation.metrics):
        return []
    return [example for client in clients for example in client.test[: evaluation.max_examples]]


def _answer_length(example: Encoded, end: int) -> int:
    """Return how many tokens a model must write for the trained answer, without the end of text."""
    return len(example.ids) - example.prompt_length - int(example.ids[-1] == end)


def _find_unknown(clients: Sequence[ClientData], unknown: int | None, *, end: int) -> dict[str, Unknown]:
    """Return what the tokenizer does not know in each split. Where that token is also the end of text, as GPT-2's,
    nothing is unknown: such a tokenizer has a token for every byte.
    """
    found: dict[str, Unknown] = {}
    if unknown is None or unknown == end:
        return found
    for split in SPLITS:
        examples: list[Encoded] = [example for client in clients for example in getattr(client, split)]
        tokens = sum(example.ids.count(unknown) for example in examples)
        answers = sum(unknown in example.ids[example.prompt_length :] for example in examples)
        if tokens:
            found[split] = Unknown(tokens / sum(len(example.ids) for example in examples), answers, len(examples))
    return found


def _count_glued(records: Sequence[Record]) -> int:
    """Count prompts that run into their answers: `Capital of Peru?Lima`."""
    pairs = ((record.input if record.input.strip() else record.instruction, record.answers[0]) for record in records)
    return sum(bool(re.search(r"[\w.?!)]$", prompt)) and answer[:1].isalnum() for prompt, answer in pairs)


def _count_unread(records: Sequence[Record]) -> dict[str, tuple[int, str]]:
    counts: dict[str, tuple[int, str]] = {}
    for record in records:
        for key in record.unread:
            count, first = counts.get(key, (0, record.source))
            counts[key] = (count + 1, first)
    return counts


def _unused_splits(reading: Reading, split_column: str | None, by: str) -> tuple[str, list[str]] | None:
    """Return column and values of splits that the data itself has, if they are mixed: that deserves a warning.

    Splits with names of another kind, such as topics, may be the clients.
    """
    if split_column is not None:
        return None
    found = find_splits(reading.records, tables=reading.splits)
    return None if found and found[0] == by and not read_splits(found[1]) else found


def _lookalikes(records: Sequence[Record], columns: Sequence[str | None]) -> dict[str, list[tuple[str, ...]]]:
    """Return for each column its values that differ in case, spaces, type or form of Unicode only; columns without
    such values are absent.
    """
    values = {
        column: dict.fromkeys(value for record in records if (value := record.columns.get(column, "")).strip())
        for column in columns
        if column
    }
    return {column: alike for column, names in values.items() if (alike := lookalikes(names))}


def _mixed(records: Sequence[Record], chosen: Partitioner | None) -> list[Owner]:
    """Return the columns that separate examples, best first, but for the one that the partitioner goes by."""
    column = getattr(chosen, "partition_by", None)
    return [owner for owner in find_owners(records).fitting if owner.column != column]


def _spelled_otherwise(records: Sequence[Record], column: str | None) -> dict[str, str]:
    """Return which split each value of a column is read as, where that is not its name."""
    values = () if column is None else (record.columns.get(column, "") for record in records)
    return {value: split for value, split in sorted(read_splits(values).items()) if value != split}


def _partition(records: Sequence[Record], chosen: Partitioner | None, default_seed: int) -> list[np.ndarray] | None:
    """Deal records to clients as a partitioner of the config says: the indices of each client's records.

    None where a column says whose each record is.
    """
    if chosen is None or isinstance(chosen, NaturalIdPartitioner):
        return None
    options = chosen.model_dump(exclude={"name", "seed", "partition_by"})
    seed = default_seed if chosen.seed is None else chosen.seed
    deal = getattr(partitioners, chosen.name)
    if column := getattr(chosen, "partition_by", None):
        labels = column_values(records, column, "clients.partitioner.partition_by")
        return deal(labels, seed=seed, **options)
    order = np.arange(len(records)) if not options.pop("shuffle") else partitioners.draw_order(len(records), seed=seed)
    return [np.sort(order[part]) for part in deal(len(records), **options)]


def _check_text(config: Config, template: Template) -> None:
    """Plain text has no prompt to show and none to answer."""
    faults = []
    if template.name != "none":
        faults.append(
            f"data.template: found '{template.name}': the data is plain text, without prompts; set it to none"
        )
    if written := [metric for metric in config.evaluation.metrics if metric != "loss"]:
        faults.append(f"evaluation.metrics: found {', '.join(written)}: plain text has no answers to write; keep loss")
    if faults:
        raise ConfigError(faults)


def _check_positions(config: Config, positions: int | None) -> int | None:
    """Refuse lengths that the base has no positions for; return the longest prompt that leaves room for an answer."""
    if positions is None:
        return None
    faults = []
    ahead = config.data.positions_ahead
    name, room = config.model.base_model, 0
    has = f"{positions} positions" + (f", of which {ahead} are kept for virtual tokens" if ahead else "")
    positions -= ahead
    if any(metric != "loss" for metric in config.evaluation.metrics):
        room = config.evaluation.max_new_tokens
    if positions < SHORTEST:
        raise ConfigError(
            [
                f"data.positions_ahead: base '{name}' has {has}: that leaves {max(positions, 0)} for texts; take fewer "
                "virtual tokens"
            ]
        )
    if config.data.max_length > positions:
        faults.append(
            f"data.max_length: found {config.data.max_length}: base '{name}' has {has}; "
            f"set data.max_length to at most {positions}"
        )
    if room >= positions:
        faults.append(
            f"evaluation.max_new_tokens: found {room}: base '{name}' has {has} for prompt and answer "
            "together; set it well below that"
        )
    if faults:
        raise ConfigError(faults)
    return positions - room
