"""Figures that tests of faults report: what was done, how often, what came of it."""

from collections.abc import Mapping
from typing import Protocol


class Note(Protocol):
    """Writes one figure down, where `pytest --figures FILE` asks for them."""

    def __call__(self, what: str, count: int, found: Mapping[str, float]) -> None: ...
