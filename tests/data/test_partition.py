"""Forming clients: who gets which example, under which id, and that nobody else changes it."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.data.formats import Record
from fedmira.data.partition import Client, client_ids, client_key, form_clients
from fedmira.errors import DataError

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def record(number: int, **columns: str) -> Record:
    return Record(f"ask {number}", f"given {number}", (f"answer {number}",), columns, f"data.jsonl:{number}")


def task(name: str, count: int, **columns: str) -> list[Record]:
    return [record(number, task=name, **columns) for number in range(count)]


def held(client: Client) -> list[Record]:
    return [*client.train, *client.validation, *client.test]


def sizes(client: Client) -> tuple[int, int, int]:
    return len(client.train), len(client.validation), len(client.test)


def fault(records: Sequence[Record], **options: object) -> str:
    with pytest.raises(DataError) as caught:
        form_clients(records, **{"by": "task", **options})  # type: ignore[arg-type]
    return str(caught.value)


# ---------------------------------------------------------------- who is a client


def test_the_key_of_a_client_is_the_first_64_bits_of_its_hash() -> None:
    assert client_key("task1") == int(hashlib.sha256(b"task1").hexdigest()[:16], 16)


def test_clients_are_in_order_of_first_appearance_of_their_values() -> None:
    records = [record(0, task="b"), record(1, task="a"), record(2, task="b")]
    assert [client.name for client in form_clients(records, by="task")] == ["b", "a"]


def test_first_keeps_the_first_values() -> None:
    records = [*task("c", 2), *task("a", 2), *task("b", 2), *task("c", 2)]
    assert [(c.name, len(held(c))) for c in form_clients(records, by="task", first=2)] == [("c", 4), ("a", 2)]


def test_first_counts_values_before_they_are_dealt() -> None:
    records = [*task("a", 4), *task("b", 4)]
    assert [c.name for c in form_clients(records, by="task", first=1, per_group=2)] == ["a-0", "a-1"]


def test_dealing_gives_every_example_to_one_client_as_evenly_as_possible() -> None:
    records = task("a", 10)
    clients = form_clients(records, by="task", per_group=3)
    assert [client.name for client in clients] == ["a-0", "a-1", "a-2"]
    assert [len(held(client)) for client in clients] == [4, 3, 3]
    assert sorted(r.source for c in clients for r in held(c)) == sorted(r.source for r in records)


def test_dealing_is_at_random_and_not_in_slices() -> None:
    first, _ = form_clients(task("a", 40), by="task", per_group=2)
    assert {r.source for r in held(first)} != {f"data.jsonl:{number}" for number in range(20)}


def test_clients_dealt_from_one_value_share_its_group() -> None:
    assert [c.group for c in form_clients(task("a", 4), by="task", per_group=2)] == ["a", "a"]


def test_the_group_is_the_value_itself_or_that_of_another_column() -> None:
    records = [*task("a", 2, family="x"), *task("b", 2, family="x")]
    assert [c.group for c in form_clients(records, by="task")] == ["a", "b"]
    assert [c.group for c in form_clients(records, by="task", groups="family")] == ["x", "x"]


def test_a_client_without_a_group_in_the_data_has_none() -> None:
    clients = form_clients([*task("a", 2), *task("b", 1, family="x")], by="task", groups="family")
    assert [client.group for client in clients] == [None, "x"]


def test_a_group_is_the_same_with_and_without_spaces_around_it() -> None:
    records = [record(0, task="a", family="x"), record(1, task="a", family=" x ")]
    assert [client.group for client in form_clients(records, by="task", groups="family")] == ["x"]


def test_training_records_are_counted_by_value_and_blank_ones_are_not() -> None:
    records = [record(number, task="a", n=value) for number, value in enumerate(("1", "2", "2", "", " "))]
    [client] = form_clients(records, by="task", validation=0.0, test=0.0)
    assert client.counts["n"] == {"1": 1, "2": 2}


def test_a_client_carries_the_columns_that_are_constant_in_it() -> None:
    records = [record(0, task="a", kind="x", n="1"), record(1, task="a", kind="x", n="2")]
    assert form_clients(records, by="task")[0].columns == {"task": "a", "kind": "x"}


def test_a_client_carries_no_column_that_is_blank_in_it() -> None:
    records = [record(number, task="a", kind=" ", n="") for number in range(2)]
    assert form_clients(records, by="task")[0].columns == {"task": "a"}


def test_a_client_of_one_example_does_not_carry_its_text_as_a_column() -> None:
    records = [
        Record(
            f"ask {n}", "", (f"answer {n}",), {"task": str(n), "prompt": f"ask {n}", "completion": f"answer {n}"}, "f:1"
        )
        for n in range(3)
    ]
    assert [c.columns for c in form_clients(records, by="task")] == [{"task": "0"}, {"task": "1"}, {"task": "2"}]


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("count", "validation", "test", "expected"),
    [
        (120, 0.1, 0.1, (96, 12, 12)),
        (10, 0.1, 0.1, (8, 1, 1)),
        (4, 0.1, 0.1, (4, 0, 0)),
        (1, 0.1, 0.1, (1, 0, 0)),
        (1, 0.4, 0.5, (1, 0, 0)),
        (2, 0.4, 0.5, (1, 0, 1)),
        (2, 0.3, 0.6, (1, 0, 1)),
        (3, 0.45, 0.5, (1, 0, 2)),
        (10, 0.0, 0.2, (8, 0, 2)),
        (10, 0.0, 0.0, (10, 0, 0)),
    ],
)
def test_the_splits_have_the_rounded_sizes_and_leave_one_example_to_train_on(
    count: int, validation: float, test: float, expected: tuple[int, int, int]
) -> None:
    [client] = form_clients(task("a", count), by="task", validation=validation, test=test)
    assert sizes(client) == expected


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    validation=st.floats(0, 0.49),
    test=st.floats(0, 0.49),
    seed=st.integers(0, 2**40),
)
def test_every_example_is_in_exactly_one_split_of_one_client(
    counts: list[int], validation: float, test: float, seed: int
) -> None:
    records = [
        Record("", "", ("x",), {"task": f"t{value}"}, f"{value}/{number}")
        for value, count in enumerate(counts)
        for number in range(count)
    ]
    clients = form_clients(records, by="task", validation=validation, test=test, seed=seed)
    assert Counter(r.source for c in clients for r in held(c)) == Counter(r.source for r in records)
    assert all(client.train for client in clients)


def test_the_test_examples_stay_when_the_validation_fraction_changes() -> None:
    one, other = (form_clients(task("a", 50), by="task", validation=v)[0] for v in (0.0, 0.3))
    assert one.test == other.test


def test_a_column_can_say_the_split() -> None:
    records = [record(n, task="a", part=part) for n, part in enumerate(["test", "train", "validation", "train"])]
    [client] = form_clients(records, by="task", split_column="part")
    assert [r.source[-1] for r in held(client)] == ["1", "3", "2", "0"]


def test_subsampling_keeps_the_fraction_and_at_least_one() -> None:
    big, small = form_clients([*task("big", 100), *task("small", 2)], by="task", subsample=0.2)
    assert sizes(big) == (16, 2, 2)
    assert sizes(small) == (1, 0, 0)


def test_subsampling_thins_each_split_that_a_column_gives() -> None:
    records = [record(n, task="a", part="test" if n < 6 else "train") for n in range(10)]
    [client] = form_clients(records, by="task", split_column="part", subsample=0.5)
    assert sizes(client) == (2, 0, 3)


# ---------------------------------------------------------------- the same for everyone, whoever else is there


def test_the_same_seed_gives_the_same_clients_and_another_seed_others() -> None:
    same, again, other = (form_clients(task("a", 40), by="task", seed=seed) for seed in (3, 3, 4))
    assert same == again
    assert same != other


def test_the_draws_are_those_of_the_documented_stream() -> None:
    [client] = form_clients(task("a", 10), by="task", validation=0.0, test=0.2, seed=5)
    order = np.random.default_rng([5, client_key("a"), 2]).permutation(10)
    assert [r.source for r in client.test] == [f"data.jsonl:{number}" for number in sorted(order[:2])]


def test_subsampling_draws_from_another_documented_stream() -> None:
    [client] = form_clients(task("a", 10), by="task", validation=0.0, test=0.0, subsample=0.4, seed=5)
    order = np.random.default_rng([5, client_key("a"), 1]).permutation(10)
    assert [r.source for r in client.train] == [f"data.jsonl:{number}" for number in sorted(order[:4])]


@pytest.mark.parametrize("options", [{}, {"per_group": 3}, {"subsample": 0.5}])
def test_other_clients_change_nothing_for_a_client(options: dict[str, float]) -> None:
    own, other = task("a", 20), task("b", 20)
    renamed = task("z", 20)
    clients = [
        {client.name: client for client in form_clients(records, by="task", **options)}  # type: ignore[arg-type]
        for records in ([*own, *other], [*other, *own], [*renamed, *own], own)
    ]
    names = [name for name in clients[0] if name.startswith("a")]
    assert all(other[name] == clients[0][name] for other in clients for name in names)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("name", ["task1", "007", "no", "A_b-c", "a" * 64, "0"])
def test_a_name_that_is_a_valid_id_is_kept(name: str) -> None:
    assert client_ids([name]) == {name: name}


def test_another_name_becomes_a_slug_with_eight_digits_of_its_hash() -> None:
    digest = hashlib.sha256("Q & A: é".encode()).hexdigest()
    assert client_ids(["Q & A: é"]) == {"Q & A: é": "Q---A---" + "-" + digest[:8]}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../../etc/passwd",
        "/abs",
        "-x",
        "_x",
        "CON",
        "nul",
        "Com1",
        "LPT9",
        "a" * 65,
        "é",
        "名",
        "a\0b",
        "a b",
    ],
)
def test_a_name_that_is_not_a_safe_folder_name_gets_a_safe_id(name: str) -> None:
    id = client_ids([name])[name]
    assert ID.fullmatch(id)
    assert id != name
    assert id.lower() not in {"con", "nul", "com1", "lpt9"}


def test_names_that_differ_only_in_case_all_get_their_hash() -> None:
    ids = client_ids(["Ab", "aB", "c"])
    assert ids["c"] == "c"
    assert ids["Ab"] == "Ab-" + hashlib.sha256(b"Ab").hexdigest()[:8]
    assert ids["aB"] == "aB-" + hashlib.sha256(b"aB").hexdigest()[:8]


def test_a_name_that_looks_like_the_id_of_another_gets_a_different_id() -> None:
    taken = client_ids(["a b"])["a b"]
    ids = client_ids(["a b", taken])
    assert len({id.lower() for id in ids.values()}) == 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=6), st.text("aAbB-_.é ", max_size=3), st.text(max_size=90)), unique=True))
def test_ids_are_safe_unique_without_case_and_independent_of_order(names: list[str]) -> None:
    ids = client_ids(names)
    assert all(ID.fullmatch(id) for id in ids.values())
    assert len({id.lower() for id in ids.values()}) == len(names)
    assert client_ids(names[::-1]) == ids


# ---------------------------------------------------------------- faults


def test_an_unknown_column_suggests_the_nearest_and_lists_all() -> None:
    message = fault(task("a", 2, kind="x"), by="tsak")
    assert "data.clients.by: no column 'tsak' (did you mean 'task'?); found: task, kind" in message
    assert "data.clients.groups: no column 'kid'" in fault(task("a", 2, kind="x"), groups="kid")
    assert "data.split_column: no column 'part'" in fault(task("a", 2), split_column="part")


@pytest.mark.parametrize("columns", [{}, {"task": ""}, {"task": " "}])
def test_a_record_without_a_value_is_named(columns: dict[str, str]) -> None:
    message = fault([*task("a", 2), record(7, **columns)])
    assert "1 of 3 records have no 'task': data.jsonl:7" in message


def test_a_group_that_is_not_constant_names_the_client() -> None:
    message = fault([record(0, task="a", kind="x"), record(1, task="a", kind="y")], groups="kind")
    assert "client 'a': found 2 values in 'kind'" in message


def test_a_group_that_only_some_records_have_names_the_client() -> None:
    records = [record(0, task="a", kind="x"), record(1, task="a")]
    assert "client 'a': found a value in some records only in 'kind'" in fault(records, groups="kind")


def test_a_client_without_a_training_example_is_named() -> None:
    records = [*task("a", 1, part="train"), *task("b", 2, part="test")]
    assert "client 'b': none of its 2 records is for training" in fault(records, split_column="part")


def test_more_clients_than_examples_name_the_first_empty_one() -> None:
    assert "client 'a-2': no record is left for it: 'a' has 2; lower data.clients.per_group" in fault(
        task("a", 2), per_group=3
    )


def test_an_unknown_split_names_the_records_but_not_the_value() -> None:
    message = fault([record(3, task="a", part="secret")], split_column="part")
    assert "client 'a': 1 records have a 'part' other than train, validation, test" in message
    assert "data.jsonl:3" in message
    assert "secret" not in message


def test_an_empty_list_of_records_is_refused() -> None:
    assert "no records" in fault([])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"per_group": 0}, "clients.per_group = 0"),
        ({"first": 0}, "clients.first = 0"),
        ({"subsample": 0.0}, "subsample = 0.0"),
        ({"subsample": 1.5}, "subsample = 1.5"),
        ({"subsample": float("nan")}, "subsample = nan"),
        ({"validation": -0.1}, "validation -0.1"),
        ({"test": float("nan")}, "test nan"),
        ({"validation": 0.5, "test": 0.5}, "validation 0.5 + test 0.5"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], named: str) -> None:
    assert named in fault(task("a", 2), **options)
