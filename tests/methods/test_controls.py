"""The controls in numbers worked by hand: untouched, pooled, fedavg_ft and groupavg."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout
from fedmira.engine.federation import Federation
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Cohort, Message, Method, State

LAYOUT = lora_layout([("m", 1, 1)], 1)
FIRST = Clock(1)


def cohort(families: str = "xyxyxy") -> Cohort:
    """One client for each letter, called c0, c1, ..., of that family; all speak English."""
    return Cohort(
        tuple(f"c{k}" for k in range(len(families))),
        (1,) * len(families),
        tuple({"family": family, "language": "en"} for family in families),
        (np.arange(len(families)),),
        seed=0,
    )


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, LAYOUT.size)


def holding(*values: float) -> State:
    ones = torch.ones(len(values))
    return State(Adapters(LAYOUT, rows(*values), ones.long(), ones))


def merge(
    method: Method, uploads: tuple[float, ...], *, ids: tuple[int, ...], weights: tuple[float, ...], stored: State
) -> Change:
    return method.merge(
        stored, torch.tensor(ids), Message(rows(*uploads)), torch.tensor(weights, dtype=torch.float64), FIRST
    )


def first(values: Tensor) -> list[float]:
    assert torch.equal(values, values[:, :1].expand_as(values))
    return values[:, 0].tolist()


def groupavg(of: Cohort, **settings: Any) -> Method:
    return build("groupavg", {"column": "family", **settings}, of)


# ---------------------------------------------------------------- groupavg


def test_each_group_gets_the_mean_of_its_own_uploads() -> None:
    """x: (0 + 3 + 6) / 3; y: (10 + 20 + 60) / 3."""
    change = merge(
        groupavg(cohort(), weights="uniform"),
        (0, 10, 3, 20, 6, 60),
        ids=(0, 1, 2, 3, 4, 5),
        weights=(9, 1, 1, 1, 1, 1),
        stored=holding(-1, -2),
    )
    assert change.ids.tolist() == [0, 1]
    assert first(change.rows) == pytest.approx([3, 30])
    assert dict(change.notes) == {"groups": 2}


def test_clients_count_by_their_examples_within_their_group() -> None:
    """x: (3 x 0 + 1 x 8) / 4; y: 5 alone, however many examples the others have."""
    change = merge(groupavg(cohort()), (0, 5, 8), ids=(0, 1, 2), weights=(3, 2, 1), stored=holding(-1, -2))
    assert first(change.rows) == pytest.approx([2, 5])


def test_a_group_with_nobody_in_the_round_keeps_its_row() -> None:
    method, state = groupavg(cohort()), holding(-1, -2)
    change = merge(method, (4, 6), ids=(1, 3), weights=(1, 1), stored=state)
    assert change.ids.tolist() == [1]
    assert first(change.rows) == [5]


def test_rows_of_groups_are_in_the_order_of_their_names_and_not_of_the_clients() -> None:
    """Clients 0 and 2 are z, client 1 is a: row 0 is a's."""
    method = groupavg(cohort("zaz"))
    assert first(method.message(holding(-1, -2), torch.arange(3), FIRST).rows) == [-2, -1, -2]
    assert first(method.message(holding(-1, -2), torch.tensor([1, 0]), FIRST).rows) == [-1, -2]
    assert method.count_rows(3) == 2


def test_every_group_begins_with_the_common_start() -> None:
    method, of = groupavg(cohort("abcb")), Federation(tuple("abcd"), LAYOUT, torch.ones(4, dtype=torch.int64), 1.0)
    stored = of.first_state(0, method).adapters
    everyone = torch.arange(3)
    row = of.start_rows(0)[0]
    assert torch.equal(stored.rows[everyone], row.expand(3, -1))
    table: Any = stored.rows
    table.write(everyone[:1], 0 * row)  # a row of its own
    assert torch.equal(stored.rows[everyone], torch.cat([0 * row, row, row]))


@pytest.mark.filterwarnings("ignore:mira")
@pytest.mark.parametrize(("families", "size"), [("xyxyxy", 3), ("aabbccdd", 2), ("xxxx", 4)])
def test_with_everyone_present_it_is_mira_on_cliques_with_a_coupling_of_one_over_n(families: str, size: int) -> None:
    of = cohort(families)
    uploads = tuple(float(k * k - 3) for k in range(len(families)))
    everyone, ones = tuple(range(len(families))), (1.0,) * len(families)
    graph = {"kind": "groups", "column": "family"}
    mira = build("mira", {"normalise": "none", "lambda": 1 / size, "graph": graph}, of)
    pulled = merge(mira, uploads, ids=everyone, weights=ones, stored=holding(*uploads))
    method = groupavg(of, weights="uniform")
    change = merge(method, uploads, ids=everyone, weights=ones, stored=holding(*range(len(set(families)))))
    averaged = State(holding(*first(change.rows)).adapters)
    assert first(method.message(averaged, torch.tensor(everyone), FIRST).rows) == pytest.approx(first(pulled.rows))


