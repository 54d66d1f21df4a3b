"""Graphs, their Laplacians and the largest stable coupling, in numbers worked by hand."""

import csv
import tempfile
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from fedmira.adapters import Adapters, lora_layout
from fedmira.errors import MethodError
from fedmira.graphs import graph as graphs
from fedmira.graphs import step
from fedmira.graphs.graph import (
    Graph,
    file_graph,
    from_matrix,
    group_graph,
    groups_by,
    random_graph,
    uniform_graph,
)
from fedmira.graphs.step import (
    check_stable,
    couple,
    laplacian,
    largest_coupling,
    largest_eigenvalue,
    normalise,
    product_distance,
    stable_coupling,
)
from fedmira.names import ClientNames

IDS = ("a", "b", "c")
STAR = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 0.0], [3.0, 0.0, 0.0]])  # degrees 4, 1, 3


def everyone(graph: Graph) -> np.ndarray:
    return np.arange(graph.clients)


def write(folder: Path, text: str) -> Path:
    path = folder / "graph.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_uniform_graph_joins_every_pair_and_nobody_with_itself() -> None:
    assert uniform_graph(3).weights.toarray().tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_groups_are_cliques() -> None:
    found = group_graph(["x", "y", "x"])
    assert found.weights.toarray().tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert found.note == "2 groups"


def test_the_random_graph_follows_the_authors_recipe() -> None:
    found = random_graph(40, seed=3).weights.toarray()
    pairs = found[np.triu_indices(40, 1)]
    assert np.array_equal(found, found.T)
    assert not found.diagonal().any()
    assert found.max() < 1
    assert not ((pairs > 0) & (pairs < 0.25)).any()
    # the mean of two uniform draws is below 1/4 with probability 1/8; 780 pairs, standard deviation 0.012
    assert (pairs == 0).mean() == pytest.approx(1 / 8, abs=0.05)
    assert np.array_equal(found, random_graph(40, seed=3).weights.toarray())
    assert not np.array_equal(found, random_graph(40, seed=4).weights.toarray())


def test_the_diagonal_of_a_matrix_is_dropped() -> None:
    assert from_matrix(np.eye(2), kind="x").weights.nnz == 0


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
def test_similarities_that_are_negative_or_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(MethodError, match="finite and >= 0"):
        from_matrix(np.array([[0, bad], [1, 0]]), kind="x")


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(MethodError, match=r"\(2, 3\)"):
        Graph(graphs.sparse.csr_array(np.ones((2, 3))), "x")


def test_a_pair_given_once_counts_both_ways(tmp_path: Path) -> None:
    found = file_graph(write(tmp_path, "client,neighbour,weight\na,c,0.5\n\n"), IDS)
    assert found.weights.toarray().tolist() == [[0, 0, 0.5], [0, 0, 0], [0.5, 0, 0]]
    assert found.symmetric


def test_a_pair_given_both_ways_keeps_each_direction(tmp_path: Path) -> None:
    found = file_graph(write(tmp_path, "client,neighbour,weight\na,b,0.5\nb,a,2\nc,c,9\n"), IDS)
    assert found.weights.toarray().tolist() == [[0, 0.5, 0], [2, 0, 0], [0, 0, 0]]
    assert not found.symmetric


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", ":1: the first line must be 'client,neighbour,weight'"),
        ("a,b,1\n", ":1: the first line"),
        ("client,neighbour,weight\na,b\n", ":2: found 2 cells"),
        ("client,neighbour,weight\na,b,1\na,d,1\n", ":3: no client 'd'"),
        ("client,neighbour,weight\na,b,much\n", ":2: weight 'much' is not a number"),
        ("client,neighbour,weight\na,b,1\na,c,-1\n", ":3: .*-1"),
        ("client,neighbour,weight\na,b,nan\n", ":2: .*nan"),
    ],
)
def test_a_fault_in_a_graph_file_is_named_with_its_line(text: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=fault):
        file_graph(write(tmp_path, text), IDS)


NAMES_OF = ClientNames({"Charit--1": "Charité", "b": "Ada", "c": "ADA", "d": "b"})


@pytest.mark.parametrize("typed", ["Charité", "Charit--1", " charité ", unicodedata.normalize("NFD", "CHARITÉ")])
def test_a_client_of_a_graph_file_is_found_by_name_and_by_id(typed: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"client,neighbour,weight\n{typed},c,2\nADA,d,3\n")
    found = file_graph(path, list(NAMES_OF.by_id), NAMES_OF)
    assert found.edges(9) == [(0, 2, 2.0), (2, 0, 2.0), (2, 3, 3.0), (3, 2, 3.0)]


