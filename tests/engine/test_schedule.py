"""Who takes part: drawn once from the seed, uniform, and the same rounds at the start of a longer run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.engine.schedule import draw_schedule


def lists(schedule: tuple[np.ndarray, ...]) -> list[list[int]]:
    return [ids.tolist() for ids in schedule]


def test_the_same_seed_gives_the_same_schedule_and_another_seed_another() -> None:
    first = lists(draw_schedule(20, rounds=5, participation=0.3, seed=0))
    assert first == lists(draw_schedule(20, rounds=5, participation=0.3, seed=0))
    assert first != lists(draw_schedule(20, rounds=5, participation=0.3, seed=1))


def test_a_longer_run_begins_with_the_same_rounds() -> None:
    short = lists(draw_schedule(20, rounds=3, participation=0.3, seed=0))
    assert lists(draw_schedule(20, rounds=9, participation=0.3, seed=0))[:3] == short


@given(st.integers(1, 60), st.floats(0.001, 1), st.integers(0, 2**40))
def test_every_round_has_its_number_of_distinct_clients_in_order(clients: int, participation: float, seed: int) -> None:
    for ids in lists(draw_schedule(clients, rounds=3, participation=participation, seed=seed)):
        assert ids == sorted(set(ids))
        assert len(ids) == max(1, round(participation * clients))
        assert 0 <= ids[0] <= ids[-1] < clients


def test_full_participation_is_everybody_every_round() -> None:
    assert lists(draw_schedule(4, rounds=2, participation=1.0, seed=0)) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("participation", [0.01, 0.1])
def test_somebody_takes_part_in_every_round(participation: float) -> None:
    assert all(len(ids) == 1 for ids in draw_schedule(4, rounds=9, participation=participation, seed=0))


def test_every_client_is_drawn_about_equally_often() -> None:
    schedule = draw_schedule(10, rounds=2000, participation=0.3, seed=0)
    counts = np.bincount(np.concatenate(schedule), minlength=10)
    assert counts.sum() == 6000
    assert np.abs(counts - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)  # five standard deviations
