"""A run's memory on disk: what each round changed is durable before the next begins, and can be put together again.

Rows of clients that were never sampled are the common start, which the seed gives back; they are not stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmira.methods.base import Change, Memory, State
from fedmira.runs import RunFolder
from fedmira.store import load_chain, prune, save_checkpoint


@dataclass
class Ledger:
    """The mutable state of one run between rounds; only the engine writes it.

    state: of the method. memory: kept optimizer moments and private parts, [K, ...]. validation [K]: the newest
    validation loss of every client, nan where it has no validation split.
    """

    state: State
    validation: Tensor
    memory: Memory = field(default_factory=dict)
    round: int = 0
    touched: set[int] = field(default_factory=set)  # rows of state.adapters that differ from the common start
    remembered: set[int] = field(default_factory=set)  # clients whose memory is kept
    delta_bytes: int = 0  # of the deltas since the last full checkpoint
    last_full: int = 0

    def apply(self, change: Change) -> None:
        """Put a merge's decision in place."""
        self.state.adapters.rows[change.ids] = change.rows
        if change.shared is not None:
            self.state = State(self.state.adapters, dict(change.shared))
        self.touched.update(change.ids.tolist())

    def recall(self, ids: Tensor, names: Sequence[str] | None = None) -> Memory:
        """Copy what the clients of `ids` kept."""
        return {name: value[ids] for name, value in self.memory.items() if names is None or name in names}

    def remember(self, ids: Tensor, memory: Memory, clients: int) -> None:
        """Keep what the clients of `ids` return at the end of a phase."""
        for name, value in memory.items():
            if name not in self.memory:
                self.memory[name] = torch.zeros(clients, *value.shape[1:], dtype=value.dtype)
            self.memory[name][ids] = value
        if memory:
            self.remembered.update(ids.tolist())


def commit(folder: RunFolder, ledger: Ledger, change: Change, trained: Tensor) -> None:
    """Make the round that `ledger` has just finished durable: a delta, or the whole state where that is no dearer.

    trained [S]: clients whose memory changed.
    """
    each = ledger.state.adapters.rows.shape[1] * 4
    remembered_each = sum(value[0].numel() * value.element_size() for value in ledger.memory.values())
    whole = len(ledger.touched) * each + len(ledger.remembered) * remembered_each
    delta = len(change.ids) * each + (len(trained) * remembered_each if ledger.memory else 0)
    # The second is full as well: were the first the only one, damage to it would lose the run.
    full = ledger.round <= 2 or ledger.delta_bytes + delta >= whole
    ids = torch.tensor(sorted(ledger.touched), dtype=torch.int64) if full else change.ids
    kept = torch.tensor(sorted(ledger.remembered), dtype=torch.int64) if full else trained
    state = {"ids": ids, "rows": ledger.state.adapters.rows[ids]}
    state |= {f"shared.{name}": value for name, value in ledger.state.shared.items()}
    files: dict[str, Mapping[str, Tensor]] = {"state": state, "engine": {"validation": ledger.validation}}
    if ledger.memory:
        files["memory"] = {"ids": kept, **ledger.recall(kept)}
    save_checkpoint(folder.checkpoints, ledger.round, files, full=full)
    if full:
        prune(folder.checkpoints, ledger.last_full)
        ledger.last_full, ledger.delta_bytes = ledger.round, 0
    else:
        ledger.delta_bytes += delta


def restore(folder: RunFolder, ledger: Ledger) -> None:
    """Bring a fresh ledger to the newest round that is intact on disk; nothing there leaves it at the start.

    Later checkpoints, which only a damaged one in between can leave, are removed.

    Raises StoreError if there are checkpoints but none can be used.
    """
    clients = len(ledger.validation)
    for checkpoint in load_chain(folder.checkpoints):
        state = checkpoint.files["state"]
        shared = {name.removeprefix("shared."): value for name, value in state.items() if name.startswith("shared.")}
        ledger.apply(Change(state["ids"], state["rows"], shared or None))
        ledger.validation = checkpoint.files["engine"]["validation"]
        memory = dict(checkpoint.files.get("memory", {}))
        if memory:
            ledger.remember(memory.pop("ids"), memory, clients)
        ledger.round = checkpoint.round
        if checkpoint.full:
            ledger.last_full, ledger.delta_bytes = checkpoint.round, 0
        else:
            ledger.delta_bytes += sum(
                value.numel() * value.element_size() for value in (state["rows"], *memory.values())
            )
    if ledger.round:  # what lies beyond is done again, and must not be taken for the new rounds' own
        prune(folder.checkpoints, keep_from=0, keep_to=ledger.round)
