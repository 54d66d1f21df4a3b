"""CSV and TSV: values stay the text they are, and a bad row is found with the line on which it begins."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.data.bad_rows import SECRET, fault, records, skipping

from fedmira.data.formats import read_records
from fedmira.data.rows import Fault, Place
from fedmira.data.tables import read_csv
from fedmira.errors import DataError

START = Place("f.csv", "f", 1, False)


def table(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz", "A.CSV"])
def test_a_csv_file_is_read_under_its_headers_names(tmp_path: Path, name: str) -> None:
    separator = "\t" if "tsv" in name else ","
    text = "prompt,completion,topic\n1 + 1?,2,sums\n".replace(",", separator)
    [record] = records(table(tmp_path / name, text))
    assert (record.instruction, record.answers, record.source) == ("1 + 1?", ("2",), f"{name}:2")
    assert record.columns == {"prompt": "1 + 1?", "completion": "2", "topic": "sums"}


def test_every_value_of_a_csv_file_stays_text(tmp_path: Path) -> None:
    text = "prompt,completion,a,b,c,d\np,007,1e3,NA,true,\n"
    [record] = records(table(tmp_path / "a.csv", text))
    assert record.answers == ("007",)
    assert [record.columns[name] for name in "abcd"] == ["1e3", "NA", "true", ""]


def test_quoted_texts_keep_commas_quotes_and_line_ends_and_the_place_is_the_first_line(tmp_path: Path) -> None:
    text = '\ufeffprompt,completion\r\n"a, ""b""\r\nc\n",x\r\n\r\nd,y\r\n'
    first, second = records(table(tmp_path / "a.csv", text))
    assert (first.instruction, first.source) == ('a, "b"\r\nc\n', "a.csv:2")
    assert (second.instruction, second.source) == ("d", "a.csv:6")


@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_characters="\0\x1b", exclude_categories=["Cs"])), min_size=2, max_size=2
        ),
        max_size=4,
    ),
    st.sampled_from(",\t"),
)
def test_any_table_written_as_csv_is_read_again(rows: list[list[str]], delimiter: str) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    found = list(read_csv(io.BytesIO(stream.getvalue().encode()), START, delimiter=delimiter))
    assert [list(row.values()) for _, row in found] == rows  # type: ignore[misc]


HEADER = "prompt,completion\n"
BAD_CSV_ROWS = {  # the second row of three -> what is said, and whether the third is still found
    "too few values": ("Zq7secretZq7", "found 1 value where the first line names 2", True),
    "too many values": ("Zq7secretZq7,b,c", "found 3 values where the first line names 2", True),
    "an empty completion": ("Zq7secretZq7,", "'completion' is empty", True),
    "a text after its quote": ('"Zq7secretZq7"x,b', "a quote inside a quoted text", True),
    "quotes that are not doubled": ('"Zq7secretZq7 "x" y",b', "a quote inside a quoted text", True),
    "a carriage return alone": ("Zq7secretZq7\rx,b", "a carriage return without a line feed", True),
    "a NUL": ("Zq7secretZq7\0,b", "of the file is NUL", True),
    "a NUL inside a quoted text of two lines": ('"Zq7secretZq7\n\0",b', "of the file is NUL", True),
    "a quote that never closes": ('"Zq7secretZq7,b', "a quote opened in this row is never closed", False),
    "a broken quote, and one that opens": ('"Zq7secretZq7"x,"b\n', "a quote inside a quoted text", False),
    "a broken quote on a second line": ('"a\n"Zq7secretZq7,b', "a quote inside a quoted text", False),
}


@pytest.mark.parametrize("kind", BAD_CSV_ROWS)
def test_a_bad_row_of_a_csv_file_is_found_with_its_first_line(tmp_path: Path, kind: str) -> None:
    row, expected, goes_on = BAD_CSV_ROWS[kind]
    path = table(tmp_path / "a.csv", f"{HEADER}p,c\n{row}\np,c\n")
    message = fault(path)
    assert "1 fault:\n  - a.csv:3: " in message
    assert expected in message
    assert SECRET not in message
    assert SECRET not in (fault(path, on_bad_row="skip") if not goes_on else str(skipping(path).skipped))


@pytest.mark.parametrize("kind", BAD_CSV_ROWS)
def test_a_bad_row_of_a_csv_file_is_skipped_only_where_the_next_is_sure_to_be_found(tmp_path: Path, kind: str) -> None:
    row, _, goes_on = BAD_CSV_ROWS[kind]
    path = table(tmp_path / "a.csv", f"{HEADER}p,c\n{row}\np,c\n")
    if goes_on:
        reading = skipping(path)
        assert [skipped.where for skipped in reading.skipped] == ["a.csv:3"]
        assert (len(reading.records), reading.read) == (2, 3)
    else:
        assert "the number of lost rows is not known" in fault(path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("prompt,completion,prompt", "columns 1 and 3 have the same name"),
        ("prompt,,completion", "column 2 of 3 has no name"),
        ("prompt,completion,", "column 3 of 3 has no name"),
        ("frage;antwort", "one column with ';' in it, but columns are separated by ',' here"),
        ("frage;antwort", "if they are separated by ';', write data.delimiter: ';'"),
        ("frage\tantwort", "one column with a tab in it"),
        ("prompt,\0", "of the file is NUL"),
        ('"prompt', "a quote opened in this row is never closed"),
        ("prompt,completion\rp,c\rp,c", "a carriage return without a line feed"),
    ],
)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_header_that_cannot_be_read_is_a_fault_of_the_file(
    tmp_path: Path, header: str, expected: str, mode: str
) -> None:
    message = fault(table(tmp_path / "a.csv", f"\n{header}\np,c\n"), on_bad_row=mode)
    assert "a.csv:2: " in message
    assert expected in message


def test_a_forgotten_header_is_never_shown(tmp_path: Path) -> None:
    message = fault(table(tmp_path / "a.csv", f"{SECRET},the patient has a cold\n{SECRET} too,x\n"))
    assert "no known format has these keys (2 others); is the first line a header?" in message
    assert SECRET not in message
    assert "cold" not in message


def test_known_column_names_are_shown_so_that_the_missing_one_is_found(tmp_path: Path) -> None:
    message = fault(table(tmp_path / "a.csv", "prompt,reply,label\na,b,c\n"))
    assert "no known format has these keys (prompt, label, 1 other)" in message


def test_a_forgotten_header_is_not_shown_as_a_near_name_either(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "subject is ill,x\nb,c\n")
    message = fault(path, columns={"task": "subject"}, format="text")
    assert "a.csv:2: no 'subject', which data.columns.task names" in message
    assert "ill" not in message


def test_only_a_header_is_no_example(tmp_path: Path) -> None:
    assert "a.csv: holds no example" in fault(table(tmp_path / "a.csv", HEADER))


def test_json_in_a_cell_is_not_read_as_a_conversation(tmp_path: Path) -> None:
    cell = json.dumps(json.dumps([{"role": "user", "content": SECRET}]))
    message = fault(table(tmp_path / "a.csv", f"messages\n{cell.replace(chr(92) + chr(34), chr(34) * 2)}\n"))
    assert "a.csv:2: 'messages' is text, not a list of turns (JSON inside a text is not read; use .jsonl" in message
    assert SECRET not in message


def test_a_text_longer_than_the_csv_modules_limit_is_read_and_the_limit_is_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    assert records(table(tmp_path / "a.csv", f"text\n{long}\n"))[0].answers == (long,)
    fault(table(tmp_path / "b.csv", 'text\n"x"y\n'))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("row", [b"x" * 101, b'"' + b"x\n" * 51 + b'"'])
def test_a_row_over_the_limit_ends_the_file_because_its_quotes_are_unknown(row: bytes) -> None:
    found = list(read_csv(io.BytesIO(b"text\na\n" + row + b"\nb\n"), START, delimiter=",", limit=100))
    assert len(found) == 2
    assert isinstance(found[1], Fault)
    assert found[1].stops
    assert "f.csv:3: the " in str(found[1])
    assert "longer than 100 bytes" in str(found[1])


def test_a_line_of_separators_is_a_row_of_empty_values_and_no_blank_line() -> None:
    text = io.BytesIO(b"a\tb\n\t\n\n1\t2\n")
    rows = [item[1] for item in read_csv(text, START, delimiter="\t") if not isinstance(item, Fault)]
    assert rows == [{"a": "", "b": ""}, {"a": "1", "b": "2"}]


@pytest.mark.parametrize("header", [" Prompt , Completion", "PROMPT,completion ", '"promt","completion"'])
def test_a_header_that_is_nearly_known_is_named_with_the_name_that_is_wanted(tmp_path: Path, header: str) -> None:
    path = table(tmp_path / "a.csv", f"{header},{SECRET}\np,c,s\n")
    message = fault(path)
    found = [name.strip('"') for name in header.split(",")]
    assert all(json.dumps(name) in message for name in found if name not in ("prompt", "completion"))
    for name, wanted in zip(found, ("prompt", "completion"), strict=True):
        assert (f"{json.dumps(name)} is not '{wanted}'" in message) == (name != wanted)
    assert SECRET not in message
    told = yaml.safe_load(message.rpartition("(our name: yours): ")[2])
    (record,) = read_records(path, columns=told).records
    assert (record.instruction, record.answers) == ("p", ("c",))


def test_a_header_that_is_nearly_one_of_the_columns_that_the_config_names_says_so(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", " frage,antwort\np,c\n")
    with pytest.raises(DataError) as caught:
        read_records(path, columns={"prompt": "frage", "completion": "antwort"})
    assert """" frage" is not 'frage'""" in str(caught.value)
    assert '{prompt: " frage", completion: "antwort"}' in str(caught.value)
