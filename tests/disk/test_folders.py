"""Study and run folders: nothing saved is overwritten, and what a crash left half-written is cut back."""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.run_facts import run_facts

from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.disk.folders import NAME_COLUMN, RESULT_COLUMNS, Result, RoundRecord, RunFolder, StudyFolder, find_study
from fedmira.errors import StoreError

FACTS = run_facts()


def config() -> Config:
    return check_config(small_study.settings(Path("base"), Path("data.jsonl"), Path("out")))


def record(number: int) -> RoundRecord:
    return RoundRecord(
        round=number,
        clients=["ada"],
        answered=["ada"],
        train_loss=[1 / 3],
        steps=[2],
        loss_before=[None],
        loss_after=[0.1 + 0.2],
        validation_loss=None,
        bytes_up=4,
        bytes_down=4,
        seconds_training=0.1,
        seconds_merge=0.1,
        seconds=0.2,
        tokens=9,
    )


def result(number: int, *, split: Any = "validation", value: float | None = 0.5) -> Result:
    return Result("ada", number, "personal", split, "loss", value)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run after round 2, tested once at its end."""
    folder = RunFolder(tmp_path / "study" / "local" / "seed-3")
    folder.create(config(), FACTS, {"ada": {"folder": "ada"}})
    folder.append(None, [result(0), result(0, split="test")])
    for number in (1, 2):
        folder.append(record(number), [result(number)])
    folder.append(None, [result(2, split="test")])
    return folder


def rows(run: RunFolder) -> list[tuple[str, str]]:
    """(round, split) of results.csv."""
    lines = list(csv.reader((run.path / "results.csv").read_text().splitlines()))
    assert tuple(lines[0]) == (*RESULT_COLUMNS, NAME_COLUMN)
    return [(row[3], row[5]) for row in lines[1:]]


def rounds(run: RunFolder) -> list[int]:
    return [line["round"] for line in run.records()]


START = [("0", "validation"), ("0", "test")]


def test_a_new_run_has_the_files_that_say_what_it_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(config(), FACTS, {})
    assert {path.name for path in folder.path.iterdir()} == {
        "config.yaml",
        "clients.json",
        "run.json",
        "results.csv",
        "metrics.jsonl",
    }


def test_a_run_created_again_after_a_crash_has_its_header_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(config(), FACTS, {})
    (folder.path / "run.json").unlink()
    folder.create(config(), FACTS, {})
    assert (folder.path / "results.csv").read_text() == ",".join((*RESULT_COLUMNS, "name")) + "\n"


def test_numbers_are_written_so_that_they_come_back_to_the_bit(run: RunFolder) -> None:
    assert run.records()[0]["loss_after"] == [0.1 + 0.2]
    run.append(None, [result(2, value=0.1 + 0.2), result(2, value=None)])
    last = (run.path / "results.csv").read_text().splitlines()[-2:]
    assert last == [
        "ada,local,3,2,personal,validation,loss,0.30000000000000004,ada",
        "ada,local,3,2,personal,validation,loss,,ada",
    ]


def test_cutting_back_to_a_round_keeps_the_rounds_up_to_it_and_no_final_test(run: RunFolder) -> None:
    run.cut_back(1)
    assert rounds(run) == [1]
    assert rows(run) == [*START, ("1", "validation")]


def test_cutting_back_to_the_last_round_drops_the_final_test_only(run: RunFolder) -> None:
    run.cut_back(2)
    assert rounds(run) == [1, 2]
    assert rows(run) == [*START, ("1", "validation"), ("2", "validation")]


def test_cutting_back_to_the_start_keeps_what_was_measured_there(run: RunFolder) -> None:
    """Also the test: it is of the untouched base."""
    run.cut_back(0)
    assert rounds(run) == []
    assert rows(run) == START


def test_cutting_back_to_before_the_start_drops_everything_because_all_is_written_again(run: RunFolder) -> None:
    run.cut_back(-1)
    assert rounds(run) == []
    assert rows(run) == []


def test_a_line_that_a_crash_cut_short_is_dropped(run: RunFolder) -> None:
    for name in ("metrics.jsonl", "results.csv"):
        path = run.path / name
        path.write_bytes(path.read_bytes()[:-9])
    run.cut_back(2)
    assert rounds(run) == [1]
    assert rows(run) == [*START, ("1", "validation"), ("2", "validation")]


def test_cutting_back_twice_changes_nothing_more(run: RunFolder) -> None:
    run.cut_back(1)
    once = [(run.path / name).read_bytes() for name in ("metrics.jsonl", "results.csv")]
    run.cut_back(1)
    assert [(run.path / name).read_bytes() for name in ("metrics.jsonl", "results.csv")] == once


def test_facts_come_back_as_they_were(run: RunFolder) -> None:
    assert run.facts == FACTS
    ended = replace(FACTS, state="complete", bytes_up=7, resumed=[{"device": "cpu"}])
    run.update(ended)
    assert run.facts == ended


def test_what_is_not_known_yet_is_not_in_the_file_and_what_does_not_exist_is_null(run: RunFolder) -> None:
    written = json.loads((run.path / "run.json").read_text())
    assert list(written)[:4] == ["schema", "state", "method", "label"]
    assert written["graph_sha256"] is None
    assert not {"bytes_up", "finished", "seconds_tuning", "resumed"} & written.keys()


def test_what_an_earlier_end_wrote_is_there_until_it_is_written_again(run: RunFolder) -> None:
    run.update(replace(FACTS, state="complete", bytes_up=7))
    run.update(replace(FACTS, rounds=9))
    assert (run.facts.state, run.facts.rounds, run.facts.bytes_up) == ("running", 9, 7)


def test_keys_of_a_newer_version_are_left_alone(run: RunFolder) -> None:
    path = run.path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "watts": 3}))
    assert run.facts == FACTS
    run.update(replace(run.facts, state="failed"))
    assert json.loads(path.read_text())["watts"] == 3


def test_a_run_of_an_earlier_version_is_read(run: RunFolder) -> None:
    path = run.path / "run.json"
    earlier = {**json.loads(path.read_text()), "schema": 1}
    del earlier["template"], earlier["architecture"]
    path.write_text(json.dumps(earlier))
    assert run.facts == replace(FACTS, schema=1, template=None, architecture=None)


@pytest.mark.parametrize("key", ["label", "base_fingerprint", "graph_sha256"])
def test_a_run_without_a_key_that_all_have_is_refused(key: str, run: RunFolder) -> None:
    path = run.path / "run.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(StoreError, match=rf"run\.json' is damaged: it has no {key}; restore it from a copy"):
        _ = run.facts


def test_a_run_whose_facts_are_something_else_is_refused(run: RunFolder) -> None:
    (run.path / "run.json").write_text("[1]")
    with pytest.raises(StoreError, match=r"run\.json' holds a list"):
        _ = run.facts


def test_a_run_of_another_schema_is_refused(run: RunFolder) -> None:
    (run.path / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(StoreError, match="schema 99, this version reads 1 and 2"):
        _ = run.facts


def test_log_records_go_to_the_runs_log_during_the_run_and_not_after_it(run: RunFolder) -> None:
    log = logging.getLogger("fedmira.test")
    with run.logging():
        log.warning("inside")
    log.warning("outside")
    assert "inside" in (run.path / "log.txt").read_text()
    assert "outside" not in (run.path / "log.txt").read_text()


# ---------------------------------------------------------------- studies


def test_a_study_is_created_in_a_new_or_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "a" / "new"):
        StudyFolder(place).create(config())
        assert StudyFolder(place).config() == config()


def test_a_folder_with_a_study_is_refused_with_the_three_options(tmp_path: Path) -> None:
    StudyFolder(tmp_path).create(config())
    with pytest.raises(
        StoreError,
        match=r"already holds a study; choose another output_dir=.*--overwrite, or continue with: fedmira resume ",
    ):
        StudyFolder(tmp_path).create(config())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("foreign", ["thesis.tex", "photos/1.jpg", "local/notes.txt", "local/seed-3"])
def test_a_folder_with_other_files_is_never_overwritten(overwrite: bool, foreign: str, tmp_path: Path) -> None:
    StudyFolder(tmp_path).create(config())
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(StoreError, match="holds files that are not a study's"):
        StudyFolder(tmp_path).check_free(overwrite=overwrite)
    with pytest.raises(StoreError):
        StudyFolder(tmp_path).clear()
    assert path.read_text() == "mine"


def test_a_study_is_cleared_whole(run: RunFolder) -> None:
    study = StudyFolder(run.path.parent.parent)
    study.path.joinpath("config.yaml").write_text("x")
    study.clear()
    assert list(study.path.iterdir()) == []


def test_a_file_instead_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match="is a file"):
        StudyFolder(tmp_path / "out").create(config())
    with pytest.raises(StoreError, match="cannot be created"):
        StudyFolder(tmp_path / "out" / "study").create(config())


def test_the_remains_of_a_crash_before_the_first_rename_are_not_a_study(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.tmp").write_text("half")
    StudyFolder(tmp_path).create(config())
    assert StudyFolder(tmp_path).config() == config()


def test_a_study_in_use_is_refused_to_a_second_process(tmp_path: Path) -> None:
    with StudyFolder(tmp_path).held(), pytest.raises(StoreError, match="in use"), StudyFolder(tmp_path).held():
        pass


def test_a_study_is_free_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with StudyFolder(tmp_path).held():
            pass


def test_a_study_is_found_by_itself_or_by_one_of_its_runs(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run.path.parent.parent
    StudyFolder(study).path.joinpath("config.yaml").write_text("x")
    assert find_study(study) == (StudyFolder(study), None)
    assert find_study(run.path) == (StudyFolder(study), run)
    monkeypatch.chdir(run.path)
    assert find_study(Path()) == (StudyFolder(study), RunFolder(Path()))


def test_a_path_that_is_neither_study_nor_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"it has no run\.json and no config\.yaml"):
        find_study(tmp_path)


def test_an_empty_folder_of_the_users_is_not_a_studys(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(StoreError, match="not a study's, such as 'mine'"):
        StudyFolder(tmp_path).clear()
    assert (tmp_path / "mine").is_dir()


def test_examples_with_a_line_separator_of_unicode_come_back(run: RunFolder) -> None:
    examples = [{"prompt": "a\u2028b\x85c", "answer": "d"}, {"prompt": "e", "answer": ""}]
    run.write_examples(examples)
    assert run.examples() == examples
