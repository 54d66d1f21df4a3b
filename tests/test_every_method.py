"""Bytes: what a page's formula says is what is counted. And the page on every method has its kept numbers in it."""

import functools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.pages import ROOT, load_script

import fedmira
from fedmira.bundled import MODEL_PATH
from fedmira.reports.results import read_results
from fedmira.reports.stats import summarise
from fedmira.study.face import Run

RESULTS = ROOT / "benchmarks" / "results"
STORED = sorted(RESULTS.glob("methods-*.json"))
CLIENTS = 3
SMALL = (f"data.clients.first={CLIENTS}", "federation.rounds=1", "training.local_steps=1", "evaluation.metrics=[loss]")


sys.path.insert(0, str(ROOT / "benchmarks"))
kept = load_script("benchmarks/kept.py")
every = load_script("benchmarks/methods/measure.py")
written = load_script("benchmarks/methods/page.py")
made = load_script("docs/make_methods.py")
evidence = sys.modules["evidence"]  # as the scripts have it


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> fedmira.Study:
    """Every method as it is measured, without tuning, on three clients of the demo for one round."""
    folder = tmp_path_factory.mktemp("every")
    config = every.HERE / "demo.yaml"
    return fedmira.run(fedmira.load_config(config, [f"output_dir={folder / 'study'}", *SMALL, "seeds=[0]"]))


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


def evaluate(formula: str, *, clients: int, numbers: int, a: int = 0, b: int = 0) -> float:
    """Work out `S x 0.5 x P x 4 + S x 8`. a, b: numbers of factors."""
    letters = {
        "S": clients,
        "P": numbers,
        "A": a,
        "B": b,
        "E": 0,
        "Q": 0,
    }  # in a first round nothing is handed on, nor in the base
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


def count_numbers(path: Path, factor: str = "") -> int:
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if factor in name]  # noqa: SIM118 - it is no dict
        shapes = [file.get_slice(name).get_shape() for name in names]
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.slow
def test_bytes_as_counted_are_those_of_the_formula_on_the_page(study: fedmira.Study) -> None:
    assert {run.facts.method for run in study.runs} == set(fedmira.method_names())
    wrong = []
    plain = next(run for run in study.runs if run.facts.method == "local")
    for run in study.runs:
        if run.facts.settings.get("lambda") == "auto":
            continue  # the page is about default settings
        exported = plain if run.facts.method in ("fedex_lora", "flora") else run  # else with what was added to the base
        path = next((exported.path / "adapters").glob("*/adapter_model.safetensors"))
        a, b = (count_numbers(path, factor) for factor in ("lora_A", "lora_B"))
        if run.facts.method == "rolora":  # the page has an even round, and this is an odd one
            a, b = b, a
        sizes = {"numbers": numbers(exported), "a": a, "b": b}
        wanted = [evaluate(one, clients=CLIENTS, **sizes) for one in formulas(run.facts.method)]
        wrong += [
            (run.facts.label, record["bytes_up"], record["bytes_down"], wanted)
            for record in run.rounds
            if [record["bytes_up"], record["bytes_down"]] != wanted
        ]
    assert not wrong, wrong
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
    stale = []
    for label, entry in kept.read(path)["methods"].items():
        if entry["settings"].get("lambda") == "auto":
            continue  # the page is about default settings
        for key, formula in zip(("bytes_up", "bytes_down"), formulas(entry["method"]), strict=True):
            if {"A", "B", "E", "Q"} & set(formula.split()):
                continue  # factors whose sizes are not kept, or more from round to round
            wanted = int(evaluate(formula, clients=1, numbers=padded(entry["parameters"])))
            stale += [(label, key, run[key]) for run in entry["runs"].values() if run[key] != [wanted, wanted]]
    assert stale == []


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize("name", ["demo", "ni"])
def test_a_setting_has_every_method_and_its_config_is_right(
    name: str, tmp_path: Path, shared_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "ni":
        monkeypatch.setattr(evidence, "SHARED", shared_file("data/natural_instructions/tasks.jsonl.gz").parents[2])
    config = every.load(name, tmp_path)
    assert {entry.id for entry in config.methods} == set(fedmira.method_names())
    assert config.methods[0].id == "local"
    assert config.evaluation.every == config.federation.rounds


def test_the_tasks_are_three_of_each_of_four_categories(
    tmp_path: Path, shared_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "SHARED", shared_file("data/natural_instructions/tasks.jsonl.gz").parents[2])
    every.words_of("ni", tmp_path)
    tasks = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [task["category"] for task in tasks]
    assert [kinds.count(kind) for kind in dict.fromkeys(kinds)] == [3, 3, 3, 3]
    assert len({task["task"] for task in tasks}) == 12


def test_without_the_shared_data_it_is_said_where_they_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "SHARED", tmp_path)
    with pytest.raises(SystemExit, match=r"no Natural Instructions at '.*tasks\.jsonl\.gz': set FEDMIRA_TEST_DATA"):
        every.words_of("ni", tmp_path)


