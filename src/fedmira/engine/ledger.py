"""A run's memory on disk: what each round changed is durable before the next begins, and can be put together again.

Rows of clients that were never sampled are the common start, which the seed gives back; they are not stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fedmira.disk.checkpoints import Tensors, load_chain, prune, save_checkpoint
from fedmira.disk.folders import RunFolder
from fedmira.disk.table import Picked, Rows
from fedmira.methods.base import Change, Memory, State


@dataclass
class Ledger:
    """The mutable state of one run between rounds; only the engine writes it.

    state: of the method. memory: kept optimizer moments and private parts, [K, ...], read by client (store.Rows).
    validation [K]: the newest validation loss of every client, nan where it has no validation split; saved [K]: as the
    newest checkpoint has it. scratch: a folder for what is too large for RAM; None keeps all in RAM.
    """

    state: State
    validation: Tensor
    scratch: Path | None = None
    memory: Memory = field(default_factory=dict)
    round: int = 0
    touched: set[int] = field(default_factory=set)  # rows of state.adapters that differ from the common start
    remembered: set[int] = field(default_factory=set)  # clients whose memory is kept
    delta_bytes: int = 0  # of the deltas since the last full checkpoint
    last_full: int = 0
    saved: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.saved = self.validation.clone()

    def apply(self, change: Change) -> None:
        """Put a merge's decision in place."""
        self.state.adapters.rows[change.ids] = change.rows
        for name, value in change.tables.items():
            self.state.tables[name][change.ids] = value
        if change.shared is not None:
            self.state = State(self.state.adapters, dict(change.shared), self.state.tables)
        self.touched.update(change.ids.tolist())

    def recall(self, ids: Tensor, names: Sequence[str] | None = None, *, first: Memory | None = None) -> Memory:
        """Copy what the clients of `ids` kept; first [n, ...]: what they have who never trained."""
        found = {name: value[ids] for name, value in self.memory.items() if names is None or name in names}
        new = torch.tensor([k not in self.remembered for k in ids.tolist()])
        for name, value in (first or {}).items():
            found.setdefault(name, value.clone())[new] = value[new]
        return found

    def remember(self, ids: Tensor, memory: Memory, clients: int) -> None:
        """Keep what the clients of `ids` return at the end of a phase."""
        for name, value in memory.items():
            if name not in self.memory:
                nothing = torch.zeros(1, *value.shape[1:], dtype=value.dtype)
                kept = Rows(nothing, torch.zeros(clients, dtype=torch.int64), self.scratch)
                self.memory[name] = cast(Tensor, kept)  # reads and writes by client as one
            self.memory[name][ids] = value
        if memory:
            self.remembered.update(ids.tolist())


def commit(folder: RunFolder, ledger: Ledger, change: Change, trained: Tensor) -> None:
    """Make the round that `ledger` has just finished durable: a delta, or the whole state where that is no dearer.

    trained [S]: clients whose memory changed.
    """
    each = ledger.state.adapters.rows.shape[1] * 4
    each += _row_bytes(ledger.state.tables)
    remembered_each = _row_bytes(ledger.memory)
    whole = len(ledger.touched) * each + len(ledger.remembered) * remembered_each
    delta = len(change.ids) * each + (len(trained) * remembered_each if ledger.memory else 0)
    # The second is full as well: were the first the only one, damage to it would lose the run.
    full = ledger.round <= 2 or ledger.delta_bytes + delta >= whole
    ids = torch.tensor(sorted(ledger.touched), dtype=torch.int64) if full else change.ids
    kept = torch.tensor(sorted(ledger.remembered), dtype=torch.int64) if full else trained
    shared = {f"shared.{name}": value for name, value in ledger.state.shared.items()}
    tables = {f"table.{name}": Picked(value, ids) for name, value in ledger.state.tables.items()}
    files: dict[str, Tensors] = {
        "state": {"ids": ids, "rows": Picked(ledger.state.adapters.rows, ids), **shared, **tables},
        "engine": {"validation": ledger.validation} if full else _measured(ledger),
    }
    if ledger.memory:
        files["memory"] = {"ids": kept, **{name: Picked(value, kept) for name, value in ledger.memory.items()}}
    save_checkpoint(folder.checkpoints, ledger.round, files, full=full)
    ledger.saved = ledger.validation.clone()
    if full:
        prune(folder.checkpoints, ledger.last_full)
        ledger.last_full, ledger.delta_bytes = ledger.round, 0
    else:
        ledger.delta_bytes += delta


def _row_bytes(tables: Mapping[str, Tensor]) -> int:
    """Bytes of one client's row in all of these tensors [K, ...] together."""
    return sum(math.prod(value.shape[1:]) * value.dtype.itemsize for value in tables.values())


def _measured(ledger: Ledger) -> Tensors:
    """Return the validation losses that this round changed, and whose they are."""
    new, old = ledger.validation, ledger.saved
    ids = ((new != old) & ~(new.isnan() & old.isnan())).nonzero().flatten()
    return {"ids": ids, "validation": new[ids]}


def restore(folder: RunFolder, ledger: Ledger) -> None:
    """Bring a fresh ledger to the newest round that is intact on disk; nothing there leaves it at the start.

    Later checkpoints, which only a damaged one in between can leave, are removed.

    Raises StoreError if there are checkpoints but none can be used.
    """
    clients = len(ledger.validation)
    for checkpoint in load_chain(folder.checkpoints):
        state = checkpoint.files["state"]
        shared, tables = (
            {name.removeprefix(kind): value for name, value in state.items() if name.startswith(kind)}
            for kind in ("shared.", "table.")
        )
        ledger.apply(Change(state["ids"], state["rows"], shared or None, tables))
        engine = checkpoint.files["engine"]
        ledger.validation[engine.get("ids", slice(None))] = engine["validation"]  # without ids: everybody's
        memory = dict(checkpoint.files.get("memory", {}))
        if memory:
            ledger.remember(memory.pop("ids"), memory, clients)
        ledger.round = checkpoint.round
        if checkpoint.full:
            ledger.last_full, ledger.delta_bytes = checkpoint.round, 0
        else:
            ledger.delta_bytes += sum(
                value.numel() * value.element_size() for value in (state["rows"], *tables.values(), *memory.values())
            )
    ledger.saved = ledger.validation.clone()
    if ledger.round:  # what lies beyond is done again, and must not be taken for the new rounds' own
        prune(folder.checkpoints, keep_from=0, keep_to=ledger.round)
