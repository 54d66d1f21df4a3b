"""The run that tests of exports read, of the study that each file makes."""

from pathlib import Path

import pytest

import fedmira
from fedmira.study.face import Run


@pytest.fixture(scope="module")
def run(here: Path) -> Run:
    """The run of `local` in the study of the test file's own folder `here`."""
    return fedmira.load_run(here / "study" / "local" / "seed-3")