@pytest.mark.parametrize(
    ("typed", "fault"),
    [
        ("ada", r"graph\.csv:2: client 'ada' may be one of 2: Ada \(b\), ADA \(c\); give the id in brackets"),
        ("b", r"graph\.csv:2: client 'b' may be one of 2: Ada \(b\), b \(d\)"),
        ("Charite", r"graph\.csv:2: no client 'Charite' \(did you mean Charité \(Charit--1\)\?\)"),
        ("zz", r"graph\.csv:2: no client 'zz'; clients are named as in the data, or by the ids in clients\.json"),
    ],
)
def test_a_name_in_a_graph_file_that_is_nobodys_or_several_clients_is_refused(
    typed: str, fault: str, tmp_path: Path
) -> None:
    path = write(tmp_path, f"client,neighbour,weight\nc,{typed},1\n")
    with pytest.raises(MethodError, match=fault):
        file_graph(path, list(NAMES_OF.by_id), NAMES_OF)


def test_a_client_without_a_group_is_named_as_people_know_it() -> None:
    with pytest.raises(MethodError, match=r"for 1 clients such as 'Charité \(Charit--1\)'"):
        groups_by("ward", ["Charit--1", "b"], [{}, {"ward": "x"}], names=NAMES_OF, what="graph column")


def test_a_pair_with_two_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r":3: weight 2 of a pair that has 0\.5 above"):
        file_graph(write(tmp_path, "client,neighbour,weight\na,b,0.5\na,b,2\n"), IDS)
    same = file_graph(write(tmp_path, "client,neighbour,weight\na,b,0.5\na,b,0.5\n"), IDS)
    assert same.weights.toarray()[0].tolist() == [0, 0.5, 0]


def test_a_graph_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"nowhere\.csv' not found"):
        file_graph(tmp_path / "nowhere.csv", IDS)


def test_row_normalisation_shares_each_clients_pull_among_its_neighbours() -> None:
    assert normalise(STAR, "row").tolist() == [[0, 0.25, 0.75], [1, 0, 0], [1, 0, 0]]


def test_symmetric_normalisation_divides_by_both_degrees() -> None:
    expected = [[0, 0.5, 3 / 12**0.5], [0.5, 0, 0], [3 / 12**0.5, 0, 0]]
    assert normalise(STAR, "symmetric") == pytest.approx(np.array(expected))


def test_no_normalisation_is_the_paper() -> None:
    assert normalise(STAR, "none") is STAR


