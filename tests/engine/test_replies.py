"""A client may refuse a reply that worsens its validation loss; and the public code's lost reply can be replayed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.house import SCHEDULE, Ran
from tests.engine.test_rounds import METHODS, play, returned
from torch import Tensor

from fedmira.methods.base import Change, Clock, Message, Method, State


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mira", {**METHODS["mira"], "lambda": 0.45})


def settings(monkeypatch: pytest.MonkeyPatch, **others: Any) -> None:
    monkeypatch.setitem(METHODS, "mira", {**METHODS["mira"], **others})


def spoil(method: Method) -> Method:
    """A server that ruins what it replies to the first client of a round."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        change = method.merge(state, ids, returned, weights, clock)
        rows = change.rows.clone()
        rows[0] *= 30
        return replace(change, rows=rows)

    return replace(method, merge=merge)


def test_a_reply_is_kept_where_the_loss_is_not_worse_and_the_upload_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are those that checkpoints give back."""
    plain = play("mira", tmp_path / "plain", change=spoil)
    settings(monkeypatch, accept={"tolerance": 0.0})
    ran = play("mira", tmp_path / "run", change=spoil)
    kept = refused = 0
    for number, ids in enumerate(SCHEDULE):
        record = ran.records[number]
        worse = 0
        for place, k in enumerate(ids):
            before, after = record["loss_before"][place], record["loss_after"][place]
            assert after <= before
            same = torch.equal(ran.stored[number][k], ran.merged[number][place])
            assert same == (before == after)
            worse += same
        assert record["notes"]["refused_replies"] == worse
        kept, refused = kept + len(ids) - worse, refused + worse
    assert kept
    assert refused  # else this test has seen nothing
    assert any(
        after > before
        for record in plain.records
        for before, after in zip(record["loss_before"], record["loss_after"], strict=True)
    )


def test_a_tolerance_above_every_loss_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = play("mira", tmp_path / "plain")
    settings(monkeypatch, accept={"tolerance": 100.0})
    ran = play("mira", tmp_path / "run")
    assert torch.equal(ran.rows, plain.rows)
    assert all(record["notes"]["refused_replies"] == 0 for record in ran.records)


def test_a_reply_that_changes_nothing_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is pulled, so each loss is to the bit what it was: not worse by more than 0."""
    settings(monkeypatch, **{"lambda": 0.0, "accept": {"tolerance": 0.0}})
    ran = play("mira", tmp_path / "run")
    assert all(record["loss_before"] == record["loss_after"] for record in ran.records)
    assert [record["notes"]["refused_replies"] for record in ran.records] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:mira")
def test_a_lost_reply_is_scored_and_stored_but_never_trained_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes as if nobody pulled, while what is stored is pulled: the public code's defect."""
    alone = play("local", tmp_path / "alone")
    settings(monkeypatch, reply="lost")
    ran = play("mira", tmp_path / "run")

    def uploads(of: Ran) -> Tensor:
        return torch.cat([returned(of, number) for number in range(len(SCHEDULE))])

    torch.testing.assert_close(uploads(ran), uploads(alone), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ran.rows[:3], alone.rows[:3], rtol=1e-3)
    settings(monkeypatch, reply="used")
    used = play("mira", tmp_path / "used")
    assert not torch.allclose(uploads(used), uploads(alone), rtol=1e-3)
