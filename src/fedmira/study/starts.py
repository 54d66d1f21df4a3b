"""Adapters that a study begins with (`lora.start`): read, checked against the base and the ranks, laid into rows.

    one folder for all, a folder for each client named by a column of the data, or each client's of another study

A smaller rank is padded exactly, another scale is folded into B: s B' = s' B. Other layers, a larger rank, another base
are refused before any pass.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedmira.adapters import scales
from fedmira.config.lora import LoraConfig
from fedmira.data.batches import ClientData
from fedmira.disk.folders import StudyFolder
from fedmira.engine.federation import Federation, Given
from fedmira.errors import ConfigError, StoreError
from fedmira.export.adapter_config import AdapterConfig, check_adapter
from fedmira.export.card import base_sha256_in
from fedmira.export.peft_folder import read_adapter
from fedmira.model.base.load import Base

log = logging.getLogger(__name__)


def read_start(section: LoraConfig, federation: Federation, base: Base, clients: Sequence[ClientData]) -> Given | None:
    """Return what clients begin with; None where factors are drawn.

    federation: with LoRA's rows, their ranks and scale. Raises ConfigError or StoreError: no such folder, run or
    column, a prompt, other layers or base, a rank larger than the client's.
    """
    if section.start is None:
        return None
    folders = _folders(section.start, base, clients)
    if not any(folders):
        raise ConfigError([f"lora.start: {section.start!r} has an adapter for none of the {len(clients)} clients"])
    ranks = federation.ranks if federation.ranks.ndim == 2 else federation.ranks[:, None].expand(-1, len(base.shapes))
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    of = torch.full((len(clients),), -1)
    read: dict[tuple[Path, tuple[int, ...]], int] = {}
    for k, folder in enumerate(folders):
        if folder is None:
            continue
        own = ranks[k]
        key = (folder, tuple(own.tolist()))
        if key not in read:
            read[key] = len(rows)
            row, has = _laid_out(check_adapter(folder), federation, base, own, clients[k].id)
            rows.append(row)
            columns.append(has)
        of[k] = read[key]
    missing = int((of < 0).sum())
    if missing:
        log.warning("lora.start: %d of %d clients have no adapter there and begin as newcomers", missing, len(clients))
    return Given(torch.cat(rows), torch.cat(columns), of)


def _folders(start: str | Mapping[str, str | int], base: Base, clients: Sequence[ClientData]) -> list[Path | None]:
    """Return the folder of each client's adapter."""
    if isinstance(start, str):
        return [Path(start)] * len(clients)
    if "column" in start:
        column = str(start["column"])
        several = [client.id for client in clients if column not in client.columns and client.counts.get(column)]
        if several or not any(column in client.columns for client in clients):
            found = f"several values for {len(several)} clients such as '{several[0]}'" if several else "no client's"
            raise ConfigError(
                [f"lora.start.column: '{column}' has {found}; it has the folder of each client's adapter"]
            )
        return [Path(client.columns[column]) if client.columns.get(column) else None for client in clients]
    study, label = StudyFolder(Path(str(start["study"]))), str(start["method"])
    runs = {(run.facts.label, run.facts.seed): run for run in study.runs()}
    seeds = [seed for found, seed in runs if found == label]
    seed = int(start.get("seed", seeds[0] if seeds else 0))
    if (label, seed) not in runs:
        known = ", ".join(f"{found} (seed {number})" for found, number in runs) or "none"
        raise StoreError(f"lora.start: '{study.path}' has no run of '{label}' with seed {seed}; there are: {known}")
    run = runs[label, seed]
    if run.facts.base_fingerprint != base.fingerprint:
        raise StoreError(
            f"lora.start: '{run.path}' was trained on {run.facts.base_model} (sha256 "
            f"{run.facts.base_fingerprint[:12]}), and this base is sha256 {base.fingerprint[:12]}"
        )
    if run.facts.state != "complete":
        raise StoreError(f"lora.start: '{run.path}' is {run.facts.state}; its adapters are written when it is complete")
    return [folder if (folder := run.adapters / client.id).is_dir() else None for client in clients]


def _laid_out(
    config: AdapterConfig, federation: Federation, base: Base, ranks: Tensor, client: str
) -> tuple[Tensor, Tensor]:
    """Return an adapter as a row [1, P] of a client of these ranks [modules], and which of its columns are given."""
    if config.is_prompt:
        raise StoreError(f"lora.start: '{config.folder}' is a prompt; clients begin with an adapter of LoRA")
    trained_on = base_sha256_in(config.folder)
    if trained_on not in {None, base.fingerprint}:
        raise StoreError(
            f"lora.start: the card of '{config.folder}' names another base, sha256 {trained_on}, and this one is "
            f"{base.fingerprint}; use that base, in the bits that the card names, or, if you know that the adapter "
            "fits, remove its README.md"
        )
    if trained_on is None and config.base_model and Path(config.base_model).name != Path(base.name).name:
        log.warning(
            "lora.start: '%s' names the base %s, and this one is %s", config.folder, config.base_model, base.name
        )
    modules = [name for name, _, _ in base.shapes]
    found = torch.tensor([[config.rank_of(name) for name in modules]])
    for name, rank, room in zip(modules, found[0].tolist(), ranks.tolist(), strict=True):
        if rank > room:
            raise StoreError(
                f"lora.start: '{config.folder}' has rank {rank} on {name}, and client '{client}' has {room}; give it "
                "that rank at least (lora.r, ranks, rank_pattern): a larger rank cannot be cut without loss"
            )
    row = read_adapter(config.folder, federation.layout)
    scale = scales(ranks[None], federation.alpha)[0]
    (part,) = federation.layout.parts
    for index, (_, second) in enumerate(part.pairs()):
        row[0, second.start : second.stop] *= config.scale_of(second.module) / float(scale[index])
    return row, federation.layout.rank_mask(found)
