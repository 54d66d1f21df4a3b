"""Bytes: what a page's formula says is what is counted. And the page on every method has its stored numbers in it."""

import csv
import functools
import importlib.util
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open
from tests.pages import ROOT

import fedmira
from fedmira.bundled import MODEL_PATH
from fedmira.config.yaml_text import parse_yaml
from fedmira.study.face import Run

RESULTS = ROOT / "benchmarks" / "results"
STORED = sorted(RESULTS.glob("methods-*.json"))
CLIENTS = 3
SMALL = (f"data.clients.first={CLIENTS}", "federation.rounds=1", "training.local_steps=1", "evaluation.metrics=[loss]")


def load_script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


every = load_script("benchmarks/paper/every_method.py")
made = load_script("docs/make_methods.py")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> fedmira.Study:
    """Every method with its default settings, and MIRA's forms, on three clients of the demo for one round."""
    chosen = f"methods={json.dumps(every.entries('demo'))}"
    place = f"output_dir={tmp_path_factory.mktemp('every') / 'study'}"
    return fedmira.run(fedmira.load_config("demo", [place, *SMALL, "seeds=[0, 1]", chosen]))


# ---------------------------------------------------------------- bytes


@functools.cache
def pages() -> dict[str, str]:
    return made.pages()


def formulas(name: str) -> tuple[str, str]:
    """What the page of a method says of bytes per round: (up, down)."""
    (said,) = re.findall(r"\| bytes that travel per round \| (.*) \|", pages()[f"{name}.md"])
    if said == "nothing":
        return "0", "0"
    found = re.fullmatch(r"(.+) up, (.+) down", said)
    assert found, said
    return found[1], found[2]


def evaluate(formula: str, *, clients: int, numbers: int) -> float:
    """Work out `S x 0.5 x P x 4 + S x 8`."""
    letters = {"S": clients, "P": numbers, "E": 0, "Q": 0}  # in a first round nothing is handed on, nor in the base
    terms = [
        [letters[word] if word in letters else float(word) for word in term.split(" x ")]
        for term in formula.split(" + ")
    ]
    return sum(math.prod(term) for term in terms) if formula != "0" else 0