@pytest.mark.parametrize("kind", graphs.NORMALISATIONS)
def test_a_client_without_neighbours_is_left_alone(kind: str) -> None:
    alone = np.array([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = laplacian(normalise(alone, kind))
    assert not found[2].any()
    assert np.isfinite(found).all()


def test_the_laplacian_of_a_star() -> None:
    assert laplacian(STAR).tolist() == [[4, -1, -3], [-1, 1, 0], [-3, 0, 3]]


@given(some.integers(0, 2**32), some.integers(1, 6), some.sampled_from(graphs.NORMALISATIONS))
def test_rows_of_a_laplacian_sum_to_zero(seed: int, clients: int, kind: str) -> None:
    weights = random_graph(clients, seed=seed).weights.toarray()
    assert laplacian(normalise(weights, kind)).sum(axis=1) == pytest.approx(np.zeros(clients), abs=1e-12)


def test_neighbours_are_the_joined_outside_of_the_round() -> None:
    assert from_matrix(STAR, kind="x").neighbours(np.array([1])).tolist() == [0]
    assert from_matrix(STAR, kind="x").neighbours(np.array([0, 1])).tolist() == [2]
    assert from_matrix(STAR, kind="x").neighbours(np.array([0, 1, 2])).tolist() == []


def test_a_round_of_the_sampled_forgets_everyone_else() -> None:
    found = couple(from_matrix(STAR, kind="x"), np.array([0, 1]), kind="row", stored=False)
    assert found.within.tolist() == [[0, 1], [1, 0]]
    assert found.neighbours.tolist() == []
    assert found.degree.tolist() == [1, 1]


def test_a_round_with_stored_neighbours_shares_the_pull_with_them() -> None:
    found = couple(from_matrix(STAR, kind="x"), np.array([0, 1]), kind="row", stored=True)
    assert found.within.tolist() == [[0, 0.25], [1, 0]]
    assert found.neighbours.tolist() == [2]
    assert found.outside.tolist() == [[0.75], [0]]
    assert found.degree.tolist() == [1, 1]


def test_stored_neighbours_bring_their_own_degree_into_the_symmetric_form() -> None:
    found = couple(from_matrix(STAR, kind="x"), np.array([0, 1]), kind="symmetric", stored=True)
    assert found.outside == pytest.approx(np.array([[3 / 12**0.5], [0]]))


def test_three_clients_all_alike_have_eigenvalue_three_and_limit_two_thirds() -> None:
    graph = uniform_graph(3)
    found = couple(graph, everyone(graph), kind="none", stored=False)
    assert largest_eigenvalue(found) == pytest.approx(3)
    assert largest_coupling(graph, [found]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["row", "symmetric"])
def test_the_same_three_clients_normalised_have_limit_four_thirds(kind: str) -> None:
    graph = uniform_graph(3)
    assert largest_coupling(graph, [couple(graph, everyone(graph), kind=kind, stored=False)]) == pytest.approx(4 / 3)


def test_a_star_has_the_eigenvalue_of_its_characteristic_polynomial() -> None:
    """det(L - x) = -x (x^2 - 8 x + 9), so the largest is 4 + sqrt 7."""
    graph = from_matrix(STAR, kind="x")
    found = couple(graph, everyone(graph), kind="none", stored=False)
    assert largest_eigenvalue(found) == pytest.approx(4 + 7**0.5)


def test_the_worst_round_of_the_schedule_sets_the_limit() -> None:
    graph = uniform_graph(6)
    pair, four = (couple(graph, np.arange(size), kind="none", stored=False) for size in (2, 4))
    assert largest_coupling(graph, [pair]) == pytest.approx(2 / 2)
    assert largest_coupling(graph, [pair, four, pair]) == pytest.approx(2 / 4)


def test_stored_neighbours_add_to_the_pull_and_lower_the_limit() -> None:
    """One of three equal clients in the round: its operator is the number 2, so the limit is 1."""
    graph = uniform_graph(3)
    assert largest_coupling(graph, [couple(graph, np.array([0]), kind="none", stored=True)]) == pytest.approx(1)
    assert largest_coupling(graph, [couple(graph, np.array([0]), kind="none", stored=False)]) == float("inf")


def test_rounds_that_join_nobody_allow_any_coupling() -> None:
    graph = from_matrix(np.zeros((3, 3)), kind="x")
    assert largest_coupling(graph, [couple(graph, everyone(graph), kind="none", stored=False)]) == float("inf")
    assert largest_coupling(graph, []) == float("inf")


def test_an_asymmetric_graph_must_stay_a_weighted_mean() -> None:
    graph = from_matrix(np.array([[0, 2.0], [1, 0]]), kind="x")
    assert not graph.symmetric
    assert largest_coupling(graph, [couple(graph, everyone(graph), kind="none", stored=False)]) == pytest.approx(1 / 2)


def test_large_rounds_give_the_same_eigenvalue_as_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(60, seed=1)
    found = couple(graph, everyone(graph), kind="symmetric", stored=False)
    exact = largest_eigenvalue(found)
    monkeypatch.setattr(step, "_DENSE", 10)
    assert largest_eigenvalue(found) == pytest.approx(exact, rel=1e-8)


@given(some.integers(0, 2**32), some.integers(2, 6), some.sampled_from(graphs.NORMALISATIONS), some.booleans())
def test_just_below_the_limit_a_repeated_step_converges_and_just_above_it_diverges(
    seed: int, clients: int, kind: str, stored: bool
) -> None:
    graph = random_graph(clients, seed=seed)
    near = couple(graph, np.arange(clients - 1), kind=kind, stored=stored)
    limit = largest_coupling(graph, [near])
    if limit == float("inf"):
        return
    operator = np.diag(near.degree) - near.within
    for factor, contracts in ((0.99, True), (1.01, False)):
        radius = np.abs(np.linalg.eigvals(np.eye(len(operator)) - factor * limit * operator)).max()
        assert (radius <= 1 + 1e-9) == contracts


# ---------------------------------------------------------------- graphs too large to be kept


LARGE = {
    "random": lambda clients: random_graph(clients, seed=3),
    "uniform": uniform_graph,
    "groups": lambda clients: group_graph([f"g{k % 4}" for k in range(clients)]),
}


@pytest.fixture(params=LARGE)
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Graph, Graph]:
    """The same graph of 40 clients as a matrix and as a rule."""
    kept = LARGE[request.param](40)
    monkeypatch.setattr(graphs, "_LISTED", 0)
    monkeypatch.setattr(graphs, "_BLOCK", 7)
    rule = LARGE[request.param](40)
    assert isinstance(rule.weights, graphs.Rule)
    assert not isinstance(kept.weights, graphs.Rule)
    return kept, rule


@pytest.mark.parametrize("ids", [[5], [1, 2, 30], [39, 0, 17], range(40)])
def test_a_graph_that_is_computed_where_it_is_needed_is_the_graph_that_is_kept(
    ids: list[int], both: tuple[Graph, Graph]
) -> None:
    kept, rule = both
    some = np.array(ids)
    assert np.array_equal(kept.subgraph(some), rule.subgraph(some))
    assert np.array_equal(kept.subgraph(some, np.array([7, 5])), rule.subgraph(some, np.array([7, 5])))
    assert np.array_equal(kept.neighbours(some), rule.neighbours(some))
    assert kept.degrees(some) == pytest.approx(rule.degrees(some))
    assert (kept.clients, kept.kind, kept.note, kept.symmetric) == (rule.clients, rule.kind, rule.note, rule.symmetric)
    assert rule.entries in (kept.entries, None)
    for kind in graphs.NORMALISATIONS:
        for stored in (False, True):
            one, other = (couple(graph, some, kind=kind, stored=stored) for graph in both)
            assert one.within == pytest.approx(other.within)
            assert one.outside == pytest.approx(other.outside)
            assert np.array_equal(one.neighbours, other.neighbours)


def test_the_random_recipe_is_one_draw_of_a_whole_matrix() -> None:
    """Index for index: a_kl = (b_kl + b_lk) / 2 of one row-major draw, as studies that have begun have it."""
    draw = np.random.default_rng([3, 0x6D697261]).random((40, 40))
    expected = (draw + draw.T) / 2
    expected[expected < 0.25] = 0
    np.fill_diagonal(expected, 0)
    assert np.array_equal(random_graph(40, seed=3).weights.toarray(), expected)


def test_a_large_graphs_fingerprint_tells_its_seed_its_groups_and_its_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "_LISTED", 0)
    made = [
        *(random_graph(clients, seed=seed) for clients, seed in ((100, 0), (100, 1), (101, 0))),
        *(uniform_graph(clients) for clients in (100, 101)),
        *(group_graph([f"g{k % count}" for k in range(100)]) for count in (2, 3)),
        group_graph([f"g{k % 2 if k < 99 else 0}" for k in range(100)]),  # differs after the first 64 only
    ]
    assert len({graph.fingerprint for graph in made}) == len(made)
    assert random_graph(100, seed=0).fingerprint == made[0].fingerprint


