"""Which cases of a test are quick: the others are run by make test-slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def one_in(count: int, cases: Iterable[Any]) -> list[Any]:
    """Keep the first of every `count` cases quick, mark the others slow; a case of several arguments is a tuple."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] * (number % count > 0))
        for number, case in enumerate(cases)
    ]
