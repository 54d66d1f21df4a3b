"""The terminal's tables, from hand-made study folders."""

import io
import json
import re
from pathlib import Path

from rich.console import Console
from tests.reports.hand_made import rows

from fedmira.reports.record import read_study
from fedmira.reports.terminal import summary_tables


def terminal(study: Path) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        for table in summary_tables(read_study(study)):
            console.print(table)
    return capture.get()


def cells(text: str, label: str) -> list[str]:
    """The cells of the table line that starts with a label."""
    line = next(line for line in text.splitlines() if re.search(rf"│\s*{re.escape(label)}\s*│", line))
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_the_terminal_starts_with_the_untouched_base(pair: Path):
    assert cells(terminal(pair), "untouched base")[1:3] == ["6.000 ± 12.706", "7.000"]


def test_the_terminal_counts_wins_on_the_first_metric_beyond_loss(pair: Path):
    assert "(ROUGE-L)" in terminal(pair)
    assert cells(terminal(pair), "mira")[-4] == "1/1/0"


def test_the_terminal_counts_wins_on_the_loss_if_that_is_all(study: Path, write_run):
    write_run("local", rows({"a": 2, "b": 1}))
    write_run("mira", rows({"a": 1, "b": 2}))
    assert cells(terminal(study), "mira")[-4] == "1/0/1"


def test_a_relabelled_local_is_still_the_baseline(study: Path, write_run):
    write_run("alone", rows({"a": 2}), method="local")
    write_run("mira", rows({"a": 1}))
    assert cells(terminal(study), "mira")[-4] == "1/0/0"


def test_the_terminal_prints_names_as_they_are(study: Path, write_run):
    write_run("local", rows({"a": 2}), state="[red]odd")
    assert "[red]odd" in terminal(study)


def test_clients_without_a_value_are_mentioned_in_the_terminal(study: Path, write_run):
    write_run("local", rows({"a": 2, "b": None}))
    assert "clients without a value (n/a), left out: 1" in " ".join(terminal(study).split())


def test_tables_stay_aligned_where_the_stream_has_ascii_only(study: Path, write_run):
    run = write_run("local", rows({"a": 2, "b": 1}))
    names = {"a": {"name": "\u6771\u4eac"}, "b": {"name": "Z\u00fcrich"}}
    (run / "clients.json").write_text(json.dumps(names))
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii", errors="backslashreplace")
    console = Console(file=stream, width=200, no_color=True)
    table = summary_tables(read_study(study), encoding=console.encoding)[0]
    console.print(table)
    stream.flush()
    lines = [line for line in written.getvalue().decode().splitlines() if line.startswith(("+", "|"))]
    assert any(r"\u6771\u4eac" in line for line in lines)
    assert any(r"Z\xfcrich" in line for line in lines)
    assert len({len(line) for line in lines}) == 1
