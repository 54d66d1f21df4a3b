"""What clients chose: read from a run, drawn, and turned into shares, with numbers that are checked by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.reports.hand_made import page, rows

from fedmira.methods.choosing import ChoiceConfig, graphs_of
from fedmira.methods.mira import Config
from fedmira.reports.choices import NOTHING, Choices, Chosen, graph_names, read_choices, shown_choices, taken
from fedmira.reports.record import StudyRecord, read_study

CLIENTS = ("a", "b", "c")
LAST: Mapping[str, list[float | None]] = {"alpha": [0.5, 1.0, None], "graph": [0, 1, None]}
GRAPHS = {"lambda": "auto", "choice": {"graphs": ["given", "global"]}}


def write_choices(
    study: Path, write_run: Any, *, last: Any = LAST, settings: Any = GRAPHS, kind: str = "groups", edges: Any = None
) -> StudyRecord:
    """Clients a and b train, c never does; 1, 3 and 4 training examples; a is joined to b (1) and c (3), b to c (2)."""
    facts = {"figures": last, "settings": settings, "clients": 3}
    run = write_run("mira", rows({"a": 1, "b": 2, "c": 3}), **facts)
    clients = {name: {"examples": {"train": n, "test": 1}} for name, n in zip(CLIENTS, (1, 3, 4), strict=True)}
    (run / "clients.json").write_text(json.dumps(clients))
    lines: list[dict[str, Any]] = [
        {"round": 1, "clients": ["a", "b"], "answered": ["a", "b"]}
        | {"figures": {"alpha": [0.0, 0.25], "graph": [0, 1]}},
        {"round": 2, "clients": ["b"], "answered": ["b"], "figures": {"alpha": [None], "graph": [None]}},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = {(0, 1): 1.0, (0, 2): 3.0, (1, 2): 2.0}
    both = edges or [[*ends, w] for (r, c), w in weights.items() for ends in ((r, c), (c, r))]
    graph = {"kind": kind, "note": "", "clients": list(CLIENTS), "entries": len(both), "edges": both}
    (run / "graph.json").write_text(json.dumps(graph))
    return read_study(study)


def only(record: StudyRecord) -> Choices:
    (found,) = read_choices(record, "mira")
    return found


def test_choices_are_read_by_round_and_client(study: Path, write_run: Any) -> None:
    found = only(write_choices(study, write_run))
    assert found.rounds == {1: {"a": Chosen(0.0, 0), "b": Chosen(0.25, 1)}, 2: {"b": Chosen(None, 0)}}
    assert found.last == {"a": Chosen(0.5, 0), "b": Chosen(1.0, 1), "c": Chosen(None, 0)}
    assert found.graphs == ["given", "global"]


def test_each_part_of_an_adapter_has_its_own(study: Path, write_run: Any) -> None:
    last = {f"{what}_{part}": LAST[what] for part in ("attention", "rest") for what in ("alpha", "graph")}
    record = write_choices(study, write_run, last=last)
    assert [found.part for found in read_choices(record, "mira")] == ["", "attention", "rest"]
    text = page(study).text
    assert "mira: attention</summary>" in text
    assert "mira: rest</summary>" in text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"graph": {"kind": "random"}},
        {"graph": {"kind": "learned"}},
        {"graph": {"kind": "groups", "column": "group"}},
        {"graph": {"kind": "uniform"}, "choice": {"graphs": ["global", "given"]}},
        {"choice": {"by": "module_group"}},
    ],
)
def test_the_graphs_are_named_in_the_order_of_the_method(settings: dict[str, Any]) -> None:
    config = Config.model_validate({"lambda": "auto", **settings})
    assert tuple(graph_names(settings)) == graphs_of(config.graph, config.choice or ChoiceConfig())


def test_shares_are_alpha_times_the_graph_among_those_who_have_trained(study: Path, write_run: Any) -> None:
    record = write_choices(study, write_run)
    shares = taken(record, only(record))
    assert shares["a"] == {"a": 0.5, "b": 0.5}, "c never trained, so all of a's half is b's"
    assert shares["b"] == {"b": 0.75, "a": 0.25}, "global: 1 and 3 examples, b included"
    assert shares["c"] is None


def test_a_learned_graph_is_read_row_by_row(study: Path, write_run: Any) -> None:
    settings = {"choice": {"graphs": ["learned"]}}
    last = {"alpha": [0.5, 0.5, 0.0], "graph": [0, 0, 0]}
    record = write_choices(study, write_run, last=last, settings=settings, kind="learned", edges=[[0, 1, 0.2]])
    assert taken(record, only(record)) == {"a": {"a": 0.5, "b": 0.5}, "b": {"b": 1.0}, "c": {"c": 1.0}}


def test_a_graph_that_is_not_stored_is_not_guessed(study: Path, write_run: Any) -> None:
    settings = {"choice": {"graphs": ["given", "learned"]}}
    record = write_choices(study, write_run, settings=settings)
    assert taken(record, only(record))["b"] is None
    (shown,) = shown_choices(record)
    assert "From whom 2 clients took is not known: not told, or by a graph that is not stored." in shown.notes


def test_the_map_has_a_cell_for_each_choice_and_none_for_who_was_not_sampled(study: Path, write_run: Any) -> None:
    (shown,) = shown_choices(write_choices(study, write_run))
    wide = dict(shown.maps)["wide"]
    a, b, c = wide.lines
    # columns of 20 pixels from 112 on, the last one after a gap of 6
    assert [(colour, path[:4]) for colour, path in a.cells] == [(NOTHING, "M112"), (a.cells[1][0], "M158")]
    assert [path[:4] for _, path in b.cells] == ["M112", "M158"]
    assert b.untold.startswith("M132")
    assert (c.cells, c.untold[:4]) == ([], "M158")
    assert a.tooltip == "a: chose in 1 round, on average 0; after the last: 0.5 of given"
    assert wide.marks[-1] == (168.0, "end")


def test_a_deeper_colour_is_a_larger_alpha_and_another_hue_another_graph(study: Path, write_run: Any) -> None:
    last = {"alpha": [0.25, 1.0, 1.0], "graph": [0, 0, 1]}
    (shown,) = shown_choices(write_choices(study, write_run, last=last))
    light, deep, other = (line.cells[-1][0] for line in dict(shown.maps)["wide"].lines)
    assert (deep, other) == ("#009E73", "#CC79A7")
    assert int(light[1:3], 16) > int(deep[1:3], 16)
    assert shown.legend[0] == ("given", [light, *shown.legend[0][1][1:3], deep])


def test_the_page_names_its_pictures_and_has_the_last_choices_as_a_table(study: Path, write_run: Any) -> None:
    write_choices(study, write_run)
    found = page(study)
    named = [one.attributes["aria-label"] for one in found.all("svg") if "aria-label" in one.attributes]
    assert "Choices under mira, clients by rounds: 1 of 2 choices took from others" in named
    assert "Shares that clients took from each other under mira after the last round" in named
    assert found.table("Choice after the last round").line("b") == ["b", "1 of global"]


@pytest.mark.parametrize("figures", [None, {}, {"other": [1]}, {"alpha": 3}, [1]])
def test_a_run_without_choices_has_no_such_section(study: Path, write_run: Any, figures: Any) -> None:
    write_run("mira", rows({"a": 1}), figures=figures)
    text = page(study).text
    assert "What clients chose" not in text


def test_of_many_clients_some_are_drawn_and_no_matrix(study: Path, write_run: Any) -> None:
    names = [f"c{place}" for place in range(100)]
    figures = {"alpha": [0.5] * 100, "graph": [0] * 100}
    run = write_run("mira", rows(dict.fromkeys(names, 1.0)), figures=figures)
    (run / "clients.json").write_text(json.dumps({name: {} for name in names}))
    (shown,) = shown_choices(read_study(study))
    assert [len(dict(shown.maps)[size].lines) for size in ("wide", "narrow")] == [60, 60]
    assert shown.matrices == []
    assert len(shown.notes) == 2
