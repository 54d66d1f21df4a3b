"""Every method of the tree, found by itself, and the settings with which it is put before the laws."""

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.laws.worlds import EVERYONE, World

from fedmira.graphs.graph import Graph
from fedmira.methods import build, load, names
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
    def moves_by_itself(self) -> bool:
        """Does the server go on where it went before, even if everyone returns what it has?"""
        wrappers = [one["name"] for one in self.settings.get("with", ())]
        return self.name == "fedopt" or "server_optimizer" in wrappers

    @property
    def chooses(self) -> bool:
        """Does each client choose its own pull?"""
        return self.settings.get("lambda") == "auto"

    @property
    def meets_anybody(self) -> bool:
        """Is a client sent rows, or means, of any that have trained, whether they are in the round or not?"""
        return self.chooses or self.name in ("fedamp", "fedfomo")

    @property
    def stored(self) -> bool:
        """Is a client reached by stored rows of its neighbours that are not in the round?"""
        return self.settings.get("neighbours") == "stored" or self.name == "dfedu"

    def build(self, world: World, folder: Path) -> Method:
        settings = dict(self.settings)
        if self.graph is not None:
            settings["graph"] = dict(GRAPHS[self.graph])
        if self.graph in FILES:
            settings["graph"]["path"] = str(write(folder / "graph.csv", FILES[self.graph]))
        with warnings.catch_warnings():  # a lost reply warns
            warnings.simplefilter("ignore")
            return build(self.name, settings, world.cohort)

    def rebuild(self, world: World, folder: Path, graph: Graph | None) -> Method:
        """Build for renamed clients: similarities go by name, so that the graph is renamed with them."""
        if graph is None or "graph" not in load(self.name).Config.model_fields:  # a method's own, made of the columns
            return self.build(world, folder)
        dense = graph.weights.toarray()
        pairs = {(k, other): float(dense[k, other]) for k in EVERYONE for other in EVERYONE if k != other}
        path = write(folder / "renamed.csv", pairs)
        settings = {**self.settings, "graph": {"kind": "file", "path": str(path)}}
        return Variant(self.name, settings).build(world, folder)


def write(path: Path, pairs: Mapping[tuple[int, int], float]) -> Path:
    lines = [f"c{one},c{other},{weight!r}" for (one, other), weight in pairs.items()]
    path.write_text("\n".join(["client,neighbour,weight", *lines]) + "\n", encoding="utf-8")
    return path


