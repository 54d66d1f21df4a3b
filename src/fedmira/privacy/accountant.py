"""Epsilon of what a client has released so far, by dp-accounting's privacy loss distributions.

Two data sets are neighbours if one has a training record of a client that the other lacks, while the client's number
of records is known to all ("zero-out": the record is replaced by one whose gradient is 0).
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fedmira.errors import ConfigError

ADJACENCY = "one training record of a client added or removed, its number of records being known (zero-out)"
SAMPLING = "Poisson"
ACCOUNTANT = "PLD"
HARDLY_ANY = 100.0  # mu of noise that hides nothing: epsilon is above 5000
WIDEST = 1e-5  # interval of privacy losses, as a share of mu^2
INTERVAL = 1e-3  # of privacy losses; they are rounded up, so that a coarser one gives a larger epsilon, never a smaller


class Release(NamedTuple):
    """One optimizer step: `gradients` noisy gradients of the same sample of the records.

    Given whether the record is in the sample, n Gaussian answers with noise z are worth one with noise z / sqrt(n).
    """

    rate: float
    gradients: int
    noise_multiplier: float


Spent = Mapping[Release, int]  # -> how many of them


def check_installed() -> None:
    """Raise ConfigError if there is no accountant."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise ConfigError(["privacy: needs dp-accounting, which is not installed; pip install 'fedmira[dp]'"]) from None


def epsilon(spent: Spent, delta: float) -> float:
    """Return an upper bound of epsilon at `delta`; 0 where nothing was released."""
    return _epsilon(tuple(sorted((release, steps) for release, steps in spent.items() if steps)), delta)


@functools.lru_cache(maxsize=4096)
def _epsilon(spent: tuple[tuple[Release, int], ...], delta: float) -> float:
    if not spent:
        return 0.0
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=INTERVAL)
    for (rate, gradients, noise_multiplier), steps in spent:
        event = GaussianDpEvent(noise_multiplier / math.sqrt(gradients))
        accountant.compose(event if rate == 1 else PoissonSampledDpEvent(rate, event), steps)
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return an upper bound of epsilon of Gaussian answers without sampling, each to all that came before.

    noise_multiplier: in units of what one record or client can change. n such answers are one with noise z / sqrt(n),
    whose losses are normal with mean mu^2 / 2 and deviation mu = sqrt(n) / z. They are counted in steps of INTERVAL, or
    wider ones where mu is large; above HARDLY_ANY the bound is mu^2 / 2 + mu sqrt(2 log(1 / delta)).
    """
    if not releases:
        return 0.0
    from dp_accounting import GaussianDpEvent, NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    noise = noise_multiplier / math.sqrt(releases)
    mu = 1 / noise
    if mu > HARDLY_ANY:
        return mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    interval = max(INTERVAL, WIDEST * mu**2)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=interval)
    accountant.compose(GaussianDpEvent(noise))
    return float(accountant.get_epsilon(delta))


def max_epsilon(all_spent: Iterable[Spent], delta: float) -> float:
    """Return the largest epsilon of several clients; 0 if there are none."""
    return max((epsilon(spent, delta) for spent in worst(all_spent)), default=0.0)


def worst(all_spent: Iterable[Spent]) -> list[Spent]:
    """Leave out whoever surely has no larger epsilon than another: as many steps at most, at no larger a rate."""
    distinct = list({tuple(sorted(spent.items())): spent for spent in all_spent}.values())
    single = [next(iter(spent.items())) for spent in distinct if len(spent) == 1]
    alike = {(release.gradients, release.noise_multiplier) for release, _ in single}
    if len(single) < len(distinct) or len(alike) > 1:
        return distinct
    left: list[Spent] = []
    most = -1
    for release, steps in sorted(single, key=lambda one: (-one[0].rate, -one[1])):
        if steps > most:
            left.append({release: steps})
            most = steps
    return left
