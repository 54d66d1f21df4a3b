"""The report's page, its summary.json and the terminal's table, from hand-made study folders."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from fedmira.errors import StoreError
from fedmira.reports import render
from fedmira.reports.render import summary_tables, write_report

HOSTILE = "<script>alert('x')</script>"


def rows(values: dict[str, float | None], metric: str = "loss", number: int = 2) -> list[tuple[object, ...]]:
    return [(client, number, "test", metric, value) for client, value in values.items()]


def curve_rows(*values: float) -> list[tuple[object, ...]]:
    return [("a", number, "validation", "loss", value) for number, value in enumerate(values)]


def page(study: Path) -> str:
    return write_report(study).read_text(encoding="utf-8")


def terminal(study: Path) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        for table in summary_tables(study):
            console.print(table)
    return capture.get()


def cells(text: str, label: str) -> list[str]:
    """The cells of the table line that starts with a label."""
    line = next(line for line in text.splitlines() if re.search(rf"│\s*{re.escape(label)}\s*│", line))
    return [cell.strip() for cell in line.strip("│ ").split("│")]


@pytest.fixture
def pair(study: Path, write_run) -> Path:
    """local and mira on two clients, with a round 0 and two metrics."""
    start = rows({"a": 5, "b": 7}, number=0) + rows({"a": 0.1, "b": 0.1}, "rouge_l", number=0)
    write_run("local", [*start, *curve_rows(5, 4, 3), *rows({"a": 3, "b": 5}), *rows({"a": 0.5, "b": 0.2}, "rouge_l")])
    write_run("mira", [*start, *curve_rows(5, 3, 2), *rows({"a": 2, "b": 4}), *rows({"a": 0.6, "b": 0.2}, "rouge_l")])
    return study


class Reader(HTMLParser):
    """Checks that elements nest and notes what refers to the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "polyline")  # HTML lets only foreign elements (SVG) close themselves

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed(pair: Path):
    reader = Reader()
    reader.feed(page(pair))
    assert reader.open == []


def test_the_page_refers_to_nothing_outside_the_study(pair: Path):
    (pair / "mira" / "seed-0" / "adapters" / "a").mkdir(parents=True)
    reader = Reader()
    reader.feed(page(pair))
    assert reader.addresses == ["mira/seed-0/adapters/"]


def test_the_page_runs_no_script(pair: Path):
    assert "<script" not in page(pair)


def test_a_hostile_client_name_is_escaped(study: Path, write_run):
    write_run("local", rows({HOSTILE: 1}))
    text = page(study)
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text


def test_hostile_settings_are_escaped(study: Path, write_run):
    write_run("local", rows({"a": 1}), settings={"note": HOSTILE})
    (study / "config.yaml").write_text(f"# {HOSTILE}\n")
    assert HOSTILE not in page(study)


def test_the_headline_shows_mean_and_interval(pair: Path):
    # losses 2 and 4: mean 3, s = sqrt 2, t(0.975, 1) = 12.706, half = 12.706
    assert "3.000 ± 12.706" in page(pair)


def test_the_headline_shows_wins_ties_and_losses(pair: Path):
    assert "<td>2/0/0</td>" in page(pair)


def test_a_missing_p_shows_its_reason(pair: Path):
    assert "2 pairs: the signed-rank test needs 6" in page(pair)


def test_every_table_names_its_lines_and_columns(pair: Path):
    text = page(pair)
    assert text.count("<table>") == text.count("<thead>") == text.count("<caption>")
    assert '<th scope="row">mira</th>' in text


def test_the_curve_has_a_text_that_says_what_it_shows(pair: Path):
    assert "Mean validation loss by round: local from 5.000 to 3.000; mira from 5.000 to 2.000</title>" in page(pair)


def test_the_baseline_curve_is_black(pair: Path):
    assert render._chart(render._read_study(pair)).lines[0].colour == "#000000"  # type: ignore[union-attr]


def test_the_curve_spans_the_chart(pair: Path):
    # rounds 0..2 and losses 2..5 are round numbers, so the first and last mark stand at the data's ends
    chart = render._chart(render._read_study(pair))
    assert chart is not None
    assert chart.lines[1].path.split()[0] == f"{render.LEFT}.0,{render.TOP}.0"
    assert chart.lines[1].path.split()[-1] == f"{render.WIDTH - render.RIGHT}.0,{render.HEIGHT - render.BOTTOM}.0"


def test_without_validation_there_is_no_chart(study: Path, write_run):
    write_run("local", rows({"a": 1}))
    assert "<polyline" not in page(study)


def test_an_unfinished_run_is_named(study: Path, write_run):
    write_run("local", rows({"a": 1}), state="interrupted")
    assert "local/seed-0 (interrupted)" in page(study)


