"""An account is on disk before what it pays for; a phase done again is free only if it is the same release."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmira.disk import files
from fedmira.errors import MethodError, StoreError
from fedmira.privacy.budget import FILE, KEY_FILE, Budget, Share, Terms, count_affordable, read_spent

pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
TERMS = Terms(epsilon=8.0, delta=1e-5, noise_multiplier=1.0, clip=1.0)
SHARES = {"a": Share(examples=20, per_step=4, steps=3), "b": Share(examples=10, per_step=4, steps=3)}
START = (torch.arange(6.0).view(2, 3),)


def budget(folder: Path, terms: Terms = TERMS, conditions: Sequence[str] = ("here",)) -> Budget:
    return Budget(folder, terms, SHARES, conditions)


def pay(account: Budget, *, number: int = 1, start: Sequence[Tensor] = START) -> Any:
    return account.pay(["a", "b"], round_number=number, start=start)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_what_is_paid_for_is_on_disk_before_it_is_released(tmp_path: Path) -> None:
    pay(budget(tmp_path))
    (line,) = lines(tmp_path)
    assert (line["round"], line["clients"]) == (1, {"a": [0.2, 3], "b": [0.4, 3]})
    assert {client: sum(spent.values()) for client, spent in read_spent(tmp_path).items()} == {"a": 3, "b": 3}
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in (FILE, KEY_FILE)} == {0o600}


def test_a_failing_disk_pays_for_nothing_and_releases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = budget(tmp_path)
    assert account.refuses(["a"]) is None
    assert account.key

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match="cannot append"):
        pay(account)
    assert account.spent == {}


def test_the_same_phase_again_is_the_same_release_and_free(tmp_path: Path) -> None:
    first, plans = pay(budget(tmp_path))
    again, plans_again = pay(budget(tmp_path))  # another process, after a kill
    assert len(lines(tmp_path)) == 1
    assert (first.mark, first.key) == (again.mark, again.key)
    for one, other in zip(plans, plans_again, strict=True):
        for step, step_again in zip(one, other, strict=True):
            np.testing.assert_array_equal(step, step_again)


@pytest.mark.parametrize("what", ["rows", "round", "conditions", "key"])
def test_any_other_phase_is_a_new_release_and_paid_for(what: str, tmp_path: Path) -> None:
    first, _ = pay(budget(tmp_path))
    if what == "key":
        (tmp_path / KEY_FILE).unlink()
    start = (START[0].index_fill(0, torch.tensor([1]), 7.0),) if what == "rows" else START
    account = budget(tmp_path, conditions=["elsewhere" if what == "conditions" else "here"])
    second, _ = pay(account, start=start, number=2 if what == "round" else 1)
    assert first.mark != second.mark
    assert len(lines(tmp_path)) == 2
    assert {client: sum(spent.values()) for client, spent in account.spent.items()} == {"a": 6, "b": 6}


def test_a_half_written_line_paid_for_nothing(tmp_path: Path) -> None:
    pay(budget(tmp_path))
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + whole[:40])
    pay(budget(tmp_path), number=2)
    assert [line["round"] for line in lines(tmp_path)] == [1, 2]


def test_a_damaged_account_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    pay(budget(tmp_path))
    pay(budget(tmp_path), number=2)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(b"{" + content[5:])
    with pytest.raises(StoreError, match="can no longer be counted"):
        budget(tmp_path).refuses(["a"])


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(StoreError, match="has 5 bytes"):
        pay(budget(tmp_path))


def test_no_round_begins_beyond_the_budget(tmp_path: Path) -> None:
    account = budget(tmp_path)
    number = 0
    while account.refuses(["a", "b"]) is None:
        number += 1
        pay(account, number=number)
    (reason,) = {account.refuses(["a", "b"])}
    assert reason is not None
    assert "above the budget of 8" in reason
    assert account.refuses(["a"]) is None  # it has twice the examples
    with pytest.raises(MethodError, match="above the budget"):
        pay(account, number=number + 1)
    assert len(lines(tmp_path)) == number
    assert count_affordable(TERMS, SHARES, [["a", "b"]] * 50)[0] == number
    assert budget(tmp_path).refuses(["b"]) is not None  # another process knows


@pytest.mark.slow
def test_two_gradients_in_a_step_end_the_run_sooner() -> None:
    schedule = [["a", "b"]] * 50
    one, two = (count_affordable(Terms(8.0, 1e-5, 2.0, 1.0, gradients=count), SHARES, schedule)[0] for count in (1, 2))
    assert 0 < two < one
