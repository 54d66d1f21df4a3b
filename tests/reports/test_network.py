"""The task graph: where nodes stand, what they show, and when it is not drawn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reports.hand_made import page, rows, six
from tests.reports.made_study import make_study

from fedmira.errors import StoreError
from fedmira.graphs.graph import Graph, from_matrix, group_graph, random_graph
from fedmira.reports import axes, network
from fedmira.reports.network import Network, networks
from fedmira.reports.places import lay_out, pack
from fedmira.reports.record import read_study
from fedmira.reports.render import render_page


def write_graph(run: Path, graph: Graph | None, names: list[str], **changes: object) -> None:
    """Write graph.json as the study does."""
    written: dict[str, object] = {"kind": "groups", "note": "by hand", "clients": names, "entries": 0, "edges": None}
    if graph is not None:
        whole = graph.weights.tocoo()
        edges = list(zip(whole.row.tolist(), whole.col.tolist(), whole.data.tolist(), strict=True))
        written |= {"kind": graph.kind, "note": graph.note, "entries": len(edges), "edges": edges}
    (run / "graph.json").write_text(json.dumps(written | changes))


def drawn(study: Path) -> Network:
    return networks(read_study(study))[0]


def write_pair(write_run, own: list[float], alone: float = 10.0) -> tuple[Path, list[str]]:
    """Write local and mira on clients c0, c1, ...; returns mira's folder and the clients."""
    write_run("local", rows(six(*[alone] * len(own)), "word_accuracy"))
    return write_run("mira", rows(six(*own), "word_accuracy")), list(six(*own))


def joined(*pairs: tuple[int, int], count: int) -> np.ndarray:
    weights = np.zeros((count, count))
    for one, other in pairs:
        weights[one, other] = weights[other, one] = 1.0
    return weights


# ---------------------------------------------------------------- places


def place_nodes(weights: np.ndarray, *, aspect: float) -> np.ndarray:
    """The place [N, 2] of each node, in the order of the weights."""
    return np.array(pack(lay_out(weights.tolist(), range(len(weights))), aspect=aspect))


def test_a_graph_has_one_picture():
    weights = random_graph(30, seed=0).weights.toarray()
    first, second = (place_nodes(weights, aspect=1.5) for _ in range(2))
    assert (first == second).all()


def test_parts_that_nothing_joins_stand_apart():
    weights = group_graph(["a"] * 4 + ["b"] * 4).weights.toarray()
    places = place_nodes(weights, aspect=2.0) * (2.0, 1.0)
    inside = max(np.ptp(places[:4], axis=0).max(), np.ptp(places[4:], axis=0).max())
    between = np.linalg.norm(places[:4].mean(axis=0) - places[4:].mean(axis=0))
    assert between > inside


def test_four_equal_cliques_stand_in_a_square():
    weights = group_graph([name for name in "abcd" for _ in range(4)]).weights.toarray()
    middles = place_nodes(weights, aspect=1.0).reshape(4, 4, 2).mean(axis=1)
    assert len({round(float(x), 6) for x in middles[:, 0]}) == 2
    assert len({round(float(y), 6) for y in middles[:, 1]}) == 2


def test_neighbours_on_a_chain_stand_nearer_than_its_ends():
    places = place_nodes(joined(*[(i, i + 1) for i in range(9)], count=10), aspect=1.0)
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    assert np.linalg.norm(places[0] - places[-1]) > 2 * steps.max()


def test_a_circle_stays_round_in_a_wide_box():
    places = place_nodes(joined((0, 1), (1, 2), (0, 2), count=3), aspect=2.0) * (2.0, 1.0)
    sides = [float(np.linalg.norm(places[i] - places[j])) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert sides == pytest.approx([sides[0]] * 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 25), st.integers(0, 60), st.integers(0, 5), st.sampled_from([0.7, 1.0, 2.5]))
def test_every_node_is_inside_and_no_two_are_in_one_place(count: int, edges: int, seed: int, aspect: float):
    draw = np.random.default_rng(seed)
    pairs = [tuple(draw.integers(0, count, 2).tolist()) for _ in range(edges)]
    weights = joined(*[(one, other) for one, other in pairs if one != other], count=count)
    places = place_nodes(weights, aspect=aspect)
    assert np.isfinite(places).all()
    assert places.min() >= -1e-9
    assert places.max() <= 1 + 1e-9
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + np.eye(count)
    assert apart.min() > 1e-3


