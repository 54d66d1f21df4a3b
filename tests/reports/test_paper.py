"""Figures for papers: what curves are made of, by hand; files that are the same every time, with text as text."""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.reports.hand_made import rows
from tests.reports.made_study import make_study
from tests.small_study import command

from fedmira.graphs.graph import group_graph
from fedmira.reports import paper
from fedmira.reports.figures import write_figures
from fedmira.reports.record import read_study
from fedmira.reports.series import Point, loss_curves

CLIENTS = [f"c{place}" for place in range(8)]
needs_matplotlib = pytest.mark.skipif(
    not paper.available(), reason="matplotlib is not installed: pip install 'fedmira[figures]'"
)


def validation(values: dict[str, list[float]]) -> Iterator[tuple[object, ...]]:
    """Validation losses of each client from round 0 on."""
    for client, losses in values.items():
        yield from ((client, turn, "validation", "loss", loss) for turn, loss in enumerate(losses))


def write_seed(write_run: Any, seed: int, values: dict[str, list[float]], size: float | None) -> None:
    """A run whose round t sends t x size bytes up and down each, and takes half a second."""
    run = write_run("mira", [*validation(values), *rows({"a": 1})], seed=seed)
    both = {} if size is None else {"bytes_up": size, "bytes_down": size}
    lines = [{"round": turn, "clients": ["a"], "seconds": 0.5, **both} for turn in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_curve_is_the_mean_over_clients_of_their_seeds_with_what_was_paid_so_far(study: Path, write_run: Any) -> None:
    write_seed(write_run, 0, {"a": [4, 3, 2], "b": [4, 5, 4]}, 10)
    write_seed(write_run, 1, {"a": [4, 1, 2], "b": [4, 3, 4]}, 30)
    whole, first, second = loss_curves(read_study(study))
    # round 1: a (3 + 1) / 2 = 2, b (5 + 3) / 2 = 4: mean 3, s = sqrt 2, t(0.975, 1) = 12.7062, half = t s / sqrt 2
    assert (whole.seed, first.seed, second.seed) == (None, 0, 1)
    assert whole.points[1] == Point(1, 40.0, 0.5, 3.0, pytest.approx(12.7062, abs=1e-4), 2)  # type: ignore[arg-type]
    assert [(point.bytes, point.seconds) for point in whole.points] == [(0, 0), (40, 0.5), (80, 1.0)]
    assert [point.loss for point in second.points] == [4, 2, 3]
    assert [point.bytes for point in second.points] == [0, 60, 120]


def test_bytes_that_are_not_known_are_not_guessed(study: Path, write_run: Any) -> None:
    write_seed(write_run, 0, {"a": [4, 3, 2]}, None)
    (only,) = loss_curves(read_study(study))
    assert [point.bytes for point in only.points] == [0, None, None]
    assert [plot.name for plot in paper.study_plots(read_study(study))][:2] == ["loss-by-round", "loss-by-seconds"]


def test_gains_are_sorted_in_their_data_and_each_method_has_its_own_look(tmp_path: Path) -> None:
    record = read_study(make_study(tmp_path / "study", CLIENTS))
    plot = next(plot for plot in paper.study_plots(record) if plot.name == "gains-word_accuracy")
    table = list(csv.DictReader(io.StringIO(plot.tables["gains-word_accuracy.csv"])))
    of_mira = [float(line["gain"]) for line in table if line["method"] == "mira"]
    assert of_mira == sorted(of_mira, reverse=True)
    assert len(of_mira) == len(CLIENTS)
    looks = paper.looks_of([f"m{place}" for place in range(20)], "local")
    assert len({(str(look.dash), look.mark) for look in looks.values()}) == 20, "without colours"
    assert paper.looks_of(["mira", "local"], "local")["local"] == ("#000000", "-", "o")


@pytest.mark.slow
@needs_matplotlib
def test_every_figure_is_there_in_three_formats_with_its_data(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", CLIENTS, graph=group_graph(list("aabbccdd")))
    ended = command("report", study, "--figures", tmp_path / "figures")
    assert ended.code == 0, ended.err
    assert "pip install" not in ended.err
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    for name in ("loss-by-round", "loss-by-bytes", "loss-by-seconds", "gains-loss", "task-graph-mira"):
        assert {f"{name}.{kind}" for kind in ("svg", "pdf", "png", "csv")} <= names
    assert {"loss.svg", "graph-mira.svg", "task-graph-mira-edges.csv"} <= names
    edges = (tmp_path / "figures" / "task-graph-mira-edges.csv").read_text().splitlines()
    assert edges[:2] == ["name,neighbour,weight", "c0,c1,1.0"]
    assert len(edges) == 1 + 4


@pytest.mark.slow
@needs_matplotlib
def test_the_same_study_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", CLIENTS, graph=group_graph(list("aabbccdd")))
    write_figures(read_study(study), tmp_path / "one")
    program = (
        "import sys; from pathlib import Path; from fedmira.reports.record import read_study;"
        "from fedmira.reports.figures import write_figures; write_figures(read_study(Path(sys.argv[1])), Path('two'))"
    )
    subprocess.run([sys.executable, "-c", program, str(study)], cwd=tmp_path, check=True)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert [name for name in one if one[name] != two.get(name)] == []


@pytest.mark.slow
@needs_matplotlib
def test_text_is_text_and_no_figure_has_a_title(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ["$a_b$", "<b>&", "\u6771\u4eac", "d"], graph=group_graph(list("aabb")))
    folder = tmp_path / "figures"
    write_figures(read_study(study), folder)
    texts = "".join(ElementTree.parse(folder / "task-graph-mira.svg").getroot().itertext())
    assert all(name in texts for name in ("$a_b$", "<b>&", "\u6771\u4eac"))
    loss = ["".join(one.itertext()) for one in ElementTree.parse(folder / "loss-by-round.svg").iter() if one.text]
    assert {"local", "fedavg", "mira", "round", "validation loss, nats per token"} <= set(loss)
    pdf = (folder / "loss-by-round.pdf").read_bytes()
    assert re.search(rb"/Subtype /(CIDFontType2|TrueType)", pdf)
    assert not re.search(rb"/Subtype /Type3|/CreationDate", pdf)
    assert "<dc:date>" not in (folder / "loss-by-round.svg").read_text()


def test_without_matplotlib_the_charts_are_written_and_one_line_says_what_the_extra_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "available", lambda: False)
    study = make_study(tmp_path / "study", CLIENTS)
    ended = command("report", study, "--figures", tmp_path / "figures")
    assert ended.code == 0, ended.err
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg"}
    assert [line for line in ended.err.splitlines() if "fedmira[figures]" in line] == [f"note: {paper.HINT}"]


def test_matplotlib_is_not_imported_for_a_report(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", CLIENTS)
    program = (
        "import sys; from fedmira.cli import main; import fedmira.reports.figures; sys.argv[1:1] = ['report'];"
        "import atexit; atexit.register(lambda: print('matplotlib' in sys.modules)); main.main()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(study)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
