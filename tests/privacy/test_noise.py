"""Noise is normal, each purpose has its own, and nobody without the key can draw it."""

import numpy as np
import pytest
from scipy import stats

from fedmira.privacy.noise import KEY_BYTES, gaussian, poisson_sample, uniform

KEY, OTHER = bytes(range(KEY_BYTES)), bytes(KEY_BYTES)
MANY = 10**6


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return gaussian(MANY, key=KEY, purpose="a")


def test_noise_is_standard_normal(drawn: np.ndarray) -> None:
    assert abs(drawn.mean()) < 5 / np.sqrt(MANY)
    assert drawn.var() == pytest.approx(1, abs=0.01)
    assert stats.kurtosis(drawn, fisher=False) == pytest.approx(3, abs=0.02)
    assert stats.kstest(drawn, "norm").pvalue > 0.001


@pytest.mark.parametrize(("key", "purpose"), [(KEY, "b"), (OTHER, "a")], ids=["another purpose", "another key"])
def test_noise_of_another_key_or_purpose_is_independent(drawn: np.ndarray, key: bytes, purpose: str) -> None:
    assert abs(np.corrcoef(drawn, gaussian(MANY, key=key, purpose=purpose))[0, 1]) < 0.005


def test_the_two_halves_of_a_draw_are_independent(drawn: np.ndarray) -> None:
    """Both come from the same uniform numbers: lengths are shared, and still the halves are not."""
    first, second = np.split(drawn, 2)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.005
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 0.005


def test_the_owner_of_the_key_draws_the_same_again() -> None:
    np.testing.assert_array_equal(*(gaussian(5, key=KEY, purpose="a") for _ in range(2)))


def test_an_odd_count_is_kept() -> None:
    assert [len(gaussian(count, key=KEY, purpose="a")) for count in (0, 1, 2, 7)] == [0, 1, 2, 7]


def test_uniform_numbers_exclude_0_and_1() -> None:
    found = uniform(MANY, key=KEY, purpose="a")
    assert 0 < found.min() < found.max() < 1


def test_every_record_is_sampled_at_its_rate_whatever_the_others_are() -> None:
    count, rounds, rate = 40, 5000, 0.3
    there = np.zeros((rounds, count))
    for step in range(rounds):
        there[step, poisson_sample(count, rate, key=KEY, purpose=f"{step}")] = 1
    error = np.sqrt(rate * (1 - rate) / rounds)
    assert np.abs(there.mean(axis=0) - rate).max() < 4.5 * error
    sizes = there.sum(axis=1)  # binomial, where a batch of a fixed size has no variance at all
    assert sizes.var() == pytest.approx(count * rate * (1 - rate), rel=0.1)


def test_a_rate_of_one_takes_everybody() -> None:
    assert poisson_sample(3, 1.0, key=KEY, purpose="a").tolist() == [0, 1, 2]
