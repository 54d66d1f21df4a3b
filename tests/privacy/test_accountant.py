"""Epsilon against closed forms: never below them, and hardly above."""

import math

import pytest
from scipy import optimize, stats
from tests.marks import one_in

from fedmira.privacy.accountant import Release, epsilon, max_epsilon, worst

pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
DELTA = 1e-5
CLOSE = 1e-3  # the interval of privacy losses


def gaussian_epsilon(noise: float, steps: int, delta: float) -> float:
    """Of n answers with noise z, without sampling: one with noise z / sqrt(n) (Balle & Wang 2018, Theorem 8)."""
    mu = math.sqrt(steps) / noise

    def excess(eps: float) -> float:
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu)) - delta

    return float(optimize.brentq(excess, 0, 500, xtol=1e-12)) if excess(0) > 0 else 0.0


def sampled_epsilon(rate: float, noise: float, delta: float) -> float:
    """Of one step: P = (1 - q) N(0, z) + q N(1, z) against N(0, z), and the other way round."""

    def above(threshold: float) -> tuple[float, float]:
        nothing, shifted = stats.norm.sf(threshold / noise), stats.norm.sf((threshold - 1) / noise)
        return (1 - rate) * nothing + rate * shifted, nothing

    def removed(eps: float) -> float:
        with_it, without = above(noise**2 * math.log1p(math.expm1(eps) / rate) + 0.5)
        return with_it - math.exp(eps) * without - delta

    def added(eps: float) -> float:
        inside = math.expm1(-eps) / rate
        if inside <= -1:  # the likelihood ratio never gets that large
            return -delta
        with_it, without = above(noise**2 * math.log1p(inside) + 0.5)
        return (1 - without) - math.exp(eps) * (1 - with_it) - delta

    ends = [optimize.brentq(excess, 0, 100, xtol=1e-12) for excess in (removed, added) if excess(0) > 0]
    return float(max(ends, default=0.0))


COMPOSED = [(noise, steps) for noise in (1.0, 2.0, 4.24, 8.0, 20.0) for steps in (1, 3, 10, 30, 100)]
SAMPLED = [(rate, noise) for rate in (0.001, 0.01, 0.1, 0.3, 0.7) for noise in (0.5, 0.8, 1.0, 2.0, 6.0)]


@pytest.mark.parametrize(("noise", "steps"), COMPOSED)
def test_steps_without_sampling_meet_the_closed_form_from_above(noise: float, steps: int) -> None:
    exact = gaussian_epsilon(noise, steps, DELTA)
    assert exact <= epsilon({Release(1.0, 1, noise): steps}, DELTA) <= exact + CLOSE


@pytest.mark.parametrize(("rate", "noise"), one_in(3, SAMPLED))
def test_a_step_with_sampling_meets_the_closed_form_from_above(rate: float, noise: float) -> None:
    exact = sampled_epsilon(rate, noise, DELTA)
    assert exact <= epsilon({Release(rate, 1, noise): 1}, DELTA) <= exact + CLOSE


@pytest.mark.parametrize(("noise", "known"), [(0.6, 8.48), (0.8, 3.75), (1.0, 2.19), (1.5, 1.07)])
def test_five_hundred_sampled_steps_cost_what_is_known(noise: float, known: float) -> None:
    assert epsilon({Release(16 / 1000, 1, noise): 500}, DELTA) == pytest.approx(known, abs=0.005)


def test_four_gradients_of_one_sample_are_one_with_half_the_noise() -> None:
    assert epsilon({Release(0.1, 4, 2.0): 10}, DELTA) == epsilon({Release(0.1, 1, 1.0): 10}, DELTA)
    assert epsilon({Release(0.1, 4, 2.0): 10}, DELTA) > epsilon({Release(0.1, 1, 2.0): 10}, DELTA)


def test_nothing_released_costs_nothing() -> None:
    assert epsilon({}, DELTA) == epsilon({Release(0.1, 1, 1.0): 0}, DELTA) == 0


def test_leaving_out_whoever_has_less_leaves_the_largest() -> None:
    spent = [{Release(rate, 1, 1.0): steps} for rate in (0.05, 0.1, 0.2) for steps in (2, 5, 9)]
    assert worst(spent) == [{Release(0.2, 1, 1.0): 9}]
    crossing = [{Release(0.05, 1, 1.0): 900}, {Release(0.2, 1, 1.0): 9}, {Release(0.1, 1, 1.0): 9}]
    assert max_epsilon(crossing, DELTA) == max(epsilon(one, DELTA) for one in crossing)
    mixed = [{Release(0.2, 1, 1.0): 9}, {Release(0.1, 2, 1.0): 9}]
    assert worst(mixed) == mixed