MIRA = [
    Variant("mira", {"lambda": 0.05 if normalise == "none" else 0.3, "neighbours": near, "normalise": normalise}, graph)
    for graph, near, normalise in itertools.product(GRAPHS, ("sampled", "stored"), ("none", "row", "symmetric"))
]
BEYOND = [  # the paper
    Variant("mira", {"lambda": 3.0, "neighbours": "sampled", "normalise": "symmetric", "solver": "exact"}, "groups"),
    Variant("mira", {"lambda": 3.0, "neighbours": "stored", "normalise": "row", "solver": "exact"}, "random"),
    Variant("mira", {"lambda": 0.05, "neighbours": "stored", "normalise": "none", "clip": 0.5}, "file"),
    Variant("mira", {"lambda": 0.3, "neighbours": "sampled", "normalise": "row", "space": "product"}, "groups"),
    Variant("mira", {"lambda": 0.3, "graph": {"kind": "learned", "degree": 2}}),
    Variant("mira", {"lambda": 0.3, "graph": {"kind": "learned", "of": "updates", "measure": "distance"}}),
]
FAMILY = {"kind": "groups", "column": "family"}
CHOSEN = [  # by each client
    Variant("mira", {"lambda": "auto"}),
    Variant("mira", {"lambda": "auto", "graph": FAMILY, "choice": {"alphas": [0, 1], "prior": 0}}),
    Variant("mira", {"lambda": "auto", "choice": {"by": "module_group", "graphs": ["global"], "margin": 0.5}}),
    Variant("mira", {"lambda": "auto", "graph": FAMILY, "choice": {"alphas": [0.5], "graphs": ["given"]}}),
]
TABLE: Mapping[str, list[Variant]] = {
    "dfedu": [  # its merges move nobody, so that no law of a graph step is about it; its own tests are
        Variant("dfedu", {"lambda": 0.3, "graph": {"kind": "uniform"}}),
        Variant("dfedu", {"lambda": 0.05, "graph": FAMILY, "normalise": "none"}),
        Variant("dfedu", {"lambda": 0.3, "normalise": "symmetric"}),
    ],
    "fedavg": [Variant("fedavg", {"weights": weights}) for weights in ("examples", "uniform")],
    "fedavg_ft": [Variant("fedavg_ft", {"weights": weights}) for weights in ("examples", "uniform")],
    "fedbone": [
        Variant("fedbone", {}),
        Variant("fedbone", {"private": False, "attention": 0, "by": "module", "weights": "examples"}),
    ],
    "fedex_lora": [Variant("fedex_lora", {"weights": weights}) for weights in ("examples", "uniform")],
    "fedfomo": [Variant("fedfomo", {"M": 2}), Variant("fedfomo", {"M": 3, "epsilon": 0, "baseline": "last"})],
    "flora": [Variant("flora", {}), Variant("flora", {"weights": "uniform", "start": "common"})],
    "groupavg": [
        Variant("groupavg", {}),
        *(Variant("groupavg", {"column": "family", "weights": weights}) for weights in ("examples", "uniform")),
    ],
    "hetlora": [Variant("hetlora", {"gamma": gamma, "lambda": 0.5}) for gamma in (0.5, 1)],
    "mira": [*MIRA, *BEYOND, *CHOSEN],
    "fedptuning": [
        Variant("fedptuning", {"virtual_tokens": 3, "hidden": 2, "weights": weights})
        for weights in ("examples", "uniform")
    ],
    "pfedme": [Variant("pfedme", {"K": 2, "lambda": 1, "eta": 0.5})],
    "fedrep": [Variant("fedrep", {}), Variant("fedrep", {"shared": "B", "head": 0.5, "weights": "uniform"})],
    "fedopt": [Variant("fedopt", {"variant": "adam"}), Variant("fedopt", {"variant": "momentum"})],
    "scaffold": [
        Variant("scaffold", {}),
        Variant("scaffold", {"variate": "gradient", "weights": "examples", "server_learning_rate": 0.5}),
    ],
}
STORED = {"lambda": 0.3, "normalise": "row", "neighbours": "stored"}
WRAPPED = [
    Variant(name, {**settings, "with": wrappers}, graph)
    for name, settings, graph, wrappers in (
        ("fedavg", {}, None, [{"name": "proximal", "mu": 0.5}]),
        ("fedavg", {}, None, [{"name": "only", "trained": "B", "travels": "B"}]),
        ("fedavg", {}, None, [{"name": "only", "trained": "alternating"}]),
        ("fedavg", {}, None, [{"name": "only", "travels": "A"}]),
        ("fedavg", {}, None, [{"name": "server_optimizer", "variant": "adam", "learning_rate": 0.1}]),
        ("fedavg", {}, None, [{"name": "server_optimizer", "variant": "yogi", "learning_rate": 0.1}]),
        ("groupavg", {"column": "family"}, None, [{"name": "server_optimizer", "variant": "momentum"}]),
        ("fedavg", {}, None, [{"name": "tuned_after", "steps": 2}]),
        ("fedavg", {}, None, [{"name": "clip", "norm": 0.3}]),
        ("fedavg", {}, None, [{"name": "noise", "sigma": 0.1, "secret": False}]),
        (
            "fedavg",
            {},
            None,
            [
                {"name": "only", "travels": "A"},
                {"name": "clip", "norm": 0.3},
                {"name": "noised", "sigma": 1, "secret": False},
            ],
        ),
        ("mira", STORED, "groups", [{"name": "accepting"}]),
        ("mira", STORED, "groups", [{"name": "lost_reply"}]),
        (
            "mira",
            STORED,
            "groups",
            [{"name": "only", "travels": "A"}],
        ),
        ("mira", {"lambda": "auto"}, None, [{"name": "only", "travels": "A"}]),
        ("dfedu", {"lambda": 0.3, "graph": FAMILY}, None, [{"name": "only", "travels": "A"}]),
        ("local", {}, None, [{"name": "proximal", "mu": 0.5}]),
        ("flexlora", {}, None, [{"name": "clipped", "norm": 0.3}]),
    )
]
# A method that nobody listed is put before the laws with its own default settings.
VARIANTS = [variant for name in names() for variant in TABLE.get(name, [Variant(name, {})])]
# On the transformer every local step costs milliseconds: each graph and each setting once is enough there.
FEW = [variant for variant in VARIANTS if variant.name != "mira"] + [MIRA[place] for place in (1, 6, 17, 22, 24)]
FEW += BEYOND + CHOSEN
VARIANTS += WRAPPED
FEW += [
    one for one in WRAPPED if one.settings["with"][0]["name"] in ("proximal", "only", "clip", "noise")
]  # local half


def similarities(variant: Variant, graph: Graph) -> np.ndarray:
    """The symmetric weights whose disagreement a step with this normalisation cannot widen.

    none and row: A itself (row steps are gradient steps in the metric of the degrees); symmetric: D^-1/2 A D^-1/2.
    """
    dense: np.ndarray = graph.weights.toarray()
    if variant.settings.get("normalise") != "symmetric":
        return dense
    degrees = np.sqrt(dense.sum(axis=1))
    return np.divide(dense, np.outer(degrees, degrees), out=np.zeros_like(dense), where=dense > 0)
