"""Which round of a run is kept, and whether the run goes on: decided by validation losses alone, never by a test.

Only rounds after which every client is validated count. The common start (round 0) is not a candidate. A loss that is
not finite is never the lowest; of equal losses the earlier round is kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmira.disk.checkpoints import Tensors
from fedmira.disk.table import Table
from fedmira.methods.base import State

FILE = "best"  # of a checkpoint


@dataclass
class Best:
    """The lowest validation loss so far of each of U units: each client (U = K), or all together by the mean (U = 1).

    loss [U] in nats, inf where no round is chosen yet; round [U]: the chosen one, 0 = none; fresh [U]: chosen since the
    newest checkpoint. state: what the server had after the chosen round, where it alone decides what clients get; None
    where clients set their adapters aside themselves.
    """

    units: int
    state: State | None = None
    loss: Tensor = field(init=False)
    round: Tensor = field(init=False)
    fresh: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.loss = torch.full((self.units,), math.inf, dtype=torch.float64)
        self.round = torch.zeros(self.units, dtype=torch.int64)
        self.fresh = torch.zeros(self.units, dtype=torch.bool)

    def offer(self, losses: Tensor, number: int) -> Tensor:
        """Choose round `number` for the units whose loss [U] is the lowest so far; return these units [n]."""
        units = (losses.isfinite() & (losses < self.loss)).nonzero().flatten()
        self.loss[units], self.round[units], self.fresh[units] = losses[units], number, True
        return units

    def files(self, *, full: bool) -> Mapping[str, Tensors]:
        """Return the file of a checkpoint: all that is chosen (full), or what changed since the newest one."""
        units = ((self.round > 0) if full else self.fresh).nonzero().flatten()
        if not len(units):
            return {}
        return {FILE: {"units": units, "loss": self.loss[units], "round": self.round[units], **self._tensors()}}

    def count_bytes(self, *, full: bool) -> int:
        """Return the bytes of the server's state in that file; losses and rounds, 24 bytes a unit, are left out."""
        if not bool(((self.round > 0) if full else self.fresh).any()):
            return 0
        return sum(value.numel() * value.element_size() for value in self._tensors().values())

    def restore(self, files: Mapping[str, Mapping[str, Tensor]], state: State) -> None:
        """Take back what one checkpoint of a chain holds. state: the server's, after that checkpoint."""
        stored = files.get(FILE)
        if stored is None:
            return
        self.loss[stored["units"]], self.round[stored["units"]] = stored["loss"], stored["round"]
        if "rows" in stored:
            shared, tables = (
                {name.removeprefix(kind): value for name, value in stored.items() if name.startswith(kind)}
                for kind in ("shared.", "table.")
            )
            adapters = replace(state.adapters, rows=_table(stored["rows"]))
            self.state = State(adapters, shared, tables, state.base[: int(stored["versions"])])

    def _tensors(self) -> dict[str, Tensor]:
        if self.state is None:
            return {}
        rows = self.state.adapters.rows
        return {
            "rows": rows[torch.arange(len(rows))],
            "versions": torch.tensor(len(self.state.base)),
            **{f"shared.{name}": value for name, value in self.state.shared.items()},
            **{f"table.{name}": value for name, value in self.state.tables.items()},
        }


def copy_state(state: State, *, rows_only: bool) -> State:
    """Copy what a server sends from, where it has few rows. rows_only: what it sends depends on the rows alone."""
    rows = state.adapters.rows
    adapters = replace(state.adapters, rows=_table(rows[torch.arange(len(rows))]))
    if rows_only:
        return State(adapters, base=state.base)
    tables = {name: value.clone() for name, value in state.tables.items()}
    return State(adapters, dict(state.shared), tables, state.base)


def _table(rows: Tensor) -> Table:
    return Table(rows, torch.arange(len(rows)))


@dataclass
class Patience:
    """Ends a run whose mean validation loss no longer falls: a validation improves if it is lower by > threshold nats.

    validations: without an improvement, in a row, after which the run ends. lowest: mean so far, as in transformers'
    EarlyStoppingCallback also where it fell by less than the threshold; waited: validations since the last improvement.
    """

    validations: int
    threshold: float = 0.0
    lowest: float = math.inf
    waited: int = 0

    def note(self, mean: float | None) -> None:
        """Take in one validation; a mean that is absent or not finite does not improve."""
        value = math.nan if mean is None else mean
        self.waited = 0 if math.isfinite(value) and self.lowest - value > self.threshold else self.waited + 1
        if math.isfinite(value):
            self.lowest = min(self.lowest, value)

    @property
    def is_exhausted(self) -> bool:
        return self.waited >= self.validations

    @property
    def reason(self) -> str:
        """Why a run ends, in words."""
        least = f" by more than {self.threshold:g}" if self.threshold else ""
        times = "one validation" if self.waited == 1 else f"{self.waited} validations in a row"
        return f"the mean validation loss did not fall{least} in {times} (lowest: {self.lowest:.4f} nats)"

    def as_tensor(self) -> Tensor:
        """Return lowest and waited [2], as a checkpoint holds them."""
        return torch.tensor([self.lowest, self.waited], dtype=torch.float64)

    def restore(self, stored: Tensor) -> None:
        self.lowest, self.waited = float(stored[0]), int(stored[1])