# ---------------------------------------------------------------- what is kept


def measure(label: str, folder: Path, *, seeds: list[int], words: tuple[str, ...] = SMALL, budget: int = 1) -> None:
    place, path = folder / "study", folder / "kept.json"
    kept.measure(every.HERE / "demo.yaml", words, label, seeds=seeds, budget=budget, folder=place, path=path)


def test_runs_are_kept_without_their_study_and_not_made_again(tmp_path: Path) -> None:
    measure("fedavg", tmp_path, seeds=[0])
    study = read_results(tmp_path / "study" / "comparison")
    found = kept.read(tmp_path / "kept.json")
    wanted = {one.method: one for one in summarise(study, metric="loss")}
    for one in summarise(kept.results_of(found), metric="loss"):
        assert one.mean == pytest.approx(wanted[one.method].mean, rel=1e-6)
        assert one.rounds == wanted[one.method].rounds
        assert one.views == wanted[one.method].views
    shutil.rmtree(tmp_path / "study")
    measure("fedavg", tmp_path, seeds=[0])
    assert not (tmp_path / "study").exists()
    with pytest.raises(SystemExit, match=r"kept\.json is of another setting \(training\)"):
        measure("fedopt", tmp_path, seeds=[0], words=(*SMALL, "training.batch_size=8"))
    assert kept.read(tmp_path / "kept.json") == found
    shutil.rmtree(tmp_path / "study")
    measure("fedavg", tmp_path, seeds=[1])
    more = kept.read(tmp_path / "kept.json")
    assert more["methods"]["fedavg"]["runs"]["0"] == found["methods"]["fedavg"]["runs"]["0"]
    assert list(more["methods"]["fedavg"]["runs"]) == ["0", "1"]
    assert [len(kept.results_of(more, seeds).rows) for seeds in (None, [1])] == [4 * CLIENTS, 2 * CLIENTS]


@pytest.mark.slow
def test_what_was_tuned_is_kept_and_stands_in_bold_on_the_page(tmp_path: Path) -> None:
    for label in ("fedprox", "mira"):
        measure(label, tmp_path, seeds=[0, 1], budget=2)
    found = kept.read(tmp_path / "kept.json")
    fedprox, mira = (found["methods"][label] for label in ("fedprox", "mira"))
    best = min(mira["tried"], key=lambda one: one["validation_loss"])
    assert len(fedprox["tried"]) == len(mira["tried"]) == 2
    assert mira["settings"]["lambda"] == best["lambda"]
    assert written.said(mira).endswith(f"}}`, **`lambda: {best['lambda']}`**")


@pytest.mark.slow
def test_what_each_run_took_is_kept(study: fedmira.Study, tmp_path: Path) -> None:
    labels = [run.facts.label for run in study.runs]
    kept.keep(study.path, tmp_path / "kept.json", labels=labels, seeds=[0], budget=1)
    methods = kept.read(tmp_path / "kept.json")["methods"]
    views = {label: entry["view"] for label, entry in methods.items()}
    assert list(views) == labels
    assert (views["local"], views["fedavg"], views["fedavg_ft"], views["mira"]) == (
        "personal",
        "global",
        "personal",
        "personal",
    )
    assert methods["mira-product"]["settings"]["space"] == "product"
    assert methods["local"]["runs"]["0"]["bytes_up"] == [0, 0]
    for run in study.runs:
        (record,) = run.rounds
        assert methods[run.facts.label]["runs"]["0"]["bytes"] == record["bytes_up"] + record["bytes_down"]


# ---------------------------------------------------------------- the page


