"""The page on `lambda: auto` is made of kept runs: of the seeds that every method has, and with its choices."""

import sys
from typing import Any

import pytest
from tests.pages import ROOT, load_script

sys.path.insert(0, str(ROOT / "benchmarks"))
choosing = load_script("benchmarks/choosing/write.py")
WHERE = {"cpu": "fast", "cores": 2, "threads": 1, "commit": "abc", "date": "2026-01-01"}


def entry(*losses: list[float], **more: Any) -> dict[str, Any]:
    """A method with a list of clients' losses for every seed."""
    costs = {"machine": WHERE, "bytes": 100, "tokens": 10, "scored": 25}
    runs = {str(seed): {**costs, "loss": some, "exact_match": [0.5] * 6, **more} for seed, some in enumerate(losses)}
    return {"view": "personal", "runs": runs}


def stored() -> dict[str, Any]:
    alone = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    choices = {"choices": [[2, 1.0, 0.25], [4, 3.0, 3.0]]}
    methods = {
        "local": entry(alone, alone, [9.0] * 6),  # the third seed is of this one alone
        "fedavg": entry([7.0, *alone[1:]], [3.0, *alone[1:]]),
        "auto": entry([0.5, *alone[1:5], 6.5], [0.5, *alone[1:5], 6.5], **choices, bytes=200),
    }
    setting = {"base": "nano", "dtype": "float32", "clients": list("abcdef"), "sampled": 3, "rounds": 1}
    return {**setting, "metrics": ["loss", "exact_match"], "methods": methods}


def test_figures_are_of_the_seeds_that_every_method_has() -> None:
    found = choosing.read(stored(), "ni-8x4")
    methods = found["methods"]
    assert (found["seeds"], found["clients"]) == (2, 6)
    assert methods["local"]["loss"]["mean"] == 3.5
    assert methods["fedavg"]["loss"]["against_local"]["difference"] == pytest.approx(4 / 6)
    assert (methods["fedavg"]["worst"], methods["fedavg"]["always_worse"]) == (4.0, 1)
    assert (methods["auto"]["worst"], methods["auto"]["always_worse"]) == (0.5, 1)
    assert methods["auto"]["loss"]["against_local"]["wins"] == 1
    assert found["choices"] == [{"alpha": 0.5, "learned": 0.25}, {"alpha": 0.75, "learned": 1.0}]


def test_the_page_says_what_was_chosen_scored_and_sent() -> None:
    text = choosing.page([choosing.read(stored(), "ni-8x4")], None)
    assert "fast, 2 cores, commit abc" in text
    assert "6 clients, 1 rounds, 2 seeds." in text
    assert "0.50 (25 %), 0.75 (100 %)." in text
    assert "- auto: 2.50 tokens scored for each one trained on, 2.00 times the bytes of fedavg." in text
    assert "| one adapter for all | 4.167 ± " in text
