"""Means, intervals and tests are those of numpy and scipy, a correction that of statsmodels."""

import math
import random
import warnings

import numpy as np
import pytest
from scipy import stats

from fedmira.reports.averages import (
    T_975,
    half_width,
    holm,
    mean,
    rank_biserial,
    signed_rank_p,
    t_quantile,
    weighted_mean,
)


def draw(seed: int, count: int) -> list[float]:
    stream = random.Random(seed)
    return [stream.gauss(0.1, 1) for _ in range(count)]


def scipys_p(differences: list[float]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ties, for which it counts or approximates as we do
        return float(stats.wilcoxon(np.array(differences, dtype=float)).pvalue)


def test_a_mean_leaves_out_what_is_not_a_number() -> None:
    assert mean([1.0, math.nan, 2.0]) == 1.5
    assert math.isnan(mean([]))


def test_a_mean_with_an_infinite_value_is_infinite_and_of_both_infinities_not_a_number() -> None:
    assert mean([1.0, math.inf]) == math.inf
    assert math.isnan(mean([-math.inf, math.inf]))


def test_a_mean_does_not_depend_on_the_order() -> None:
    values = draw(0, 1000)
    assert mean(values) == mean(sorted(values)) == pytest.approx(np.mean(values), rel=1e-13)


def test_the_table_of_t_is_scipys_and_goes_on_without_a_break() -> None:
    assert [t_quantile(freedom) for freedom in (*range(1, 40), 1999)] == pytest.approx(
        [float(stats.t.ppf(0.975, freedom)) for freedom in (*range(1, 40), 1999)], rel=1e-12
    )
    assert len(T_975) == 30


@pytest.mark.parametrize("count", [2, 3, 16, 31, 32, 300])
def test_the_interval_is_scipys(count: int) -> None:
    values = draw(count, count)
    expected = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    assert half_width(values) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("count", [6, 7, pytest.param(13, marks=pytest.mark.slow), 14, 31, 50, 51, 300])
def test_the_signed_rank_test_is_scipys(count: int) -> None:
    plain = draw(count, count)
    tied = [float(round(2 * value)) for value in plain]
    diverged = [math.inf, *plain[1:]]
    for differences in (plain, [abs(value) for value in plain], tied, diverged, [0.0, *plain[1:]]):
        assert signed_rank_p(differences) == pytest.approx(scipys_p(differences), rel=1e-12)


@pytest.mark.parametrize("count", [1, 6, 13, 31, 300])
def test_the_effect_size_is_of_scipys_ranks(count: int) -> None:
    plain = draw(count, count)
    for differences in (plain, [float(round(2 * value)) for value in plain], [math.inf, *plain[1:]], [0.0, *plain]):
        nonzero = np.array([value for value in differences if value != 0])
        ranks = stats.rankdata(np.abs(nonzero))
        above, below = ranks[nonzero > 0].sum(), ranks[nonzero < 0].sum()
        assert rank_biserial(differences) == pytest.approx(float((above - below) / (above + below)), rel=1e-12)
    assert rank_biserial([abs(value) for value in plain]) == 1
    assert rank_biserial([0.0, 0.0]) is None


def test_the_rank_sums_of_the_effect_size_are_those_of_the_test() -> None:
    # scipy's two-sided statistic is the smaller rank sum, and both sums add up to n (n + 1) / 2
    values = draw(3, 20)
    smaller = stats.wilcoxon(np.array(values)).statistic
    assert abs(rank_biserial(values) or 0) == pytest.approx(1 - 2 * smaller / (20 * 21 / 2))


def test_a_weighted_mean_is_numpys() -> None:
    values, weights = draw(5, 40), [float(place % 7) for place in range(40)]
    assert weighted_mean(values, weights) == pytest.approx(np.average(values, weights=weights), rel=1e-12)
    assert weighted_mean([1.0, 2.0], [0, 0]) is None
    assert weighted_mean([math.inf, 2.0], [0, 1]) == 2
    assert weighted_mean([math.inf, 2.0], [1, 1]) == math.inf


@pytest.mark.parametrize(
    ("found", "adjusted"),
    [
        ([0.5], [0.5]),
        # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04 is raised to the one before
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.9, 0.8], [1.0, 1.0]),
        (
            [0.001, 0.2, 0.2, 0.04, 0.6, 0.011, 0.03, 0.0004, 0.02],
            [0.008, 0.6, 0.6, 0.16, 0.6, 0.077, 0.15, 0.0036, 0.12],
        ),
    ],
)
def test_holms_correction_has_the_values_of_statsmodels(found: list[float], adjusted: list[float]) -> None:
    """Recorded from multipletests(found, method="holm") of statsmodels 0.15.0."""
    corrected = holm({f"method {place}": p for place, p in enumerate(found)})
    assert [corrected[f"method {place}"] for place in range(len(found))] == pytest.approx(adjusted, rel=1e-12)


def test_nothing_is_corrected_where_nothing_was_tested() -> None:
    assert holm({}) == {}