@pytest.mark.parametrize("kind", LARGE)
def test_ten_thousand_clients_need_no_matrix(kind: str) -> None:
    tracemalloc.start()
    graph = LARGE[kind](10_000)
    near = couple(graph, np.arange(0, 10_000, 1250), kind="row", stored=False)
    assert graph.fingerprint
    assert graph.edges(10**6) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert near.within.shape == (8, 8)
    assert largest_coupling(graph, [near]) > 0
    assert peak < 10e6  # the matrix is 800 MB


def test_a_small_graph_lists_its_edges() -> None:
    assert group_graph(["x", "y", "x"]).edges(2) == [(0, 2, 1.0), (2, 0, 1.0)]
    assert group_graph(["x", "y", "x"]).edges(1) is None


NAMES = some.text(some.characters(exclude_categories=("Cs",), exclude_characters="\x00\r"), min_size=1, max_size=6).map(
    str.strip
)


@given(
    some.lists(NAMES.filter(bool), min_size=2, max_size=5, unique=True), some.sampled_from(["\n", "\r\n"]), some.data()
)
def test_a_graph_file_is_what_any_program_writes_as_separated_values(
    ids: list[str], end: str, data: some.DataObject
) -> None:
    """Quoted where needed or everywhere, with any letters in a name: the cells that csv.writer was given come back."""
    quoting = data.draw(some.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.csv")
        with path.open("w", encoding=data.draw(some.sampled_from(["utf-8", "utf-8-sig"])), newline="") as file:
            writer = csv.writer(file, quoting=quoting, lineterminator=end)
            writer.writerow(["client", "neighbour", "weight"])
            writer.writerow([ids[0], ids[1], 0.5])
        graph = file_graph(path, ids)
    assert graph.subgraph(np.array([0, 1])).tolist() == [[0, 0.5], [0.5, 0]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"client","neighbour","weight"\n"a","b,0.5\n', "graph.csv:2: not comma-separated values"),
        ('client,neighbour,weight\n"a"x,b,0.5\n', "graph.csv:2: not comma-separated values"),
        ("client;neighbour;weight\na;b;1\n", "graph.csv:1: the first line must be"),
        ("", "graph.csv:1: the first line must be"),
        ('client,neighbour,weight\n\n"a","b"\n', "graph.csv:3: found 2 cells"),
        ('client,neighbour,weight\n"a\nx",b,1\n', "graph.csv:3: no client 'a?x'"),
    ],
)
def test_a_graph_file_that_is_damaged_is_refused_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "graph.csv").write_text(text)
    with pytest.raises(MethodError) as caught:
        file_graph(tmp_path / "graph.csv", ["a", "b"])
    assert words in str(caught.value)


