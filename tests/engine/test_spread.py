"""What an order is made of and what an actor does with it, here without Ray; tests/study/test_ray.py has the actors."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.house import house, run
from tests.laws.variants import VARIANTS, Variant
from tests.laws.worlds import WORLDS

from fedmira.data.batches import ClientData
from fedmira.engine.cost import plan_cohort
from fedmira.engine.phase import cut_into_passes
from fedmira.engine.spread.actor import Failed, ScoreOrder, Trainer, TrainOrder, thin, whole
from fedmira.engine.spread.crew import _put_together, _taken_apart, blocks_of
from fedmira.engine.spread.passes import Spread
from fedmira.errors import ConfigError, ModelError, WireError
from fedmira.methods import build

cloudpickle = pytest.importorskip("ray.cloudpickle")  # which sends functions too, by their code


class Store(dict[int, Any]):
    """What Ray's store does: a value by its reference, as another process would read it."""

    def put(self, value: Any) -> int:
        self[len(self)] = cloudpickle.dumps(value)
        return len(self) - 1

    def get(self, reference: int) -> Any:
        return pickle.loads(self[reference])  # noqa: S301 - written above


class Here:
    """One actor, here: what it is sent goes through pickle as it would on its way."""

    def __init__(self, clients: Sequence[ClientData], base: Any) -> None:
        self.store = Store()
        self.trainer = Trainer(lambda: base, blocks_of(clients, self.store.put), threads=1, fetch=self.store.get)
        self.trainer.ready()
        self.orders: list[TrainOrder | ScoreOrder] = []

    class post:
        workers = 2

    def put(self, value: Any, make: Any) -> int:
        return self.store.put(make())

    def carry_out(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for number in reversed(range(len(tasks))):  # in any order
            order = self.store.get(self.store.put(tasks[number].build()))
            self.orders.append(order)
            answer = getattr(self.trainer, tasks[number].what)(order)
            if isinstance(answer, Failed):
                raise answer.error()
            yield number, answer


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_an_actor_gets_of_a_method_holds_nothing_about_the_federation(variant: Variant, tmp_path: Path) -> None:
    world = WORLDS["quadratic"]()
    sent = cloudpickle.dumps(variant.build(world, tmp_path))
    for word in (b"Cohort", b"Graph", b"Profiles"):
        assert word not in sent
    assert len(sent) < 100_000


def test_rows_that_are_all_alike_travel_once() -> None:
    rows = torch.randn(1, 5).expand(3, -1)
    assert thin(rows).shape == (1, 5)
    assert torch.equal(whole(thin(rows), 3), rows)


def test_rows_that_differ_in_the_sign_of_a_zero_are_not_alike() -> None:
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0]])
    assert len(thin(rows)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_tensor_is_put_together_as_it_was_without_what_is_behind_a_view(dtype: torch.dtype) -> None:
    values = torch.arange(24).reshape(4, 6).to(dtype)
    for part in (values, values[1:3], values[:, ::2].T, values[0, 0], values[:0]):
        numbers, *rest = _taken_apart(part)
        assert numbers.nbytes == part.numel() * part.element_size()
        back = _put_together((numbers, *rest))
        assert back.dtype == dtype
        assert torch.equal(back, part)
        back.zero_()  # it can be written


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 3))
def test_who_shares_a_pass_is_the_same_where_several_are_given_at_once(
    steps: list[int], cohort: int, width: int
) -> None:
    order = sorted(range(len(steps)), key=lambda k: -steps[k])
    one_by_one = [order[first : first + cohort] for first in range(0, len(order), cohort)]
    together = []
    for first in range(0, len(order), cohort * width):
        some = order[first : first + cohort * width]
        plans = [[None] * steps[k] for k in some]
        together += [[some[n] for n in chosen] for chosen in cut_into_passes(plans, cohort)]  # type: ignore[arg-type]
    assert together == one_by_one


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(["one", "two"], "a file"),
        WireError("norm", "too long"),
        ModelError("no such base"),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
)
def test_an_error_in_an_actor_is_the_same_error_here(error: Exception) -> None:
    store = Store()
    failed = store.get(store.put(Failed.of(error)))
    found = failed.error()
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
    assert getattr(found, "errno", None) == getattr(error, "errno", None)


def test_an_error_that_cannot_travel_keeps_its_name() -> None:
    class Odd(Exception):
        pass

    assert str(Failed.of(Odd(object())).error()) == "Odd"


METHODS: list[tuple[str, dict[str, Any]]] = [  # the first five are quick
    ("ditto", {}),  # memory
    ("feddpa", {"weights": "uniform"}),  # a gate
    ("fedptuning", {}),  # virtual tokens
    ("fedex_lora", {}),  # adds to the base
    ("flora", {}),
    ("fedavg_ft", {"steps": 1}),
    ("hetlora", {}),
    ("scaffold", {}),
    ("fedsophia", {"tau": 2}),
    ("pooled", {}),
    ("fedavg", {"with": [{"name": "only", "travels": "A"}]}),
]


@pytest.mark.parametrize(
    ("name", "settings"),
    [pytest.param(*case, id=case[0], marks=[pytest.mark.slow] * (number >= 5)) for number, case in enumerate(METHODS)],
)
def test_orders_give_the_bits_of_the_same_passes_in_this_process(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    of = house(cohort=2, metrics=["loss", "exact_match"], evaluation={"max_new_tokens": 2}, keep_optimizer=True)
    method = build(name, settings, of.cohort())
    crew = Here(of.clients, of.workplace.base)
    there = replace(of, workplace=replace(of.workplace, executor=Spread(crew)))  # type: ignore[arg-type]
    found = [run(where, method, tmp_path / str(n)) for n, where in enumerate((of, there))]
    assert {type(order) for order in crew.orders} == ({ScoreOrder} if name == "pooled" else {ScoreOrder, TrainOrder})
    assert torch.equal(found[0].rows, found[1].rows)
    assert found[0].results == found[1].results
    records = [[{k: v for k, v in one.items() if "seconds" not in k} for one in ran.records] for ran in found]
    assert records[0] == records[1]


def test_what_many_clients_are_sent_alike_travels_once_for_a_pass(tmp_path: Path) -> None:
    of = house(ranks=(2, 2, 2, 2), cohort=2)
    crew = Here(of.clients, of.workplace.base)
    there = replace(of, workplace=replace(of.workplace, executor=Spread(crew)))  # type: ignore[arg-type]
    run(there, build("fedavg", {}, of.cohort()), tmp_path / "run")
    sent = [order.start.rows for order in crew.orders if isinstance(order, TrainOrder)]
    assert {len(rows) for rows in sent} == {1}


def test_an_actor_keeps_as_much_data_as_it_may_and_fetches_the_rest_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmira.engine.spread.crew.BLOCK_TOKENS", 1)  # a client each
    monkeypatch.setattr("fedmira.engine.spread.actor.KEPT_TOKENS", 1)
    of = house()
    trainer = Here(of.clients, of.workplace.base).trainer
    assert [trainer._client(k) for k in (2, 0, 3, 0)] == [of.clients[k] for k in (2, 0, 3, 0)]
    assert len(trainer.data) == 1


def test_actors_on_cpus_share_the_memory_that_is_free() -> None:
    of = house()

    def room(actors: int) -> int:
        return plan_cohort(of.workplace.base, of.layout, of.clients, batch_size=2, sampled=4, actors=actors).bytes_free

    assert room(4) < room(1) / 3