def entry(losses: list[float], scores: list[float], **changes: Any) -> dict[str, Any]:
    """A method that had these losses of six clients with the first seed, and half a nat more with the second."""
    where = {"cpu": "fast", "cores": 2, "threads": 1, "commit": "abc", "date": "2026-01-01"}
    costs = {"machine": where, "bytes_up": [448, 448], "bytes_down": [448, 896], "seconds": 7.4, "bytes": 1}
    runs = {str(n): {**costs, "loss": [one + n / 2 for one in losses], "rouge_l": scores} for n in (0, 1)}
    facts = {"method": "local", "settings": {}, "learning_rate": 1e-3, "view": "personal", "parameters": 100}
    return {**facts, "tried": [], "runs": runs, **changes}


def found(**more: dict[str, Any]) -> dict[str, Any]:
    tried = [{"lambda": 0.1, "validation_loss": 2.0}, {"lambda": 0.3, "validation_loss": 1.0}]
    alone = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    better = [one - 0.25 for one in alone]
    methods = {
        "local": entry(alone, [0.5] * 6),
        "untouched": entry([9.0] * 6, [0.0] * 6, method="untouched", view="global"),
        "fedavg": entry([*better[:4], 6.0, 6.0], [0.25] * 6, method="fedavg", view="global"),
        "mira": entry(
            better, [0.75] * 6, method="mira", settings={"lambda": 0.3, "graph": {"kind": "random"}}, tried=tried
        ),
        **more,
    }
    setting = {"base": "small", "dtype": "float32", "clients": list("abcdef"), "sampled": 3, "rounds": 9, "budget": 3}
    training = {"local_steps": 5, "batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-3}
    return {**setting, "metrics": ["loss", "rouge_l"], "training": training, "methods": methods}


def test_a_line_of_the_table_has_the_numbers_of_its_method() -> None:
    text = written.rows_of(found(), kept.results_of(found()))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    head, rows = lines[0], {line[0]: line for line in lines[2:]}
    assert head[2:6] == ["loss", "ROUGE-L", "better / equal / worse", "p"]
    assert rows["local"][1:] == ["", "3.750 ± 1.963", "0.500 ± 0.000", "", "", "", "448", "448 to 896", "7", "personal"]
    assert rows["mira"][1] == "**`lambda: 0.3`**, `graph: {kind: random}`"
    assert rows["mira"][2:7] == ["3.500 ± 1.963", "0.750 ± 0.000", "6 / 0 / 0", "0.094", "\u22120.250"]
    assert rows["fedavg"][4:7] == ["4 / 1 / 1", "0.75", "+1.000"]


def test_sentences_say_what_the_numbers_say() -> None:
    lines = written.lessons(found(), kept.results_of(found()))
    assert lines[0].endswith(
        ": mira (3.500), local (3.750), fedavg (3.750). With one adapter for all clients: fedavg (3.750)."
    )
    assert "better are none; worse are none; not told apart are mira (3.500), fedavg (3.750)" in lines[1]
    assert "up to 0.500 apart (local), in the median 0.500" in lines[2]
    assert lines[3] == "Lower loss than training alone, and yet lower ROUGE-L: none."
    assert lines[4] == "No client has a higher loss than alone: mira (3.500)."


def test_a_lower_loss_with_a_lower_score_is_told() -> None:
    some = found(other=entry([0.5] * 6, [0.25] * 6))
    assert "and yet lower ROUGE-L: other (0.750)." in written.lessons(some, kept.results_of(some))[3]


def test_a_data_set_that_was_not_measured_says_how_to() -> None:
    page = written.make_page({"ni": found()}, "## Notes\n")
    assert "Not measured yet; measure it by: `python benchmarks/methods/measure.py demo`." in page
    assert "6 clients, 3 a round, 9 rounds of 5 steps of 4 examples" in page
    assert page.endswith("## Notes\n")


def test_the_page_in_docs_is_what_the_kept_results_give(tmp_path: Path) -> None:
    written.main(tmp_path / "methods.md", RESULTS)
    page = (ROOT / "docs" / "results" / "methods.md").read_text(encoding="utf-8")
    assert (tmp_path / "methods.md").read_text(encoding="utf-8") == page, (
        "write it again: python benchmarks/methods/page.py"
    )
