"""What a seed decides is the same on every Python: no compensated sum, no hash, no order of a set."""

import ast
import builtins
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedmira
from fedmira.adapters import lora_layout, start_adapters
from fedmira.adapters.ranks import client_ranks
from fedmira.bundled.languages import make_tasks
from fedmira.data import partitioners
from fedmira.data.batches import local_batches
from fedmira.data.partition import client_key, form_clients
from fedmira.data.partitioners import dirichlet
from fedmira.data.records import Record
from fedmira.engine.schedule import draw_schedule
from fedmira.graphs.graph import random_graph

ROOT = Path(fedmira.__file__).parent
GOLDEN = json.loads((Path(__file__).parent / "flwr_partitions.json").read_text(encoding="utf-8"))
# Splits, schedules, batches, ranks, graphs, the bundled tasks: where a number drawn or added decides who gets what.
SEEDED = (
    *("data/partition.py", "data/partitioners.py", "data/batches.py", "engine/schedule.py", "adapters/ranks.py"),
    *("graphs/graph.py", "graphs/learned.py", "graphs/settings.py", "graphs/step.py", "bundled/languages.py"),
    *("engine/phase.py", "engine/trainees.py", "data/splits.py"),
)
# Calls of `sum` there: all of whole numbers, which no Python rounds.
WHOLE = {
    *("sum(partition_sizes)", "sum(map(len, parts))", "sum(sizes)", "sum(map(len, classes))"),
    *("sum((stop - start for start, stop in self.labelled))", "sum((example.labels for example in self.train))"),
    *("sum((int(batch.lengths.sum()) for batch in batches))", "sum((piece.tokens for piece in pieces))"),
    "sum((piece.scored for piece in pieces))",
    *("sum((len(example.ids) for example in self.train))", "sum((len(part.leaves) // 2 for part in layout.parts))"),
}


def read(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def calls(name: str) -> Iterator[tuple[str, str]]:
    """(file, source) of every call of a built-in function in the modules where a seed decides."""
    for file in SEEDED:
        for node in ast.walk(read(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield file, ast.unparse(node)


def test_sums_where_a_seed_decides_are_of_whole_numbers() -> None:
    assert {call for call in calls("sum") if call[1] not in WHOLE} == set()


@pytest.mark.parametrize("name", ["hash", "id"])
def test_nothing_a_seed_decides_comes_from_an_address_or_a_hash(name: str) -> None:
    assert list(calls(name)) == []


def test_no_seeded_module_uses_the_generator_of_the_standard_library() -> None:
    for file in SEEDED:
        imports = (node for node in ast.walk(read(file)) if isinstance(node, ast.Import))
        assert "random" not in [name.name for node in imports for name in node.names], file


def test_no_seeded_module_goes_through_a_set_in_its_order() -> None:
    looped = []
    for file in SEEDED:
        for node in ast.walk(read(file)):
            if isinstance(node, ast.For | ast.comprehension):
                called = isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) in ("set", "frozenset")
                if called or isinstance(node.iter, ast.Set | ast.SetComp):
                    looped.append((file, ast.unparse(node.iter)))
    assert looped == []


def other_sum(numbers: object, start: float = 0) -> float:
    """`sum` as Python 3.12 and later have it: floats are added without rounding on the way."""
    values = list(numbers)  # type: ignore[call-overload]
    floats = any(isinstance(value, float) for value in values)
    return math.fsum(values) + start if floats else builtins.sum(values, start)


def test_the_recorded_draws_of_flwr_do_not_depend_on_how_python_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitioners, "sum", other_sum, raising=False)
    labels = [GOLDEN["classes"][place] for place in GOLDEN["labels"]]
    cases = [case for case in GOLDEN["cases"] if case["partitioner"] == "dirichlet"]
    assert len(cases) > 3
    for case in cases:
        parts = dirichlet(labels, **case["parameters"])
        assert [part.tolist() for part in parts] == case["parts"]


@given(st.lists(st.floats(0, 1, width=64), max_size=40))
def test_numbers_are_added_from_the_first_to_the_last(numbers: list[float]) -> None:
    assert partitioners._add(numbers) == (np.add.accumulate(numbers)[-1] if numbers else 0)


def test_ten_tenths_are_less_than_one_on_every_python() -> None:
    assert partitioners._add([0.1] * 10) == 0.9999999999999999


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def recorded() -> dict[str, str]:
    """What seeds decide; recorded on Python 3.11.7 with numpy 2.4 and torch 2.13."""
    labels = [f"c{place % 7}" for place in range(400)]
    balanced = dirichlet(labels, num_partitions=9, alpha=0.3, self_balancing=True, seed=11)
    draws = {"num_partitions": 9, "alpha": 0.3}
    ids = [f"client {place}" for place in range(50)]
    ranks = client_ranks(
        "heavy-tail-light",
        usual=8,
        ids=ids,
        columns=[{}] * 50,
        keys=[client_key(name) for name in ids],
        seed=3,
        modules=lambda: ["attn", "mlp"],
    )
    records = [Record(f"q{k}", "", (f"a{k}",), {"task": f"t{k % 3}"}, f"data:{k}") for k in range(90)]
    clients = form_clients(records, per_group=3, subsample=0.5, validation=0.2, test=0.2, seed=5)
    splits = [
        [one.id, *([record.instruction for record in part] for part in (one.train, one.validation, one.test))]
        for one in clients
    ]
    batches = local_batches(50, seed=1, round=2, key=client_key("a"), batch_size=8, steps=None, epochs=2)
    start = start_adapters(
        lora_layout([("m", 6, 4)], 2), torch.tensor([2]), 2.0, torch.Generator().manual_seed(6)
    ).rows.tolist()
    schedule = draw_schedule(40, rounds=5, participation=0.3, seed=2)
    return {
        "balanced": digest([part.tolist() for part in balanced]),
        "free": digest([part.tolist() for part in dirichlet(labels, self_balancing=False, seed=11, **draws)]),
        "schedule": digest([ids.tolist() for ids in schedule]),
        "graph": random_graph(30, seed=4).fingerprint[:16],
        "tasks": digest(make_tasks(5)),
        "ranks": digest(ranks.tolist()),
        "splits": digest(splits),
        "batches": digest([batch.tolist() for batch in batches]),
        "start": digest(start),
    }


def test_seeds_decide_what_they_decided_when_this_was_recorded() -> None:
    assert recorded() == RECORDED


RECORDED = {
    "balanced": "1524c40612bd4944",
    "free": "40a7b4289420e31c",
    "schedule": "e5c5cdf33bc4b287",
    "graph": "6973e659659ba78c",
    "tasks": "718ebc742ba3c974",
    "ranks": "8d24a5e0a5d12e55",
    "splits": "332261d5ac16c880",
    "batches": "615bc76f8822ace6",
    "start": "8cf014d03e8f5fb6",
}
