"""Axes, curves, merges and bars: where things stand in pixels, on numbers small enough to check by hand."""

import json
import math
from pathlib import Path

import pytest
from tests.reports.hand_made import curve_rows, page, rows, six

from fedmira.reports import axes, curves, gain
from fedmira.reports.record import StudyRecord, read_study

Track = list[tuple[int, float | None, float | None]]


def chart(record: StudyRecord) -> curves.Chart:
    found = curves.curve_chart(record, axes.styles(record.labels, record.baseline), curves.WIDE)
    assert found is not None
    return found


def write_merges(run: Path, tracks: dict[str, Track]) -> None:
    """Write metrics.jsonl from each client's (round, loss before, loss after)."""
    turns = sorted({turn for track in tracks.values() for turn, _, _ in track})
    lines = []
    for turn in turns:
        there = [(client, b, a) for client, track in tracks.items() for t, b, a in track if t == turn]
        clients, before, after = (list(part) for part in zip(*there, strict=True))
        lines.append({"round": turn, "clients": clients, "loss_before": before, "loss_after": after})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def panel(record: StudyRecord, label: str, client: str) -> tuple[curves.Merging, curves.Panel]:
    found = curves.merging(record, label)
    assert found is not None
    return found, next(one for one in found.panels if one.client == client)


# ---------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("low", "high", "places"),
    [(0.0, 5.0, [0, 1, 2, 3, 4, 5]), (2.1, 2.3, [2.1, 2.15, 2.2, 2.25, 2.3]), (0.0, 60.0, [0, 20, 40, 60])],
)
def test_marks_are_round_numbers_that_enclose_the_data(low: float, high: float, places: list[float]):
    assert axes.marks(low, high) == pytest.approx(places)


def test_rounds_are_marked_by_whole_numbers():
    assert axes.marks(0, 1, whole=True) == [0, 1]


def test_a_flat_curve_still_has_an_axis():
    assert len(axes.marks(2.0, 2.0)) >= 2


def test_the_last_round_is_marked_and_ends_the_axis():
    found = axes.round_axis(0, 12, 0, 120)
    assert found.marks == [(0, "0"), (50, "5"), (100, "10"), (120, "12")]


def test_what_lies_beyond_an_axis_stands_at_its_end():
    axis = axes.enclosing_axis([0.0, 10.0], 0, 100)
    assert [axis.at(value) for value in (-math.inf, 5, math.inf)] == [0, 50, 100]


def test_no_two_methods_share_colour_and_mark():
    found = axes.styles([f"m{place}" for place in range(42)], "local")
    assert len({(style.colour, style.mark) for style in found.values()}) == 42


def test_the_baseline_is_black_wherever_it_stands():
    found = axes.styles(["mira", "local"], "local")
    assert (found["local"].colour, found["mira"].colour) == ("#000000", axes.COLOURS[0])


def test_gain_is_blue_loss_is_vermilion_and_nothing_is_pale():
    colours = [axes.gain_colour(value, 2.0) for value in (2.0, 5.0, math.inf, 0.0, -2.0)]
    assert colours == [axes.BETTER, axes.BETTER, axes.BETTER, axes.LEVEL, axes.WORSE]


def test_half_the_gain_is_half_the_colour():
    # 0xF2 = 242 -> 0x00: 121 = 0x79; 242 -> 0x72 = 114: 178 = 0xB2; 242 -> 0xB2 = 178: 210 = 0xD2
    assert axes.gain_colour(1.0, 2.0) == "#79B2D2"


def test_places_are_chosen_evenly_with_both_ends():
    assert axes.spread_out(9, 5) == [0, 2, 4, 6, 8]
    assert axes.spread_out(3, 5) == [0, 1, 2]


# ---------------------------------------------------------------- loss by round