# ---------------------------------------------------------------- what is shown


def test_nodes_are_coloured_and_marked_by_gain(study: Path, write_run):
    run, clients = write_pair(write_run, [12.0, 8.0, 10.0])
    write_graph(run, group_graph(["a"] * 3), clients)
    nodes = drawn(study).drawings[0].nodes
    assert [(node.fill, node.mark) for node in nodes] == [
        (axes.BETTER, axes.CIRCLE),
        (axes.WORSE, axes.SQUARE),
        (axes.LEVEL, axes.DIAMOND),
    ]
    assert nodes[0].tooltip == "c0: gain +2.000; 2 neighbours, strongest weight 1.00"


def test_the_scale_reaches_as_far_both_ways(study: Path, write_run):
    run, clients = write_pair(write_run, [12.0, 9.0])
    write_graph(run, group_graph(["a"] * 2), clients)
    scale = drawn(study).scale
    assert (scale[0], scale[4], scale[-1]) == (
        (axes.WORSE, "\u22122.000"),
        (axes.LEVEL, "0.000"),
        (axes.BETTER, "+2.000"),
    )


def test_a_client_without_a_gain_is_hollow(study: Path, write_run):
    run, clients = write_pair(write_run, [12.0, math.nan])
    write_graph(run, group_graph(["a"] * 2), clients)
    node = drawn(study).drawings[0].nodes[1]
    assert (node.known, node.fill, "gain n/a" in node.tooltip) == (False, "#FFFFFF", True)


def test_the_groups_of_clients_are_named(study: Path, write_run):
    run, clients = write_pair(write_run, [12.0, 11.0])
    (study / "local" / "seed-0" / "clients.json").write_text(json.dumps({"c0": {"group": "north"}, "c1": {}}))
    write_graph(run, group_graph(["a"] * 2), clients)
    assert drawn(study).drawings[0].nodes[0].tooltip.startswith("c0 (north): gain +2.000")


def test_an_edge_in_both_directions_is_drawn_once(study: Path, write_run):
    run, clients = write_pair(write_run, [1.0, 2.0, 3.0])
    write_graph(run, group_graph(["a", "a", "b"]), clients)
    assert len(drawn(study).drawings[0].edges) == 1
    assert drawn(study).notes == []


def test_weights_that_differ_by_direction_are_told(study: Path, write_run):
    run, clients = write_pair(write_run, [1.0, 2.0])
    write_graph(run, None, clients, edges=[[0, 1, 0.25], [1, 0, 0.5]])
    assert [node.tooltip.split("; ")[1] for node in drawn(study).drawings[0].nodes] == [
        "1 neighbour, strongest weight 0.50"
    ] * 2
    assert drawn(study).notes == ["Weights differ by direction; an edge shows the larger of both."]


def test_of_very_many_edges_the_strongest_are_drawn(study: Path, write_run):
    run, clients = write_pair(write_run, [float(place) for place in range(60)])
    write_graph(run, random_graph(60, seed=0), clients)
    found = drawn(study)
    assert len(found.drawings[0].edges) == network.MOST_EDGES
    assert found.notes[0].endswith(f"edges the {network.MOST_EDGES} strongest are drawn.")


def test_every_method_with_a_graph_has_its_own(study: Path, write_run):
    run, clients = write_pair(write_run, [1.0, 2.0])
    write_graph(run, group_graph(["a"] * 2), clients)
    other = write_run("mira-random", rows(six(3, 4), "word_accuracy"))
    write_graph(other, random_graph(2, seed=0), clients)
    assert [found.label for found in networks(read_study(study))] == ["mira", "mira-random"]


def test_a_study_without_results_of_a_method_still_has_its_graph(study: Path, write_run):
    write_run("local", rows(six(1, 2)))
    write_graph(write_run("mira", []), group_graph(["a"] * 2), ["c0", "c1"])
    assert all(not node.known for node in drawn(study).drawings[0].nodes)
    assert "2 without a value" in page(study).text


# ---------------------------------------------------------------- too many, too few


