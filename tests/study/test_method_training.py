"""A study whose methods train differently: each run is what it would be alone, and everything says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.small_study import ROUNDS, command, differences, outcome

import fedmira
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.disk.folders import RunFolder
from fedmira.errors import MethodError
from fedmira.reports.facts import notices, setup_facts
from fedmira.reports.record import read_study
from fedmira.study import dry_run
from fedmira.study.face import Study

CHANGED = {"learning_rate": 0.02, "local_epochs": 1, "gradient_accumulation_steps": 2}
FEDAVG = {"name": "fedavg", "training": CHANGED}
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("studies")
    inputs = small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")

    def made(name: str, **changes: Any) -> Config:
        quick = {"evaluation": {"metrics": ["loss"]}, **changes}
        return check_config(small_study.settings(*inputs, folder / name, **quick))

    return made


@pytest.fixture(scope="module")
def study(make: Make) -> Study:
    return fedmira.run(make("study", methods=[{"name": "local"}, FEDAVG]))


def of(found: dict[str, Any], method: str) -> dict[str, Any]:
    """What a study found of one method. Cards differ: they say which keys were changed."""
    return {key: value for key, value in found.items() if key.startswith(method) and not key.endswith("README.md")}


def test_each_method_is_trained_as_in_a_study_of_its_own(study: Study, make: Make) -> None:
    training = {**CHANGED, "local_steps": None}
    alone = fedmira.run(make("alone", methods=[{"name": "fedavg"}], training=training))
    assert differences(of(outcome(study.path), "fedavg"), of(outcome(alone.path), "fedavg")) == []


def test_a_runs_own_config_runs_again_to_the_same_bits(study: Study, tmp_path: Path) -> None:
    run = study.path / "fedavg" / "seed-3"
    again = fedmira.run(fedmira.load_config(run / "config.yaml", [f"output_dir={tmp_path / 'again'}"]))
    assert again.config.training_of(again.config.methods[0]).learning_rate == 0.02
    assert differences(of(outcome(study.path), "fedavg"), of(outcome(again.path), "fedavg")) == []


def test_run_json_and_cards_say_what_was_changed(study: Study) -> None:
    local, fedavg = (run.facts for run in study.runs)  # in the order of the tables
    if local.method != "local":
        local, fedavg = fedavg, local
    assert fedavg.settings["training"] == CHANGED
    assert "training" not in local.settings
    assert (fedavg.training or {})["learning_rate"] == 0.02
    assert ((local.training or {})["local_steps"], (fedavg.training or {})["local_steps"]) == (2, None)
    card = (study.path / "fedavg" / "seed-3" / "adapters" / "ada" / "README.md").read_text(encoding="utf-8")
    assert '"learning_rate": 0.02' in card


def test_the_report_says_that_the_comparison_is_not_at_equal_compute(study: Study) -> None:
    record = read_study(study.path)
    (said,) = [text for text in notices(record) if "equal compute" in text]
    assert "local: local_steps 2, batch_size 2, gradient_accumulation_steps 1" in said
    assert "fedavg: local_epochs 1, batch_size 2, gradient_accumulation_steps 2" in said
    facts = dict(setup_facts(record))
    assert (
        facts["Training of fedavg"].startswith("learning_rate 0.02, ")
        or "learning_rate 0.02" in facts["Training of fedavg"]
    )
    assert "Training of local" not in facts
    assert "equal compute" in (study.path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_another_learning_rate_is_equal_compute_and_so_are_methods_that_do_not_train(make: Make) -> None:
    methods = [{"name": "untouched"}, {"name": "local"}, {"name": "fedavg", "training": {"learning_rate": 0.02}}]
    found = fedmira.run(make("rates", methods=methods, federation={"rounds": 1}))
    assert not [text for text in notices(read_study(found.path)) if "equal compute" in text]


def test_the_plan_counts_and_shows_each_methods_training(study: Study, make: Make) -> None:
    plan = dry_run.plan_study(make("planned", methods=[{"name": "local"}, FEDAVG]))
    assert plan.training == {"fedavg": CHANGED}
    for run in study.runs:
        trained = sum(record["tokens"] for record in RunFolder(run.path).records())
        assert plan.work[run.facts.label].trained == pytest.approx(trained, rel=0.05)


def test_memory_is_planned_for_the_largest_pass_of_any_method(make: Make) -> None:
    def planned(**training: Any) -> dry_run.Plan:
        methods = [{"name": "local"}, {"name": "fedavg", "training": training}]
        return dry_run.plan_study(make("memory", methods=methods, federation={"rounds": 1}))

    plain, larger, parts = planned(), planned(batch_size=4), planned(gradient_accumulation_steps=2)
    assert larger.memory["cohort"] > plain.memory["cohort"]
    row = plain.memory["rows"] // 3  # of the three clients that `local` trains
    assert parts.memory["cohort"] - plain.memory["cohort"] == 2 * row  # a second gradient of two clients


def test_a_dry_run_prints_what_a_method_changes(make: Make, tmp_path: Path) -> None:
    raw = make("printed", methods=[{"name": "local"}, FEDAVG]).model_dump(mode="json", by_alias=True)
    config = small_study.save_config(tmp_path / "config.yaml", raw)
    ended = command("run", config, "--dry-run")
    assert ended.code == 0, ended.err
    assert "training of fedavg: " in ended.out
    assert "learning_rate 0.02" in ended.out
    assert "training of local" not in ended.out


# ---------------------------------------------------------------- a schedule and the end of a run

COSINE = {"lr_scheduler_type": "cosine", "keep_optimizer": True}


@pytest.mark.slow
def test_a_run_that_stops_in_between_goes_on_in_its_schedule(make: Make, tmp_path: Path) -> None:
    """Killed at some moment after the first checkpoint, and resumed: the bits of a run that was not."""
    whole = fedmira.run(make("whole", methods=[{"name": "mira", "lambda": 0.2}], training=COSINE))
    cut = make("cut", methods=[{"name": "mira", "lambda": 0.2}], training=COSINE)
    config = small_study.save_config(tmp_path / "cut.yaml", cut.model_dump(mode="json", by_alias=True))
    ended = command("run", config, die_at=45)
    assert ended.code == -9
    study = Path(cut.output_dir)
    done = len(RunFolder(study / "mira" / "seed-3").records())
    assert 0 < done < ROUNDS
    assert differences(outcome(fedmira.resume(study).path), outcome(whole.path)) == []


@pytest.mark.slow
def test_a_schedule_that_does_not_depend_on_the_rounds_gives_the_bits_of_a_longer_run(make: Make) -> None:
    methods, training = [{"name": "fedavg"}], {"lr_scheduler_type": "linear", "lr_scheduler_over": "steps"}
    longer = fedmira.run(make("long", methods=methods, training=training, federation={"rounds": 2}))
    short = fedmira.run(make("short", methods=methods, training=training, federation={"rounds": 1}))
    grown = fedmira.resume(short.path, ["federation.rounds=2"])
    assert differences(outcome(grown.path), outcome(longer.path)) == []
    assert grown.runs[0].facts.resumed[0].get("rounds_before") is None


def test_added_rounds_follow_the_schedule_of_the_longer_run_and_it_is_said(make: Make) -> None:
    training = {"lr_scheduler_type": "linear", "lr_scheduler_over": "rounds", "learning_rate": 0.06}
    short = fedmira.run(make("grows", methods=[{"name": "fedavg"}], training=training, federation={"rounds": 2}))
    grown = fedmira.resume(short.path, ["federation.rounds=3"])
    run = grown.runs[0]
    assert [record["notes"]["learning_rate"] for record in run.rounds] == pytest.approx([0.06, 0.03, 0.02])
    assert run.facts.resumed[0]["rounds_before"] == 2
    assert "followed a schedule of 2 rounds" in (run.path / "log.txt").read_text(encoding="utf-8")
    assert [text for text in notices(read_study(grown.path)) if "Rounds were added to a schedule" in text]


def test_a_schedule_may_not_end_above_a_methods_own_learning_rate(make: Make) -> None:
    training = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}}
    methods = [{"name": "local"}, {"name": "fedptuning", "virtual_tokens": 2, "learning_rate": 0.005}]
    with pytest.raises(MethodError, match=r"methods.1 \(fedptuning\): learning_rate = 0.005 is below training.lr_s"):
        dry_run.plan_study(make("prompts", methods=methods, training=training))


@pytest.mark.parametrize(
    ("study", "entry", "found"),
    [
        ({"optimizer": "adamw"}, {}, "optimizer: adamw"),
        ({"optimizer": "sgd", "momentum": 0.9}, {}, "momentum: 0.9"),
        ({"optimizer": "sgd"}, {"training": {"optimizer": "adamw"}}, "optimizer: adamw"),
        ({"optimizer": "sgd"}, {}, None),
        ({"optimizer": "adamw", "momentum": 0.9}, {"training": {"optimizer": "sgd", "momentum": 0}}, None),
    ],
)
def test_a_method_that_needs_plain_sgd_is_refused_any_other_optimizer_before_anything_is_written(
    study: dict[str, Any], entry: dict[str, Any], found: str | None, make: Make
) -> None:
    methods = [{"name": "local"}, {"name": "scaffold", **entry}]
    config = make("optimizers", methods=methods, training=study, federation={"rounds": 1})
    if found is None:
        dry_run.plan_study(config)
        return
    with pytest.raises(MethodError, match=rf"methods.1 \(scaffold\): .*{found}; .*optimizer: sgd, momentum: 0"):
        fedmira.run(config)
    assert not Path(config.output_dir).exists()


def test_a_methods_training_is_json_that_a_program_can_read(study: Study) -> None:
    stored = json.loads((study.path / "fedavg" / "seed-3" / "run.json").read_text(encoding="utf-8"))
    assert stored["settings"]["training"] == CHANGED
    assert set(stored["training"]) == set(type(study.config.training).model_fields)
