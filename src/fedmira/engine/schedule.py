"""Who takes part: the participation schedule, drawn once from the seed."""

import numpy as np


def draw_schedule(clients: int, *, rounds: int, participation: float, seed: int) -> tuple[np.ndarray, ...]:
    """Return, per round, S = max(1, round(participation x K)) distinct client positions, ascending.

    Uniform without replacement; round t depends on (seed, t) only, so that a longer run begins with the same rounds.
    """
    size = max(1, round(participation * clients))
    return tuple(
        np.sort(np.random.default_rng([seed, number]).choice(clients, size=size, replace=False))
        for number in range(1, rounds + 1)
    )