def padded(count: int) -> int:
    return -(-count // 16) * 16


def numbers(run: Run) -> int:
    """P, counted on what a client is handed and, for a prompt encoder, from the widths in its settings."""
    if run.facts.method == "fedptuning":
        settings = fedmira.load_method("fedptuning").Config.model_validate(run.facts.settings)
        tokens, hidden = settings.virtual_tokens, settings.hidden  # type: ignore[attr-defined]
        width = json.loads((MODEL_PATH / "config.json").read_text(encoding="utf-8"))["hidden_size"]
        return padded(tokens * width + 2 * width * hidden + hidden**2 + 2 * hidden + width)
    return padded(max(map(count_numbers, (run.path / "adapters").glob("*/adapter_model.safetensors"))))


def count_numbers(path: Path) -> int:
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - it is no dict
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.slow
def test_bytes_as_counted_are_those_of_the_formula_on_the_page(study: fedmira.Study) -> None:
    assert {run.facts.method for run in study.runs} == set(fedmira.method_names())
    wrong = []
    for run in study.runs:
        wanted = [evaluate(one, clients=CLIENTS, numbers=numbers(run)) for one in formulas(run.facts.method)]
        wrong += [
            (run.facts.label, record["bytes_up"], record["bytes_down"], wanted)
            for record in run.rounds
            if [record["bytes_up"], record["bytes_down"]] != wanted
        ]
    assert wrong == []
    assert any(run.facts.bytes_up for run in study.runs)


def test_with_a_rank_per_client_each_row_is_counted_at_its_own(tmp_path: Path) -> None:
    chosen = ["lora.ranks=[2, 4, 8]", "methods=[fedavg, flexlora, {name: mira, space: product}]"]
    done = fedmira.run(fedmira.load_config("demo", [f"output_dir={tmp_path / 'study'}", *SMALL, *chosen]))
    for run in done.runs:
        (record,) = run.rounds
        sizes = [4 * padded(count_numbers(path)) for path in run.path.glob("adapters/*/adapter_model.safetensors")]
        assert len(set(sizes)) == CLIENTS
        assert (run.facts.method, record["bytes_up"]) == (run.facts.method, sum(sizes))
        assert record["bytes_down"] == record["bytes_up"]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_bytes_are_those_of_the_formula_of_today(path: Path) -> None:
    """A method that sends less than it did, or pads more, needs to be measured again."""
    result = json.loads(path.read_text(encoding="utf-8"))
    stale = []
    for row in result["rows"]:
        wanted = [evaluate(one, clients=1, numbers=padded(row["parameters"])) for one in formulas(row["method"])]
        if [row["bytes_up"], row["bytes_down"]] != [[int(one), int(one)] for one in wanted]:
            stale.append((row["label"], row["bytes_up"], row["bytes_down"], wanted))
    assert stale == []


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize("what", ["demo", "ni"])
def test_a_study_has_every_method_and_its_config_is_right(
    what: str, tmp_path: Path, shared_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "ni":
        monkeypatch.setattr(every, "SHARED", shared_file("data/natural_instructions/tasks.jsonl.gz").parents[2])
    config = every.load(what, 2, 3, tmp_path)
    assert {entry.id for entry in config.methods} == set(fedmira.method_names())
    assert config.methods[0].id == "local"
    assert (config.federation.rounds, config.seeds) == (2, [0, 1, 2])
    assert list(config.evaluation.metrics) == list(every.METRICS[what])


def test_the_tasks_are_three_of_each_of_four_categories(
    tmp_path: Path, shared_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every, "SHARED", shared_file("data/natural_instructions/tasks.jsonl.gz").parents[2])
    tasks = [json.loads(line) for line in every.save_tasks(tmp_path).read_text(encoding="utf-8").splitlines()]
    kinds = [task["category"] for task in tasks]
    assert [kinds.count(kind) for kind in dict.fromkeys(kinds)] == [3, 3, 3, 3]
    assert len({task["task"] for task in tasks}) == 12


def test_without_the_shared_data_it_is_said_where_they_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every, "SHARED", tmp_path)
    with pytest.raises(SystemExit, match=r"no Natural Instructions at '.*tasks\.jsonl\.gz': set FEDMIRA_TEST_DATA"):
        every.save_tasks(tmp_path)


# ---------------------------------------------------------------- what is found


@pytest.mark.slow
def test_a_row_holds_the_means_of_results_csv(study: fedmira.Study) -> None:
    rows = {row["label"]: row for row in every.summaries(study, ["loss"])}
    assert list(rows) == list(dict.fromkeys(run.facts.label for run in study.runs))
    by_seed: dict[str, list[float]] = {}
    for run in study.runs:
        with (run.path / "results.csv").open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if (line["split"], line["round"]) == ("test", "1")]
        assert len(lines) == CLIENTS
        by_seed.setdefault(run.facts.label, []).append(statistics.mean(float(line["value"]) for line in lines))
    for label, means in by_seed.items():
        assert rows[label]["scores"]["loss"]["seeds"] == pytest.approx(means)
        assert rows[label]["scores"]["loss"]["mean"] == pytest.approx(statistics.mean(means))
    assert rows["local"]["against"] is None
    assert sum(rows["fedavg"]["against"][key] for key in ("wins", "ties", "losses")) == CLIENTS


@pytest.mark.slow
def test_a_row_holds_what_its_runs_have_recorded(study: fedmira.Study) -> None:
    rows = {row["label"]: row for row in every.summaries(study, ["loss"])}
    views = {label: row["view"] for label, row in rows.items()}
    assert (views["local"], views["fedavg"], views["fedavg_ft"], views["mira-knn"]) == (
        "personal",
        "global",
        "personal",
        "personal",
    )
    assert rows["mira-product"]["settings"]["space"] == "product"
    assert rows["local"]["bytes_up"] == [0, 0]
    assert rows["fedavg"]["seeds"] == [0, 1]


# ---------------------------------------------------------------- the page


def row(label: str, losses: list[float], *, p: float | None = None, **changes: Any) -> dict[str, Any]:
    mean = statistics.mean(losses)
    against = None if p is None else {"wins": 1, "ties": 2, "losses": 3, "difference": mean - 2, "p_holm": p}
    one = {"label": label, "method": label.partition("-")[0], "settings": {}, "view": "personal", "parameters": 100}
    one |= {"bytes_up": [448, 448], "bytes_down": [448, 448], "seeds": [0, 1]}
    return one | {"scores": {"loss": {"mean": mean, "seeds": losses}}, "against": against} | changes


