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

FILE = "memory"  # of a checkpoint


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


@dataclass(frozen=True, eq=False)
class Staged:
    """What the clients `ids` [n] remember of a round that is not durable yet."""

    memory: ClientMemory
    ids: Tensor
    values: Mapping[str, Tensor]

    def files(self, *, full: bool) -> Mapping[str, Tensors]:
        """Return the file of a checkpoint: of all clients that have trained (full), or of those of the round."""
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
        return self._bytes_each * len({*self.memory.remembered, *self.ids.tolist()})

    @property
    def bytes_of_round(self) -> int:
        """Bytes of a checkpoint of the round's clients."""
        return self._bytes_each * len(self.ids)

    @property
    def _bytes_each(self) -> int:
        return sum(table.row_bytes for table in self.memory.tables.values())

    def apply(self) -> None:
        """Remember it from now on."""
        for name, value in self.values.items():
            self.memory.tables[name].write(self.ids, value)
        if self.values:
            self.memory.remembered.update(self.ids.tolist())
