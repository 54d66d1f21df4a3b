"""Warnings about a method on these clients: what its settings do here that a user may not expect."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmira.adapters.ranks import is_mixed, shown
from fedmira.graphs.graph import Graph
from fedmira.methods.base import Cohort, Method

LONELY_NAMED = 5  # clients without a neighbour, in a warning


def rank_notes(label: str, method: Method, ranks: Tensor) -> list[str]:
    """Say where a method takes factors of different ranks together, as if those of smaller rank were padded."""
    mixes = method.regime.trainees == "sampled" and not method.sends_nothing
    padded = mixes and method.facts.compare == "factors" and method.layout is None
    if not padded or not is_mixed(ranks):
        return []
    return [
        f"{label}: clients have ranks {shown(ranks)}, and their factors are mixed as if padded with zeros, and "
        "cut to each client's rank; flexlora, and mira with space: product, mix the updates themselves"
    ]


def lonely_notes(label: str, graph: Graph | None, cohort: Cohort, *, of: Sequence[int] | None = None) -> list[str]:
    """Say which clients a graph joins to nobody. of: look at these clients only; None = at all."""
    lonely = [] if graph is None else [int(k) for k in graph.lonely if of is None or int(k) in of]
    if not lonely:
        return []
    if len(lonely) == len(cohort if of is None else of):
        return [
            f"{label}: the graph joins nobody, no client has a neighbour, so nothing is shared: the results are those "
            "of training alone; give clients that belong together the same value, or take another graph"
        ]
    named = ", ".join(f"'{cohort.names.shown(cohort.ids[k])}'" for k in lonely[:LONELY_NAMED])
    more = ", ..." if len(lonely) > LONELY_NAMED else ""
    return [
        f"{label}: {len(lonely)} of {len(cohort)} clients have no neighbour in the graph and learn alone: {named}{more}"
    ]


def apart_notes(label: str, method: Method, cohort: Cohort) -> list[str]:
    """Say where a graph joins clients, but no round has two that it joins, and no stored row takes part either."""
    graph, pull = method.facts.graph, method.facts.pull
    if graph is None or pull is None or len(graph.lonely) == len(cohort):  # the last is said by lonely_notes
        return []
    if any(graph.subgraph(ids).any() or bool(pull(torch.from_numpy(ids)).any()) for ids in cohort.schedule):
        return []
    most = max((len(ids) for ids in cohort.schedule), default=0)
    return [
        f"{label}: no round has two clients that the graph joins ({most} of {len(cohort)} clients in a round), so "
        "nothing is shared: the results are those of training alone; raise federation.participation, or take "
        "neighbours: stored"
    ]
