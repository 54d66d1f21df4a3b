"""Partitioners: the parts that flwr-datasets makes, every example in one part at most, and nothing from a hidden state.

`flwr_partitions.json` holds what flwr-datasets 0.6.1 made; its note says how. Every case is compared index by index and
in order: the draws are the same. The two part only where flwr-datasets divides by zero (see the test on zero shares) or
lets pass what makes no sense, such as more iid parts than examples.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedmira.data import partitioners
from fedmira.data.partitioners import dirichlet, draw_order, exponential, iid, linear, pathological, shard, size, square
from fedmira.errors import DataError

GOLDEN = json.loads((Path(__file__).parent / "flwr_partitions.json").read_text(encoding="utf-8"))
LABELS = [GOLDEN["classes"][place] for place in GOLDEN["labels"]]
BY_LABEL = ("dirichlet", "pathological", "shard")
ABC = ["c", "a", "b", "a", "c", "a"]  # a: 1, 3, 5; b: 2; c: 0, 4

TWO = {"num_partitions": 2}

SEEDED: list[tuple[Callable[..., list[np.ndarray]], dict[str, Any]]] = [
    (dirichlet, {"num_partitions": 5, "alpha": 0.5}),
    (pathological, {"num_partitions": 6, "num_classes_per_partition": 2}),
    (pathological, {"num_partitions": 6, "num_classes_per_partition": 2, "class_assignment_mode": "deterministic"}),
    (
        pathological,
        {"num_partitions": 6, "num_classes_per_partition": 2, "class_assignment_mode": "first-deterministic"},
    ),
    (shard, {"num_partitions": 5, "num_shards_per_partition": 2}),
]


def make(case: dict[str, Any]) -> list[np.ndarray]:
    name = case["partitioner"]
    return getattr(partitioners, name)(LABELS if name in BY_LABEL else len(LABELS), **case["parameters"])


def title(case: dict[str, Any]) -> str:
    return f"{case['partitioner']}-{'-'.join(f'{key}={value}' for key, value in case['parameters'].items())}"


def lists(parts: Sequence[np.ndarray]) -> list[list[int]]:
    return [part.tolist() for part in parts]


def dealt(parts: Sequence[np.ndarray]) -> list[int]:
    return sorted(index for part in parts for index in part.tolist())


# ---------------------------------------------------------------- the parts of flwr-datasets


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=title)
def test_the_parts_are_those_of_flwr_datasets_in_the_same_order(case: dict[str, Any]) -> None:
    parts = make(case)
    assert lists(parts) == case["parts"]
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}


@pytest.mark.parametrize("case", GOLDEN["refused"], ids=title)
def test_what_flwr_datasets_refuses_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^data\.clients\.partitioner: "):
        make(case)


@pytest.mark.parametrize("seed", GOLDEN["order"])
def test_the_order_is_that_of_a_shuffled_flwr_dataset(seed: str) -> None:
    assert draw_order(50, seed=int(seed)).tolist() == GOLDEN["order"][seed]


def test_the_order_is_drawn_with_flwrs_seed_by_default() -> None:
    assert draw_order(50).tolist() == GOLDEN["order"]["42"]


# ---------------------------------------------------------------- by hand


def test_iid_parts_are_consecutive_and_the_first_ones_larger() -> None:
    assert lists(iid(8, num_partitions=3)) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_parts_of_given_sizes_leave_out_all_other_examples() -> None:
    assert lists(size(6, partition_sizes=[1, 3])) == [[0], [1, 2, 3]]


def test_sizes_grow_with_the_index_and_the_last_part_takes_the_remainder() -> None:
    assert [len(part) for part in linear(14, num_partitions=3)] == [2, 4, 8]  # 14 / 6 = 2.33 a unit
    assert [len(part) for part in square(30, num_partitions=3)] == [2, 8, 20]  # 30 / 14 = 2.14 a unit
    assert [len(part) for part in exponential(30, num_partitions=3)] == [2, 7, 21]  # 30 / 30.19 = 0.99 a unit


def test_classes_are_in_lexical_order() -> None:
    labels = ["b", "2", "a", "10", "Z"]
    parts = pathological(
        labels, num_partitions=5, num_classes_per_partition=1, class_assignment_mode="deterministic", shuffle=False
    )
    assert [labels[index] for [index] in lists(parts)] == ["10", "2", "Z", "a", "b"]


def test_labels_that_numpy_treats_as_equal_are_two_classes() -> None:
    parts = pathological(
        ["a", "a\0"], num_partitions=2, num_classes_per_partition=1, class_assignment_mode="deterministic"
    )
    assert lists(parts) == [[0], [1]]


def test_an_even_dirichlet_cuts_each_class_at_the_same_fraction() -> None:
    parts = dirichlet(["a", "b"] * 5, num_partitions=2, alpha=1e9, min_partition_size=0, shuffle=False)
    # the cut is at 2.4999 or 2.5001 of the 5 examples of a class: 2 to the first part either way
    assert lists(parts) == [[0, 2, 1, 3], [4, 6, 8, 5, 7, 9]]


def test_a_small_alpha_gives_a_part_fewer_classes_than_a_large_one() -> None:
    few, many = (
        sum(len({LABELS[index] for index in part}) for part in dirichlet(LABELS, num_partitions=5, alpha=alpha))
        for alpha in (0.1, 100.0)
    )
    assert few < 20 < many <= 35


def test_balancing_gives_nothing_more_to_a_part_above_the_average() -> None:
    # average 6: the part that takes most of the 10 "a" is above it, so every "b" goes to the other one
    labels = ["a"] * 10 + ["b"] * 2
    parts = dirichlet(
        labels, num_partitions=2, alpha=[9.0, 1.0], min_partition_size=0, self_balancing=True, shuffle=False
    )
    assert len(parts[0]) > 6
    assert {10, 11} <= set(parts[1].tolist())


def test_shares_that_balancing_turns_to_zero_are_drawn_again() -> None:
    # Each class goes to one part as a whole. Seed 1 draws part 1 for both, where flwr-datasets divides 0 by 0; and then
    # part 0 for "a" and part 1 for "b".
    whole = {"num_partitions": 2, "alpha": 1e-320, "min_partition_size": 0, "shuffle": False, "seed": 1}
    labels = ["a"] * 7 + ["b"] * 5
    assert [len(part) for part in dirichlet(labels, **whole)] == [0, 12]
    assert [len(part) for part in dirichlet(labels, self_balancing=True, **whole)] == [7, 5]


def test_pathological_examples_of_a_class_are_cut_evenly_and_in_order() -> None:
    parts = pathological(
        [*ABC, "b"], num_partitions=2, num_classes_per_partition=3, class_assignment_mode="deterministic", shuffle=False
    )
    assert lists(parts) == [[1, 3, 2, 0], [5, 6, 4]]


def test_shards_are_consecutive_examples_of_the_data_sorted_by_class() -> None:
    parts = shard(ABC, num_partitions=3, num_shards_per_partition=1, shuffle=False)
    assert sorted(lists(parts)) == [[0, 4], [1, 3], [5, 2]]  # a a | a b | c c


def test_an_incomplete_shard_is_left_out_unless_kept() -> None:
    assert dealt(shard(ABC, num_partitions=1, shard_size=4)) == [1, 2, 3, 5]
    assert dealt(shard(ABC, num_partitions=1, shard_size=4, keep_incomplete_shard=True)) == [0, 1, 2, 3, 4, 5]


def test_shards_beyond_the_needed_number_are_left_out() -> None:
    parts = shard(ABC, num_partitions=2, num_shards_per_partition=1, shard_size=2)
    assert [len(part) for part in parts] == [2, 2]


@pytest.mark.parametrize(("partitioner", "parameters"), SEEDED)
def test_shuffling_changes_the_order_within_a_part_only(
    partitioner: Callable[..., list[np.ndarray]], parameters: dict[str, Any]
) -> None:
    shuffled, sorted_by_class = (partitioner(LABELS, **parameters, shuffle=flag) for flag in (True, False))
    assert lists(shuffled) != lists(sorted_by_class)
    assert [sorted(part) for part in lists(shuffled)] == [sorted(part) for part in lists(sorted_by_class)]


# ---------------------------------------------------------------- the seed, and nothing else


@pytest.mark.parametrize(("partitioner", "parameters"), SEEDED)
def test_the_same_seed_gives_the_same_parts_and_another_seed_others(
    partitioner: Callable[..., list[np.ndarray]], parameters: dict[str, Any]
) -> None:
    same, again, other = (lists(partitioner(LABELS, **parameters, seed=seed)) for seed in (3, 3, 4))
    assert same == again
    assert same != other


@pytest.mark.parametrize(("partitioner", "parameters"), SEEDED)
def test_the_global_generators_are_neither_used_nor_changed(
    partitioner: Callable[..., list[np.ndarray]], parameters: dict[str, Any]
) -> None:
    found = []
    saved = np.random.get_state()  # noqa: NPY002 - the legacy global generator is what is looked at
    try:
        for seed in (1, 2):
            np.random.seed(seed)  # noqa: NPY002
            before = np.random.get_state()[1].tolist()  # type: ignore[union-attr]  # noqa: NPY002
            found.append(lists(partitioner(LABELS, **parameters)))
            assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr]  # noqa: NPY002
    finally:
        np.random.set_state(saved)  # noqa: NPY002
    assert found[0] == found[1]


def test_the_labels_given_are_not_changed() -> None:
    labels = list(ABC)
    shard(labels, num_partitions=2, shard_size=2)
    assert labels == ABC


# ---------------------------------------------------------------- every example once

some_labels = st.lists(st.sampled_from(["b", "a", "10", "2", "é"]), min_size=1, max_size=60)
some_seed = st.integers(0, 2**32)


@given(st.data(), st.integers(1, 200))
def test_parts_cut_in_order_hold_every_example_once(data: st.DataObject, count: int) -> None:
    num_partitions = data.draw(st.integers(1, count))
    parts = iid(count, num_partitions=num_partitions)
    assert np.concatenate(parts).tolist() == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.sampled_from([linear, square, exponential]), st.integers(1, 200), st.integers(1, 6))
def test_parts_that_grow_hold_every_example_once(
    partitioner: Callable[..., list[np.ndarray]], count: int, num_partitions: int
) -> None:
    try:
        parts = partitioner(count, num_partitions=num_partitions)
    except DataError:
        assume(False)
    assert np.concatenate(parts).tolist() == list(range(count))
    assert min(map(len, parts)) >= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 5))
def test_parts_of_given_sizes_have_them(sizes: list[int], spare: int) -> None:
    parts = size(sum(sizes) + spare, partition_sizes=sizes)
    assert [len(part) for part in parts] == sizes
    assert dealt(parts) == list(range(sum(sizes)))


@given(st.data(), some_labels, st.floats(0.05, 1e6), st.booleans(), st.booleans(), some_seed)
def test_dirichlet_parts_hold_every_example_once(
    data: st.DataObject, labels: list[str], alpha: float, balancing: bool, shuffle: bool, seed: int
) -> None:
    num_partitions = data.draw(st.integers(1, len(labels)))
    parts = dirichlet(
        labels,
        num_partitions=num_partitions,
        alpha=alpha,
        min_partition_size=0,
        self_balancing=balancing,
        shuffle=shuffle,
        seed=seed,
    )
    assert len(parts) == num_partitions
    assert dealt(parts) == list(range(len(labels)))


@given(st.integers(1, 6), some_seed)
def test_no_dirichlet_part_is_below_the_smallest_size(least: int, seed: int) -> None:
    try:
        parts = dirichlet(LABELS, num_partitions=8, alpha=0.3, min_partition_size=least, seed=seed)
    except DataError:
        assume(False)
    assert min(map(len, parts)) >= least


@given(
    st.data(),
    some_labels,
    st.sampled_from(["random", "deterministic", "first-deterministic"]),
    st.booleans(),
    some_seed,
)
def test_pathological_parts_have_their_number_of_classes_and_miss_only_classes_of_no_part(
    data: st.DataObject, labels: list[str], mode: Any, shuffle: bool, seed: int
) -> None:
    num_partitions = data.draw(st.integers(1, min(Counter(labels).values())))  # then no class can run out
    each = data.draw(st.integers(1, len(set(labels))))
    parts = pathological(
        labels,
        num_partitions=num_partitions,
        num_classes_per_partition=each,
        class_assignment_mode=mode,
        shuffle=shuffle,
        seed=seed,
    )
    assert [len({labels[index] for index in part}) for part in parts] == [each] * num_partitions
    held = {labels[index] for index in dealt(parts)}
    assert dealt(parts) == [index for index, label in enumerate(labels) if label in held]


@given(st.data(), some_labels, st.booleans(), st.booleans(), some_seed)
def test_shards_of_a_size_miss_only_the_incomplete_one(
    data: st.DataObject, labels: list[str], keep: bool, shuffle: bool, seed: int
) -> None:
    num_partitions = data.draw(st.integers(1, len(labels)))
    shard_size = data.draw(st.integers(1, len(labels) // num_partitions))
    parts = shard(
        labels,
        num_partitions=num_partitions,
        shard_size=shard_size,
        keep_incomplete_shard=keep,
        shuffle=shuffle,
        seed=seed,
    )
    found = dealt(parts)
    assert len(set(found)) == len(found) == len(labels) - (0 if keep else len(labels) % shard_size)
    assert min(map(len, parts)) >= 1


@given(st.data(), some_labels, st.booleans(), some_seed)
def test_a_number_of_shards_for_each_part_gives_no_example_twice(
    data: st.DataObject, labels: list[str], keep: bool, seed: int
) -> None:
    num_partitions = data.draw(st.integers(1, len(labels)))
    each = data.draw(st.integers(1, len(labels) // num_partitions))
    parts = shard(
        labels,
        num_partitions=num_partitions,
        num_shards_per_partition=each,
        keep_incomplete_shard=keep,
        seed=seed,
    )
    assert len(set(dealt(parts))) == len(dealt(parts))
    length = len(labels) // (num_partitions * each)
    short = [length * each - len(part) for part in parts if len(part) != length * each]
    assert short == ([length - len(labels) % length] if short and keep else [])


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("partitioner", "given_data", "parameters", "message"),
    [
        (iid, 5, {"num_partitions": 0}, "num_partitions = 0: must be at least 1"),
        (iid, 5, {"num_partitions": 6}, "num_partitions = 6: at most 5, the number of examples"),
        (iid, 0, {"num_partitions": 1}, "num_partitions = 1: at most 0, the number of examples"),
        (size, 5, {"partition_sizes": []}, "partition_sizes is empty"),
        (
            size,
            5,
            {"partition_sizes": [2, 0, -1]},
            "partition_sizes[1] = 0: must be at least 1; partition_sizes[2] = -1",
        ),
        (size, 5, {"partition_sizes": [4, 2]}, "partition_sizes sum to 6: at most 5, the number of examples"),
        (linear, 5, {"num_partitions": -3}, "num_partitions = -3: must be at least 1"),
        (linear, 5, {"num_partitions": 3}, "num_partitions = 3: the smallest part of 5 examples would be empty"),
        (square, 5, {"num_partitions": 6}, "num_partitions = 6: at most 5"),
        (exponential, 2000, {"num_partitions": 900}, "num_partitions = 900: the smallest part of 2000 examples"),
        (dirichlet, ABC, {"num_partitions": 0, "alpha": 1.0}, "num_partitions = 0: must be at least 1"),
        (dirichlet, ABC, {"num_partitions": 7, "alpha": 1.0}, "num_partitions = 7: at most 6"),
        (dirichlet, ABC, {**TWO, "alpha": 1.0, "min_partition_size": -1}, "min_partition_size = -1: must be at"),
        (dirichlet, ABC, {**TWO, "alpha": 1.0}, "min_partition_size = 10 in each of 2 partitions: at most 3"),
        (dirichlet, LABELS, {**TWO, "alpha": 0.0}, "alpha = 0: must be above 0 and at most 1e+300"),
        (dirichlet, LABELS, {**TWO, "alpha": [1.0, -2.0]}, "alpha = -2: must be above 0"),
        (dirichlet, LABELS, {**TWO, "alpha": float("nan")}, "alpha = nan: must be above 0"),
        (dirichlet, LABELS, {**TWO, "alpha": 1e308}, "alpha = 1e+308: must be above 0 and at most"),
        (dirichlet, LABELS, {"num_partitions": 3, "alpha": [1.0, 1.0]}, "alpha has 2 numbers, num_partitions is 3"),
        (
            dirichlet,
            ABC,
            {**TWO, "alpha": [1e-9, 1.0], "min_partition_size": 1},
            "none of 11 draws with alpha = 1e-09 to 1 gave each of 2 partitions min_partition_size = 1 examples (the "
            "best one gave 0); raise alpha",
        ),
        (
            dirichlet,
            ["a", "a", "a", "b"],
            {**TWO, "alpha": [1.0, 1e-320], "min_partition_size": 0, "self_balancing": True},
            "self_balancing: each of 11 draws",
        ),
        (dirichlet, LABELS, {**TWO, "alpha": 1.0, "seed": -1}, "seed = -1: must be at least 0"),
        (pathological, ABC, {**TWO, "num_classes_per_partition": 0}, "num_classes_per_partition = 0: must be"),
        (pathological, ABC, {**TWO, "num_classes_per_partition": 4}, "num_classes_per_partition = 4: at most 3"),
        (
            pathological,
            ABC,
            {**TWO, "num_classes_per_partition": 3},
            "2 partitions need class 2 of 3 (in lexical order)",
        ),
        (
            pathological,
            ABC,
            {**TWO, "num_classes_per_partition": 1, "class_assignment_mode": "rand"},
            "class_assignment_mode = 'rand' (did you mean 'random'?)",
        ),
        (shard, ABC, {"num_partitions": 7, "shard_size": 1}, "num_partitions = 7: at most 6"),
        (shard, ABC, TWO, "neither num_shards_per_partition nor shard_size is given"),
        (shard, ABC, {**TWO, "shard_size": 0}, "shard_size = 0: must be at least 1"),
        (shard, ABC, {**TWO, "num_shards_per_partition": 0}, "num_shards_per_partition = 0: must be"),
        (shard, ABC, {**TWO, "num_shards_per_partition": 4}, "6 examples make 6 shards of 1"),
        (
            shard,
            ABC,
            {**TWO, "num_shards_per_partition": 2, "shard_size": 2, "keep_incomplete_shard": True},
            "6 examples make 3 shards of 2, but num_partitions = 2 needs 4",
        ),
        (shard, ABC, {"num_partitions": 3, "shard_size": 4}, "6 examples make 1 shards of 4, but num_partitions = 3"),
        (
            shard,
            ABC,
            {"num_partitions": 3, "shard_size": 4, "keep_incomplete_shard": True},
            "6 examples make 2 shards of 4, but num_partitions = 3 needs 3",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(
    partitioner: Callable[..., object], given_data: int | list[str], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        partitioner(given_data, **parameters)
    assert str(caught.value).startswith(f"data.clients.partitioner: {message}")


def test_a_seed_below_zero_is_refused_for_the_order_too() -> None:
    with pytest.raises(DataError, match="seed = -1: must be at least 0"):
        draw_order(5, seed=-1)


def test_an_error_shows_the_first_few_faults_only() -> None:
    with pytest.raises(DataError) as caught:
        size(5, partition_sizes=[0] * 1000)
    assert str(caught.value).count("must be at least") == 5


def test_an_error_about_a_class_does_not_show_its_label() -> None:
    with pytest.raises(DataError) as caught:
        pathological(["secret", "other", "other"], num_partitions=2, num_classes_per_partition=2)
    assert "class 2 of 2" in str(caught.value)
    assert "secret" not in str(caught.value)
