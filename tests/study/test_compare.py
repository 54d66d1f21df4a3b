"""`fedmira compare`: equal budgets, equal terms, one start; what is complete is not done again."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests import small_study

from fedmira.config.sections import Config
from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.engine.events import Event
from fedmira.errors import ConfigError, StoreError
from fedmira.methods import entry_faults
from fedmira.study.compare import compare
from fedmira.study.events import RunBegun, StepBegun
from fedmira.study.face import run
from fedmira.study.loading import check, load_compared
from fedmira.study.tuning import Candidate, best_of, first_candidates, knob_of, rates_of, second_candidates, with_values

Settings = Callable[..., dict[str, Any]]
METHODS = [{"name": "local"}, {"name": "mira", "graph": {"kind": "groups", "column": "group"}}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compare")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


def config(made: tuple[Path, Path], output: Path, **changes: Any) -> Config:
    raw = small_study.settings(*made, output, **{"methods": METHODS, "federation": {"rounds": 2}, **changes})
    return check(raw, "study.yaml")


class Seen:
    """What happened: runs that were carried out, and scorings of the untouched base."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.starts = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunBegun):
            self.runs.append(f"{event.folder.parents[1].name}/{event.facts.label}/{event.facts.seed}")
        self.starts += isinstance(event, StepBegun)


