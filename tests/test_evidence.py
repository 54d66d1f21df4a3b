"""The pages of evidence: their studies load, and what their tables say follows from the runs that are kept."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.pages import ROOT, load_script

import fedmira

sys.path.insert(0, str(ROOT / "benchmarks"))
evidence = load_script("benchmarks/evidence.py")
PAGES = {
    name: load_script(f"benchmarks/{name}.py")
    for name in ("choosing/write", "paper/losses", "ranks/write", "questions/write", "privacy/write")
}
WHERE = {"cpu": "fast", "cores": 2, "threads": 1, "commit": "abc", "date": "2026-01-01"}
MINUS = "\N{MINUS SIGN}"
ALONE = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def entry(shift: float, seeds: int = 2, **more: Any) -> dict[str, Any]:
    """A method whose clients' losses are those of training alone and `shift`."""
    curves = {"train": [[turn, 9.0 - turn / 10] for turn in range(1, 61)], "validation": [[0, 5.0], [6, 4.0 + shift]]}
    run = {"machine": WHERE, "bytes": 100, "tokens": 10, "scored": 25, "curves": curves, "epsilon": 2.5, **more}
    scores = {"rouge_l": [0.25] * 8, "exact_match": [0.5] * 8}
    runs = {str(seed): {**run, **scores, "loss": [value + shift for value in ALONE]} for seed in range(seeds)}
    return {"view": "personal", "learning_rate": 0.002, "runs": runs}


