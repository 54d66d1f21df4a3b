"""Everything that can be checked and settled before a study writes anything: data, methods, base, cohort, threads."""

import functools
import hashlib
import re
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedmira import bundled
from fedmira import methods as method_files
from fedmira.adapters import lora_layout, scales
from fedmira.adapters.ranks import by_ending, client_ranks, is_mixed, shown
from fedmira.config.partitioners import NaturalIdPartitioner, Partitioner
from fedmira.config.sections import Config, MethodEntry
from fedmira.data import partitioners
from fedmira.data.batches import ClientData, Truncation, encode_client
from fedmira.data.formats import Record, read_records
from fedmira.data.partition import SPLITS, client_key, column_values, form_clients
from fedmira.data.rows import Fault
from fedmira.data.templates import Template, make_template
from fedmira.engine.cost import plan_cohort
from fedmira.engine.federation import Federation, Observer
from fedmira.engine.schedule import draw_schedule
from fedmira.errors import ConfigError, MethodError, ModelError, nearest
from fedmira.evaluation.embed import embed_prompts
from fedmira.methods.base import Cohort, Method
from fedmira.model.base.load import Base, choose_device, count_positions, load_base, load_tokenizer
from fedmira.model.base.trial import check_embeddings

# Parameters below which a base runs on one thread: its products are so small that waiting for a second thread costs
# more than it brings (the demo, 0.26 M: 44 s on one thread, 59 s on two).
SMALL_BASE = 1_000_000
SHORTEST = 4  # tokens of a text, as data.max_length has it


@dataclass(frozen=True, eq=False)
class Intake:
    """A study's data as token ids, and what was done to it on the way."""

    clients: list[ClientData]
    truncation: Truncation
    format: str
    keys: Mapping[str, str]  # our name -> the data's key
    template: str
    examples: int  # read
    others: int  # files in the folder that are of another kind, and not read
    empty: int  # files or splits without an example, with on_bad_row: skip
    skipped: Sequence[Fault]  # bad rows, with on_bad_row: skip
    left_out: int  # examples that the partitioner gives to nobody
    unknown: float  # share of the training tokens that the tokenizer does not know
    glued: int  # prompts that end, and whose answers begin, without a space or line break
    pooled: Sequence[str]  # splits that the data itself names, and that are mixed and drawn anew


@dataclass(frozen=True, eq=False)
class Prepared:
    """A study that passed every check: what its runs share, and each run's method."""

    federation: Federation
    intake: Intake
    cohorts: Mapping[int, Cohort]
    entries: Sequence[MethodEntry]
    notes: Mapping[str, list[str]]  # label -> warnings of its build
    methods: Mapping[tuple[str, int], Method]
    linears: Sequence[str]  # names of the base's linear layers below its head
    threads: int


def take_in(config: Config, observer: Observer) -> tuple[Any, Intake]:
    """Read the data and encode every client with the base's tokenizer; return both. No weights are read.

    Raises DataError, ConfigError or ModelError.
    """
    base_path, revision = bundled.resolve(config.model.base_model), config.model.revision
    tokenizer = load_tokenizer(base_path, revision=revision)
    max_question = _check_positions(keep_positions(config), count_positions(base_path, revision=revision))
    intake = _read_clients(config, tokenizer, max_question, observer)
    observer("data", {"intake": intake})
    return tokenizer, intake


