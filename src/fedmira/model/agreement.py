"""When two results of a trial are the same: within rounding of the type that they were computed in."""

import math

import torch
from torch import Tensor

TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 5e-2}  # fraction of the largest number, or of 1
TOLERANCE = 1e-4  # in wider types


def agree(values: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None) -> bool:
    """Return whether max |values - expected| <= tolerance * max(1, max |expected|); False where shapes differ.

    dtype: the type that both were computed in, None for that of `expected`. Values that are not numbers never agree.
    """
    if values.shape != expected.shape:
        return False
    tolerance = TOLERANCES.get(expected.dtype if dtype is None else dtype, TOLERANCE)
    scale = float(expected.detach().double().abs().max().clamp(min=1))
    return difference(values, expected) <= tolerance * scale < math.inf


def difference(values: Tensor, expected: Tensor) -> float:
    """Return max |values - expected|."""
    return float((values.detach().double() - expected.detach().double()).abs().max())
