"""Who takes part: the participation schedule, drawn once from the seed."""

from collections.abc import Sequence

import numpy as np


def draw_schedule(
    clients: int, *, rounds: int, participation: float, seed: int, since: Sequence[int] | None = None
) -> tuple[np.ndarray, ...]:
    """Return, per round, S = max(1, round(participation x K)) distinct client positions, ascending.

    Uniform without replacement; round t depends on (seed, t) and the clients of that round only, so that a longer run
    begins with the same rounds. since [K], ascending: the first round of each client, None = 1; K is then the number of
    those that take part by round t.
    """
    firsts = np.ones(clients, dtype=np.int64) if since is None else np.asarray(since)
    schedule = []
    for number in range(1, rounds + 1):
        there = int((firsts <= number).sum())
        size = max(1, round(participation * there))
        schedule.append(np.sort(np.random.default_rng([seed, number]).choice(there, size=size, replace=False)))
    return tuple(schedule)
