"""Everything that can be checked and settled before a study writes anything: data, methods, base, cohort, threads."""

import hashlib
import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedmira import bundled
from fedmira import methods as method_files
from fedmira.adapters import lora_layout
from fedmira.config import Config, MethodEntry
from fedmira.data.batches import ClientData, Truncation, encode_client
from fedmira.data.formats import read_records
from fedmira.data.partition import form_clients
from fedmira.engine.rounds import Federation, Observer
from fedmira.engine.schedule import draw_schedule
from fedmira.errors import ConfigError, ModelError
from fedmira.methods.base import Cohort, Method
from fedmira.model.load import count_positions, load_base, load_tokenizer
from fedmira.plan import plan_cohort

# Parameters below which a base runs on one thread: its products are so small that waiting for a second thread costs
# more than it brings (the demo, 0.26 M: 44 s on one thread, 59 s on two).
SMALL_BASE = 1_000_000


@dataclass(frozen=True, eq=False)
class Prepared:
    """A study that passed every check: what its runs share, and each run's method."""

    federation: Federation
    cohorts: Mapping[int, Cohort]
    entries: Sequence[MethodEntry]
    notes: Mapping[str, list[str]]  # label -> warnings of its build
    methods: Mapping[tuple[str, int], Method]
    linears: Sequence[str]  # names of the base's linear layers below its head
    threads: int


def prepare(config: Config, observer: Observer, saved: Mapping[str, Any] | None = None) -> Prepared:
    """Read data, check the methods, load the base and settle the cohort; nothing is written.

    saved: run.json of an earlier run of the study, whose dtype, threads and cohort are used again.
    """
    base_path = bundled.resolve(config.model.base_model)
    tokenizer = load_tokenizer(base_path)
    max_question = _check_positions(config, count_positions(base_path))
    clients, truncation, found = _read_clients(config, tokenizer, max_question)
    observer("data", {"clients": clients, "truncation": truncation, "format": found})
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
        )
        for seed in config.seeds
    }
    built, notes = {}, {}
    for entry in config.methods:
        for seed, cohort in cohorts.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                built[entry.folder, seed] = method_files.build(entry.name, entry.settings, cohort)
            notes[entry.folder] = [str(warning.message) for warning in caught]
    base = load_base(
        base_path,
        dtype=config.model.dtype if saved is None else saved["dtype"],
        device=config.model.device,
        targets=config.lora.target_modules,
        tokenizer=tokenizer,
    )
    small = sum(parameter.numel() for parameter in base.model.parameters()) < SMALL_BASE
    threads = int(saved["threads"]) if saved is not None else 1 if small else torch.get_num_threads()
    if saved is not None and saved["base_fingerprint"] != base.fingerprint:
        raise ModelError(
            f"model.base_model '{config.model.base_model}' is not the base this study began with (sha256 "
            f"{base.fingerprint[:12]}, began with {saved['base_fingerprint'][:12]}); put the old one back"
        )
    layout = lora_layout(base.shapes, config.lora.r)
    sampled = len(next(iter(cohorts.values())).schedule[0])
    if saved is not None:
        width = int(saved["cohort"])
    elif config.federation.cohort == "auto":
        width = plan_cohort(base, layout, clients, batch_size=config.training.batch_size, sampled=sampled).cohort
    else:
        width = config.federation.cohort
    federation = Federation(
        config=config,
        base=base,
        clients=tuple(clients),
        layout=layout,
        ranks=torch.full((len(clients),), config.lora.r),
        cohort=width,
    )
    observer("model", {"federation": federation, "sampled": sampled})
    linears = [name for name, module in base.model.named_modules() if _is_linear(module)]
    return Prepared(federation, cohorts, config.methods, notes, built, linears, threads)


def _is_linear(module: torch.nn.Module) -> bool:
    return (
        hasattr(module, "weight") and getattr(module.weight, "ndim", 0) == 2 and not hasattr(module, "num_embeddings")
    )


def _read_clients(config: Config, tokenizer: Any, max_question: int | None) -> tuple[list[ClientData], Truncation, str]:
    section = config.data
    found, records = read_records(bundled.resolve(section.path), format=section.format, columns=section.columns)
    formed = form_clients(
        records,
        by=section.clients.by,
        per_group=section.clients.per_group,
        first=section.clients.first,
        groups=section.clients.groups,
        subsample=section.subsample,
        validation=section.split.validation,
        test=section.split.test,
        split_column=section.split_column,
        seed=section.seed,
    )
    clients = [
        encode_client(
            client, tokenizer, template=section.template, max_length=section.max_length, max_question=max_question
        )
        for client in formed
    ]
    truncation = sum((client.truncation for client in clients), Truncation())
    return clients, truncation, found


def _check_positions(config: Config, positions: int | None) -> int | None:
    """Refuse lengths that the base has no positions for; return the longest prompt that leaves room for an answer."""
    if positions is None:
        return None
    faults = []
    name, room = config.model.base_model, 0
    if any(metric != "loss" for metric in config.evaluation.metrics):
        room = config.evaluation.max_new_tokens
    if config.data.max_length > positions:
        faults.append(
            f"data.max_length: found {config.data.max_length}: base '{name}' has {positions} positions; "
            "set data.max_length to at most that"
        )
    if room >= positions:
        faults.append(
            f"evaluation.max_new_tokens: found {room}: base '{name}' has {positions} positions for prompt and answer "
            "together; set it well below that"
        )
    if faults:
        raise ConfigError(faults)
    return positions - room


def client_table(federation: Federation) -> dict[str, Any]:
    """Return clients.json: id -> folder, name, group, rank, counts of examples, tokens and cuts, sha256 of the data."""
    return {
        client.id: {
            "folder": client.id,
            "name": client.name,
            "group": client.group,
            "rank": int(federation.ranks[position]),
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
        for position, client in enumerate(federation.clients)
    }


def _fingerprint(client: ClientData) -> str:
    """sha256 over a client's token ids and answers, so that a resumed study can tell that its data has changed."""
    digest = hashlib.sha256()
    for part in (client.train, client.validation, client.test):
        digest.update(len(part).to_bytes(8, "big"))
        for example in part:
            digest.update(array("q", [example.prompt_length, *example.ids]).tobytes())
            digest.update(repr(example.answers).encode())
    return digest.hexdigest()