def test_an_unmeasured_study_says_so(study: Path, write_run):
    write_run("local", rows({"a": 1}, number=0), state="running")
    assert "No run has been tested yet." in page(study)


def test_a_run_record_may_lack_every_key(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    (run / "run.json").write_text("{}")
    assert "unknown" in page(study)


def test_a_run_without_a_record_is_still_shown(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    (run / "run.json").unlink()
    assert "local/seed-0" in page(study)


def test_a_damaged_record_is_refused(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    (run / "run.json").write_text("{")
    with pytest.raises(StoreError, match=r"run\.json' is damaged"):
        write_report(study)


def test_bytes_and_pull_are_shown(study: Path, write_run):
    write_run("mira", rows({"a": 1}), bytes_up=1_500_000, bytes_down=999, pull_percent=[5, 12.5], seconds=3.25)
    text = page(study)
    assert "<td>3.2</td>\n<td>1.5 MB</td><td>999 B</td>\n<td>5 to 12</td>\n<td>n/a</td>" in text


def test_clients_that_were_never_sampled_are_counted_apart(study: Path, write_run):
    run = write_run("mira", rows({"a": 1, "b": 2, "c": 3}), clients=3)
    (run / "metrics.jsonl").write_text('{"round": 1, "clients": ["a"]}\n{"round": 2, "clients": ["b", "a"]}\n')
    write_report(study)
    assert json.loads((study / "summary.json").read_text())["runs"][0]["never_sampled"] == 1


def test_the_summary_holds_the_figures_unrounded(pair: Path):
    write_report(pair)
    summary = json.loads((pair / "summary.json").read_text())
    mira = summary["metrics"]["loss"]["methods"][1]
    assert (mira["method"], mira["mean"], mira["against"]["difference"]) == ("mira", 3.0, -1.0)
    assert summary["metrics"]["loss"]["base"]["mean"] == 6.0
    assert summary["validation_loss"]["mira"] == [[0, 5.0], [1, 3.0], [2, 2.0]]


def test_a_diverged_loss_keeps_the_summary_valid_json(study: Path, write_run):
    write_run("local", rows({"a": "inf"}))  # type: ignore[dict-item]
    write_report(study)
    text = (study / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert summary["metrics"]["loss"]["methods"][0]["mean"] == "inf"


def test_the_same_study_gives_the_same_page(pair: Path):
    assert page(pair) == page(pair)


def test_no_temporary_file_is_left(pair: Path):
    write_report(pair)
    assert sorted(entry.name for entry in pair.iterdir() if entry.is_file()) == ["report.html", "summary.json"]


def test_a_failed_write_keeps_the_old_page(pair: Path, monkeypatch: pytest.MonkeyPatch):
    before = page(pair)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left"):
        write_report(pair)
    assert (pair / "report.html").read_text(encoding="utf-8") == before
    assert not list(pair.glob(".*.tmp"))


def test_the_terminal_starts_with_the_untouched_base(pair: Path):
    assert cells(terminal(pair), "untouched base")[1:3] == ["6.000 ± 12.706", "7.000"]


def test_the_terminal_counts_wins_on_the_first_metric_beyond_loss(pair: Path):
    assert "(ROUGE-L)" in terminal(pair)
    assert cells(terminal(pair), "mira")[-1] == "1/1/0"


def test_the_terminal_counts_wins_on_the_loss_if_that_is_all(study: Path, write_run):
    write_run("local", rows({"a": 2, "b": 1}))
    write_run("mira", rows({"a": 1, "b": 2}))
    assert cells(terminal(study), "mira")[-1] == "1/0/1"


def test_a_relabelled_local_is_still_the_baseline(study: Path, write_run):
    write_run("alone", rows({"a": 2}), method="local")
    write_run("mira", rows({"a": 1}))
    assert cells(terminal(study), "mira")[-1] == "1/0/0"


def test_the_terminal_prints_names_as_they_are(study: Path, write_run):
    write_run("local", rows({"a": 2}), state="[red]odd")
    assert "[red]odd" in terminal(study)


def test_clients_without_a_value_are_mentioned_in_the_terminal(study: Path, write_run):
    write_run("local", rows({"a": 2, "b": None}))
    assert "clients without a value (n/a), left out: 1" in " ".join(terminal(study).split())


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0.0, 5.0, [0, 1, 2, 3, 4, 5]), (2.1, 2.3, [2.1, 2.15, 2.2, 2.25, 2.3]), (0.0, 60.0, [0, 20, 40, 60])],
)
def test_marks_are_round_numbers_that_enclose_the_data(low: float, high: float, marks: list[float]):
    assert render._marks(low, high) == pytest.approx(marks)


def test_rounds_are_marked_by_whole_numbers():
    assert render._marks(0, 1, whole=True) == [0, 1]


def test_a_flat_curve_still_has_an_axis():
    assert len(render._marks(2.0, 2.0)) >= 2