def many(study: Path, write_run, count: int, groups: int, graph: Graph | None) -> Network:
    run, clients = write_pair(write_run, [10.0 + place % groups for place in range(count)])
    table = {client: {"group": f"g{place % groups}"} for place, client in enumerate(clients)}
    (study / "local" / "seed-0" / "clients.json").write_text(json.dumps(table))
    write_graph(run, graph, clients)
    return drawn(study)


def test_too_many_clients_are_drawn_as_groups_with_mean_gain(study: Path, write_run):
    # groups g0 g1 g2 gain 0, 1, 2; the graph joins every client to the next, so every group to every other
    count = 300
    ring = joined(*[(place, (place + 1) % count) for place in range(count)], count=count)
    found = many(study, write_run, count, 3, from_matrix(ring, kind="file"))
    assert found.groups
    nodes = found.drawings[0].nodes
    assert [node.tooltip.split(";")[0] for node in nodes] == [
        "g0, 100 clients: gain 0.000",
        "g1, 100 clients: gain +1.000",
        "g2, 100 clients: gain +2.000",
    ]
    assert len(found.drawings[0].edges) == 3
    assert "strongest weight 100.00" in nodes[0].tooltip


def test_groups_that_nothing_joins_are_said_to_be_so(study: Path, write_run):
    found = many(study, write_run, 300, 3, group_graph([f"g{place % 3}" for place in range(300)]))
    assert "No edge leads from one group to another." in found.notes


def test_groups_are_drawn_where_the_edges_were_too_many_to_be_written(study: Path, write_run):
    found = many(study, write_run, 300, 3, None)
    assert "Edges are not drawn: there were too many to be written to graph.json." in found.notes
    assert len(found.drawings[0].nodes) == 3


@pytest.mark.parametrize("groups", [1, 61])
def test_too_many_clients_without_a_usable_number_of_groups_are_not_drawn(groups: int, study: Path, write_run):
    found = many(study, write_run, 305, groups, None)
    assert found.refused == (
        f"305 clients are too many to distinguish (up to 200 are drawn), and they form {groups} "
        f"group{'' if groups == 1 else 's'} (2 to 60 are drawn instead)"
    )
    assert f"Not drawn: {found.refused}" in page(study).text


def test_few_clients_whose_weights_were_not_written_are_not_drawn(study: Path, write_run):
    run, clients = write_pair(write_run, [1.0, 2.0])
    write_graph(run, None, clients)
    assert drawn(study).refused == "its weights are not in graph.json"


def test_one_client_has_no_graph_to_draw(study: Path, write_run):
    run, clients = write_pair(write_run, [1.0])
    write_graph(run, group_graph(["a"]), clients)
    assert drawn(study).refused == "no client has a neighbour"


@pytest.mark.parametrize(
    "damage",
    [
        {"edges": [[0, 7, 1.0]]},
        {"edges": [[-1, 0, 1.0]]},
        {"edges": [[0, 1]]},
        {"edges": [[0, 1, "x"]]},
        {"edges": [[0, 1, None]]},
        {"clients": None},
    ],
)
def test_a_graph_that_cannot_be_is_refused_with_its_file(damage: dict[str, object], study: Path, write_run):
    run, clients = write_pair(write_run, [1.0, 2.0])
    write_graph(run, group_graph(["a"] * 2), clients, **damage)
    with pytest.raises(StoreError, match=r"graph\.json' is damaged .* restore it from a copy"):
        drawn(study)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ("abcd", "The graph of mira joins nobody: its results are those of training alone."),
        ("aabc", "2 clients of 4 have no neighbour in the graph of mira, and learn alone."),
        ("aaab", "1 client of 4 has no neighbour in the graph of mira, and learns alone."),
        ("aabb", None),
    ],
)
def test_a_page_says_whom_a_graph_leaves_alone(groups: str, told: str | None, stored: bool, tmp_path: Path) -> None:
    """Where graph.json has no count of them, as earlier versions wrote it, they are counted."""
    study = make_study(tmp_path / "study", ["c0", "c1", "c2", "c3"], sampled=2, graph=group_graph(list(groups)))
    path = study / "mira" / "seed-0" / "graph.json"
    content = json.loads(path.read_text())
    lonely = sum(groups.count(group) == 1 for group in groups)
    path.write_text(json.dumps({**content, "lonely": lonely} if stored else content))
    said = network.notices(read_study(study))
    assert said == ([] if told is None else [told])
    assert told is None or told in render_page(read_study(study))
