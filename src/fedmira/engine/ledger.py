"""A run's state on the server: what each round changed is durable before it is used, and can be put together again.

Rows of clients that were never sampled are the common start, which the seed gives back; they are not stored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmira.adapters import Pairs
from fedmira.adapters.added import count_bytes, from_named, named
from fedmira.disk.checkpoints import Tensors, load_chain, prune, save_checkpoint
from fedmira.disk.table import Overlay, Picked, Table
from fedmira.engine.best import FILE as BEST_FILE
from fedmira.engine.best import Best, Patience
from fedmira.engine.clients import Kept, Restored
from fedmira.engine.federation import Federation
from fedmira.methods.base import Change, State


@dataclass
class Ledger:
    """The server's side of a run between rounds; only the engine writes it. It knows no client's data or memory.

    state: of the method. validation [K]: the newest validation loss of every client, nan where none is known; saved
    [K]: as the newest checkpoint has it. known [K]: how many changes of the base each client has received. best: the
    round to keep, None = the last; patience: when the run ends early, None = never.
    """

    federation: Federation
    state: State
    validation: Tensor
    best: Best | None = None
    patience: Patience | None = None
    round: int = 0
    delta_bytes: int = 0  # of the deltas since the last full checkpoint
    last_full: int = 0
    saved: Tensor = field(init=False)
    known: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.saved = self.validation.clone()
        self.known = torch.zeros(len(self.federation), dtype=torch.int64)

    @property
    def table(self) -> Table:
        """The rows that the server keeps; methods read them by client and never write them."""
        rows = self.state.adapters.rows
        assert isinstance(rows, Table), "a method's init keeps the table it was given"
        return rows

    def after(self, change: Change) -> State:
        """Return the state as it will be once a change is applied; nothing is copied, and nothing is changed."""
        stored = replace(self.state.adapters, rows=Overlay(self.table, change.ids, change.rows))
        shared = self.state.shared if change.shared is None else dict(change.shared)
        tables = dict(self.state.tables)
        for name, value in change.tables.items():
            tables[name] = tables[name].index_copy(0, change.ids, value)
        return State(stored, shared, tables, _base_after(self.state, change))

    def received(self, ids: Tensor) -> None:
        """Note that the clients `ids` have the base as it is now."""
        self.known[ids] = len(self.state.base)

    def apply(self, change: Change) -> None:
        """Carry out what a merge decided."""
        self.table.write(change.ids, change.rows)
        for name, value in change.tables.items():
            self.state.tables[name][change.ids] = value
        shared = self.state.shared if change.shared is None else dict(change.shared)
        self.state = replace(self.state, shared=shared, base=_base_after(self.state, change))


def _base_after(state: State, change: Change) -> tuple[Pairs, ...]:
    return (*state.base, change.base) if change.base else state.base


def commit(
    checkpoints: Path, ledger: Ledger, change: Change, kept: Kept | None, facts: Mapping[str, Any] | None = None
) -> None:
    """Make the next round durable before it is applied: a delta, or the whole state where that is not larger.

    kept: what a simulation's clients remember of the round. facts: of the round, as JSON.
    """
    number = ledger.round + 1
    written = ledger.table.written
    each = ledger.table.row_bytes
    each += sum(value[:1].numel() * value.element_size() for value in ledger.state.tables.values())
    touched = torch.tensor(sorted({*written.nonzero().flatten().tolist(), *change.ids.tolist()}), dtype=torch.int64)
    state, had = ledger.after(change), len(ledger.state.base)
    whole = len(touched) * each + count_bytes(state.base) + (0 if kept is None else kept.bytes_of_all)
    delta = len(change.ids) * each + count_bytes(state.base[had:]) + (0 if kept is None else kept.bytes_of_round)
    if ledger.best is not None:
        whole += ledger.best.count_bytes(full=True)
        delta += ledger.best.count_bytes(full=False)
    # The second is full as well: were the first the only one, damage to it would lose the run.
    full = number <= 2 or ledger.delta_bytes + delta >= whole
    ids = touched if full else change.ids
    shared = {f"shared.{name}": value for name, value in state.shared.items()}
    tables = {f"table.{name}": Picked(value, ids) for name, value in state.tables.items()}
    base = named(state.base, 0) if full else named(state.base[had:], had)
    known = {"known": ledger.known} if state.base else {}
    waited = {} if ledger.patience is None else {"patience": ledger.patience.as_tensor()}
    files: dict[str, Tensors] = {
        "state": {"ids": ids, "rows": Picked(state.adapters.rows, ids), **shared, **tables},
        "engine": {**({"validation": ledger.validation} if full else _measured(ledger)), **known, **waited},
        **({} if not base else {"base": base}),
        **({} if ledger.best is None else ledger.best.files(full=full)),
        **({} if kept is None else kept.files(full=full)),
    }
    save_checkpoint(checkpoints, number, files, full=full, facts=facts or {})
    ledger.saved = ledger.validation.clone()
    if ledger.best is not None:
        ledger.best.fresh[:] = False
    if full:
        prune(checkpoints, ledger.last_full)
        ledger.last_full, ledger.delta_bytes = number, 0
    else:
        ledger.delta_bytes += delta


def _grown(values: Tensor, table: Tensor) -> Tensor:
    """Fill what a checkpoint of fewer clients has of a table up with zeros, to the size that its rows have now."""
    grown = values.new_zeros(len(values), *table.shape[1:])
    grown[tuple(slice(size) for size in values.shape)] = values
    return values if values.shape[1:] == table.shape[1:] else grown


def _measured(ledger: Ledger) -> Tensors:
    """Return the validation losses that changed since the last checkpoint, and whose they are."""
    new, old = ledger.validation, ledger.saved
    ids = ((new != old) & ~(new.isnan() & old.isnan())).nonzero().flatten()
    return {"ids": ids, "validation": new[ids]}


def restore(
    checkpoints: Path,
    ledger: Ledger,
    clients: Restored,
    after: Callable[[], None] = lambda: None,
    *,
    only_read: bool = False,
) -> Mapping[str, Any]:
    """Bring a fresh ledger, and its clients, to the newest round that is intact on disk; return that round's facts.

    Without a checkpoint both stay at the start. Later checkpoints, which only a damaged one in between can leave, are
    removed, unless they are only read. A checkpoint of fewer clients than there are now says nothing about the last
    ones. after: is called when the ledger is at the round of a checkpoint. Raises StoreError if there are checkpoints
    but none can be used.
    """
    facts: Mapping[str, Any] = {}
    for checkpoint in load_chain(checkpoints):
        state = checkpoint.files["state"]
        shared, tables = (
            {name.removeprefix(kind): value for name, value in state.items() if name.startswith(kind)}
            for kind in ("shared.", "table.")
        )
        tables = {name: _grown(value, ledger.state.tables[name]) for name, value in tables.items()}
        ledger.apply(Change(state["ids"], state["rows"], shared or None, tables))
        base = tuple(pairs for _, pairs in sorted(from_named(checkpoint.files.get("base", {})).items()))
        ledger.state = replace(ledger.state, base=(*ledger.state.base, *base))
        engine = checkpoint.files["engine"]
        everybody = torch.arange(len(engine["validation"]))
        ledger.validation[engine.get("ids", everybody)] = engine["validation"]
        if "known" in engine:
            ledger.known[: len(engine["known"])] = engine["known"]
        if ledger.patience is not None and "patience" in engine:
            ledger.patience.restore(engine["patience"])
        if ledger.best is not None:
            ledger.best.restore(checkpoint.files, ledger.state)
        clients.restore(checkpoint.files)
        ledger.round, facts = checkpoint.round, checkpoint.facts
        if checkpoint.full:
            ledger.last_full, ledger.delta_bytes = checkpoint.round, 0
        else:
            memory = checkpoint.files.get("memory", {})
            chosen = checkpoint.files.get(BEST_FILE, {})
            values = [state["rows"], *tables.values(), *(value for name, value in memory.items() if name != "ids")]
            values += [value for name, value in chosen.items() if name not in ("units", "loss", "round")]
            values += [value for name, value in checkpoint.files.get("aside", {}).items() if name != "ids"]
            ledger.delta_bytes += sum(value.numel() * value.element_size() for value in values) + count_bytes(base)
        after()
    ledger.saved = ledger.validation.clone()
    if ledger.round and not only_read:  # what is beyond is done again, and must not be taken for the new rounds' own
        prune(checkpoints, keep_from=0, keep_to=ledger.round)
    return facts
