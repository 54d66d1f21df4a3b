"""Tests of what is durable let `os.fsync` do its work."""

import os
from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def _fsync_works(true_fsync: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", true_fsync)
