"""Nothing that is not a sound upload reaches a merge, and one bad upload is that client's silence only."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmira.adapters import Layout, lora_layout
from fedmira.engine.federation import Federation
from fedmira.engine.gate import MAX_NORM, SCHEMA, Expected, Header, Upload, admit, check_change, refusal
from fedmira.errors import WireError
from fedmira.methods.base import Change, Message

LAYOUT: Layout = lora_layout([("q_proj", 4, 4)], 2)
IDS = (4, 7, 9)
NAMES = tuple(f"c{k}" for k in range(10))
FEDERATION = Federation(NAMES, LAYOUT, torch.full((10,), 2), 4.0, run="local/seed-3", base="abc")


def rows() -> Tensor:
    return torch.arange(3.0 * LAYOUT.size).reshape(3, LAYOUT.size) / 10


def expected(columns: int = LAYOUT.size) -> Expected:
    return Expected(FEDERATION, "mira", 2, {NAMES[k]: k for k in IDS}, columns)


def header(k: int, **changes: Any) -> Header:
    name = NAMES[k]
    own = Header("local/seed-3", 2, name, f"2/{name}", "abc", LAYOUT.fingerprint, "mira", float(k))
    return replace(own, **changes)


def upload(k: int, row: Tensor, *, scalars: Mapping[str, Tensor] | None = None, **changes: Any) -> Upload:
    return Upload(header(k, **changes), Message(row, scalars or {}))


def decide(
    sent: Tensor, weights: list[float] | None = None, more: Tensor | None = None, **scalars: Tensor
) -> tuple[list[int], dict[int, str]]:
    message = Message(sent, scalars, {} if more is None else {"second": more})
    given = weights or [1.0, 2.0, 3.0]
    uploads = [
        Upload(header(k, weight=given[place]), message.take(slice(place, place + 1))) for place, k in enumerate(IDS)
    ]
    places, refused = admit(uploads, expected())
    return places.tolist(), refused


def test_sound_uploads_all_pass() -> None:
    assert decide(rows()) == ([0, 1, 2], {})
    assert decide(rows(), more=rows()) == ([0, 1, 2], {})


def test_nobody_is_admitted_where_nobody_answered() -> None:
    places, refused = admit([], expected())
    assert (places.tolist(), places.dtype, refused) == ([], torch.int64, {})


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, LAYOUT.size // 2, LAYOUT.size - 1])
@pytest.mark.parametrize("client", [0, 1, 2])
@pytest.mark.parametrize("which", ["rows", "more"])
def test_a_number_that_is_not_finite_silences_its_client_wherever_it_stands(
    bad: float, place: int, client: int, which: str
) -> None:
    sent = {"rows": rows(), "more": rows()}
    sent[which][client, place] = bad
    kept, refused = decide(sent["rows"], more=sent["more"])
    assert kept == [position for position in range(3) if position != client]
    assert refused == {IDS[client]: "not_finite"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_declared_scalar_that_is_not_finite_silences_its_client(bad: float) -> None:
    assert decide(rows(), steps=torch.tensor([1.0, bad, 1.0])) == ([0, 2], {7: "not_finite"})


@pytest.mark.parametrize("size", [1e7, 1e30, 3e38])
@pytest.mark.parametrize("which", ["rows", "more"])
def test_a_row_that_is_far_too_long_is_refused_by_its_norm(size: float, which: str) -> None:
    sent = {"rows": rows(), "more": rows()}
    sent[which][1] = size
    assert decide(sent["rows"], more=sent["more"]) == ([0, 2], {7: "norm"})


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
        torch.zeros(1, LAYOUT.size - 1),
        torch.zeros(1, LAYOUT.size + 1),
        torch.zeros(2, LAYOUT.size),
        torch.zeros(0, LAYOUT.size),
        torch.zeros(LAYOUT.size),
        torch.zeros(1, 1, LAYOUT.size),
        torch.zeros(1, LAYOUT.size, dtype=torch.int64),
        torch.zeros(1, LAYOUT.size, dtype=torch.bool),
        torch.zeros(1, LAYOUT.size, dtype=torch.complex64),
    ],
)
@pytest.mark.parametrize("which", ["rows", "more"])
def test_uploads_of_another_shape_or_kind_are_refused_and_never_broadcast(sent: Tensor, which: str) -> None:
    good = torch.zeros(1, LAYOUT.size)
    message = Message(sent, more={"m": good}) if which == "rows" else Message(good, more={"m": sent})
    assert refusal(Upload(header(7), message), expected()) == "size"


@pytest.mark.parametrize("scalar", [torch.ones(2), torch.ones(0), torch.tensor(1.0), torch.ones(1, 1)])
def test_a_scalar_that_is_not_one_number_is_refused(scalar: Tensor) -> None:
    assert refusal(upload(7, rows()[:1], scalars={"steps": scalar}), expected()) == "size"


def test_every_client_may_be_refused_for_a_reason_of_its_own() -> None:
    sent = rows()
    sent[0, 0], sent[1] = math.nan, 1e30
    assert decide(sent, [1.0, 1.0, 0.0]) == ([], {4: "not_finite", 7: "norm", 9: "weight"})


def test_the_gate_changes_no_upload() -> None:
    sent = rows()
    decide(sent)
    assert torch.equal(sent, rows())


def test_only_the_columns_that_travel_are_expected() -> None:
    assert refusal(upload(7, torch.zeros(1, 3)), expected(3)) is None
    assert refusal(upload(7, torch.zeros(1, LAYOUT.size)), expected(3)) == "size"


# ---------------------------------------------------------------- the wire's words, one at a time

WIRE: dict[str, list[dict[str, Any]]] = {
    "schema": [
        {"schema": SCHEMA + 1},
        {"schema": 0},
        {"method": "fedavg"},
        {"run_id": "local/seed-4"},
        {"base_hash": "abd"},
        {"layout_hash": "0" * 64},
    ],
    "identity": [{"client": "c8"}, {"client": ""}, {"client": "C7"}],
    "round": [{"round": 1}, {"round": 3}, {"round": 0}],
    "weight": [{"weight": 0.0}, {"weight": math.nan}],
}


@pytest.mark.parametrize(
    ("reason", "changes"), [(reason, changes) for reason, several in WIRE.items() for changes in several], ids=str
)
def test_an_upload_that_says_something_else_is_refused_by_that_word(reason: str, changes: dict[str, Any]) -> None:
    assert refusal(upload(7, rows()[:1]), expected()) is None
    assert refusal(upload(7, rows()[:1], **changes), expected()) == reason


def test_what_is_wrong_first_is_said() -> None:
    """In the order in which a server can tell: who and what before the numbers are looked at."""
    nan = torch.full((1, LAYOUT.size), math.nan)
    wrong: dict[str, Callable[[Upload], Upload]] = {
        "weight": lambda one: replace(one, header=replace(one.header, weight=0.0)),
        "norm": lambda one: replace(one, message=Message(torch.full((1, LAYOUT.size), 1e30))),
        "not_finite": lambda one: replace(one, message=Message(nan)),
        "size": lambda one: replace(one, message=Message(nan[:, 1:])),
        "duplicate": lambda one: replace(one, header=replace(one.header, nonce="used")),
        "round": lambda one: replace(one, header=replace(one.header, round=9)),
        "identity": lambda one: replace(one, header=replace(one.header, client="nobody")),
        "schema": lambda one: replace(one, header=replace(one.header, schema=9)),
    }
    waited, sent = expected(), upload(7, rows()[:1])
    waited.nonces.add("used")
    for reason, change in wrong.items():
        sent = change(sent)
        assert refusal(sent, waited) == reason


def test_metrics_of_an_upload_are_no_reason() -> None:
    assert refusal(upload(7, rows()[:1], metrics={"train_loss": math.nan}), expected()) is None


def test_a_client_answers_once_and_its_first_sound_upload_counts() -> None:
    sent = rows()
    bad = torch.full((1, LAYOUT.size), math.nan)
    first, again = upload(7, sent[:1]), upload(7, sent[1:2], nonce="another")
    places, refused = admit([upload(7, bad), first, again, upload(9, sent[2:])], expected())
    assert places.tolist() == [1, 3]
    assert refused == {7: "not_finite"}
    places, refused = admit([first, again, upload(9, sent[2:])], expected())
    assert places.tolist() == [0, 2]
    assert refused == {}  # it has answered


def test_a_nonce_is_used_once_whoever_uses_it() -> None:
    sent = rows()
    places, refused = admit([upload(7, sent[:1], nonce="one"), upload(9, sent[1:2], nonce="one")], expected())
    assert places.tolist() == [0]
    assert refused == {9: "duplicate"}


def test_uploads_that_come_in_one_by_one_are_judged_as_those_that_come_together() -> None:
    waited, sent = expected(), rows()
    for place, k in enumerate(IDS):
        own = upload(k, sent[place : place + 1])
        places, refused = admit([own], waited)
        assert (places.tolist(), refused) == ([0], {})
        assert refusal(own, waited) == "duplicate"
    assert waited.answered == {NAMES[k] for k in IDS}
    assert waited.nonces == {f"2/{NAMES[k]}" for k in IDS}


def test_a_refused_upload_uses_up_neither_its_turn_nor_its_nonce() -> None:
    waited = expected()
    admit([upload(7, torch.full((1, LAYOUT.size), math.nan))], waited)
    assert (waited.answered, waited.nonces) == (set(), set())
    assert refusal(upload(7, rows()[:1]), waited) is None


def test_somebody_who_was_not_asked_is_only_left_out() -> None:
    places, refused = admit([upload(8, rows()[:1]), upload(7, rows()[1:2])], expected())
    assert (places.tolist(), refused) == ([1], {})


# ---------------------------------------------------------------- merges


def test_a_merge_that_gave_a_number_that_is_not_finite_replaces_nothing() -> None:
    ids = torch.tensor(IDS)
    check_change(Change(ids, rows()), "mira", LAYOUT)
    broken = rows()
    broken[2, 0] = math.nan
    with pytest.raises(WireError, match="not_finite: the merge of 'mira'"):
        check_change(Change(ids, broken), "mira", LAYOUT)


def test_everything_that_a_merge_decides_is_looked_at() -> None:
    ids, broken = torch.tensor(IDS), rows()
    broken[0, 3] = math.inf
    counts = {"seen": torch.tensor([1, 2, 3]), "known": torch.tensor([True, False, True])}
    check_change(Change(ids, rows(), shared={"m": rows()}, tables={"sketch": rows(), **counts}), "mira", LAYOUT)
    for change in (
        Change(ids, rows(), shared={"m": broken}),
        Change(ids, rows(), tables={"sketch": broken, **counts}),
    ):
        with pytest.raises(WireError, match="not_finite: the merge of 'mira'"):
            check_change(change, "mira", LAYOUT)