def prepare(config: Config, observer: Observer, saved: Mapping[str, Any] | None = None) -> Prepared:
    """Read data, check the methods, load the base and settle the cohort; nothing is written.

    saved: run.json of an earlier run of the study, whose dtype, threads and cohort are used again.
    """
    config = keep_positions(config)
    choose_device(config.model.device)  # refused now if it is not there, and not after minutes of reading
    tokenizer, intake = take_in(config, observer)
    clients = intake.clients

    @functools.cache
    def load() -> Base:
        return load_base(
            bundled.resolve(config.model.base_model),
            revision=config.model.revision,
            dtype=config.model.dtype if saved is None else saved["dtype"],
            device=config.model.device,
            targets=config.lora.target_modules,
            tokenizer=tokenizer,
        )

    @functools.cache
    def profile(column: str | None) -> np.ndarray:
        with warnings.catch_warnings():  # those of libraries are no notes on a method
            warnings.simplefilter("ignore")
            return embed_prompts(load(), clients) if column is None else count_values(clients, column)

    ranks = client_ranks(
        config.lora.ranks,
        usual=config.lora.r,
        ids=[client.id for client in clients],
        columns=[client.columns for client in clients],
        keys=[client_key(client.id) for client in clients],
        seed=config.data.seed,
        modules=lambda: [name for name, _, _ in load().shapes],
    )
    cohorts = {
        seed: Cohort(
            ids=tuple(client.id for client in clients),
            examples=tuple(len(client.train) for client in clients),
            columns=tuple(client.columns for client in clients),
            schedule=draw_schedule(
                len(clients),
                rounds=config.federation.rounds,
                participation=config.federation.participation,
                seed=seed,
            ),
            seed=seed,
            profile=profile,
            ranks=ranks,
            scale=scales(ranks, config.lora.lora_alpha),
        )
        for seed in config.seeds
    }
    built, notes = {}, {}
    for place, entry in enumerate(config.methods):
        for seed, cohort in cohorts.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    built[entry.folder, seed] = method_files.build(entry.name, entry.settings, cohort)
                except MethodError as error:
                    raise MethodError(f"methods.{place} ({entry.folder}): {error}") from error
            notes[entry.folder] = [str(warning.message) for warning in caught]
            notes[entry.folder] += _rank_notes(entry.folder, built[entry.folder, seed], ranks)
    base = load()
    small = sum(parameter.numel() for parameter in base.model.parameters()) < SMALL_BASE
    threads = int(saved["threads"]) if saved is not None else 1 if small else torch.get_num_threads()
    if saved is not None and saved["base_fingerprint"] != base.fingerprint:
        raise ModelError(
            f"model.base_model '{config.model.base_model}' is not the base this study began with (sha256 "
            f"{base.fingerprint[:12]}, began with {saved['base_fingerprint'][:12]}); put the old one back"
        )
    layout = lora_layout(base.shapes, ranks.amax(dim=0).tolist())  # of each module the largest
    sampled = len(next(iter(cohorts.values())).schedule[0])
    federation = Federation(
        config=config,
        base=base,
        clients=tuple(clients),
        layout=layout,
        ranks=ranks,
        cohort=sampled,
    )
    kinds = {one.layout: one for one in map(federation.under, built.values())}
    for entry in config.methods:
        _check_virtual(entry, federation.under(built[entry.folder, config.seeds[0]]).layout.virtual_tokens)
    if any(layout.virtual_tokens for layout in kinds):
        check_embeddings(base.decoder, base.model.get_input_embeddings(), name=config.model.base_model)
    if saved is not None:
        width = int(saved["cohort"])
    elif config.federation.cohort == "auto":
        batch = config.training.batch_size
        width = min(plan_cohort(base, one, clients, batch_size=batch, sampled=sampled).cohort for one in kinds)
    else:
        width = config.federation.cohort
    federation = replace(federation, cohort=width)
    observer("model", {"federation": federation, "kinds": list(kinds.values()), "sampled": sampled})
    linears = [name for name, module in base.model.named_modules() if _is_linear(module)]
    return Prepared(federation, intake, cohorts, config.methods, notes, built, linears, threads)


def _check_virtual(entry: MethodEntry, found: int) -> None:
    """Raise MethodError if a method's settings do not tell how many virtual tokens it lays out."""
    told = method_files.settings_of(entry).tokens_ahead
    if told != found:
        raise MethodError(
            f"method '{entry.folder}' lays out {found} virtual tokens, and its settings say {told}: let "
            "Config.tokens_ahead return what the layout has, for they take positions of the base"
        )


def _rank_notes(label: str, method: Method, ranks: torch.Tensor) -> list[str]:
    """Say where a method takes factors of different ranks together, as if those of smaller rank were padded."""
    padded = method.exchanges and method.compare == "factors" and method.layout is None
    if not padded or not is_mixed(ranks):
        return []
    return [
        f"{label}: clients have ranks {shown(ranks)}, and their factors are mixed as if padded with zeros, and "
        "cut to each client's rank; flexlora, and mira with space: product, mix the updates themselves"
    ]


def count_values(clients: Sequence[ClientData], column: str) -> np.ndarray:
    """Return [K, values]: the share of each value of a column in every client's training examples.

    Raises MethodError if no client has that column, or it has too many values to be counted.
    """
    values = sorted({value for client in clients for value in client.counts.get(column, {})})
    if not values:
        known = sorted({name for client in clients for name, own in client.counts.items() if own})
        raise MethodError(
            f"no column '{column}' whose values can be counted{nearest(column, known)}; there are: "
            f"{', '.join(known) or 'none'}"
        )
    found = np.array([[client.counts.get(column, {}).get(value, 0) for value in values] for client in clients])
    return found / np.maximum(found.sum(axis=1, keepdims=True), 1)


def _is_linear(module: torch.nn.Module) -> bool:
    return (
        hasattr(module, "weight") and getattr(module.weight, "ndim", 0) == 2 and not hasattr(module, "num_embeddings")
    )


