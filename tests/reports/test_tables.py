"""Tables and figures for papers: the numbers of the page, in files that other programs read."""

import csv
import io
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.reports.hand_made import page
from tests.reports.made_study import make_study
from tests.small_study import command

from fedmira.disk.folders import Result, StudyFolder
from fedmira.errors import ConfigError
from fedmira.graphs.graph import group_graph
from fedmira.reports import paper
from fedmira.reports.figures import write_figures
from fedmira.reports.record import StudyRecord, read_study
from fedmira.reports.render import render_page, write_pages
from fedmira.reports.tables import COLUMNS, results_csv, table_text
from fedmira.reports.wording import number, signed

CLIENTS = [f"c{place}" for place in range(8)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, seeds 0, 1 and 2; seed s adds s / 10 to each client's final score of local."""
    path = make_study(tmp_path_factory.mktemp("made") / "study", CLIENTS, graph=group_graph(list("aabbccdd")))
    folder = StudyFolder(path)
    config = folder.config()
    folder.rewrite(config.model_copy(update={"seeds": [0, 1, 2]}))
    first = folder.run("local", 0)
    rows = [row for row in read_study(path).results.rows if row.method == "local"]
    for seed in (1, 2):
        run = folder.run("local", seed)
        clients = json.loads((first.path / "clients.json").read_text())
        run.create(config, replace(first.facts, seed=seed), clients)
        moved = [row._replace(value=row.value + seed / 10) for row in rows]
        run.append(None, [Result(r.client, r.round, r.view, r.split, r.metric, r.value) for r in moved])
    return path


@pytest.fixture(scope="module")
def record(study: Path) -> StudyRecord:
    return read_study(study)


def test_every_seed_has_its_mean_and_together_they_have_a_deviation(record: StudyRecord) -> None:
    for metric in record.metrics:
        local = next(item for item in metric.methods if item.method == "local")
        assert list(local.by_seed) == [0, 1, 2]
        assert local.by_seed[2] - local.by_seed[0] == pytest.approx(0.2)
        assert local.seed_deviation == pytest.approx(statistics.stdev(local.by_seed.values()))
        assert local.seed_deviation == pytest.approx(0.1)
        assert local.mean == pytest.approx(statistics.mean(local.by_seed.values()))
        once = next(item for item in metric.methods if item.method == "mira")
        assert (list(once.by_seed), once.seed_deviation) == ([0], None)


def test_summary_and_page_have_the_spread_over_seeds(study: Path, record: StudyRecord) -> None:
    write_pages(record)
    methods = json.loads((study / "summary.json").read_text())["metrics"]["loss"]["methods"]
    local = next(item for item in methods if item["method"] == "local")
    assert set(local["by_seed"]) == {"0", "1", "2"}
    assert local["seed_deviation"] == pytest.approx(0.1)
    assert "SD over seeds" in render_page(record)
    assert "sd over seeds" in command("report", study).out


def test_with_one_seed_there_is_no_such_column(tmp_path: Path) -> None:
    record = read_study(make_study(tmp_path / "study", CLIENTS))
    assert "SD over seeds" not in render_page(record)
    assert "SD over seeds" not in table_text(record, "md")


def test_the_results_of_a_study_are_those_of_its_runs_one_after_another(study: Path, record: StudyRecord) -> None:
    write_pages(record)
    whole = list(csv.reader((study / "results.csv").read_text().splitlines()))
    parts = [list(csv.reader(path.read_text().splitlines())) for path in study.glob("*/seed-*/results.csv")]
    assert whole[0] == parts[0][0]
    assert sorted(whole[1:]) == sorted(row for part in parts for row in part[1:])
    assert results_csv(record) == (study / "results.csv").read_text()


def test_the_table_as_csv_has_every_digit_of_the_summary(record: StudyRecord) -> None:
    lines = list(csv.DictReader(io.StringIO(table_text(record, "csv"))))
    items = [(metric.name, item) for metric in record.metrics for item in metric.lines]
    assert len(lines) == len(items) == 7
    assert tuple(lines[0]) == COLUMNS
    for line, (metric, item) in zip(lines, items, strict=True):
        assert (line["metric"], line["method"]) == (metric, item.method)
        for name in ("mean", "half_width", "seed_deviation", "worst", "lowest_tenth"):
            assert line[name] == ("" if (value := getattr(item, name)) is None else repr(value))
        if item.against:
            assert [line["wins"], line["p_holm"]] == [str(item.against.wins), repr(item.against.p_holm)]
            assert [line["p"], line["effect"]] == [repr(item.against.p), repr(item.against.effect)]
        assert line["weighted_mean"] == repr(item.weighted_mean)
    assert {(line["bytes"], line["seconds"]) for line in lines if line["method"] == "mira"} == {("48000.0", "4.5")}


def test_a_run_costs_the_bytes_of_both_directions_and_a_method_the_mean_of_its_runs(study: Path) -> None:
    # make_study: 6 rounds with 4 clients, 1000 bytes each up and down, 0.75 s; seeds 1 and 2 of local have no rounds
    record = read_study(study)
    assert record.costs["mira"] == (6 * 4 * 2000, 6 * 0.75)
    runs = [replace(run, fields={**run.fields, "bytes_up": 6 * run.seed, "bytes_down": 3, "seconds": run.seed})
            for run in record.runs]  # fmt: skip
    assert replace(record, runs=runs).costs["local"] == ((3 + 9 + 15) / 3, 1)
    assert replace(record, runs=[replace(run, fields={}, rounds=[]) for run in runs]).costs["local"] == (None, None)


def test_the_page_has_effect_sizes_weighted_means_and_costs(study: Path) -> None:
    found = page(study).table("Means weighted by each client's test examples, effect size r against local")
    assert found.lines[0] == [
        *("Method", "Word accuracy, weighted", "Word accuracy, r", "Test loss, weighted", "Test loss, r"),
        *("Bytes", "Time"),
    ]
    score = next(metric for metric in read_study(study).metrics if metric.name == "word_accuracy")
    mira = next(item for item in score.methods if item.method == "mira")
    assert mira.against is not None
    line = found.line("mira")
    assert line[1:3] == [number(mira.weighted_mean), signed(mira.against.effect, 2)]
    assert line[-2:] == ["48.0 kB", "4.5 s"]
    assert [found.line("local")[place] for place in (2, 4, 5)] == ["", "", "48.0 kB"]


def test_the_terminal_has_them_where_there_is_room(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", CLIENTS)
    told = command("report", study).out
    assert "48.0 kB" in told
    assert max(map(len, told.splitlines())) <= 120
    (line,) = [line for line in told.splitlines() if "fedavg" in line and "kB" in line]
    score = next(metric for metric in read_study(study).metrics if metric.name == "word_accuracy")
    against = next(item for item in score.methods if item.method == "fedavg").against
    assert against is not None
    assert line.split("│")[-4].strip() == signed(against.effect, 2)


def test_markdown_and_latex_have_as_many_cells_in_every_line(record: StudyRecord) -> None:
    head, rule, *rest = [line.strip("| ").split(" | ") for line in table_text(record, "md").splitlines()]
    assert {len(line) for line in (rule, *rest)} <= {len(head), len(head) - 6}  # empty cells at the end are stripped
    lines = [line for line in table_text(record, "latex").splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in lines} == {len(head) - 1}
    assert r"$\pm$" in table_text(record, "latex")


@pytest.mark.parametrize("name", ["a_b", "50%", "a&b", "x|y", "{z}", "a\\b", "#1", "~", "^", "<b>"])
def test_a_name_cannot_break_a_table(name: str, record: StudyRecord) -> None:
    item = replace(record.metrics[0].methods[0], method=name)
    changed = replace(record, metrics=[record.metrics[0]._replace(methods=[item])])
    lines = [line for line in table_text(changed, "latex").splitlines() if line.endswith(r"\\")]
    bare = [re.sub(r"\\[&%$#_{}]", "", line) for line in lines]
    assert {line.count("&") for line in bare} == {11}
    assert not re.search(r"[%#]|(?<!\\)_", "".join(bare))
    plain = [re.sub(r"\\.", "", line) for line in table_text(changed, "md").splitlines()]
    assert {line.count("|") for line in plain} == {13}


def test_an_unknown_format_is_refused_with_those_there_are(study: Path, record: StudyRecord) -> None:
    with pytest.raises(ConfigError, match=r"found 'late' \(did you mean 'latex'\?\); allowed: csv, md, latex"):
        table_text(record, "late")
    assert command("report", study, "--table", "html").code == 2


@pytest.fixture
def page_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's charts without the figures for papers, which take seconds and are tested in test_paper.py."""
    monkeypatch.setattr(paper, "available", lambda: False)


@pytest.mark.usefixtures("page_only")
def test_figures_are_files_that_stand_alone(study: Path, tmp_path: Path) -> None:
    ended = command("report", study, "--table", "csv", "--figures", tmp_path / "figures")
    assert ended.code == 0
    assert ended.out == table_text(read_study(study), "csv")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"loss.svg", "gain-loss-mira.svg", "gain-word_accuracy-mira.svg", "graph-mira.svg"} <= names
    for path in (tmp_path / "figures" / name for name in names if name.startswith(("loss.", "gain-", "graph-"))):
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in path.read_text()
        assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")
    legend = "".join(ElementTree.parse(tmp_path / "figures" / "loss.svg").getroot().itertext())
    assert all(label in legend for label in ("local", "fedavg", "mira"))


@pytest.mark.usefixtures("page_only")
def test_a_figure_shows_a_hostile_name_as_text(tmp_path: Path) -> None:
    record = read_study(make_study(tmp_path / "study", ["<b>&", "b", "c", "d"]))
    for path in write_figures(record, tmp_path / "figures"):
        if path.suffix == ".svg":
            ElementTree.parse(path)