def test_the_curve_spans_the_chart(pair: Path):
    # rounds 0..2 and losses 2..5 are round numbers, so the data's ends stand at the chart's
    found = chart(read_study(pair))
    mira = next(line for line in found.lines if line.label == "mira")
    box = curves.WIDE
    assert mira.path.split()[0] == f"{box.left}.0,{box.top}.0"
    assert mira.path.split()[-1] == f"{box.x_end}.0,{box.y_end}.0"


def test_the_lowest_last_loss_comes_first_in_the_legend(pair: Path):
    assert [(line.label, line.first, line.last) for line in chart(read_study(pair)).lines] == [
        ("mira", 5.0, 2.0),
        ("local", 5.0, 3.0),
    ]


def test_a_point_that_is_not_finite_is_left_out(study: Path, write_run):
    write_run("mira", curve_rows(5.0, float("inf"), 3.0))
    assert curves.mean_curves(read_study(study)) == {"mira": [(0, 5.0), (2, 3.0)]}


def test_a_long_curve_is_drawn_with_few_marks(study: Path, write_run):
    write_run("mira", curve_rows(*[1 / (turn + 1) for turn in range(1000)]))
    line = chart(read_study(study)).lines[0]
    assert len(line.path.split()) == curves.MOST_POINTS
    assert len(line.points) == curves.MOST_MARKS
    assert line.points[-1][2] == "mira, round 999: 0.001"


# ---------------------------------------------------------------- before and after a merge


def test_merges_are_counted_by_what_they_did(study: Path, write_run):
    run = write_run("mira", rows({"a": 1, "b": 2}))
    write_merges(run, {"a": [(1, 3.0, 2.0), (2, 2.0, 2.0)], "b": [(1, 3.0, 4.0), (3, 3.0, 2.5)]})
    found = curves.merging(read_study(study), "mira")
    assert found is not None
    assert (found.lower, found.equal, found.higher) == (2, 1, 1)
    assert (found.before, found.after) == (11 / 4, 10.5 / 4)


def test_a_client_goes_down_while_training_and_jumps_at_the_merge(study: Path, write_run):
    run = write_run("mira", curve_rows(4.0) + rows({"a": 1}))
    write_merges(run, {"a": [(1, 3.0, 2.0), (2, 1.0, 4.0)]})
    merging, found = panel(read_study(study), "mira", "a")
    x, y = merging.x, merging.y
    stops = [(0, 4.0), (1, 3.0), (1, 2.0), (2, 1.0), (2, 4.0)]
    assert found.path == " ".join(f"{x.at(turn)},{y.at(value)}" for turn, value in stops)
    assert [effect for *_, effect, _ in found.merges] == ["better", "worse"]
    assert found.merges[0][-1] == "round 1: 3.000 before, 2.000 after the merge"


def test_a_refused_upload_is_no_merge(study: Path, write_run):
    run = write_run("mira", rows({"a": 1}))
    write_merges(run, {"a": [(1, None, 5.0), (2, 3.0, 2.0)]})
    assert len(panel(read_study(study), "mira", "a")[1].merges) == 1


def test_training_alone_has_no_merges_to_show(study: Path, write_run):
    run = write_run("local", rows({"a": 1}))
    write_merges(run, {"a": [(1, 3.0, 3.0)]})
    assert curves.merging(read_study(study), "local") is None


def test_of_many_clients_the_worst_and_the_best_are_among_the_twelve(study: Path, write_run):
    write_run("local", rows(six(*[10.0] * 40)))
    run = write_run("mira", rows(six(*[float(place) for place in range(40)])))
    write_merges(run, {f"c{place}": [(1, 3.0, 2.0)] for place in range(40)})
    found = curves.merging(read_study(study), "mira")
    assert found is not None
    drawn = [one.client for one in found.panels]
    assert (len(drawn), drawn[0], drawn[-1], found.clients) == (12, "c39", "c0", 40)


# ---------------------------------------------------------------- gain