def stored(**shifts: float) -> dict[str, Any]:
    """A study with methods whose losses lie that far from training alone."""
    return {
        "base": "nano",
        "dtype": "float32",
        "clients": list("abcdefgh"),
        "groups": ["x"] * 4 + ["y"] * 4,
        "examples": [12] * 8,
        "sampled": 3,
        "rounds": 60,
        "metrics": ["loss", "rouge_l"],
        "training": {"local_steps": 3, "batch_size": 4, "learning_rate": 0.002},
        "budget": 3,
        "methods": {"local": entry(0.0), **{label.replace("_", "-"): entry(by) for label, by in shifts.items()}},
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_study_of_a_page_loads_with_its_methods(name: str) -> None:
    for study in PAGES[name].STUDIES:
        config = fedmira.load_config(study.config, study.words)
        labels = [one.folder for one in config.methods]
        assert set(study.labels) | set(study.more) <= set(labels), study.name
        assert (study.labels or labels)[0] == "local"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*/full*.yaml")), ids=lambda path: path.stem)
def test_the_full_settings_load(path: Path) -> None:
    config = fedmira.load_config(path)
    assert config.methods[0].name == "local"
    assert not Path(config.model.base_model).exists()  # a name on the hub


def test_the_page_of_losses_says_from_when_on_one_curve_is_below_another() -> None:
    losses = PAGES["paper/losses"]
    found = stored(fedit=0.5, mira_paper=0.25, mira_strong=0.75)
    assert losses.crossing(found, "mira-paper", "fedit") == "from round 6 on"  # equal before
    assert losses.crossing(found, "mira-strong", "fedit") == "never"
    text = losses.page({"ni": found})
    assert "| x | **2.500** | 3.000 | 2.750 | 3.250 |" in text
    assert "| y | **6.500** | 7.000 | 6.750 | 7.250 |" in text
    assert "8 / 0 / 0" in text  # than FedIT
    assert losses.trained(found, "fedit", 6) == pytest.approx(9.0 - 3.5 / 10)


def test_mixed_ranks_are_compared_with_flexlora_of_the_smallest_rank() -> None:
    ranks = PAGES["ranks/write"]
    found = {"smallest": stored(flexlora=0.5, fedavg=1.0), "uniform": stored(flexlora=0.25, hetlora=0.75)}
    text = ranks.page(found)
    assert "| uniform | flexlora | 4.750 ± " in text
    assert f"| {MINUS}0.250 | 8 / 0 | " in text
    assert "| 0.250 | 0 / 8 | " in text  # hetlora
    assert "| 8 for all | flexlora | 5.000 ± " in text


def test_questions_compare_a_graph_with_its_permutation_and_list_where_it_hurts() -> None:
    questions = PAGES["questions/write"]
    found = {
        "graphs": stored(task=-0.5, task_shuffled=0.25, fedavg=1.0, product=-0.75),
        "rank-8": stored(task=-0.5, pull_001=0.0, pull_01=-0.1, pull_1=0.5),
        "clients-10": stored(fedavg=1.0, auto=-0.25),
    }
    for one in found["clients-10"]["methods"].values():
        one["runs"]["1"]["never"] = [0, 7]
    text = questions.page(found)
    assert f"- the same task (the truth): {MINUS}0.750 nats against its own permutation, better for 8 of 8" in text
    assert "| 8 | 4.500 | 4.500 | 4.400 * | 4.000 * | 5.000 * |" in text
    assert "| graphs | fedavg | 100 % | 1.000 |" in text
    assert "clients 10: 8 clients, 2 seeds." in text
    assert "| 10 | 2 | 4.500 | 5.500 | 4.250 |  |" in text  # never sampled


def test_loss_and_epsilon_are_by_noise() -> None:
    privacy = PAGES["privacy/write"]
    found = {"none": stored(fedavg=-0.25, mira_05=-0.5), "1": stored(fedavg=-0.5, mira_05=0.25)}
    for one in found["none"]["methods"].values():
        for run in one["runs"].values():
            del run["epsilon"]
    for run in found["1"]["methods"]["fedavg"]["runs"].values():
        run["epsilon"] = 0.0  # of one that trains nobody
    text = privacy.page(found)
    assert "| none | \N{INFINITY} | training alone | 4.500 ± " in text
    assert "| 1 | 2.50 | training alone | " in text
    assert f"- noise 1: FedAvg, {MINUS}0.500 nats against training alone" in text
    assert "the others bring as much as without any: 0.500 nats beside 0.500." in text
    assert "of its 12\nexamples" in text
    row = {"unit": "c", "title": "many", "parameters": 1024, "steps": 5, "seconds_plain": [1.0, 2.0], "ratio": 3.5}
    spent = {"machine": {"cpu": "fast", "cores": 2, "commit": "abc"}, "rows": [{**row, "spread": [3.0, 4.0]}]}
    assert "| (c) many | 1,024 | 5 | 2 | 3.50 | 3.00 to 4.00 |" in privacy.page(found, spent)


def test_tasks_are_taken_in_turn_from_each_category(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data/natural_instructions"
    folder.mkdir(parents=True)
    rows = [{"category": category, "task": f"{category}{number}"} for category in "abc" for number in range(3)]
    with gzip.open(folder / "tasks.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evidence, "SHARED", tmp_path)

    def names(**options: Any) -> list[str]:
        path = evidence.save_tasks(tmp_path / "out" / "tasks.jsonl", **options)
        return [json.loads(line)["task"] for line in path.read_text().splitlines()]

    assert names(categories=2, tasks=2) == ["a0", "b0", "a1", "b1"]
    assert names(categories=2, tasks=2, in_turn=False) == ["a0", "a1", "b0", "b1"]
    assert names(categories=3, tasks=2, most=4) == ["a0", "b0", "c0", "a1"]


def test_newcomers_are_compared_with_training_alone_each_by_its_mean_over_seeds() -> None:
    newcomers = load_script("benchmarks/questions/newcomers.py")
    rows = [
        {"method": "auto", "seed": seed, "client": client, "examples": 20, "steps": 8}
        | {"losses": {"untouched base": 4.0, "start": 3.0, "alone": 2.0 + seed, "adapted": 1.5 + seed + shift}}
        for seed in (0, 1)
        for client, shift in (("a", 0.0), ("b", 1.0), ("c", 0.1))
    ]
    text = newcomers.page({"machine": WHERE, "rows": rows})
    assert "| `lambda: auto`: its own choice of the means | 4.000 | 3.000 | 2.500 | 2.367 | 2 of 3 | " in text
    assert "with 20 training examples" in text
    assert "3\nnewcomers" in text
