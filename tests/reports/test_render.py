"""The report's page and its summary.json, from hand-made study folders."""

import itertools
import json
import os
import re
from importlib.resources import files
from pathlib import Path

import pytest
from tests.reports.hand_made import HOSTILE, curve_rows, page, rows, six

from fedmira.errors import StoreError
from fedmira.reports.render import write_report


def summary(study: Path) -> dict:
    write_report(study)
    return json.loads((study / "summary.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- one file, safe and well formed


def test_the_page_refers_to_nothing_outside_the_study(pair: Path):
    (pair / "mira" / "seed-0" / "adapters" / "a").mkdir(parents=True)
    found = [element.attributes for element in page(pair).elements]
    addresses = [value for one in found for name, value in one.items() if name in ("src", "href", "data", "action")]
    assert [address for address in addresses if not address.startswith("#")] == ["mira/seed-0/adapters/"]
    assert not any("url(" in value for one in found for value in one.values())


def test_a_link_within_the_page_leads_somewhere(pair: Path):
    read = page(pair)
    places = {element.attributes.get("id") for element in read.elements}
    links = [one.attributes["href"][1:] for one in read.all("a") if one.attributes["href"].startswith("#")]
    assert len(links) > 5
    assert set(links) <= places


def test_the_page_runs_no_script_and_forbids_any(pair: Path):
    read = page(pair)
    assert not read.all("script")
    assert not any(name.startswith("on") for element in read.elements for name in element.attributes)
    assert "default-src 'none'" in read.all("meta")[2].attributes["content"]


@pytest.mark.parametrize(
    "name", [HOSTILE, '"><img src=x onerror=alert(1)>', "</title></style></svg><b>", "{{ 7*7 }}", "a&amp;b", "it's"]
)
def test_a_hostile_client_name_is_shown_as_it_is_and_does_nothing(name: str, study: Path, write_run):
    write_run("local", rows({name: 1, "b": 2}))
    write_run("mira", rows({name: 2, "b": 1}))
    (study / "mira" / "seed-0" / "clients.json").write_text(json.dumps({name: {"name": name, "group": name}}))
    graph = {"kind": name, "note": name, "clients": [name, "b"], "edges": [[0, 1, 1.0]]}
    (study / "mira" / "seed-0" / "graph.json").write_text(json.dumps(graph))
    read = page(study)
    assert read.table("Test split at the last round").lines[1][0] == name
    assert not read.all("script", "img", "b")


def test_a_name_cannot_turn_the_text_around_it(study: Path, write_run):
    write_run("local", rows({"\u202eevil": 1, "\x1b[2J": 2}))
    read = page(study)
    assert read.table("Test split at the last round").lines[1][0] == "[U+202E]evil"
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", read.text)


def test_half_a_character_does_not_keep_the_page_from_being_written(study: Path, write_run):
    run = write_run("local", rows({"a": 1}), note="\ud800")
    (run / "clients.json").write_text('{"a": {"name": "\\ud800", "group": "\\udfff"}}')
    assert "[U+D800]" in page(study).text


def test_hostile_settings_are_escaped(study: Path, write_run):
    write_run("local", rows({"a": 1}), settings={"note": HOSTILE})
    (study / "config.yaml").write_text(f"# {HOSTILE}\n")
    read = page(study)
    assert not read.all("script")
    assert HOSTILE in next(element.text for element in read.all("pre"))


# ---------------------------------------------------------------- figures


def test_the_table_shows_mean_and_interval(pair: Path):
    # losses 2 and 4: mean 3, s = sqrt 2, t(0.975, 1) = 12.706, half = 12.706
    assert page(pair).table("Test loss").line("mira")[2] == "3.000 ± 12.706"


def test_the_table_names_the_view(study: Path, write_run):
    write_run("local", rows({"a": 1}, number=0) + rows({"a": 1}))
    write_run("fedavg", rows({"a": 1}), view="global")
    table = page(study).table("Test loss")
    assert [table.line(label)[1] for label in ("untouched base", "local", "fedavg")] == ["start", "personal", "global"]


def test_the_table_shows_the_paired_difference_and_who_gained(study: Path, write_run):
    # differences -1 -2 -3 -4 -5 +1: mean -14/6 = -2.333, s = 2.160247, t(0.975, 5) = 2.570582, half = 2.267
    write_run("local", rows(six(2, 4, 6, 8, 10, 5)))
    write_run("mira", rows(six(1, 2, 3, 4, 5, 6)))
    line = page(study).table("Test loss").line("mira")
    assert line[6] == "\u22122.333 ± 2.267"
    assert line[7] == "5 / 0 / 1"


def test_the_figures_of_the_page_are_those_of_the_summary(pair: Path):
    table, figures = page(pair).table("ROUGE-L"), summary(pair)["metrics"]["rouge_l"]
    for item in [figures["base"], *figures["methods"]]:
        line = table.line(item["method"])
        assert line[2].startswith(f"{item['mean']:.3f}")
        assert line[4] == f"{item['worst']:.3f} {item['worst_client']}"
        assert line[5] == f"{item['lowest_tenth']:.3f}"


def test_the_judged_metric_comes_first_and_the_loss_after_it(pair: Path):
    assert [table.caption.split(" on ")[0] for table in page(pair).tables[:2]] == ["ROUGE-L", "Test loss"]


def test_a_missing_p_shows_its_reason(pair: Path):
    assert page(pair).table("Test loss").line("mira")[8] == "2 pairs: the signed-rank test needs 6"


def test_without_training_alone_nothing_is_compared(study: Path, write_run):
    write_run("fedavg", rows({"a": 1}))
    assert page(study).table("Test loss").lines[0][-1] == "Lowest tenth"


def test_a_diverged_method_is_shown_as_such(study: Path, write_run):
    write_run("local", rows({"a": 1, "b": 2}))
    write_run("fedavg", rows({"a": "nan", "b": 3}) + curve_rows(2.0, 3.0, float("inf")))
    read = page(study)
    assert read.table("Test loss").line("fedavg")[2] == "∞"
    assert "fedavg diverged: 1 client without a finite test loss." in read.text


def test_the_loss_curve_is_there_as_a_table_too(pair: Path):
    assert page(pair).table("Validation loss").lines == [
        ["Round", "local", "mira"],
        ["0", "5.000", "5.000"],
        ["1", "4.000", "3.000"],
        ["2", "3.000", "2.000"],
    ]


def test_the_curve_has_a_text_that_says_what_it_shows(pair: Path):
    labels = [element.attributes.get("aria-label", "") for element in page(pair).all("svg")]
    said = "Mean validation loss by round: local from 5.000 to 3.000; mira from 5.000 to 2.000"
    assert labels.count(said) == 2  # for wide windows and for narrow ones


def test_without_validation_there_is_no_chart(study: Path, write_run):
    write_run("local", rows({"a": 1}))
    assert "Loss by round" not in [element.text for element in page(study).all("h2")]


def test_costs_are_shown(study: Path, write_run):
    run = write_run("mira", rows({"a": 1}), rounds=3, pull_percent=[5, 12.5], bytes_down=999)
    line = {"clients": ["a", "b"], "bytes_up": 750_000, "seconds": 61, "seconds_training": 2, "tokens": 700}
    (run / "metrics.jsonl").write_text(
        json.dumps({"round": 1, **line}) + "\n" + json.dumps({"round": 2, **line}) + "\n"
    )
    cells = page(study).table("Costs of each run").lines[1]
    assert cells[2:6] == ["2 of 3", "2 min 2 s", "4.0 s", "n/a"]
    assert cells[6:11] == ["350", "1.5 MB", "999 B", "375.0 kB", "5 to 12"]


# ---------------------------------------------------------------- whatever a study lacks


def test_an_unfinished_run_is_named(study: Path, write_run):
    write_run("local", rows({"a": 1}), state="interrupted")
    assert "local/seed-0 (interrupted)" in page(study).text


def test_an_unmeasured_study_says_so(study: Path, write_run):
    write_run("local", rows({"a": 1}, number=0), state="running")
    assert "No run has been tested yet." in page(study).text


def test_a_method_that_was_not_tested_is_named_apart(study: Path, write_run):
    write_run("local", rows({"a": 1}))
    write_run("mira", [], state="failed")
    read = page(study)
    assert "Not tested yet, and not in the tables: mira." in read.text
    assert [line[0] for line in read.table("Test loss").lines] == ["Method", "local"]


def test_a_run_record_may_lack_every_key(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    (run / "run.json").write_text("{}")
    assert page(study).table("Costs of each run").lines[1][1] == "unknown"


def test_a_run_without_a_record_is_still_shown(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    (run / "run.json").unlink()
    assert page(study).table("Costs of each run").lines[1][0] == "local/seed-0"


def test_a_log_of_rounds_may_lack_every_key(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    (run / "metrics.jsonl").write_text('{}\n3\n{"clients": ["a"]}\n')
    assert page(study).table("Costs of each run").lines[1][2] == "n/a"


@pytest.mark.parametrize("name", ["run.json", "clients.json", "graph.json"])
def test_a_damaged_file_is_refused_by_name(name: str, study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    (run / name).write_text("{")
    with pytest.raises(StoreError, match=rf"{name}' is damaged"):
        write_report(study)


@pytest.mark.parametrize("name", ["run.json", "clients.json", "graph.json"])
def test_a_file_that_holds_something_else_is_refused_by_name(name: str, study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    (run / name).write_text("[1]")
    with pytest.raises(StoreError, match=rf"{name}' holds a list"):
        write_report(study)


def test_one_client_and_one_round_make_a_page(study: Path, write_run):
    for label, value in (("local", 2.0), ("mira", 1.0)):
        run = write_run(label, rows({"a": value}, number=1) + curve_rows(3.0, value))
        around = {"round": 1, "clients": ["a"], "loss_before": [2.0], "loss_after": [value]}
        (run / "metrics.jsonl").write_text(json.dumps(around) + "\n")
    assert page(study).table("Test loss").line("mira")[2] == "1.000"


# ---------------------------------------------------------------- for everybody


def test_every_table_names_itself_its_lines_and_its_columns(pair: Path):
    tables = page(pair).tables
    assert len(tables) > 4
    assert all(table.caption and None not in table.scopes for table in tables)
    assert all("row" in table.scopes and "col" in table.scopes for table in tables)


def test_every_picture_has_a_text_or_is_marked_as_ornament(pair: Path):
    for element in page(pair).all("svg"):
        marks = element.attributes
        assert marks.get("aria-hidden") == "true" or (marks.get("role") == "img" and marks.get("aria-label"))


def test_headings_skip_no_level_and_there_is_one_title(pair: Path):
    levels = [int(element.tag[1]) for element in page(pair).all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_what_scrolls_can_be_reached_by_keyboard_and_has_a_name(pair: Path):
    boxes = [one.attributes for one in page(pair).all("div") if one.attributes.get("class") == "scroll"]
    assert len(boxes) > 3
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)


def test_the_first_link_skips_to_the_results(pair: Path):
    read = page(pair)
    assert read.all("a")[0].attributes["href"] == "#main"
    assert read.all("html")[0].attributes["lang"] == "en"


def luminance(colour: str) -> float:
    """WCAG 2: relative luminance of #rrggbb."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_black_on_white_has_the_contrast_that_the_standard_says():
    assert (luminance("#ffffff") + 0.05) / (luminance("#000000") + 0.05) == pytest.approx(21)


def test_text_has_a_contrast_of_four_and_a_half_on_every_ground():
    css = files("fedmira.reports").joinpath("report.css").read_text(encoding="utf-8")
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css))
    texts = set(re.findall(r"(?<![\w-])(?:color|fill): ([^;}]+?) *[;}]", css))
    grounds = set(re.findall(r"background: ([^;}]+?) *[;}]", css))
    assert texts == {"var(--ink)", "var(--quiet)", "var(--link)"}
    assert grounds == {"var(--paper)", "var(--panel)", "var(--warn)"}
    for text in texts:
        for ground in grounds:
            dark, light = sorted(luminance(named[one[6:-1]]) for one in (text, ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


# ---------------------------------------------------------------- summary.json and files


def test_clients_that_were_never_sampled_are_counted_apart(study: Path, write_run):
    run = write_run("mira", rows({"a": 1, "b": 2, "c": 3}), clients=3)
    (run / "metrics.jsonl").write_text('{"round": 1, "clients": ["a"]}\n{"round": 2, "clients": ["b", "a"]}\n')
    assert summary(study)["runs"][0]["never_sampled"] == 1


def test_the_summary_holds_the_figures_unrounded(pair: Path):
    found = summary(pair)
    mira = found["metrics"]["loss"]["methods"][1]
    assert (mira["method"], mira["mean"], mira["against"]["difference"]) == ("mira", 3.0, -1.0)
    assert found["metrics"]["loss"]["base"]["mean"] == 6.0
    assert found["validation_loss"]["mira"] == [[0, 5.0], [1, 3.0], [2, 2.0]]


def test_the_summary_says_what_the_page_says_first(pair: Path):
    said = summary(pair)["headline"][0]
    assert (said["method"], said["verdict"]) == ("mira", "few")
    assert said["text"] in page(pair).text


def test_a_diverged_loss_keeps_the_summary_valid_json(study: Path, write_run):
    write_run("local", rows({"a": "inf"}))  # type: ignore[dict-item]
    write_report(study)
    text = (study / "summary.json").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["metrics"]["loss"]["methods"][0]["mean"] == "inf"


def test_the_same_study_gives_the_same_page(pair: Path):
    first = page(pair).text
    assert page(pair).text == first


def test_no_temporary_file_is_left(pair: Path):
    write_report(pair)
    assert sorted(entry.name for entry in pair.iterdir() if entry.is_file()) == [
        "report.html",
        "results.csv",
        "summary.json",
    ]


def test_a_failed_write_keeps_the_old_page(pair: Path, monkeypatch: pytest.MonkeyPatch):
    before = write_report(pair).read_text(encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left"):
        write_report(pair)
    assert (pair / "report.html").read_text(encoding="utf-8") == before
    assert not list(pair.glob(".*.tmp"))
