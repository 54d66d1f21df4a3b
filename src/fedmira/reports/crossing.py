"""Who could use whose adapter: the matrices of a study (matrix.csv of its runs), their means over seeds, and a picture.

    D_kl = mean over seeds of M_kl - M_ll      M_kl: test loss of client l with the adapter of client k

Below zero, client l would do better with k's adapter than with its own. Tests are looked at here, so that nobody may be
chosen by them.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.disk.files import make_folder, write_atomic
from fedmira.disk.folders import MATRIX
from fedmira.reports import paper
from fedmira.reports.averages import mean
from fedmira.reports.record import StudyRecord
from fedmira.reports.wording import fitted

NAMES_SHOWN = 40  # clients; more are numbered by their place in the CSV
NAME_ROOM = 16.0  # ems of a name beside the picture


class Crossing(NamedTuple):
    """The mean matrix of a method. losses [K][K]: adapter, client; seeds: how many runs it is of."""

    label: str
    clients: Sequence[str]
    losses: Sequence[Sequence[float | None]]
    seeds: int

    @property
    def differences(self) -> list[list[float | None]]:
        """Each loss minus that of the client's own adapter, [K][K]."""
        own = [self.losses[place][place] for place in range(len(self.clients))]
        return [[_minus(loss, at_home) for loss, at_home in zip(row, own, strict=True)] for row in self.losses]

    @property
    def better_elsewhere(self) -> int:
        """How many clients would have a lower test loss with the adapter of some other client."""
        columns = zip(*self.differences, strict=True)
        return sum(any(value is not None and value < 0 for value in column) for column in columns)


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def crossings(record: StudyRecord) -> list[Crossing]:
    """Return the mean matrix of every method that has some. Raises OSError if a file cannot be read."""
    found = []
    for label in record.labels:
        paths = [record.path / run.folder / MATRIX for run in record.runs if run.label == label]
        matrices = [_read(path) for path in paths if path.is_file()]
        if not matrices:
            continue
        clients = list(dict.fromkeys(adapter for adapter, _ in matrices[0]))
        losses = [
            [_mean([matrix.get((adapter, client)) for matrix in matrices]) for client in clients] for adapter in clients
        ]
        found.append(Crossing(label, clients, losses, len(matrices)))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean over seeds; None if a seed is missing."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _read(path: Path) -> dict[tuple[str, str], float]:
    """Read (adapter, client) -> loss; clients without test examples are left out."""
    with path.open(encoding="utf-8", newline="") as file:
        return {(line["adapter"], line["client"]): float(line["loss"]) for line in csv.DictReader(file) if line["loss"]}


def write_crossings(record: StudyRecord, folder: Path) -> list[Crossing]:
    """Write FOLDER/matrix-LABEL.csv and, where matplotlib is installed, its picture; return what was written of.

    Raises StoreError if they cannot be written.
    """
    found = crossings(record)
    if found:
        make_folder(folder)
    plots = [_plot(one, record) for one in found]
    if paper.available():
        paper.write_plots(plots, folder)
    else:
        for plot in plots:
            for name, text in plot.tables.items():
                write_atomic(folder / name, text.encode("utf-8", "backslashreplace"), shared=True)
    return found


def _plot(one: Crossing, record: StudyRecord) -> paper.Plot:
    """A square for each pair, blue where another's adapter is better than the client's own; and its numbers."""
    names = [record.called(client) for client in one.clients]
    rows = [
        [names[adapter], names[client], one.losses[adapter][client], difference]
        for adapter, row in enumerate(one.differences)
        for client, difference in enumerate(row)
    ]
    name = f"matrix-{one.label}"
    table = paper.table_of(("adapter", "client", "loss", "minus_own"), rows)
    return paper.Plot(name, lambda: _draw(one.differences, names), {f"{name}.csv": table})


def _draw(differences: Sequence[Sequence[float | None]], names: Sequence[str]) -> Any:
    figure, plane = paper.new_figure((6.0, 5.2))
    table = [[math.nan if value is None else value for value in row] for row in differences]
    finite = sorted(abs(value) for row in table for value in row if math.isfinite(value))
    most = (finite[int(0.9 * (len(finite) - 1))] if finite else 0.0) or 1.0  # a few useless adapters hide nothing
    mesh = plane.pcolormesh(table, cmap="RdBu_r", vmin=-most, vmax=most)
    plane.invert_yaxis()
    plane.set_aspect("equal")
    if len(names) <= NAMES_SHOWN:
        ticks = [place + 0.5 for place in range(len(names))]
        shown = [fitted(name, NAME_ROOM) for name in names]
        plane.set_xticks(ticks, shown, rotation=90, fontsize=5)
        plane.set_yticks(ticks, shown, fontsize=5)
    plane.tick_params(length=0)
    plane.set_xlabel("test split of")
    plane.set_ylabel("adapter of")
    figure.colorbar(mesh, ax=plane, label="loss minus that of the own adapter, nats", extend="both")
    return figure
