"""CSV as Excel writes it around the world: what is sure is found, what is said is taken, the rest is refused."""

import csv
import gzip
import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.bad_rows import PAIR, fault, write

from fedmira.config.faults import check_config
from fedmira.config.sections import DELIMITERS
from fedmira.config.yaml_text import dump_config
from fedmira.data.formats import Reading, read_records
from fedmira.data.tables import SEPARATORS
from fedmira.errors import ConfigError, DataError

HEADER = ["hospital", "question", "answer"]
ROWS = [["Charité", "Wie groß?", "3,5 cm"], ["Zürich", "Grüße|an", "7;5"]]
BESIDE = {"prompt": "question", "completion": "answer"}


def table(delimiter: str, *, first: str = "") -> str:
    lines = [[f'"{cell}"' for cell in row] for row in ROWS]
    return first + "\r\n".join(delimiter.join(line) for line in [HEADER, *lines]) + "\r\n"


def check(reading: Reading) -> None:
    found = [[record.columns["hospital"], record.instruction, *record.answers] for record in reading.records]
    assert found == ROWS


def save(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_what_a_mark_and_a_header_say_is_found(name: str, encoding: str, delimiter: str, tmp_path: Path) -> None:
    path = save(tmp_path, name, table(delimiter).encode(encoding))
    reading = read_records(path, columns=BESIDE)
    check(reading)
    usual = delimiter == ("\t" if name == "a.tsv" else ",")
    assert len(reading.found) == (not usual) + (encoding in ("utf-16", "utf-32"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "cp1252", "latin-1", "mac-roman", "cp850"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "#"])
def test_what_is_said_is_taken(encoding: str, delimiter: str, tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", table(delimiter).encode(encoding))
    check(read_records(path, columns=BESIDE, encoding=encoding, delimiter=delimiter))


@pytest.mark.parametrize("sign", [";", "|", "#"])
def test_excels_first_line_names_the_separator(sign: str, tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", table(sign, first=f"sep={sign}\r\n").encode())
    check(read_records(path, columns=BESIDE))
    check(read_records(path, columns=BESIDE, delimiter=sign))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_json_is_utf_8_unless_another_encoding_is_said(encoding: str, tmp_path: Path) -> None:
    path = save(tmp_path, "a.jsonl", '{"prompt": "é", "completion": "ü"}\n'.encode(encoding))
    assert "data.encoding: " in fault(path)
    assert read_records(path, encoding=encoding).records[0].answers == ("ü",)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp1252"])
def test_a_refusal_names_the_setting_that_works(encoding: str, tmp_path: Path) -> None:
    """cp1252 is named as an example, because any byte may be a letter of many encodings."""
    text = '{"prompt": "a é", "completion": "ü"}'
    path = save(tmp_path, "a.json", text.encode(encoding))
    named = fault(path).rpartition("data.encoding: ")[2]
    assert read_records(path, encoding=named).records[0].instruction == "a é"


@pytest.mark.parametrize(("sign", "word"), [(";", "semicolon"), ("\t", "tab"), ("|", "pipe")])
def test_a_header_of_unknown_names_is_refused_with_the_setting_that_works(sign: str, word: str, tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", f"frage{sign}antwort\np{sign}c\n".encode())
    assert f"; if they are separated by {sign!r}" in fault(path) or word == "tab"
    named = fault(path).rpartition("write data.delimiter: ")[2].partition("; ")[0]
    assert check_config({**RAW, "data": {"path": "x", "delimiter": yaml.safe_load(named)}}).data.delimiter == sign
    columns = {"prompt": "frage", "completion": "antwort"}
    assert read_records(path, columns=columns).records[0].answers == ("c",)  # the names are known now
    data = check_config({**RAW, "data": {"path": "x", "delimiter": word}}).data
    assert data.delimiter == sign


def test_a_header_that_the_usual_separator_cuts_is_not_cut_otherwise(tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", b"prompt,x;completion,completion\np,x,c\n")
    assert read_records(path).records[0].columns["x;completion"] == "x"


def test_a_decimal_comma_stays_text(tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", b"prompt;completion;dose\np;c;3,5\n")
    assert read_records(path).records[0].columns["dose"] == "3,5"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    rows=st.lists(
        st.tuples(*[st.text(st.characters(codec="cp1252", exclude_characters="\0\x1b"), min_size=1)] * 2).filter(
            lambda row: row[1].strip()
        ),
        min_size=1,
        max_size=4,
    ),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-16", "cp1252"]),
)
def test_any_table_is_read_again(rows: list[tuple[str, str]], delimiter: str, encoding: str, tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *rows])
    told = "cp1252" if encoding == "cp1252" else None
    found = [
        (record.instruction, *record.answers) for record in read_records(tmp_path / "a.csv", encoding=told).records
    ]
    assert found == rows


# ---------------------------------------------------------------- what is refused


def test_a_mark_that_contradicts_the_setting_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", table(",").encode("utf-8-sig"))
    with pytest.raises(DataError, match=r"begins with the mark of UTF-8; write data\.encoding: utf-8, or null"):
        read_records(path, columns=BESIDE, encoding="cp1252")
    for encoding in ("utf8", "UTF-8", "utf-8-sig"):
        check(read_records(path, columns=BESIDE, encoding=encoding))


def test_bytes_of_another_encoding_than_said_are_one_fault(tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", b"prompt,completion\np,\x81\n")
    assert "a.csv: is not in " in fault(path, encoding="cp1252")
    path = save(tmp_path, "b.csv", "prompt,completion\np,c\n".encode("utf-16")[:-1])
    assert "check data.encoding" in fault(path, encoding="utf-16")


@pytest.mark.parametrize(("key", "value"), [("encoding", "cp1252"), ("delimiter", ";")])
def test_settings_of_text_files_are_refused_where_there_is_none(key: str, value: str, tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "completion": ["c"]}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"prompt": ["p"], "completion": ["c"]}).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert f"data.{key}" in fault(path, **{key: value})
    if key == "delimiter":
        write(tmp_path / "a.jsonl", PAIR)
        assert "only .csv and .tsv files have one" in fault(tmp_path / "a.jsonl", delimiter=";")


def test_every_separator_has_a_name() -> None:
    assert set(DELIMITERS.values()) == set(SEPARATORS)


RAW = {
    "seeds": [0],
    "output_dir": "x",
    "model": {"base_model": "x"},
    "federation": {"rounds": 1},
    "training": {"local_steps": 1},
    "methods": ["local"],
}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("encoding", "latin1x", "is not an encoding of text (did you mean 'latin-1'?)"),
        ("encoding", "base64", "is not an encoding of text"),
        ("encoding", "undefined", "is not an encoding of text"),
        ("encoding", "", "is empty"),
        ("encoding", "a\0b", "is not an encoding of text"),
        ("delimiter", ";;", "should be one character that separates columns, or comma, semicolon, tab, pipe"),
        ("delimiter", "a", "should be one character"),
        ("delimiter", '"', "should be one character"),
        ("delimiter", "\n", "should be one character"),
    ],
)
def test_a_setting_that_cannot_be_is_a_fault_of_the_config(key: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({**RAW, "data": {"path": "x", key: value}})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "delimiter"), [*itertools.product(["cp1252", None], [",", "tab", "\\t", "\t", "PIPE", "|", "#", None])]
)
def test_a_config_with_these_settings_is_written_so_that_it_reads_back(
    encoding: str | None, delimiter: str | None
) -> None:
    config = check_config({**RAW, "data": {"path": "x", "encoding": encoding, "delimiter": delimiter}})
    assert check_config(yaml.safe_load(dump_config(config))) == config