@given(some.lists(some.sampled_from("abcdef"), min_size=1, max_size=12))
def test_lonely_are_those_whose_group_has_no_other_member(groups: list[str]) -> None:
    expected = [place for place, group in enumerate(groups) if groups.count(group) == 1]
    assert group_graph(groups).lonely.tolist() == expected


def test_lonely_are_counted_where_a_graph_is_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmira.graphs.graph._LISTED", 1)
    assert group_graph(["a", "b", "a", "c"]).lonely.tolist() == [1, 3]
    assert uniform_graph(5).lonely.tolist() == []
    assert random_graph(5, seed=0).lonely.tolist() == []


def test_a_weight_of_zero_makes_no_neighbour(tmp_path: Path) -> None:
    (tmp_path / "graph.csv").write_text("client,neighbour,weight\na,b,0\nb,c,1\nc,b,0\n")
    assert file_graph(tmp_path / "graph.csv", ["a", "b", "c"]).lonely.tolist() == [0, 2]


# ---------------------------------------------------------------- which couplings are stable


def test_a_coupling_is_lowered_until_two_neighbours_meet_in_the_middle() -> None:
    """Largest eigenvalue 2, stable below 1: above 1 / 2 each would pass the other. A coupling below that stays."""
    pair = uniform_graph(2)
    near = couple(pair, everyone(pair), kind="none", stored=False)
    assert stable_coupling(0.9, pair, near) == pytest.approx(0.5)
    assert stable_coupling(0.4, pair, near) == 0.4


def test_on_an_asymmetric_graph_a_coupling_is_lowered_until_rows_are_weighted_means() -> None:
    """The largest row sum is 2: at 1 / 2 a client moves to its neighbours' mean."""
    uneven = from_matrix(np.array([[0.0, 2.0], [1.0, 0.0]]), kind="x")
    near = couple(uneven, everyone(uneven), kind="none", stored=False)
    assert stable_coupling(0.9, uneven, near) == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore:mira")
def test_at_the_limit_itself_a_symmetric_graph_is_refused() -> None:
    """Two neighbours at the limit change places in every round, for ever."""
    pair = uniform_graph(2)
    rounds = [couple(pair, everyone(pair), kind="none", stored=False)]
    limit = largest_coupling(pair, rounds)
    with pytest.raises(MethodError, match="must be below 1 "):
        check_stable(limit, pair, rounds, normalised=False, method="mira")
    check_stable(0.999 * limit, pair, rounds, normalised=False, method="mira")


def test_the_distance_of_two_updates_counts_each_at_its_own_scale() -> None:
    """One number each: 3 x 2 x 1 and 0.5 x 4 x 1 are 4 apart."""
    layout = lora_layout([("m", 1, 1)], 1)
    sides = []
    for scale, b in ((3.0, 2.0), (0.5, 4.0)):
        side = Adapters(layout, torch.zeros(1, layout.size), torch.tensor([1]), torch.tensor([scale]))
        ((first, second),) = layout.parts[0].pairs()
        side.leaf(first).fill_(1)
        side.leaf(second).fill_(b)
        sides.append(side)
    assert product_distance(*sides) == pytest.approx(4)


def test_the_fingerprint_of_a_rule_depends_on_its_similarities_too() -> None:
    def of(value: float) -> str:
        rule = graphs.Rule((3, 3), lambda ids, others: value * (ids[:, None] != others), "the same", None)
        return Graph(rule, "x").fingerprint

    assert of(1.0) == of(1.0) != of(0.5)
