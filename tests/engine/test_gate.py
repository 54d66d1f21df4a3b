"""Nothing that is not a sound upload reaches a merge, and one bad upload is that client's silence only."""

import math

import pytest
import torch

from fedmira.adapters import Layout, lora_layout
from fedmira.engine.gate import MAX_NORM, admit, check_change
from fedmira.errors import WireError
from fedmira.methods.base import Change, Message

LAYOUT: Layout = lora_layout([("q_proj", 4, 4)], 2)
IDS = torch.tensor([4, 7, 9])


def rows() -> torch.Tensor:
    return torch.arange(3.0 * LAYOUT.size).reshape(3, LAYOUT.size) / 10


def decide(
    sent: torch.Tensor, weights: list[float] | None = None, **scalars: torch.Tensor
) -> tuple[list[int], dict[int, str]]:
    given = torch.tensor(weights or [1.0, 2.0, 3.0], dtype=torch.float64)
    places, refused = admit(IDS, Message(sent, scalars), given, LAYOUT)
    return places.tolist(), refused


def test_sound_uploads_all_pass() -> None:
    assert decide(rows()) == ([0, 1, 2], {})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, LAYOUT.size // 2, LAYOUT.size - 1])
@pytest.mark.parametrize("client", [0, 1, 2])
def test_a_number_that_is_not_finite_silences_its_client_wherever_it_stands(
    bad: float, place: int, client: int
) -> None:
    sent = rows()
    sent[client, place] = bad
    kept, refused = decide(sent)
    assert kept == [position for position in range(3) if position != client]
    assert refused == {int(IDS[client]): "not_finite"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_declared_scalar_that_is_not_finite_silences_its_client(bad: float) -> None:
    assert decide(rows(), steps=torch.tensor([1.0, bad, 1.0])) == ([0, 2], {7: "not_finite"})


@pytest.mark.parametrize("size", [1e7, 1e30, 3e38])
def test_a_row_that_is_far_too_long_is_refused_by_its_norm(size: float) -> None:
    sent = rows()
    sent[1] = size
    assert decide(sent) == ([0, 2], {7: "norm"})


@pytest.mark.parametrize("size", [0.0, 1e-45, MAX_NORM / 100])
def test_a_row_that_is_short_or_zero_is_legal(size: float) -> None:
    sent = rows()
    sent[1] = size
    assert decide(sent) == ([0, 1, 2], {})


@pytest.mark.parametrize("weight", [0.0, -9.0, math.nan, math.inf])
def test_a_weight_that_is_no_positive_number_is_refused(weight: float) -> None:
    assert decide(rows(), [1.0, weight, 1.0]) == ([0, 2], {7: "weight"})


@pytest.mark.parametrize(
    "sent",
    [
        torch.zeros(3, LAYOUT.size - 1),
        torch.zeros(3, LAYOUT.size + 1),
        torch.zeros(2, LAYOUT.size),
        torch.zeros(1, LAYOUT.size),
        torch.zeros(LAYOUT.size),
        torch.zeros(3, 1, LAYOUT.size),
        torch.zeros(3, LAYOUT.size, dtype=torch.int64),
        torch.zeros(3, LAYOUT.size, dtype=torch.bool),
    ],
)
def test_uploads_of_another_shape_or_kind_are_refused_and_never_broadcast(sent: torch.Tensor) -> None:
    assert decide(sent) == ([], {4: "size", 7: "size", 9: "size"})


def test_every_client_may_be_refused_for_a_reason_of_its_own() -> None:
    sent = rows()
    sent[0, 0], sent[1] = math.nan, 1e30
    assert decide(sent, [1.0, 1.0, 0.0]) == ([], {4: "not_finite", 7: "norm", 9: "weight"})


def test_the_gate_changes_no_upload() -> None:
    sent = rows()
    decide(sent)
    assert torch.equal(sent, rows())


def test_a_merge_that_gave_a_number_that_is_not_finite_replaces_nothing() -> None:
    check_change(Change(IDS, rows()), "mira")
    broken = rows()
    broken[2, 0] = math.nan
    with pytest.raises(WireError, match="not_finite: the merge of 'mira'"):
        check_change(Change(IDS, broken), "mira")
