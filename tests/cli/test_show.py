"""Columns of what a command prints stay below one another, also where letters are wide, narrow or joined."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from fedmira.cli.show import in_cells, side_by_side
from fedmira.names import shown_name

WIDE = ["東京大学病院", "Klinik Zürich", "🏥🏥", "이름", "e\u0301cole", "Praxis", "中" * 60, "x" * 60]


@given(st.text() | st.sampled_from(WIDE), st.integers(10, 40))
def test_a_cell_takes_its_columns_whatever_its_letters(text: str, width: int) -> None:
    shown = in_cells(shown_name(text), width)
    assert cell_len(shown) == width
    assert shown.endswith(" ")
    if cell_len(shown_name(text)) < width:
        assert shown.rstrip(" ") == shown_name(text).rstrip(" ")


@pytest.mark.parametrize("name", WIDE)
def test_answers_begin_below_one_another(name: str) -> None:
    lines = side_by_side({"base": "ANSWER one\nANSWER two", name: "ANSWER three"}).split("\n")
    assert len({cell_len(line[: line.index("ANSWER")]) for line in lines}) == 1


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_they_do_so_where_the_stream_writes_letters_in_ascii(
    name: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace"))
    print(in_cells(shown_name(name), 34), side_by_side({"base": "ANSWER", name: "ANSWER"}), sep="\n", flush=True)
    cell, *lines = written.getvalue().decode(encoding).splitlines()
    assert cell_len(cell) == 34
    assert len({cell_len(line[: line.index("ANSWER")]) for line in lines}) == 1