def test_every_method_gets_the_same_budget_and_the_best_by_validation_is_compared(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    seen = Seen()
    study = compare(config(made, tmp_path / "out", seeds=[3, 4]), budget=4, observer=seen)
    assert study == tmp_path / "out" / "comparison"
    told = json.loads((tmp_path / "out" / "tuning.json").read_text(encoding="utf-8"))
    assert (told["budget"], told["seed"]) == (4, 3)
    assert {label: len(one["tried"]) for label, one in told["methods"].items()} == {"local": 4, "mira": 4}
    assert seen.starts == 1, "the untouched base is scored once for all three studies"
    assert sum(run.endswith("/3") for run in seen.runs) == 4 + 4 + 2
    assert [run for run in seen.runs if run.endswith("/4")] == ["comparison/local/4", "comparison/mira/4"]
    for label, one in told["methods"].items():
        losses = [values["validation_loss"] for values in one["tried"]]
        assert len(set(losses)) > 1, "the candidates would all be the same"
        best = one["tried"][losses.index(min(losses))]
        assert one["chosen"] == {key: value for key, value in best.items() if key != "validation_loss"}
        facts = RunFolder(study / label / "seed-3").facts
        assert facts.training is not None
        assert facts.training["learning_rate"] == one["chosen"]["learning_rate"]
        assert facts.settings.get("lambda", 0.1) == one["chosen"].get("lambda", 0.1)
        assert facts.validation_loss == min(losses), "the same run, of the tuning and of the comparison"
    summary = json.loads((study / "summary.json").read_text(encoding="utf-8"))
    assert "exact_match" in json.dumps(summary)


@pytest.mark.slow
def test_the_start_is_that_of_a_study_alone(made: tuple[Path, Path], tmp_path: Path) -> None:
    compare(config(made, tmp_path / "out"), budget=2, observer=lambda event: None)
    alone = config(made, tmp_path / "alone", methods=[{"name": "local"}])
    run(alone)
    start = {
        name: [line for line in (path / "results.csv").read_text().splitlines() if line.split(",")[3] == "0"]
        for name, path in (
            ("alone", tmp_path / "alone" / "local" / "seed-3"),
            ("compared", tmp_path / "out" / "comparison" / "local" / "seed-3"),
        )
    }
    assert start["alone"] == start["compared"]


@pytest.mark.slow
def test_called_again_it_does_nothing_and_with_more_it_does_only_that(made: tuple[Path, Path], tmp_path: Path) -> None:
    compare(config(made, tmp_path / "out"), budget=2, observer=lambda event: None)
    before = small_study.outcome(tmp_path / "out" / "comparison")
    again = Seen()
    compare(config(made, tmp_path / "out"), budget=2, observer=again)
    assert (again.runs, again.starts) == ([], 0)
    more = Seen()
    wider = config(made, tmp_path / "out", methods=[*METHODS, {"name": "fedavg"}], seeds=[3, 4])
    compare(wider, budget=2, observer=more)
    assert more.runs == [
        "learning-rate/fedavg-1/3",
        "learning-rate/fedavg-2/3",
        "comparison/fedavg/3",
        "comparison/local/4",
        "comparison/mira/4",
        "comparison/fedavg/4",
    ]
    after = small_study.outcome(tmp_path / "out" / "comparison")
    assert {name: after[name] for name in before} == before
    fewer = Seen()
    compare(config(made, tmp_path / "out"), budget=2, observer=fewer)
    assert fewer.runs == []
    assert {run.path.parent.name for run in StudyFolder(tmp_path / "out" / "comparison").runs()} == {
        "local",
        "mira",
        "fedavg",
    }


def test_a_method_of_virtual_tokens_may_be_added_where_it_leaves_room_for_the_texts(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    compare(config(made, tmp_path / "out"), budget=1, observer=lambda event: None)
    more = Seen()
    virtual = {"name": "fedptuning", "virtual_tokens": 2, "hidden": 4}
    compare(config(made, tmp_path / "out", methods=[*METHODS, virtual]), budget=1, observer=more)
    assert more.runs == ["comparison/fedptuning/3"]


def test_other_settings_in_the_same_folder_are_refused_and_nothing_is_lost(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    compare(config(made, tmp_path / "out"), budget=1, observer=lambda event: None)
    before = small_study.outcome(tmp_path / "out" / "comparison")
    for other, words in (
        ({"training": {"learning_rate": 0.1}}, "training"),
        ({"methods": [{"name": "local"}, {"name": "mira", "lambda": 0.7}]}, "method 'mira'"),
    ):
        with pytest.raises(StoreError, match=words):
            compare(config(made, tmp_path / "out", **other), budget=1, observer=lambda event: None)
    assert small_study.outcome(tmp_path / "out" / "comparison") == before
    compare(config(made, tmp_path / "out", training={"learning_rate": 0.1}), budget=1, observer=print, overwrite=True)
    assert small_study.outcome(tmp_path / "out" / "comparison") != before


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bits(made: tuple[Path, Path], tmp_path: Path) -> None:
    raw = small_study.settings(*made, tmp_path / "whole", methods=METHODS, federation={"rounds": 2})
    path = small_study.save_config(tmp_path / "study.yaml", raw)
    done = small_study.command("compare", path, "--budget", 3, "-q")
    assert done.code == 0, done.err
    whole = small_study.outcome(tmp_path / "whole" / "comparison")
    for place, moment in enumerate((20, 150, 400)):
        words = ("compare", path, "--budget", 3, "-q", f"output_dir={tmp_path / f'parts{place}'}")
        assert small_study.command(*words, die_at=moment).code < 0
        ended = small_study.command(*words)
        assert ended.code == 0, ended.err
        assert not small_study.differences(whole, small_study.outcome(tmp_path / f"parts{place}" / "comparison"))


def test_the_folder_of_a_study_is_not_that_of_several(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("seeds: [0]\n")
    with pytest.raises(StoreError, match="holds a study of its own"):
        compare(config(made, tmp_path / "out"), budget=1, observer=print)


# ---------------------------------------------------------------- what is tried


def entries(*methods: Mapping[str, Any]) -> Config:
    raw = small_study.settings(Path("base"), Path("data"), Path("out"), methods=list(methods))
    return check(raw, "study.yaml")


def tried(of: Config, budget: int, losses: Callable[[Mapping[str, Any]], float]) -> list[Mapping[str, Any]]:
    """All values that are tried for the only method, where a run's loss is known."""
    label = of.methods[0].folder
    first = first_candidates(of, budget)[label]
    known = [Candidate(one.entry, one.values, losses(one.values)) for one in first]
    second = second_candidates(of, {label: known}, budget)[label]
    return [one.values for one in (*known, *second)]


@pytest.mark.parametrize("budget", [2, 3, 4, 6])
def test_a_method_with_a_setting_of_its_own_has_as_many_runs_as_one_without(budget: int) -> None:
    def flat(values: Mapping[str, Any]) -> float:
        return 1.0

    plain = tried(entries({"name": "fedavg"}), budget, flat)
    assert len(plain) == budget
    assert len({values["learning_rate"] for values in plain}) == budget
    own = tried(entries({"name": "mira"}), budget, flat)
    assert len(own) == min(budget, 6)
    assert len({tuple(sorted(values.items())) for values in own}) == len(own)


def test_values_of_the_setting_are_tried_at_the_best_learning_rate() -> None:
    values = tried(entries({"name": "mira"}), 4, lambda one: abs(one["learning_rate"] - 0.1))
    assert values[2:] == [{"learning_rate": 0.1, "lambda": 0.3}, {"learning_rate": 0.1, "lambda": 0.6}]


def test_what_an_entry_sets_itself_is_not_tuned() -> None:
    (fixed,) = entries({"name": "mira", "lambda": "auto", "training": {"learning_rate": 0.1}}).methods
    assert knob_of(fixed) is None
    assert rates_of(fixed, entries({"name": "local"}), 4) == []
    assert tried(entries({"name": "mira", "lambda": "auto"}), 4, lambda one: 1.0) == [
        {"learning_rate": 0.05 * factor} for factor in (1, 2, 0.5, 4)
    ]


def test_beside_an_optimizer_of_its_own_tuning_begins_at_the_entrys_learning_rate() -> None:
    """The config's is for another optimizer."""
    training = {"optimizer": "sgd", "learning_rate": 0.5}
    assert tried(entries({"name": "scaffold", "training": training}), 3, lambda one: 1.0) == [
        {"learning_rate": rate} for rate in (0.5, 1.0, 0.25)
    ]


def test_half_of_the_budget_goes_to_learning_rates() -> None:
    values = tried(entries({"name": "fedprox"}), 3, lambda one: abs(one["learning_rate"] - 0.1))
    assert [one["learning_rate"] for one in values] == [0.05, 0.1, 0.1]
    assert [set(one) for one in values] == [{"learning_rate"}, {"learning_rate"}, {"learning_rate", "mu"}]


def test_a_methods_own_learning_rate_is_tuned_where_it_has_one() -> None:
    (entry,) = entries({"name": "fedptuning"}).methods
    rates = rates_of(entry, entries({"name": "local"}), 3)
    assert rates == [0.05, 0.1, 0.025]
    changed = with_values(entry, {"learning_rate": 0.1}, "fedptuning-2")
    assert changed.settings == {"learning_rate": 0.1}
    assert changed.training is None


@pytest.mark.parametrize(
    ("losses", "best"),
    [([2.0, 1.0, 1.0], 1), ([math.inf, 3.0, None], 1), ([math.nan, None, math.inf], None), ([], None)],
)
def test_the_lowest_finite_loss_wins_and_of_equal_ones_the_earlier(
    losses: Sequence[float | None], best: int | None
) -> None:
    (entry,) = entries({"name": "local"}).methods
    some = [Candidate(entry, {"learning_rate": place}, loss) for place, loss in enumerate(losses)]
    found = best_of(some)
    assert (None if found is None else found.values["learning_rate"]) == best


# ---------------------------------------------------------------- what is asked for


def written(tmp_path: Path, methods: Sequence[Mapping[str, Any]]) -> Path:
    raw = small_study.settings(Path("base"), Path("data"), tmp_path / "out", methods=list(methods))
    return small_study.save_config(tmp_path / "study.yaml", raw)


def test_methods_and_seeds_are_taken_from_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, [{"name": "mira", "label": "strong", "lambda": 0.5}, {"name": "fedavg"}])
    found = load_compared(path, (), methods=["strong", "fedit"], seeds=3, budget=4)
    assert found.seeds == [3, 4, 5]
    assert [(entry.name, entry.folder) for entry in found.methods] == [
        ("local", "local"),
        ("mira", "strong"),
        ("fedit", "fedit"),
    ]
    assert found.methods[1].settings == {"lambda": 0.5}
    assert [entry.folder for entry in load_compared(path, (), methods=None, seeds=None, budget=1).methods] == [
        "local",
        "strong",
        "fedavg",
    ]


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    twice = written(tmp_path, [{"name": "mira", "label": "a"}, {"name": "mira", "label": "b"}])
    with pytest.raises(ConfigError) as caught:
        load_compared(twice, (), methods=["mira"], seeds=0, budget=0)
    for words in ("--seeds 0: need at least 1", "--budget 0", "--methods mira: the config has a, b"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="unknown method 'mirra'"):
        load_compared(twice, (), methods=["mirra"], seeds=None, budget=4)
    assert entry_faults(0, load_compared(twice, (), methods=["a"], seeds=None, budget=1).methods[1]) == []
