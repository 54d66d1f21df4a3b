"""Notices, data, sampling, costs, lists of clients and examples; and how figures and names are written."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.reports.hand_made import page, rows, six

from fedmira.disk.run_facts import RunFacts
from fedmira.reports import facts, wording
from fedmira.reports.record import ShownFacts, read_study


def write_rounds(run: Path, *rounds: list[str], **more: Any) -> None:
    """Write metrics.jsonl with the sampled clients of each round."""
    lines = [json.dumps({"round": turn, "clients": names, **more}) for turn, names in enumerate(rounds, start=1)]
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def client(train: int, test: int = 1, **more: Any) -> dict[str, Any]:
    return {"examples": {"train": train, "validation": 1, "test": test}, "trained_tokens": 10 * train, **more}


def test_a_report_asks_run_json_for_keys_that_it_has() -> None:
    assert set(ShownFacts._fields) <= {field.name for field in fields(RunFacts)}


# ---------------------------------------------------------------- notices


def test_a_sound_study_has_no_notice(pair: Path):
    assert facts.notices(read_study(pair)) == []


def test_never_sampled_clients_are_told(study: Path, write_run):
    write_rounds(write_run("local", rows({"a": 1, "b": 2, "c": 3}), clients=3), ["a"], ["a", "b"])
    assert facts.notices(read_study(study))[0].startswith("1 client was never sampled (most, over the seeds).")


def test_different_numbers_of_rounds_are_told(study: Path, write_run):
    write_run("local", rows({"a": 1}, number=2))
    write_run("mira", rows({"a": 1}, number=3))
    assert facts.notices(read_study(study)) == ["The runs were tested after different numbers of rounds: 2, 3."]


def test_clients_without_a_value_are_told(study: Path, write_run):
    write_run("local", rows({"a": 1, "b": None}))
    assert facts.notices(read_study(study))[0].startswith("1 client without a value (n/a; no test example, or not")


def test_refused_uploads_are_told(study: Path, write_run):
    write_run("local", rows({"a": 1}), refused_uploads=2)
    assert facts.notices(read_study(study)) == ["2 uploads refused, and not merged: see log.txt of the run."]


def test_refused_replies_are_told(study: Path, write_run):
    write_run("local", rows({"a": 1}), refused_replies=0)
    assert facts.notices(read_study(study)) == []
    write_run("mira", rows({"a": 1}), refused_replies=3)
    assert facts.notices(read_study(study)) == ["3 replies refused by clients whose loss got worse."]


def test_one_seed_is_said_to_be_one(study: Path, write_run):
    write_run("local", rows({"a": 1}))
    assert facts.basis(read_study(study)).startswith("Test split after 2 rounds; 1 client; one seed (0): chance")


def test_several_seeds_are_counted(study: Path, write_run):
    for seed in (0, 1):
        write_run("local", rows({"a": 1}), seed=seed)
    assert facts.basis(read_study(study)).startswith("Test split after 2 rounds; 1 client; 2 seeds.")


# ---------------------------------------------------------------- data and sampling


def test_data_is_counted_over_clients(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    table = {
        "a": client(10, group="x", prompts_cut=2, dropped=1),
        "b": client(30, group="y", prompts_cut=1),
        "c": client(20, test=0, group="y"),
    }
    (run / "clients.json").write_text(json.dumps(table))
    found = dict(facts.data_facts(read_study(study)))
    assert found == {
        "Clients": "3 in 2 groups",
        "Examples": "60 to train on (10 to 30 a client), 3 for validation, 2 for the test",
        "Tokens with a loss": "600 in the training split",
        "Cut to fit": "3 prompts cut at their start (2 clients); 1 examples dropped (1 client)",
        "No test example": "1 client: c",
    }


def test_nothing_cut_is_said_too(study: Path, write_run):
    (write_run("local", rows({"a": 1})) / "clients.json").write_text(json.dumps({"a": client(10)}))
    assert dict(facts.data_facts(read_study(study)))["Cut to fit"].startswith("nothing")


def test_sampling_is_told_seed_by_seed(study: Path, write_run):
    frame = rows({"a": 1, "b": 2, "c": 3})
    write_rounds(write_run("local", frame, sampled=2), ["a", "b"], ["a", "b"])
    write_rounds(write_run("local", frame, seed=1, sampled=2), ["a", "b"], ["c", "b"])
    assert facts.sampling_facts(read_study(study)) == [
        ("Seed 0", "2 of 3 clients a round, 2 rounds; each took part 0 to 2 times, 1.3 on average; never: 1 (c)"),
        (
            "Seed 1",
            "2 of 3 clients a round, 2 rounds; each took part 1 to 2 times, 1.3 on average; nobody was left out",
        ),
    ]


def test_settings_are_those_of_the_first_run(study: Path, write_run):
    fields = {"base_model": "org/base", "base_fingerprint": "0123456789abcdef", "parameters": 29184, "threads": 2}
    write_run("local", rows({"a": 1}), device="cpu", versions={"torch": "2.13.0"}, started="2026-01-02", **fields)
    assert facts.setup_facts(read_study(study)) == [
        ("Base model", "org/base, sha256 0123456789ab…"),
        ("Adapter", "29,184 parameters a client"),
        ("Computed on", "cpu, threads: 2"),
        ("Versions", "torch 2.13.0"),
        ("Begun", "2026-01-02"),
    ]


# ---------------------------------------------------------------- long lists


def test_few_clients_are_all_listed(study: Path, write_run):
    write_run("local", rows(six(*range(300))))
    table = facts.client_tables(read_study(study))[0]
    assert (len(table.lines), table.note) == (300, "")


def test_of_many_clients_the_two_ends_are_listed(study: Path, write_run):
    write_run("local", rows(six(*[1000.0] * 301)))
    write_run("mira", rows(six(*range(301))))
    table = facts.client_tables(read_study(study))[0]
    listed = [name for name, _, _ in table.lines]
    assert (len(listed), listed[0], listed[24], listed[25], listed[-1]) == (50, "c300", "c276", "c24", "c0")
    assert table.note.startswith(
        "Of 301 clients, those with the 25 smallest and the 25 greatest gains of mira over local"
    )


def test_of_many_clients_without_gains_the_first_are_listed(study: Path, write_run):
    write_run("local", rows(six(*range(301))))
    table = facts.client_tables(read_study(study))[0]
    assert [name for name, _, _ in table.lines] == [f"c{place}" for place in range(50)]


def test_a_client_is_called_by_its_name_and_not_by_its_id(study: Path, write_run):
    run = write_run("local", rows({"st-mary": 1}))
    (run / "clients.json").write_text(json.dumps({"st-mary": {"name": "St. Mary's"}}))
    assert page(study).table("Test split at the last round").lines[1][0] == "St. Mary's"


def test_examples_are_shown_and_very_long_ones_are_cut(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    one = {"client": "a", "prompt": "Say <b>", "references": ["x", "y"], "base": "n" * 5000, "answer": "<i>"}
    (run / "examples.jsonl").write_text(json.dumps(one) + "\n")
    read = page(study)
    table = read.table("Answers to example 1 of a")
    assert table.lines[1:] == [["reference", "x | y"], ["untouched base", "n" * 4000 + " […]"], ["local", "<i>"]]
    assert not read.all("b", "i")


def test_examples_of_many_clients_are_thinned_evenly(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    lines = [
        json.dumps({"client": f"c{place:02}", "prompt": "p", "references": [], "base": "", "answer": ""})
        for place in range(90)
    ]
    (run / "examples.jsonl").write_text("\n".join(lines))
    kept, said = facts.shown_examples(read_study(study))
    assert (len(kept), next(iter(kept)), list(kept)[-1]) == (30, "c00", "c89")
    assert said.startswith(" 30 of 90 clients")


# ---------------------------------------------------------------- wording


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "n/a"),
        (math.nan, "n/a"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (0.0, "0.000"),
        (1.23456, "1.235"),
        (0.00012, "1.2e-04"),
        (0.0006, "0.001"),
        (-0.25, "-0.250"),
    ],
)
def test_numbers_are_short_and_never_a_false_zero(value: float | None, said: str):
    assert wording.number(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.0, "+1.000"), (-1.0, "\u22121.000"), (0.0, "0.000"), (math.nan, "n/a"), (-math.inf, "\u2212∞")],
)
def test_differences_carry_their_sign(value: float, said: str):
    assert wording.signed(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "n/a"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (1e18, "1000000.0 TB")],
)
def test_bytes_have_a_unit(value: float | None, said: str):
    assert wording.size(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(None, "n/a"), (3.25, "3.2 s"), (61, "1 min 1 s"), (7260, "2 h 1 min"), (math.inf, "n/a")]
)
def test_times_have_a_unit(value: float | None, said: str):
    assert wording.seconds(value) == said


def test_a_p_value_stays_on_one_line():
    assert wording.unbroken("better (p < 0.0001), so") == "better (p\u00a0<\u00a00.0001), so"


def test_long_lists_of_names_end_with_a_count():
    assert wording.listed(["a", "b", "c"], 2) == "a, b and 1 more"


def test_a_name_is_cut_with_a_mark():
    assert (wording.short("abcdef", 6), wording.short("abcdefg", 6)) == ("abcdef", "abcde…")


@pytest.mark.parametrize(
    ("name", "said"), [("iiiiiiiiii", "iiiiiiiiii"), ("mmmmmmmmmm", "mmm…"), ("北北北北北", "北北…")]
)
def test_a_name_is_cut_by_the_room_its_letters_take(name: str, said: str):
    assert wording.fitted(name, 4) == said


def test_names_in_other_scripts_are_left_alone():
    assert wording.clean("עברית नमस्ते e\u0301 👩\u200d🔬") == "עברית नमस्ते e\u0301 👩\u200d🔬"
