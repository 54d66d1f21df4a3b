"""The page on `lambda: auto` is made of kept runs: of the seeds that every method has, and with its choices."""

import sys
from typing import Any

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
    found = stored()
    seeds = choosing.evidence.seeds_of(found, ["local", "fedavg", "auto"])
    assert seeds == [0, 1]
    assert (choosing.worst(found, "fedavg", seeds), choosing.always_worse(found, "fedavg", seeds)) == (4.0, 1)
    assert (choosing.worst(found, "auto", seeds), choosing.always_worse(found, "auto", seeds)) == (0.5, 1)
    assert choosing.choices([found["methods"]["auto"]["runs"][str(seed)] for seed in seeds]) == [
        {"alpha": 0.5, "learned": 0.25},
        {"alpha": 0.75, "learned": 1.0},
    ]


def test_the_page_says_what_was_chosen_scored_and_sent() -> None:
    text = choosing.page({"ni-8x4": stored()}, None)
    assert "fast, 2 cores, commit abc" in text
    assert "6 clients, 1 rounds, 2 seeds." in text
    assert "0.50 (25 %), 0.75 (100 %)." in text
    assert "`auto`: 2.50 tokens scored for each one trained on, 2.00 times the bytes of fedavg." in text
    assert "| training alone | 3.500 ± " in text
    assert "| one adapter for all | 4.167 ± " in text
    assert "What of the choice is needed" not in text


def test_ablations_are_a_table_of_their_own_with_the_seeds_that_they_have() -> None:
    found = stored()
    found["methods"]["auto-global"] = entry([1.5, *[2.0] * 5])
    text = choosing.page({"ni-8x4": found}, None)
    main, ablations = text.split("### What of the choice is needed")
    assert "auto, global only" in ablations
    assert "auto, global only" not in main
    assert "2 seeds" in main
    assert "1 seed." in ablations


def test_auto_is_said_to_be_lower_only_where_a_test_tells() -> None:
    found = stored()
    found["clients"], found["metrics"] = [str(number) for number in range(20)], ["loss"]
    for label, shift in (("local", 1.0), ("fedavg", 0.0), ("auto", 0.0)):
        found["methods"][label]["runs"] = {
            "0": {**found["methods"][label]["runs"]["0"], "loss": [number + shift for number in range(20)]}
        }
    text = choosing.finding(found, ["local", "fedavg", "auto"])
    assert text == "At p < 0.01 the loss of `auto` is lower than `local`; not told apart from `fedavg`."