def _read_clients(config: Config, tokenizer: Any, max_question: int | None, observer: Observer) -> Intake:
    section = config.data
    reading = read_records(
        bundled.resolve(section.path),
        format=section.format,
        columns=section.columns,
        on_bad_row=section.on_bad_row,
        subset=section.subset,
        revision=section.revision,
    )
    template = make_template(section.template, usual=reading.template, tokenizer=tokenizer)
    if reading.format == "text":
        _check_text(config, template)
    chosen = section.clients.partitioner
    parts = _partition(reading.records, chosen, section.seed)
    formed = form_clients(
        reading.records,
        by=chosen.partition_by if isinstance(chosen, NaturalIdPartitioner) else section.clients.by,
        per_group=section.clients.per_group,
        parts=parts,
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
        observer("encoding", {"done": done, "clients": len(formed)})
    return Intake(
        clients=clients,
        truncation=sum((client.truncation for client in clients), Truncation()),
        format=reading.format,
        keys=reading.keys,
        template=template.name,
        examples=len(reading.records),
        others=reading.counts["others"],
        empty=reading.counts["empty"],
        skipped=reading.skipped,
        unknown=_unknown_share(clients, getattr(tokenizer, "unk_token_id", None)),
        glued=_count_glued(reading.records) if template.name == "none" and reading.format != "text" else 0,
        pooled=_pooled_splits(reading.records) if section.split_column is None else (),
        left_out=0 if parts is None else len(reading.records) - sum(len(part) for part in parts),
    )


def _unknown_share(clients: Sequence[ClientData], unknown: int | None) -> float:
    """Return the share of tokens that stand for words the tokenizer does not know; GPT-2's is its end of text."""
    if unknown is None:
        return 0.0
    found = sum(one.ids[:-1].count(unknown) for client in clients for one in client.train)
    return found / max(1, sum(client.tokens for client in clients))


def _count_glued(records: Sequence[Record]) -> int:
    """Count prompts that run into their answers: `Capital of Peru?Lima`."""
    pairs = ((record.input if record.input.strip() else record.instruction, record.answers[0]) for record in records)
    return sum(bool(re.search(r"[\w.?!)]$", prompt)) and answer[:1].isalnum() for prompt, answer in pairs)


def _pooled_splits(records: Sequence[Record]) -> list[str]:
    """Return the splits that a column `split` names, if it names several: mixing them is worth a word."""
    named = {record.columns.get("split", "") for record in records}
    return sorted(named) if len(named) > 1 and named <= set(SPLITS) else []


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


def keep_positions(config: Config) -> Config:
    """Keep as many positions free as any method's virtual tokens take: all methods are to get the same texts.

    A run's own config has them too, so that a method alone cuts its prompts where it did beside the others.
    Raises ConfigError for settings that a method does not know.
    """
    taken = (method_files.settings_of(entry).tokens_ahead for entry in config.methods)
    ahead = max(config.data.positions_ahead, *taken)
    return config.model_copy(update={"data": config.data.model_copy(update={"positions_ahead": ahead})})


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


def client_table(federation: Federation) -> dict[str, Any]:
    """Return clients.json: id -> folder, name, group, rank, counts of examples, tokens and cuts, sha256 of the data.

    rank is the largest of a client's modules; where they differ, ranks has each, by the ending of its name.
    """
    modules = [name for name, _, _ in federation.base.shapes]
    return {
        client.id: {
            "folder": client.id,
            "name": client.name,
            "group": client.group,
            "rank": int(own.max()),
            **({"ranks": by_ending(modules, own.tolist())} if int(own.min()) < int(own.max()) else {}),
            "examples": {
                "train": len(client.train),
                "validation": len(client.validation),
                "test": len(client.test),
            },
            "sha256": _fingerprint(client),
            "trained_tokens": client.trained_tokens,
            "prompts_cut": client.truncation.prompts_cut,
            "answers_cut": client.truncation.answers_cut,
            "questions_cut": client.truncation.questions_cut,
            "dropped": client.truncation.dropped,
        }
        for client, own in zip(federation.clients, federation.ranks, strict=True)
    }


def _fingerprint(client: ClientData) -> str:
    """sha256 over a client's token ids and answers, so that a resumed study can tell that its data has changed."""
    digest = hashlib.sha256()
    for part in (client.train, client.validation, client.test):
        digest.update(len(part).to_bytes(8, "big"))
        for example in part:
            spans = [place for span in example.labelled for place in span]
            digest.update(array("q", [len(spans), *spans, *example.ids]).tobytes())
            digest.update(repr(example.answers).encode())
            if example.own_question is not None:
                digest.update(array("q", [-1, *example.own_question]).tobytes())
    return digest.hexdigest()


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Compute on so many threads, and give the caller's number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
