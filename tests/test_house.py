"""The house: few things at its root, files that can be read in one go, and records that stay small."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import fedmira
from fedmira.errors import MethodError
from fedmira.graphs.graph import group_graph
from fedmira.methods import names
from fedmira.methods.base import Client, Facts, Method, Regime
from fedmira.methods.means import change_nothing

ROOT = Path(fedmira.__file__).parent
LINES = 450
METHOD_LINES = 160
PLAIN = Method("plain", change_nothing)
EACH = Method("each", change_nothing, rows_of="each")


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_nothing_is_at_the_root_but_the_door_the_errors_and_the_rooms() -> None:
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "errors.py", "py.typed"}


def test_no_file_is_longer_than_can_be_read_in_one_go() -> None:
    assert {str(path): length(path) for path in ROOT.rglob("*.py") if length(path) > LINES} == {}


def test_no_method_is_longer_than_a_page_or_three() -> None:
    assert {name: count for name in names() if (count := length(ROOT / "methods" / f"{name}.py")) > METHOD_LINES} == {}


def test_a_method_has_eleven_fields_and_two_that_must_be_given() -> None:
    assert len(fields(Method)) <= 11
    assert [PLAIN.name, PLAIN.merge] == ["plain", change_nothing]
    assert {field.name for field in fields(Client)} == {"start", "begin", "step", "finish", "use", "gate"}


@pytest.mark.parametrize(
    ("method", "wrong", "why"),
    [
        (PLAIN, {"regime": Regime(tolerance=0.0)}, "a client can refuse a reply"),
        (EACH, {"regime": Regime(trainees="pool")}, "trains one row for all"),
        (PLAIN, {"rows_of": torch.tensor([0, 1]), "regime": Regime(trainees="nobody")}, "trains one row for all"),
        (PLAIN, {"regime": Regime(trainees="pool", tune=("steps", 1))}, "no client fine-tunes"),
        (PLAIN, {"regime": Regime(pool_steps=3)}, "pool_steps are of a pool"),
        (
            EACH,
            {"facts": Facts(graph=group_graph(["a", "a"]), learned=lambda state: group_graph(["a", "a"]))},
            "a graph is given or learned",
        ),
        (EACH, {"facts": Facts(pull=lambda ids: ids)}, "needs a graph that is given"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_when_the_record_is_built(
    method: Method, wrong: dict[str, object], why: str
) -> None:
    with pytest.raises(MethodError, match=why):
        replace(method, **wrong)
