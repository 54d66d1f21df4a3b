"""What simulated clients keep between rounds and never send: tensors by name, a row of each client.

Names have an owner: `method/x` is a method's memory, `moments/main/x` an optimizer's, `row` the client's own row where
not all of it travels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedmira.disk.checkpoints import Tensors
from fedmira.disk.table import Overlay, Picked, Table

FILE, ASIDE_FILE = "memory", "aside"  # of a checkpoint


@dataclass(eq=False)
class ClientMemory:
    """Tables [K, ...] by name, which take room for the clients that have trained. scratch: a folder for large ones."""

    clients: int
    scratch: Path | None = None
    tables: dict[str, Table] = field(default_factory=dict)
    remembered: set[int] = field(default_factory=set)  # clients that have trained

    def recall(self, owner: str, ids: Tensor, *, first: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Copy what the clients `ids` [n] keep under an owner. first [n, ...]: for those that never trained."""
        recalled = {
            name.removeprefix(f"{owner}/"): table[ids]
            for name, table in self.tables.items()
            if name.startswith(f"{owner}/")
        }
        new = torch.tensor([k not in self.remembered for k in ids.tolist()], dtype=torch.bool)
        for name, value in (first or {}).items():
            recalled.setdefault(name, value.clone())[new] = value[new]
        return recalled

    def add(self, name: str, table: Table) -> None:
        """Keep a name in this table, whose rows have a start other than 0."""
        self.tables[name] = table

    def stage(self, ids: Tensor, values: Mapping[str, Tensor]) -> "Staged":
        """Prepare what the clients of `ids` [n] return at the end of a phase, to be kept once the round counts."""
        for name, value in values.items():
            if name not in self.tables:
                nothing = torch.zeros(1, *value.shape[1:], dtype=value.dtype)
                self.add(name, Table(nothing, torch.zeros(self.clients, dtype=torch.int64), self.scratch))
        return Staged(self, ids, dict(values))

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what one checkpoint holds."""
        values = dict(files.get(FILE, {}))
        if values:
            self.stage(values.pop("ids"), values).apply()


@dataclass(eq=False)
class Aside:
    """Rows [K, P] that clients set aside as their best so far. fresh: clients that did since the newest checkpoint."""

    table: Table
    fresh: set[int] = field(default_factory=set)

    def put(self, ids: Tensor, rows: Tensor) -> None:
        """Set aside the rows [n, P] of the clients `ids` [n], instead of what they had set aside."""
        self.table.write(ids, rows)
        self.fresh.update(ids.tolist())

    def choose(self, *, full: bool) -> Tensor:
        """Return the clients [n] of a checkpoint: all that set a row aside (full), or those that did since the last."""
        if full:
            return self.table.written.nonzero().flatten()
        return torch.tensor(sorted(self.fresh), dtype=torch.int64)

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what one checkpoint holds."""
        if ASIDE_FILE in files:
            self.table.write(files[ASIDE_FILE]["ids"], files[ASIDE_FILE]["rows"])


@dataclass(frozen=True, eq=False)
class Staged:
    """What the clients `ids` [n] remember of a round that is not durable yet, and what they have set aside by now."""

    memory: ClientMemory
    ids: Tensor
    values: Mapping[str, Tensor]
    aside: Aside | None = None

    def files(self, *, full: bool) -> Mapping[str, Tensors]:
        """Return the files of a checkpoint: of all clients that have trained (full), or of those of the round."""
        files = dict(self._memory_file(full=full))
        if self.aside is not None and len(chosen := self.aside.choose(full=full)):
            files[ASIDE_FILE] = {"ids": chosen, "rows": Picked(self.aside.table, chosen)}
        return files

    def _memory_file(self, *, full: bool) -> Mapping[str, Tensors]:
        if not self.memory.tables:
            return {}
        if not full:
            return {FILE: {"ids": self.ids, **self.values}}
        everyone = torch.tensor(sorted({*self.memory.remembered, *self.ids.tolist()}), dtype=torch.int64)
        rows = {
            name: Picked(Overlay(table, self.ids, self.values[name]) if name in self.values else table, everyone)
            for name, table in self.memory.tables.items()
        }
        return {FILE: {"ids": everyone, **rows}}

    @property
    def bytes_of_all(self) -> int:
        """Bytes of a checkpoint of all clients that have trained."""
        return self._bytes_each * len({*self.memory.remembered, *self.ids.tolist()}) + self._bytes_aside(full=True)

    @property
    def bytes_of_round(self) -> int:
        """Bytes of a checkpoint of the round's clients."""
        return self._bytes_each * len(self.ids) + self._bytes_aside(full=False)

    def _bytes_aside(self, *, full: bool) -> int:
        return 0 if self.aside is None else self.aside.table.row_bytes * len(self.aside.choose(full=full))

    @property
    def _bytes_each(self) -> int:
        return sum(table.row_bytes for table in self.memory.tables.values())

    def apply(self) -> None:
        """Remember it from now on."""
        for name, value in self.values.items():
            self.memory.tables[name].write(self.ids, value)
        if self.values:
            self.memory.remembered.update(self.ids.tolist())
        if self.aside is not None:
            self.aside.fresh.clear()
