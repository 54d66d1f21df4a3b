"""How long a study will still take: the arithmetic, not the speed."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.cli.progress import Remaining
from fedmira.engine.cost import Speeds, Work


def test_rounds_left_are_those_of_this_run_and_of_the_runs_after_it() -> None:
    """3 runs of 4 rounds, 2 s each: after round 1, 11 rounds are left, 22 s."""
    remaining = Remaining(3)
    remaining.begin_run(100.0)
    assert remaining.end_round(1, 4, 102.0) == 22.0
    assert [remaining.end_round(number, 4, 100.0 + 2 * number) for number in (2, 3, 4)] == [20.0, 18.0, 16.0]
    remaining.begin_run(112.0)  # 4 s went into adapters: the mean is 3 s a round
    assert remaining.end_round(1, 4, 115.0) == pytest.approx(15 / 5 * 7)


def test_a_resumed_run_counts_the_rounds_that_it_saw() -> None:
    remaining = Remaining(1)
    remaining.begin_run(0.0)
    assert remaining.end_round(8, 10, 5.0) == 10.0


@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.1, 10))
def test_with_equal_rounds_the_estimate_is_exact_at_every_round(runs: int, rounds: int, each: float) -> None:
    remaining, now = Remaining(runs), 0.0
    for run in range(runs):
        remaining.begin_run(now)
        for number in range(1, rounds + 1):
            now += each
            left = runs * rounds - run * rounds - number
            assert remaining.end_round(number, rounds, now) == pytest.approx(left * each)
    assert remaining.end_round(rounds, rounds, now) == 0


def test_seconds_are_the_work_at_each_of_its_speeds() -> None:
    assert Speeds(0.5, 0.25, 2.0).seconds(Work(10, 8, 3)) == 10 * 0.5 + 8 * 0.25 + 3 * 2
    assert [field.name for field in fields(Speeds)][-1] == "cpu"
