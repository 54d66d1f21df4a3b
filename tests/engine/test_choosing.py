"""A run in which each client chooses its own pull: what is written of it, and that it is the best by its own data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.house import SCHEDULE, Ran, house, run, without_seconds
from torch import Tensor

from fedmira.evaluation.measure import measure_loss
from fedmira.methods import build
from fedmira.methods.base import Method

ALPHAS = (0, 0.5, 1)
RATE = 0.35  # rows move far enough for choices to differ
EVERYONE = torch.arange(4)


def method(of: Any, **choice: Any) -> Method:
    settings = {"alphas": list(ALPHAS), "graphs": ["global"], "prior": 0, **choice}
    return build("mira", {"lambda": "auto", "choice": settings}, of.cohort())


def ran(path: Path, *, rounds: int | None = None, choice: Any = None, **settings: Any) -> Ran:
    of = house(learning_rate=RATE, **settings)
    return run(of, method(of, **(choice or {})), path, rounds=rounds)


def mean_of(found: Ran, stored: Tensor, number: int) -> Tensor:
    """The mean by examples, after a round, of those that have trained by then."""
    trained = sorted({k for ids in SCHEDULE[:number] for k in ids})
    weights = torch.tensor([len(found.house.clients[k].train) for k in trained], dtype=torch.float64)
    return ((weights / weights.sum())[:, None] * stored[trained].double()).sum(0).float()


def best(found: Ran, stored: Tensor, mean: Tensor, ids: Sequence[int]) -> tuple[Tensor, list[float]]:
    """Rows of the clients `ids` with the lowest validation loss among all candidates, and their alphas."""
    federation, workplace = found.house.federation, found.house.workplace
    rows = [(1 - alpha) * stored + alpha * mean for alpha in ALPHAS]
    losses = [
        measure_loss(
            workplace.base,
            lambda some, values=values: federation.adapters(some, values[some].clone()).mask_(),  # type: ignore[misc]
            workplace.clients,
            list(ids),
            split="validation",
            cohort=8,
        )
        for values in rows
    ]
    chosen = np.array(losses, dtype=float).argmin(axis=0)
    picked = torch.stack([rows[place][k] for place, k in zip(chosen, ids, strict=True)])
    return federation.adapters(torch.tensor(ids), picked).mask_().rows, [ALPHAS[place] for place in chosen]


def test_clients_begin_each_round_and_end_the_run_with_the_candidate_that_is_best_for_them(tmp_path: Path) -> None:
    found = ran(tmp_path / "run")
    records = found.records
    assert records[0]["figures"] == {"alpha": [0, 0], "graph": [0, 0]}  # nobody else has trained
    assert "scored" not in records[0]
    taken = set()
    for number in (2, 3):
        stored = found.stored[number - 2]
        _, alphas = best(found, stored, mean_of(found, stored, number - 1), SCHEDULE[number - 1])
        assert records[number - 1]["figures"]["alpha"] == alphas
        tokens = sum(len(e.ids) for k in SCHEDULE[number - 1] for e in found.house.clients[k].validation)
        assert records[number - 1]["scored"] == len(ALPHAS) * tokens
        taken |= set(alphas)
    stored = found.stored[-1]
    rows, alphas = best(found, stored, mean_of(found, stored, len(SCHEDULE)), range(4))
    torch.testing.assert_close(found.rows, rows)
    assert found.folder.facts.figures == {"alpha": alphas, "graph": [0.0] * 4}
    assert found.folder.facts.seconds_tuning is not None
    assert alphas[3] > 0  # never sampled: from the common start to the others' mean
    assert len(taken | set(alphas)) > 1, "the test would not see a choice that is always the same"


def test_what_is_tested_and_exported_is_what_was_chosen_in_the_end(tmp_path: Path) -> None:
    found = ran(tmp_path / "run", metrics=["loss"])
    workplace = found.house.workplace
    losses = measure_loss(workplace.base, found.serve, workplace.clients, range(4), split="test", cohort=8)
    tests = {
        row["client"]: float(row["value"]) for row in found.results if row["split"] == "test" and row["round"] != "0"
    }
    assert tests == pytest.approx(dict(zip(("c0", "c1", "c2", "c3"), losses, strict=True)), rel=1e-5)


def test_validation_of_a_round_is_that_of_the_clients_own_rows_which_nobody_chose(tmp_path: Path) -> None:
    found = ran(tmp_path / "run")
    for record in found.records:
        assert record["loss_before"] == record["loss_after"]


def test_with_the_best_rounds_kept_the_last_choice_begins_at_what_was_set_aside(tmp_path: Path) -> None:
    found = ran(tmp_path / "run", evaluation={"keep": "best"}, choice={"alphas": [0]})
    aside = found.clients.aside  # type: ignore[union-attr]
    assert aside is not None
    had = aside.table.written
    assert bool(had[:3].all())
    torch.testing.assert_close(found.rows[had], aside.table[EVERYONE[had]])


@pytest.mark.parametrize("choice", [{}, {"graphs": ["learned", "global"], "prior": 6, "by": "module_group"}])
def test_a_run_that_goes_on_later_has_the_bits_of_one_that_did_not_stop(tmp_path: Path, choice: Any) -> None:
    whole = ran(tmp_path / "whole", choice=choice)
    ran(tmp_path / "parts", rounds=2, choice=choice)
    parts = ran(tmp_path / "parts", choice=choice)
    assert torch.equal(parts.rows, whole.rows)
    assert without_seconds(parts.records) == without_seconds(whole.records)
    assert parts.folder.facts.figures == whole.folder.facts.figures
