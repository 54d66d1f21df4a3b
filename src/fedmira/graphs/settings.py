"""Settings of a task graph, as in YAML, and the graph that they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from fedmira.adapters.lazy import np
from fedmira.config.strict import Strict
from fedmira.graphs.graph import Graph, make_graph
from fedmira.graphs.learned import LEAST_SKETCH, LearnedGraph, knn_graph, shuffled
from fedmira.names import ClientNames

KEYS = {
    "random": {"seed", "shuffled"},
    "uniform": {"shuffled"},
    "groups": {"column", "shuffled"},
    "file": {"path", "shuffled"},
    "knn": {"features", "column", "measure", "degree", "shuffled"},
    "learned": {"of", "measure", "scope", "centred", "every", "degree", "sketch", "shuffled"},
}


class GraphConfig(Strict):
    """Where the similarities a_kl come from."""

    kind: Literal["random", "uniform", "groups", "file", "knn", "learned"] = "random"  # random: the authors' recipe
    column: str | None = None  # groups: clients with the same value are joined; knn: whose values are counted
    path: str | None = None  # file: CSV with client,neighbour,weight; clients by name or id
    seed: int | None = Field(default=None, ge=0)  # random: None = the run's seed
    features: Literal["embedding", "histogram"] = "embedding"  # knn: embeddings of prompts, or counts of values
    of: Literal["adapters", "updates"] = "adapters"  # learned: all that was learned, or only in the last round
    measure: Literal["cosine", "distance"] = "cosine"  # knn, learned
    scope: Literal["whole", "layer"] = (
        "whole"  # learned: one similarity for all layers together, or the mean of each layer's
    )
    centred: bool = False  # learned: compare what is left of adapters when their mean over clients is subtracted
    every: int = Field(default=1, ge=1)  # learned: rounds between two sketches of the same client
    degree: int = Field(default=10, ge=1)  # knn, learned: most neighbours of a client
    sketch: int = Field(default=LEAST_SKETCH, ge=LEAST_SKETCH)  # learned: numbers stored for each client
    shuffled: bool = False  # the same graph with its clients permuted: a control

    @model_validator(mode="after")
    def _complete(self) -> GraphConfig:
        if self.kind == "groups" and not self.column:
            raise ValueError("graph kind 'groups' needs 'column', the data column that names a client's group")
        if self.kind == "file" and not self.path:
            raise ValueError("graph kind 'file' needs 'path', a CSV with client,neighbour,weight")
        if self.kind == "knn" and (self.features == "histogram") != (self.column is not None):
            raise ValueError("graph kind 'knn' needs 'column' with 'features: histogram', and only there")
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        changed = {name for name in self.model_fields_set - {"kind"} if getattr(self, name) != defaults[name]}
        if unknown := sorted(changed - KEYS[self.kind]):
            raise ValueError(
                f"graph kind '{self.kind}' has no {', '.join(unknown)}; it takes {sorted(KEYS[self.kind])}"
            )
        return self


def given_graph(
    config: GraphConfig,
    *,
    ids: Sequence[str],
    names: ClientNames,
    columns: Sequence[Mapping[str, str]],
    seed: int,
    profile: Callable[[str | None], np.ndarray],
) -> Graph:
    """Make a graph that is known before training.

    ids, names, columns, profile: of the clients, as in a method's Cohort; seed: of the run. Raises MethodError
    if the graph cannot be made from them.
    """
    if config.kind == "knn":
        column = config.column if config.features == "histogram" else None
        note = f"{config.degree} nearest by {f'the values of {column}' if column else 'embeddings of prompts'}"
        graph = knn_graph(profile(column), measure=config.measure, degree=config.degree, note=note)
    else:
        graph = make_graph(
            config.kind,
            ids=ids,
            names=names,
            columns=columns,
            column=config.column,
            path=config.path,
            seed=seed if config.seed is None else config.seed,
        )
    return shuffled(graph, seed) if config.shuffled else graph


def learn_graph(config: GraphConfig, *, products: bool, stored: bool, seed: int) -> LearnedGraph:
    """Return the description of a graph that is learned during training.

    products: compare updates s B A instead of their factors; stored: clients that are not in the round count too.
    """
    return LearnedGraph(
        of=config.of,
        measure=config.measure,
        by_module=config.scope == "layer",
        centred=config.centred,
        every=config.every,
        degree=config.degree,
        size=config.sketch,
        products=products,
        stored=stored,
        shuffled=config.shuffled,
        seed=seed,
    )
