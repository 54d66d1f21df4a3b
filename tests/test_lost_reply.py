"""The replay of the public code's lost reply runs, says what came out, and what it says is in the right cell."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.pages import save_base

PAPER = Path(__file__).resolve().parent.parent / "benchmarks" / "paper"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPER))
        yield importlib.import_module("lost_reply")


def call(script: ModuleType, folder: Path, *others: str) -> str:
    """Run the script on what lies in a folder; return the page."""
    options = ["--clients", "6", "--rounds", "2", "--seeds", "0", "1", "--dtype", "float32"]
    options += ["--data", str(folder / "tasks.jsonl")]
    options += ["--base", str(folder / "base"), "--study", str(folder / "study")]
    options += ["--page", str(folder / "page.md"), "--json", str(folder / "found.json"), *others]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lost_reply.py", *options])
        script.main()
    return (folder / "page.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of six made-up tasks in two categories, its page and its JSON."""
    folder = tmp_path_factory.mktemp("lost")
    save_base(folder / "base")
    lines = []
    for number in range(6):
        instances = [{"input": f"{place}", "output": [f"{place + number}"]} for place in range(20)]
        task = {"task": f"t{number}", "category": f"c{number // 3}", "definition": f"Add {number}."}
        lines.append(json.dumps({**task, "instances": instances}) + "\n")
    (folder / "tasks.jsonl").write_text("".join(lines), encoding="utf-8")
    call(script, folder)
    return folder


def losses(study: Path, method: str) -> list[list[float]]:
    """Training losses of every round of both seeds."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(study.glob(f"{method}/seed-*/metrics.jsonl"))]
    return [json.loads(line)["train_loss"] for text in texts for line in text.splitlines()]


@pytest.mark.slow
def test_with_the_reply_lost_every_round_trains_as_training_alone_does(ran: Path) -> None:
    assert losses(ran / "study", "mira-lost") == losses(ran / "study", "local")
    assert losses(ran / "study", "mira") != losses(ran / "study", "local")  # a client came back: the reply tells
    found = json.loads((ran / "found.json").read_text(encoding="utf-8"))
    assert found["rounds_equal"] == [4, 4]
    assert "in 4 of\n4 rounds" in (ran / "page.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_is_scored_is_pulled_once(ran: Path) -> None:
    found = json.loads((ran / "found.json").read_text(encoding="utf-8"))
    mean = {name: one["loss"]["mean"] for name, one in found["methods"].items()}
    assert len(set(mean.values())) == 4  # lost is neither local nor mira
    around = found["around_the_merge"]
    assert around["mira-lost"][0] == around["local"][0] == around["local"][1] != around["mira-lost"][1]


@pytest.mark.slow
def test_a_seed_has_a_mean_of_its_own_and_a_pair_every_client(ran: Path) -> None:
    found = json.loads((ran / "found.json").read_text(encoding="utf-8"))
    local = found["methods"]["local"]["loss"]
    assert sum(local["seed_means"]) / 2 == pytest.approx(local["mean"])
    ((_, _, pair),) = (one for one in found["pairs"] if one[:2] == ["mira-lost", "mira"])
    assert (pair["loss"]["baseline"], pair["loss"]["pairs"]) == ("mira", 6)
    difference = found["methods"]["mira-lost"]["loss"]["mean"] - found["methods"]["mira"]["loss"]["mean"]
    assert pair["loss"]["difference"] == pytest.approx(difference)


@pytest.mark.slow
def test_no_place_on_this_machine_is_stored(ran: Path) -> None:
    for name in ("found.json", "page.md"):
        assert str(ran) not in (ran / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_study_that_is_there_is_read_and_not_run_again(script: ModuleType, ran: Path) -> None:
    page = (ran / "page.md").read_text(encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in ran.glob("study/*/*/metrics.jsonl")}
    assert call(script, ran) == page
    assert {path: path.stat().st_mtime_ns for path in ran.glob("study/*/*/metrics.jsonl")} == before
    with pytest.raises(SystemExit, match="a study with other settings; remove it, or give another --study"):
        call(script, ran, "--lambda", "0.1")


def judged(**values: Any) -> dict[str, Any]:
    pair = {"difference": 0.1, "half_width": 0.02, "wins": 1, "ties": 0, "losses": 9, "p": 0.004, "reason": ""} | values
    return {"pairs": [["mira", "local", {}], ["mira-lost", "mira", {"loss": pair}]]}


def test_the_verdict_names_the_better_and_how_many_clients_say_so(script: ModuleType) -> None:
    """The difference is lost minus used: above 0 the lost reply has the larger loss."""
    assert script.verdict(judged()).endswith("by 0.100 nats a token (of the clients 9 do better with it, 1 worse).")
    assert " is better here than with the reply lost " in script.verdict(judged())
    other = script.verdict(judged(difference=-0.2, wins=7, losses=3))
    assert (
        " is worse here than with the reply lost by 0.200 nats a token (of the clients 3 do better with it, 7 worse)."
        in other
    )
    for unclear in (judged(p=0.2), judged(p=None, reason="5 pairs")):
        assert "cannot be told apart" in script.verdict(unclear)


def test_a_comparison_has_its_numbers_in_its_cells(script: ModuleType) -> None:
    pair = judged()["pairs"][1][2]["loss"]
    assert script.judged(pair) == ["+0.100 ± 0.020", "1 / 0 / 9", "0.004"]
    assert script.judged({**pair, "p": None, "reason": "5 pairs"})[2] == "5 pairs"
    assert script.cell({"mean": 1.5, "half_width": 0.25, "seed_means": [2.0, 1.0]}) == "1.500 ± 0.250 (1.000 to 2.000)"
