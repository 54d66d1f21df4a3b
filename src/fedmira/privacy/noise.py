"""Secret random numbers: SHAKE-256 of a key and of what they are for, so that only the key's owner can draw them again.

A generator such as PCG64 or the Mersenne Twister will not do: a few of its numbers tell all that follow.
"""

import hashlib

import numpy as np

KEY_BYTES = 32


def uniform(count: int, *, key: bytes, purpose: str) -> np.ndarray:
    """Return float64 numbers in (0, 1), 53 bits each; another key or purpose gives independent ones."""
    stream = hashlib.shake_256(len(key).to_bytes(2, "big") + key + purpose.encode()).digest(8 * count)
    return (np.frombuffer(stream, dtype="<u8") >> np.uint64(11)) * 2.0**-53 + 2.0**-54


def gaussian(count: int, *, key: bytes, purpose: str) -> np.ndarray:
    """Return float64 numbers of the standard normal distribution, up to 8.6 deviations from 0.

    Source: Box & Muller 1958 (doi:10.1214/aoms/1177706645).
    """
    half = -(-count // 2)
    drawn = uniform(2 * half, key=key, purpose=purpose)
    length, angle = np.sqrt(-2 * np.log(drawn[:half])), 2 * np.pi * drawn[half:]
    return np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:count]


def poisson_sample(count: int, rate: float, *, key: bytes, purpose: str) -> np.ndarray:
    """Return positions of 0 ... count - 1, each there with probability `rate`, whatever the others are."""
    return np.flatnonzero(uniform(count, key=key, purpose=purpose) < rate)