def test_bars_are_sorted_and_start_at_zero(study: Path, write_run):
    # gains +1, -1, 0 on an axis from -1 to 1
    write_run("local", rows({"a": 2, "b": 2, "c": 2}))
    write_run("mira", rows({"a": 3, "b": 1, "c": 2}))
    record = read_study(study)
    found = gain.gain_panels(record, record.metrics[0]).panels[0]
    zero, end = found.axis.at(0), found.axis.at(1)
    assert [(bar.client, bar.x, bar.width, bar.effect, bar.text) for bar in found.bars] == [
        ("b", zero, end - zero, "better", "+1.000"),
        ("c", zero, 0, "level", "0.000"),
        ("a", found.axis.at(-1), zero - found.axis.at(-1), "worse", "\u22121.000"),
    ]
    assert (found.better, found.equal, found.worse) == (1, 1, 1)


def test_an_infinite_gain_ends_with_the_axis_and_says_so(study: Path, write_run):
    write_run("local", rows({"a": float("inf"), "b": 2}))
    write_run("mira", rows({"a": 3, "b": 1}))
    record = read_study(study)
    bar = gain.gain_panels(record, record.metrics[0]).panels[0].bars[0]
    assert (bar.client, bar.text) == ("a", "+∞")
    assert bar.x + bar.width == gain.WIDTH - gain.RIGHT


def test_many_clients_become_one_sorted_line_whose_ends_are_named(study: Path, write_run):
    write_run("local", rows(six(*[1000.0] * 1000)))
    write_run("mira", rows(six(*[float(place) for place in range(250, 1250)])))
    record = read_study(study)
    found = gain.gain_panels(record, record.metrics[0]).panels[0]
    assert found.bars == []
    assert len(found.path.split()) == gain.MOST_POINTS
    assert (found.best, found.least) == (("c0", 750.0), ("c999", -249.0))
    assert (found.better, found.equal, found.worse) == (750, 1, 249)
    left, width = found.box.left, found.box.x_end - found.box.left
    assert found.split == pytest.approx((left + width * 0.75, left + width * 0.751), abs=0.11)
    text = page(study).text
    assert "750 better, 1 equal, 249 worse" in text
    assert "c999</bdi> \u2212249.000" in text


@pytest.mark.parametrize(("clients", "bars"), [(gain.BARS_SHOWN, gain.BARS_SHOWN), (gain.BARS_SHOWN + 1, 0)])
def test_there_are_bars_up_to_sixty_clients_and_a_line_beyond(clients: int, bars: int, study: Path, write_run):
    write_run("local", rows({f"c{place}": 2 for place in range(clients)}))
    write_run("mira", rows({f"c{place}": 1 for place in range(clients)}))
    record = read_study(study)
    found = gain.gain_panels(record, record.metrics[0]).panels[0]
    assert (len(found.bars), found.path == "") == (bars, bars > 0)


def test_clients_without_a_gain_are_counted(study: Path, write_run):
    write_run("local", rows({"a": 2, "b": 2}))
    write_run("mira", rows({"a": 3, "b": None}))
    record = read_study(study)
    assert gain.gain_panels(record, record.metrics[0]).panels[0].missing == 1


def test_a_line_of_the_table_is_drawn_to_scale(study: Path, write_run):
    # values 1 2 3: mean 2, half interval 2.484; worst 3; marks of [-0.484, 4.484] are -1 .. 5
    write_run("local", rows(six(1, 2, 3)))
    record = read_study(study)
    axis, found = gain.dots(record.metrics[0])
    assert (axis.low, axis.high) == (-1, 5)
    drawn = found["local"]
    assert (drawn.mean, drawn.worst) == (axis.at(2), axis.at(3))
    assert drawn.mean - drawn.low == pytest.approx(drawn.high - drawn.mean, abs=0.11)


def test_a_diverged_line_stands_at_the_end_of_its_scale(study: Path, write_run):
    write_run("local", rows({"a": 1, "b": 2}))
    write_run("mira", rows({"a": float("inf"), "b": 2}))
    assert gain.dots(read_study(study).metrics[0])[1]["mira"].mean == gain.DOTS.x_end
