"""`fedmira sweep`: every point of a grid is the study that `run` makes of it, beside the others in one table."""

import csv
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.study.test_compare import METHODS, Seen

from fedmira.disk.folders import RunFolder
from fedmira.errors import ConfigError
from fedmira.reports.paper import available
from fedmira.study.face import run
from fedmira.study.loading import load_config
from fedmira.study.search import search
from fedmira.study.sweep import Grid, Range, plan_sweep, split_words, sweep


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of one round, and what it needs."""
    folder = tmp_path_factory.mktemp("sweep")
    base, data = small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")
    raw = small_study.settings(base, data, folder / "out", methods=METHODS, federation={"rounds": 2})
    return small_study.save_config(folder / "study.yaml", raw)


@pytest.mark.slow
def test_every_point_is_the_study_that_run_makes_of_it(written: Path, tmp_path: Path) -> None:
    points = plan_sweep(written, {"lambda": [0.1, 0.6], "r": [1, 2]}, [f"output_dir={tmp_path / 'out'}"])
    assert [point.name for point in points] == [
        "lambda-0.1_r-1",
        "lambda-0.1_r-2",
        "lambda-0.6_r-1",
        "lambda-0.6_r-2",
    ]
    seen = Seen()
    lines = sweep(points, seen)
    assert seen.starts == 1, "all points have the same untouched base"
    labels = [run.split("/")[1] for run in seen.runs]
    assert labels == ["local", "mira", "local", "mira", "mira", "mira"], "local has no lambda"
    for point, words in zip(points[1::2], (["methods.1.lambda=0.1"], ["methods.1.lambda=0.6"]), strict=True):
        alone = tmp_path / point.name
        run(load_config(written, [*words, "lora.r=2", f"output_dir={alone}"]))
        expected, found = small_study.outcome(alone), small_study.outcome(Path(point.config.output_dir))
        assert {name: expected[name] for name in found} == found
    with (tmp_path / "out" / "sweep.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(lines) == 2 * (2 + 2 + 1 + 1)
    (one,) = [
        line for line in table if (line["folder"], line["method"], line["metric"]) == (points[1].name, "mira", "loss")
    ]
    summary = json.loads((Path(points[1].config.output_dir) / "summary.json").read_text(encoding="utf-8"))
    assert repr(float(one["mean"])) in json.dumps(summary)
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
    assert stored["points"][2] == {"folder": "lambda-0.6_r-1", "lambda": 0.6, "r": 1}


@pytest.mark.slow
def test_called_again_only_what_is_new_is_run(written: Path, tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path / 'out'}"]
    sweep(plan_sweep(written, {"lambda": [0.1, 0.6]}, words), lambda event: None)
    seen = Seen()
    sweep(plan_sweep(written, {"lambda": [0.1, 0.3, 0.6]}, words), seen)
    assert seen.runs == ["lambda-0.3/mira/3"]


@pytest.mark.parametrize(
    ("words", "grid", "overrides"),
    [
        (["lambda=0,0.01,1e-2"], {"lambda": [0, 0.01, 0.01]}, []),
        (["lora.r=4,8", "seeds=[0,1]"], {"lora.r": [4, 8]}, ["seeds=[0,1]"]),
        (["learning_rate=1e-3"], {}, ["learning_rate=1e-3"]),
        (["optimizer=adamw,sgd", "choice.by=whole,module_group"],
         {"optimizer": ["adamw", "sgd"], "choice.by": ["whole", "module_group"]}, []),
    ],
)  # fmt: skip
def test_values_with_commas_between_them_are_swept(
    words: Sequence[str], grid: dict[str, list[Any]], overrides: list[str]
) -> None:
    assert split_words(words) == (grid, overrides)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, "nothing is swept"),
        ({"lamda": [0.1, 0.2]}, "lamda: no section and no method of this config has it (did you mean 'lambda'?)"),
        ({"seed": [0, 1]}, "seed"),
        ({"r": [4, -1]}, "r--1: lora.r: found -1"),
        ({"lambda": [0.1, 0.1]}, "lambda: a value is given twice"),
        ({"template": ["a b.jinja", "a-b.jinja"]}, "in a folder called template-a-b.jinja"),
        ({"training.learning_rat": [0.1, 0.2]}, "unknown key"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_run(
    written: Path, grid: dict[str, list[Any]], words: str
) -> None:
    if words == "seed":
        assert plan_sweep(written, grid)[0].config.data.seed == 0
        return
    with pytest.raises(ConfigError) as caught:
        plan_sweep(written, grid)
    assert words in str(caught.value)


@pytest.mark.slow
def test_the_command_prints_one_table_for_each_metric(written: Path, tmp_path: Path) -> None:
    words = ("sweep", written, "lambda=0.1,0.6", f"output_dir={tmp_path / 'out'}", "-q")
    ended = small_study.command(*words)
    assert ended.code == 0, ended.err
    assert ended.out.count("mira") == 2 * 2
    assert "lambda" in ended.out
    again = small_study.command(*words, "--json")
    assert [line["lambda"] for line in json.loads(again.out)] == [0.1] * 4 + [0.6] * 2
    there = (tmp_path / "out" / "figures" / "sensitivity-loss.svg").is_file()
    assert (there, f"figures: {tmp_path / 'out' / 'figures'}" in ended.err) == (available(), available())
    assert ("fedmira[figures]" in ended.err) is not available()
    refused = small_study.command("sweep", written, "lambda=0.1,zwei", f"output_dir={tmp_path / 'other'}")
    assert refused.code == 2
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- a search

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="optuna is not installed: pip install 'fedmira[optuna]'"
)
RANGES: Grid = {"lambda": Range(0.01, 0.9), "r": Range(1, 2), "optimizer": ["adamw", "sgd"]}


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("lambda=0..1", {"lambda": Range(0, 1)}),
        ("learning_rate=1e-4..1e-2", {"learning_rate": Range(1e-4, 1e-2)}),
        ("learning_rate=0.5...75", {"learning_rate": Range(0.5, 0.75)}),
        ("data.path=../there", {}),
        ("output_dir=1.2.3", {}),
    ],
)
def test_two_numbers_with_dots_between_them_are_a_range(word: str, found: dict[str, Range]) -> None:
    assert split_words([word])[0] == found


def test_a_range_that_does_not_go_up_or_is_swept_is_refused(written: Path) -> None:
    with pytest.raises(ConfigError, match=r"lambda=1\.\.0: a range is two numbers, the lower first"):
        split_words(["lambda=1..0"])
    with pytest.raises(ConfigError, match="lambda: a range is searched, with --trials N, and not swept"):
        plan_sweep(written, {"lambda": Range(0, 1)})
    assert (Range(1, 9).whole, Range(1, 9.0).whole, Range(1, 9).wide, Range(0, 9).wide) == (True, False, True, False)


@needs_optuna
def test_a_search_finds_its_studies_again_and_goes_on(written: Path, tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path / 'out'}"]
    lines, best = search(written, RANGES, words, trials=4, observer=lambda event: None)
    seen = Seen()
    again, same = search(written, RANGES, words, trials=7, observer=seen)
    assert again[: len(lines)] == lines, "the same losses, the same proposals"
    assert not {run.split("/")[0] for run in seen.runs} & {line["folder"] for line in lines}
    folders = {path.parent.name for path in (tmp_path / "out").glob("*/config.yaml")}
    assert folders == {line["folder"] for line in again}
    losses = {
        folder: RunFolder(tmp_path / "out" / folder / "mira" / "seed-3").facts.validation_loss for folder in folders
    }
    assert losses[same.name] == min(losses.values())  # type: ignore[type-var]
    assert losses[best.name] == min(losses[line["folder"]] for line in lines)  # type: ignore[type-var]
    assert all(0.01 <= line["lambda"] <= 0.9 and line["r"] in (1, 2) for line in again)


@needs_optuna
def test_a_bound_that_is_not_allowed_is_refused_before_anything_is_run(written: Path, tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match=r"r-0: lora\.r: found 0"):
        search(written, {"r": Range(0, 2)}, words, trials=2, observer=print)
    more = [*words, "methods=[{name: mira, graph: {kind: uniform}}, {name: fedavg}]"]
    with pytest.raises(ConfigError, match="one method beside 'local', and this config has: mira, fedavg"):
        search(written, {"r": Range(1, 2)}, more, trials=2, observer=print)
    assert not (tmp_path / "out").exists()


def test_without_optuna_trials_say_what_to_install(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "optuna" else find(name, *more)
    )
    with pytest.raises(ConfigError, match=r"pip install 'fedmira\[optuna\]'"):
        search(written, RANGES, [], trials=1, observer=print)


@needs_optuna
def test_the_command_says_where_the_best_is(written: Path, tmp_path: Path) -> None:
    done = small_study.command(
        "sweep", written, "lambda=0.1..0.9", f"output_dir={tmp_path / 'out'}", "--trials", 2, "-q", "--json"
    )
    assert done.code == 0, done.err
    assert len({line["folder"] for line in json.loads(done.out)}) == 2
    assert f"lowest validation loss: {tmp_path / 'out'}" in done.err
