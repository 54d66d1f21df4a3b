"""MIRA in numbers worked by hand: w_k - c sum_l a_kl (w_k - w_l), c = eta x lambda."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, State

LAYOUT = lora_layout([("m", 1, 1)], 1)
FIRST = Clock(1)
CHAIN = "client,neighbour,weight\nc0,c1,1\nc1,c2,0.5\n"  # degrees 1, 1.5, 0.5


def cohort(clients: int, *, rounds: tuple[tuple[int, ...], ...] | None = None, family: str = "") -> Cohort:
    schedule = rounds if rounds is not None else (tuple(range(clients)),)
    return Cohort(
        tuple(f"c{k}" for k in range(clients)),
        (1,) * clients,
        tuple({"family": family[k], "language": "en"} if family else {} for k in range(clients)),
        tuple(np.array(ids) for ids in schedule),
        seed=0,
    )


def mira(of: Cohort, **settings: Any) -> Method:
    return build("mira", {"normalise": "none", **settings}, of)


def chain(folder: Path, **settings: Any) -> Method:
    """Three clients in a row, similarities 1 and 0.5, c = 0.2."""
    path = folder / "chain.csv"
    path.write_text(CHAIN, encoding="utf-8")
    return mira(cohort(3), **{"lambda": 0.2, "graph": {"kind": "file", "path": str(path)}, **settings})


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, LAYOUT.size)


def merge(
    method: Method, uploads: tuple[float, ...], *, ids: tuple[int, ...] = (), stored: tuple[float, ...] = ()
) -> list[float]:
    who = torch.tensor(ids or range(len(uploads)))
    held = rows(*(stored or [99.0] * (int(who.max()) + 1)))
    state = State(Adapters(LAYOUT, held, torch.ones(len(held), dtype=torch.int64), torch.ones(len(held))))
    change = method.merge(state, who, Message(rows(*uploads)), torch.ones(len(who)), FIRST)
    assert torch.equal(change.ids, who)
    assert torch.equal(change.rows, change.rows[:, :1].expand_as(change.rows))
    return change.rows[:, 0].tolist()


@pytest.mark.filterwarnings("ignore:mira")
def test_two_equal_tasks_meet_in_the_middle() -> None:
    assert merge(mira(cohort(2), graph={"kind": "uniform"}, **{"lambda": 0.5}), (0, 4)) == [2, 2]


def test_meeting_in_the_middle_is_not_called_overshooting() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mira(cohort(2), graph={"kind": "uniform"}, **{"lambda": 0.5})


def test_two_equal_tasks_move_by_the_coupling() -> None:
    assert merge(mira(cohort(2), graph={"kind": "uniform"}, **{"lambda": 0.25}), (0, 4)) == [1, 3]


def test_eta_and_lambda_act_as_their_product() -> None:
    assert merge(mira(cohort(2), eta=0.5, graph={"kind": "uniform"}, **{"lambda": 0.5}), (0, 4)) == [1, 3]


def test_three_tasks_in_a_row(tmp_path: Path) -> None:
    """0 + 0.2 x 10;  10 - 0.2 (10 - 5);  20 - 0.2 x 0.5 x 10."""
    assert merge(chain(tmp_path), (0, 10, 20)) == pytest.approx([2, 9, 19])


def test_three_tasks_with_each_pull_shared_among_the_neighbours(tmp_path: Path) -> None:
    """0 + 0.2 x 10;  10 - 0.2 (2/3 x 10 - 1/3 x 10);  20 - 0.2 x 10."""
    assert merge(chain(tmp_path, normalise="row"), (0, 10, 20)) == pytest.approx([2, 10 - 2 / 3, 18])


def test_three_tasks_in_the_symmetric_form(tmp_path: Path) -> None:
    """1 / sqrt(1 x 1.5) = 0.81650 and 0.5 / sqrt(1.5 x 0.5) = 0.57735."""
    expected = [1.6330, 10 - 0.2 * (8.1650 - 5.7735), 20 - 1.1547]
    assert merge(chain(tmp_path, normalise="symmetric"), (0, 10, 20)) == pytest.approx(expected, abs=1e-4)


def test_a_neighbour_that_is_not_in_the_round_does_not_pull(tmp_path: Path) -> None:
    assert merge(chain(tmp_path), (0, 20), ids=(0, 2)) == [0, 20]


def test_a_stored_neighbour_pulls_with_its_last_row(tmp_path: Path) -> None:
    method = chain(tmp_path, neighbours="stored")
    assert merge(method, (0, 20), ids=(0, 2), stored=(-9, 10, -9)) == pytest.approx([2, 19])


def test_stored_neighbours_share_the_pull_with_the_sampled_ones(tmp_path: Path) -> None:
    """Client 1 alone with stored 0 and 20: 10 - 0.2 (2/3 (10 - 0) + 1/3 (10 - 20))."""
    method = chain(tmp_path, neighbours="stored", normalise="row")
    assert merge(method, (10,), ids=(1,), stored=(0, -9, 20)) == pytest.approx([10 - 2 / 3])


def test_row_normalisation_makes_the_pull_independent_of_the_number_of_clients() -> None:
    for clients in (2, 5, 9):
        method = mira(cohort(clients), normalise="row", graph={"kind": "uniform"}, **{"lambda": 0.25})
        assert merge(method, (8,) + (0,) * (clients - 1))[0] == pytest.approx(6)
        assert method.facts.pull is not None
        assert method.facts.pull(torch.arange(clients)).tolist() == pytest.approx([0.25] * clients)


def test_the_pull_is_the_coupling_times_the_degree(tmp_path: Path) -> None:
    method = chain(tmp_path)
    assert method.facts.pull is not None
    assert method.facts.pull(torch.arange(3)).tolist() == pytest.approx([0.2, 0.3, 0.1])
    assert method.facts.pull(torch.tensor([0, 2])).tolist() == [0, 0]


def test_the_record_of_a_round_tells_the_mean_pull_in_percent(tmp_path: Path) -> None:
    state = State(Adapters(LAYOUT, rows(0, 0, 0), torch.ones(3, dtype=torch.int64), torch.ones(3)))
    change = chain(tmp_path).merge(state, torch.arange(3), Message(rows(0, 10, 20)), torch.ones(3), FIRST)
    assert dict(change.notes) == pytest.approx({"pull_percent": 20.0})


def test_the_record_of_a_round_has_the_share_of_differences_that_were_clipped() -> None:
    """16 equal numbers: 0, 1 and 10 are 4, 40 and 36 apart, each seen from both sides; four of six are above 20."""
    method = mira(cohort(3), clip=20.0, graph={"kind": "uniform"}, **{"lambda": 0.1})
    state = State(Adapters(LAYOUT, rows(0, 0, 0), torch.ones(3, dtype=torch.int64), torch.ones(3)))
    change = method.merge(state, torch.arange(3), Message(rows(0, 1, 10)), torch.ones(3), FIRST)
    assert change.notes["clipped_percent"] == pytest.approx(100 * 4 / 6)


@pytest.mark.filterwarnings("ignore:mira")
@pytest.mark.parametrize("clients", [2, 3, 5])
def test_all_alike_with_a_coupling_of_one_over_n_is_the_uniform_mean(clients: int) -> None:
    of = cohort(clients)
    uploads = tuple(float(k * k) for k in range(clients))
    single = State(Adapters(LAYOUT, rows(0), torch.tensor([1]), torch.ones(1)))
    mean = build("fedavg", {"weights": "uniform"}, of).merge(
        single, torch.arange(clients), Message(rows(*uploads)), torch.ones(clients), FIRST
    )
    found = merge(mira(of, graph={"kind": "uniform"}, **{"lambda": 1 / clients}), uploads)
    assert found == pytest.approx([float(mean.rows[0, 0])] * clients)


@pytest.mark.filterwarnings("ignore:mira")
def test_family_cliques_with_a_coupling_of_one_over_n_are_family_means() -> None:
    method = mira(cohort(6, family="xyxyxy"), graph={"kind": "groups", "column": "family"}, **{"lambda": 1 / 3})
    assert merge(method, (0, 10, 3, 20, 6, 60)) == pytest.approx([3, 30, 3, 30, 3, 30])


def test_three_clients_all_alike_are_refused_at_two_thirds_with_the_limit_in_the_message() -> None:
    with pytest.raises(MethodError, match=r"eta x lambda = 0\.7 must be below 0\.6667 .*normalise: row"):
        mira(cohort(3), graph={"kind": "uniform"}, **{"lambda": 0.7})


def test_just_below_the_limit_there_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"0\.66 is over half of the stable limit 0\.6667"):
        mira(cohort(3), graph={"kind": "uniform"}, **{"lambda": 0.66})


def test_the_limit_is_that_of_the_rounds_to_come_and_not_of_the_whole_graph() -> None:
    pairs = cohort(6, rounds=((0, 1), (4, 5)))
    assert mira(pairs, graph={"kind": "uniform"}, **{"lambda": 0.4}).personal  # limit 1 for two, 1/3 for six
    with pytest.raises(MethodError, match=r"below 0\.3333"):
        mira(cohort(6), graph={"kind": "uniform"}, **{"lambda": 0.4})


def test_an_asymmetric_graph_may_pull_to_the_mean_of_its_neighbours_but_no_further(tmp_path: Path) -> None:
    path = tmp_path / "graph.csv"
    path.write_text("client,neighbour,weight\nc0,c1,2\nc1,c0,1\n", encoding="utf-8")
    graph = {"kind": "file", "path": str(path)}
    assert merge(mira(cohort(2), graph=graph, **{"lambda": 0.5}), (0, 8)) == [8, 4]
    with pytest.raises(MethodError, match=r"below 0\.5 .*row sum of an asymmetric graph"):
        mira(cohort(2), graph=graph, **{"lambda": 0.51})


def test_a_round_in_which_fewer_answer_than_were_checked_lets_nobody_overshoot() -> None:
    """Three alike are stable below 2 / 3; of two of them, 0.6 would carry each past the other."""
    with pytest.warns(UserWarning, match="overshoot"):
        method = mira(cohort(3), graph={"kind": "uniform"}, **{"lambda": 0.6})
    assert merge(method, (0, 4), ids=(0, 1), stored=(9, 9, 9)) == pytest.approx([2, 2])


def test_without_a_penalty_any_graph_will_do() -> None:
    method = mira(cohort(6), eta=100, graph={"kind": "uniform"}, **{"lambda": 0})
    assert merge(method, (0, 1, 2, 3, 4, 5)) == [0, 1, 2, 3, 4, 5]


def test_the_random_graph_is_drawn_from_the_runs_seed_unless_it_has_its_own() -> None:
    first, second, own = (
        mira(cohort(5), normalise="row", graph=graph).facts.graph
        for graph in ({"kind": "random"}, {"kind": "random", "seed": 0}, {"kind": "random", "seed": 1})
    )
    assert first is not None
    assert second is not None
    assert own is not None
    assert np.array_equal(first.weights.toarray(), second.weights.toarray())
    assert not np.array_equal(first.weights.toarray(), own.weights.toarray())


def test_a_group_column_that_no_client_has_is_refused_with_those_that_all_have() -> None:
    with pytest.raises(MethodError, match=r"'topic' has no single value for 2 clients such as 'c0'.*family, language"):
        mira(cohort(2, family="xy"), graph={"kind": "groups", "column": "topic"})


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"graph": {"kind": "groups"}}, "needs 'column'"),
        ({"graph": {"kind": "file"}}, "needs 'path'"),
        ({"graph": {"kind": "ring"}}, "graph.kind"),
        ({"lambda": -0.1}, "lambda"),
        ({"eta": -1}, "eta"),
        ({"normalise": "column"}, "normalise"),
        ({"neighbour": "stored"}, "neighbours"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        mira(cohort(2), **settings)


def test_yaml_lambda_is_python_lam() -> None:
    from fedmira.methods.mira import Config

    assert Config.model_validate({"lambda": 0.3}).lam == Config(lam=0.3).lam == 0.3
