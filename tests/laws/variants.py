"""Every method of the tree, found by itself, and the settings with which it is put before the laws."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.laws.worlds import EVERYONE, World

from fedmira.graph import Graph
from fedmira.methods import build, names
from fedmira.methods.base import Method

# Similarities of the file graphs; the second one is stronger in one direction than in the other.
SYMMETRIC = {(0, 1): 1.0, (0, 3): 0.5, (1, 2): 0.7, (3, 4): 0.25, (3, 5): 1.5}
ASYMMETRIC = {**SYMMETRIC, (1, 0): 0.25, (5, 3): 0.5}
FILES = {"file": SYMMETRIC, "file, asymmetric": ASYMMETRIC}
GRAPHS: Mapping[str, Mapping[str, Any]] = {
    "random": {"kind": "random"},
    "uniform": {"kind": "uniform"},
    "groups": {"kind": "groups", "column": "family"},
    "file": {"kind": "file"},
    "file, asymmetric": {"kind": "file"},
}


@dataclass(frozen=True)
class Variant:
    """A method with settings. graph: a key of GRAPHS, None where the method has no graph."""

    name: str
    settings: Mapping[str, Any]
    graph: str | None = None

    def __str__(self) -> str:
        words = [self.name, *([self.graph] if self.graph else []), *(str(v) for v in self.settings.values())]
        return " ".join(words)

    @property
    def stored(self) -> bool:
        return self.settings.get("neighbours") == "stored"

    def build(self, world: World, folder: Path) -> Method:
        settings = dict(self.settings)
        if self.graph is not None:
            settings["graph"] = dict(GRAPHS[self.graph])
        if self.graph in FILES:
            settings["graph"]["path"] = str(write(folder / "graph.csv", FILES[self.graph]))
        return build(self.name, settings, world.cohort)

    def rebuild(self, world: World, folder: Path, graph: Graph | None) -> Method:
        """Build for renamed clients: similarities go by name, so that the graph is renamed with them."""
        if graph is None:
            return build(self.name, self.settings, world.cohort)
        dense = graph.weights.toarray()
        pairs = {(k, other): float(dense[k, other]) for k in EVERYONE for other in EVERYONE if k != other}
        path = write(folder / "renamed.csv", pairs)
        return build(self.name, {**self.settings, "graph": {"kind": "file", "path": str(path)}}, world.cohort)


def write(path: Path, pairs: Mapping[tuple[int, int], float]) -> Path:
    lines = [f"c{one},c{other},{weight!r}" for (one, other), weight in pairs.items()]
    path.write_text("\n".join(["client,neighbour,weight", *lines]) + "\n", encoding="utf-8")
    return path


MIRA = [
    Variant("mira", {"lambda": 0.05 if normalise == "none" else 0.3, "neighbours": near, "normalise": normalise}, graph)
    for graph, near, normalise in itertools.product(GRAPHS, ("sampled", "stored"), ("none", "row", "symmetric"))
]
TABLE: Mapping[str, list[Variant]] = {
    "fedavg": [Variant("fedavg", {"weights": weights}) for weights in ("examples", "uniform")],
    "mira": MIRA,
}
# A method that nobody listed is put before the laws with its own default settings.
VARIANTS = [variant for name in names() for variant in TABLE.get(name, [Variant(name, {})])]
# On the transformer every local step costs milliseconds: each graph and each setting once is enough there.
FEW = [variant for variant in VARIANTS if variant.name != "mira"] + [MIRA[place] for place in (1, 6, 17, 22, 24)]


def similarities(variant: Variant, graph: Graph) -> np.ndarray:
    """The symmetric weights whose disagreement a step with this normalisation cannot widen.

    none and row: A itself (row steps are gradient steps in the metric of the degrees); symmetric: D^-1/2 A D^-1/2.
    """
    dense: np.ndarray = graph.weights.toarray()
    if variant.settings["normalise"] != "symmetric":
        return dense
    degrees = np.sqrt(dense.sum(axis=1))
    return np.divide(dense, np.outer(degrees, degrees), out=np.zeros_like(dense), where=dense > 0)