def test_groups_of_one_keep_what_they_upload() -> None:
    change = merge(groupavg(cohort("abc")), (4, 5, 6), ids=(0, 1, 2), weights=(1, 2, 3), stored=holding(0, 0, 0))
    assert first(change.rows) == [4, 5, 6]


def test_its_graph_joins_the_clients_of_a_group() -> None:
    graph = groupavg(cohort("xyx")).facts.graph
    assert graph is not None
    assert graph.weights.toarray().tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert build("groupavg", {}, cohort()).facts.graph is None


def test_weights_of_a_round_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(MethodError, match="sum to 0"):
        merge(groupavg(cohort()), (0, 4), ids=(0, 1), weights=(0, 0), stored=holding(0, 0))


def test_a_column_that_no_client_has_is_refused_with_those_that_all_have() -> None:
    with pytest.raises(MethodError, match=r"'topic' has no single value for 6 clients such as 'c0'.*family, language"):
        groupavg(cohort(), column="topic")


# ---------------------------------------------------------------- fedavg_ft


@pytest.mark.parametrize(("weights", "mean"), [("examples", 3), ("uniform", 2)])
def test_rounds_before_fine_tuning_average_as_fedavg_does(weights: str, mean: float) -> None:
    method = build("fedavg_ft", {"weights": weights}, cohort())
    change = merge(method, (0, 4), ids=(0, 1), weights=(1, 3), stored=holding(7))
    assert change.ids.tolist() == [0]
    assert first(change.rows) == [mean]
    assert method.facts.weighs == (weights == "examples")


def test_a_mean_of_no_weight_is_refused() -> None:
    with pytest.raises(MethodError, match="weights of 2 clients sum to 0"):
        merge(build("fedavg_ft", {}, cohort()), (0, 4), ids=(0, 1), weights=(0, 0), stored=holding(7))


@pytest.mark.parametrize(
    ("settings", "tune"),
    [({}, ("epochs", 1)), ({"epochs": 3}, ("epochs", 3)), ({"steps": 20}, ("steps", 20))],
)
def test_everyone_fine_tunes_for_steps_or_passes_or_one_pass(settings: dict[str, int], tune: tuple[str, int]) -> None:
    assert build("fedavg_ft", settings, cohort()).regime.tune == tune


@pytest.mark.parametrize(
    ("settings", "fault"),
    [({"steps": 5, "epochs": 1}, "steps: 5 and epochs: 1"), ({"steps": 0}, "steps"), ({"epochs": 0}, "epochs")],
)
def test_a_length_that_makes_no_sense_is_refused(settings: dict[str, int], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        build("fedavg_ft", settings, cohort())


# ---------------------------------------------------------------- untouched, pooled


def test_the_untouched_base_takes_nothing_over_whatever_comes_back() -> None:
    method = build("untouched", {}, cohort())
    change = merge(method, (3, 4), ids=(0, 1), weights=(1, 1), stored=holding(7))
    assert (change.ids.tolist(), change.rows.shape) == ([], (0, LAYOUT.size))
    assert first(method.message(holding(7), torch.tensor([4, 0]), FIRST).rows) == [7, 7]
    assert method.regime.trainees == "nobody"


def test_the_pool_keeps_what_it_trains_and_the_server_has_nothing_of_it() -> None:
    method = build("pooled", {}, cohort())
    change = merge(method, (3,), ids=(0,), weights=(60,), stored=holding(7))
    assert (change.ids.tolist(), change.rows.shape) == ([], (0, LAYOUT.size))
    assert first(method.message(holding(7), torch.tensor([2, 5]), FIRST).rows) == [7, 7]
    assert method.regime.trainees == "pool"
    assert method.count_rows(6) == 1


def test_the_pool_takes_its_clients_steps_unless_told_how_many() -> None:
    assert build("pooled", {}, cohort()).regime.pool_steps is None
    assert build("pooled", {"steps": 12}, cohort()).regime.pool_steps == 12
    with pytest.raises(ConfigError, match="steps"):
        build("pooled", {"steps": 0}, cohort())


def test_only_what_is_federated_sends_adapters() -> None:
    names = ("untouched", "pooled", "local", "fedavg_ft", "groupavg")
    silent = {name: build(name, {}, cohort()).sends_nothing for name in names}
    assert silent == {"untouched": True, "pooled": True, "local": True, "fedavg_ft": False, "groupavg": False}