def result(**changes: Any) -> Mapping[str, Any]:
    rows = [
        row("local", [2.0, 2.0], bytes_up=[0, 0], bytes_down=[0, 0]),
        row("fedavg", [2.25, 2.75], p=0.01, view="global"),
        row("fedptuning", [3.0, 3.0], p=0.2, view="global", bytes_up=[224, 448]),
        row("mira", [1.5, 1.75], p=0.03, settings={"lambda": 0.25, "graph": {"kind": "random"}}),
        row("mira-product", [1.5, 1.5], p=0.3),
        row("mira-exact", [1.75, 1.75], p=1.0),
        *(row(f"mira-{graph}", [1.875, 1.875], p=1.0) for graph in ("random", "uniform", "knn", "learned")),
        *(row(name, [2.125, 2.125], p=1.0) for name in ("fedavg_ft", "flexlora", "groupavg", "pooled")),
        row("fedsophia", [2.25, 2.25], p=1.0, view="global"),
    ]
    training = {"local_steps": 5, "batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-3}
    facts = {
        "base": "small",
        "dtype": "float32",
        "clients": 6,
        "sampled": 3,
        "rounds": 9,
        "threads": 1,
        "training": training,
    }
    told = {"where": "commit abc", "command": "python it", "seconds": 120.0, "seeds": [0, 1], "metrics": ["loss"]}
    return {**facts, **told, "rows": rows, **changes}


def test_a_line_of_the_table_has_the_numbers_of_its_row() -> None:
    text = every.table(result()["rows"], ["loss"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    head, found = lines[0], {line[0]: line for line in lines[2:]}
    assert head[2:6] == ["loss", "better / equal / worse", "p", "bytes up"]
    assert found["fedavg"][2:] == ["2.500 (2.250 to 2.750)", "1 / 2 / 3", "0.01", "448", "448", "global"]
    assert found["local"][3:5] == ["", ""]
    assert found["fedptuning"][5] == "224 to 448"
    assert found["mira"][1] == "`lambda: 0.25, graph: {kind: random}`"
    assert parse_yaml(f"{{{found['mira'][1].strip('`')}}}", "settings") == result()["rows"][3]["settings"]


def test_sentences_say_what_the_numbers_say() -> None:
    lines = every.lessons(result())
    assert lines[0].startswith("Lowest loss, `pooled` and `untouched` left out here")
    assert lines[0].endswith(": mira-product (1.500). With one adapter for all clients: fedsophia (2.250).")
    judged = "better are mira (1.625); worse are fedavg (2.500); not told apart are mira-product (1.500), mira-exact"
    assert judged in lines[1]
    assert "up to 0.500 apart (fedavg), in the median 0.000" in lines[2]
    assert lines[3].endswith(
        "mira (1.625), mira-random (1.875), mira-uniform (1.875), mira-knn (1.875), mira-learned "
        "(1.875). A mean within the groups in the place of a pull: groupavg (2.125)."
    )
    assert lines[4].endswith("MIRA's loss changes by -0.125 with `space: product` and by +0.125 with `solver: exact`.")
    assert lines[5].endswith("pooled (2.125), fedavg_ft (2.125), flexlora (2.125), fedavg (2.500).")
    assert lines[6].startswith("A prompt encoder is 1.00 times what LoRA at this rank sends; losses: fedavg (2.500), ")
    assert lines[7].startswith(
        "Fed-Sophia at FedAvg's learning rate: 2.250 against 2.500. [Rounds to a loss](fedsophia.md)"
    )


def test_a_lower_loss_with_a_lower_score_is_told() -> None:
    scores = {"local": 0.5, "mira": 0.25, "mira-product": 0.75, "fedavg": 0.1}
    rows = [
        {**one, "scores": {**one["scores"], "rouge_l": {"mean": scores[one["label"]], "seeds": []}}}
        for one in result()["rows"]
        if one["label"] in scores
    ]
    assert every.scores_apart(rows, "rouge_l") == "Lower loss than training alone, and yet lower ROUGE-L: mira (1.625)."


def test_a_data_set_that_was_not_measured_says_how_to(tmp_path: Path) -> None:
    page = every.make_page({"ni": result()})
    assert "## The demo\n\nNot measured yet; measure it by: `python benchmarks/paper/every_method.py demo`." in page
    assert "6 clients, 3 a round, 9 rounds of 5 steps of 4 examples" in page


def test_the_page_in_docs_is_what_the_stored_results_give(tmp_path: Path) -> None:
    every.main(every.What.page, results=RESULTS, page=tmp_path / "methods.md")
    kept = (ROOT / "docs" / "results" / "methods.md").read_text(encoding="utf-8")
    assert (tmp_path / "methods.md").read_text(encoding="utf-8") == kept, (
        "write it again: python benchmarks/paper/every_method.py page"
    )
