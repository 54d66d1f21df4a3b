"""Bytes to rows: text survives, and every bad row is found with its line, counted, and never shown."""

import codecs
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.bad_rows import BAD_LINES, GOOD, PAIR, SECRET, fault, records, skipping, write

from fedmira.data.rows import BadText, Fault, Place, decode, read_document, read_lines
from fedmira.data.tables import read_csv

START = Place("f", "f", 1, False)

# ---------------------------------------------------------------- text


def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "\xc3\xa9", "completion": "x"}\r\n\r\n')
    assert [record.instruction for record in records(path)] == ["é"]


def test_line_separators_inside_a_text_do_not_end_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c", "completion": "x"}\n', encoding="utf-8")
    assert records(path)[0].instruction == "a\u2028b\x85c"


def test_blank_lines_keep_the_count_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(PAIR) + "\n   \n" + json.dumps(PAIR))
    assert [record.source for record in records(path)] == ["a.jsonl:2", "a.jsonl:4"]


def test_rows_of_a_list_have_the_line_of_their_start(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"prompt": "a",\n  "completion": "b"},\n {"prompt": "c", "completion": "d"}\n]\n')
    assert [record.source for record in records(path)] == ["a.json:2", "a.json:4"]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_text_survives_the_reading(text: str) -> None:
    line = json.dumps({"prompt": text, "completion": "x"}, ensure_ascii=False).encode()
    [(_, row)] = read_lines(io.BytesIO(line), START)  # type: ignore[misc]
    assert row["prompt"] == text


# ---------------------------------------------------------------- bad rows


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_found_with_its_number_and_without_its_text(tmp_path: Path, kind: str) -> None:
    line, expected = BAD_LINES[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    message = fault(path)
    assert "1 fault:\n  - a.jsonl:2: " in message
    assert expected in message
    assert SECRET not in message


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_row_in_a_list_is_found_with_its_line(tmp_path: Path, kind: str) -> None:
    line, _ = BAD_LINES[kind]
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + GOOD + b",\n" + line + b",\n" + GOOD + b"]")
    message = fault(path)
    assert SECRET not in message
    assert "1 fault:\n  - a.json:2: " in message


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_skipped_and_counted_wherever_it_stands(tmp_path: Path, kind: str, position: int) -> None:
    lines = [GOOD, GOOD]
    lines.insert(position, BAD_LINES[kind][0])
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\n".join(lines))
    reading = skipping(path)
    assert (len(reading.records), len(reading.skipped), reading.read) == (2, 1, 3)
    assert [skipped.where for skipped in reading.skipped] == [f"a.jsonl:{2 * position + 1}"]
    assert SECRET not in str(reading.skipped)


BROKEN_LISTS = {  # after these the start of the next row of a list is unknown
    *(
        "not JSON at all",
        "cut short",
        "two rows on one line",
        "single quotes",
        "a trailing comma",
        "a raw tab in a text",
    ),
    *("a bad escape", "Latin-1", "a NUL byte", "a bomb of brackets", "a number of 5000 digits"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_row_of_a_list_is_skipped_unless_the_list_itself_is_broken(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + GOOD + b",\n" + BAD_LINES[kind][0] + b",\n" + GOOD + b"]")
    if kind in BROKEN_LISTS:
        message = fault(path, on_bad_row="skip")
        assert "a.json:2: " in message
        assert "the number of lost rows is not known" in message
        assert SECRET not in message
    else:
        reading = skipping(path)
        assert [skipped.where for skipped in reading.skipped] == ["a.json:2"]
        assert (len(reading.records), reading.read) == (2, 3)


@given(st.lists(st.sampled_from([None, *BAD_LINES]), min_size=1, max_size=12))
def test_kept_and_skipped_rows_add_up_to_all(kinds: list[str | None]) -> None:
    lines = [GOOD if kind is None else BAD_LINES[kind][0] for kind in kinds]
    found = list(read_lines(io.BytesIO(b"\n".join(lines)), START))
    assert len(found) == len(lines)
    assert all(isinstance(item, tuple) for item, kind in zip(found, kinds, strict=True) if kind is None)
    places = [item.where if isinstance(item, Fault) else str(item[0]) for item in found]
    assert places == [f"f:{number}" for number in range(1, len(lines) + 1)]


def test_faults_without_end_are_counted_and_five_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIR, *[{"prompt": "p"}] * 7)
    message = fault(path)
    assert "7 faults, the first 5:" in message
    assert message.count("\n") == 5
    assert "a.jsonl:6" in message
    assert "a.jsonl:7" not in message


def test_skipping_every_row_is_an_error_that_gives_the_first_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": 1}, {"reply": 2})
    message = fault(path, on_bad_row="skip")
    assert "2 faults:\n  - a.jsonl:1: no known format has these keys (question)" in message


def test_skipping_rows_of_a_known_format_that_are_all_bad_is_an_error_too(tmp_path: Path) -> None:
    assert "1 fault:\n  - a.jsonl:1: no 'completion'" in fault(
        write(tmp_path / "a.jsonl", {"prompt": "p"}), format="prompt_completion", on_bad_row="skip"
    )


def test_rows_are_skipped_until_one_settles_the_format(tmp_path: Path) -> None:
    reading = skipping(write(tmp_path / "a.jsonl", {"note": "x"}, PAIR, {"note": "x"}))
    assert (reading.format, len(reading.records)) == ("prompt_completion", 1)
    assert [skipped.where for skipped in reading.skipped] == ["a.jsonl:1", "a.jsonl:3"]


def test_nothing_is_skipped_if_nothing_is_bad(tmp_path: Path) -> None:
    reading = skipping(write(tmp_path / "a.jsonl", PAIR, PAIR))
    assert reading.skipped == ()
    assert reading.counts == {"tables": 1, "empty": 0, "others": 0, "kept": 2, "skipped": 0}


@pytest.mark.parametrize("skip", ["error", "skip"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_no_log_and_no_warning_holds_text_of_a_bad_row(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    kind: str,
    skip: str,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_LINES[kind][0])
    fault(path, on_bad_row=skip)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_an_empty_file_is_a_fault(tmp_path: Path, name: str, content: bytes, mode: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"1 fault:\n  - {name}: holds no example" in fault(tmp_path / name, on_bad_row=mode)


def test_an_empty_list_is_a_fault_and_so_is_an_empty_file_in_a_folder(tmp_path: Path) -> None:
    assert "holds no example" in fault(write(tmp_path / "a.json"))
    write(tmp_path / "b.jsonl", PAIR)
    assert "a.json: holds no example" in fault(tmp_path)
    reading = skipping(tmp_path)
    assert (reading.counts["empty"], reading.counts["kept"], reading.counts["skipped"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"prompt": "a", "completion": "b"}', "a.json:1: not JSON: the list is not closed here"),
        ('[{"prompt": "a", "completion": "b"}\n,\n]', "a.json:3: not JSON: expecting value"),
        ('[{"prompt": "a", "completion": "b"}] x', "not JSON: more text follows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"}', "a.json:2: not JSON: more text"),
        ("[", "not JSON: the list is not closed here"),
    ],
)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_list_that_is_not_json_is_a_fault_that_cannot_be_skipped(
    tmp_path: Path, text: str, expected: str, mode: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    assert expected in fault(tmp_path / "a.json", on_bad_row=mode)


@pytest.mark.parametrize(
    "damage",
    [b"not gzip", gzip.compress(GOOD * 100, mtime=0)[:-12], gzip.compress(GOOD, mtime=0)[:15] + b"xxxx"],
    ids=["no-gzip", "cut", "damaged"],
)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_damaged_archive_is_a_fault_that_cannot_be_skipped(
    tmp_path: Path, damage: bytes, name: str, mode: str
) -> None:
    (tmp_path / name).write_bytes(damage)
    assert f"{name}: damaged, or not a gzip file" in fault(tmp_path / name, on_bad_row=mode)


# ---------------------------------------------------------------- encodings

RIGHT = {"utf-8": "é 東京", "utf-8-sig": "é 東京"}
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
# UTF-7 and HZ are missing: they write other letters with ASCII's own, so that nothing can tell them from ASCII text.
OTHERS = (
    *(("latin-1", "café"), ("iso8859-15", "5 €"), ("cp1252", "“x”"), ("cp437", "café"), ("mac-roman", "café")),
    *(("cp1250", "žluť"), ("cp1251", "мир"), ("koi8-r", "мир"), ("iso8859-7", "κόσμος"), ("cp1255", "שלום")),
    *(("tis-620", "ไทย"), ("shift_jis", "東京"), ("euc-jp", "東京"), ("iso2022-jp", "東京"), ("iso2022-kr", "서울")),
    *(("gb18030", "东京"), ("big5", "東京"), ("euc-kr", "서울")),
)
EBCDIC = ("cp037", "cp1140")
KINDS = ("json", "jsonl", "csv")


def encoded(text: str, kind: str, encoding: str) -> bytes:
    """Two rows, the first in ASCII, the second with the text, both on lines of their own after the header of a CSV."""
    rows = [json.dumps({"prompt": prompt, "completion": "b"}, ensure_ascii=False) for prompt in ("a", text)]
    shapes = {"json": "[{},\n{}]", "jsonl": "{}\n{}\n"}
    if kind == "csv":
        return f"prompt,completion\na,b\n{text},b\n".encode(encoding)
    return shapes[kind].format(*rows).encode(encoding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", [*RIGHT, *(name for name, _ in OTHERS)])
def test_ascii_text_is_read_under_any_encoding(tmp_path: Path, encoding: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    content = encoded("plain", kind, encoding)
    path.write_bytes(content.removeprefix(b"\x1b$)C"))  # ISO-2022-KR begins even ASCII with an escape sequence
    assert [record.instruction for record in records(path)] == ["a", "plain"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", RIGHT)
def test_utf_8_with_or_without_a_mark_gives_the_right_text(tmp_path: Path, encoding: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(encoded(RIGHT[encoding], kind, encoding))
    assert [record.instruction for record in records(path)] == ["a", RIGHT[encoding]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("encoding", "text"), OTHERS)
def test_another_encoding_is_one_line_with_file_line_and_byte(
    tmp_path: Path, encoding: str, text: str, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    content = encoded(text, kind, encoding)
    path.write_bytes(content)
    byte = next(place for place, value in enumerate(content) if value >= 0x80 or value == 0x1B)
    line = 1 + content[:byte].count(b"\n")
    message = fault(path)
    assert f"1 fault:\n  - a.{kind}:{line}: byte {byte} of the file " in message
    assert "save the file as UTF-8" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize(
    ("encoding", "kind"),
    [  # the mark of UTF-16 and UTF-32 is believed in CSV: tests/data/test_text_form.py
        (encoding, kind)
        for encoding in (*WIDE, *EBCDIC)
        for kind in KINDS
        if (encoding, kind) not in (("utf-16", "csv"), ("utf-32", "csv"))
    ],
)
def test_an_encoding_that_shares_nothing_with_ascii_is_one_fault_at_the_first_byte(
    tmp_path: Path, encoding: str, kind: str, mode: str
) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(encoded("plain", kind, encoding))
    byte = 1 if encoding in ("utf-16-le", "utf-32-le") else 0  # their first byte is the one of ASCII
    message = fault(path, on_bad_row=mode)
    assert f"a.{kind}:1: byte {byte} of the file is " in message
    assert ("looks like UTF-16 or UTF-32" in message) == (encoding in WIDE)
    assert f"a.{kind}:2" not in message


def test_a_terminals_colours_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\n\x1b[31mred\x1b[0m,b\n")
    assert records(tmp_path / "a.csv")[0].instruction == "\x1b[31mred\x1b[0m"


def test_the_offset_of_a_bad_byte_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + GOOD + b"\n" + b'{"prompt": "\xff"}')
    assert f"a.jsonl:2: byte {3 + len(GOOD) + 1 + 12} of the file is not UTF-8" in fault(path)


@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(st.sampled_from(b'[]{}",:\n\r\t \0\x1b\xff\xc3\xa9ab1\\'), max_size=40).map(bytes),
    )
)
def test_reading_any_bytes_gives_rows_and_faults_only(data: bytes) -> None:
    for found in (
        read_lines(io.BytesIO(data), START, limit=20),
        read_document(io.BytesIO(data), START, limit=30),
        read_csv(io.BytesIO(data), START, delimiter=",", limit=20),
    ):
        items = list(found)
        assert all(isinstance(item, Fault | tuple) for item in items)
        assert not any(isinstance(item, Fault) and item.stops for item in items[:-1])


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_over_64_mib_is_one_bad_row(tmp_path: Path, name: str) -> None:
    long = b'{"prompt": "' + b"x" * (64 << 20) + b'", "completion": "b"}'
    content = GOOD + b"\n" + long + b"\n" + GOOD
    (tmp_path / name).write_bytes(gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content)
    assert f"1 fault:\n  - {name}:2: the line is longer than 64 MiB" in fault(tmp_path / name)
    reading = skipping(tmp_path / name)
    assert [record.source for record in reading.records] == [f"{name}:1", f"{name}:3"]
    assert len(reading.skipped) == 1


def test_a_very_long_line_is_never_wholly_in_memory() -> None:
    bomb = io.BytesIO(gzip.compress(bytes(200 << 20), 1, mtime=0))
    tracemalloc.start()
    with gzip.open(bomb) as stream:
        found = list(read_lines(stream, START, limit=1 << 20))  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [str(item) for item in found] == [
        "f:1: the line is longer than 1 MiB; is it one example? split it, or remove it"
    ]
    assert peak < 60 << 20


@pytest.mark.parametrize(("extra", "kept"), [(0, 1), (1, 0)])
def test_a_line_of_exactly_the_limit_is_read(extra: int, kept: int) -> None:
    found = list(read_lines(io.BytesIO(GOOD + b" " * (100 + extra - len(GOOD))), START, limit=100))
    assert sum(isinstance(item, tuple) for item in found) == kept


def test_a_document_of_more_than_2_gib_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, (2 << 30) + 1)  # a hole: no such bytes are on the disk
    assert "a.json: a JSON document of more than 2 GiB is not read" in fault(path)
    assert "write one row per line (.jsonl)" in fault(path)


def test_an_archive_that_grows_beyond_the_limit_is_refused_while_it_is_read() -> None:
    content = b"[" + b",\n".join([GOOD] * 50) + b"]"
    [refused] = read_document(io.BytesIO(content), START, limit=len(content) - 1)
    assert isinstance(refused, Fault)
    assert refused.stops
    assert len(list(read_document(io.BytesIO(content), START, limit=len(content)))) == 50


def test_a_mark_of_utf_8_is_dropped_at_the_start_of_a_file_only() -> None:
    assert decode(b"\xef\xbb\xbfx", 0) == "x"
    assert decode(b"\xef\xbb\xbfx", 5) == "\ufeffx"


def test_a_nul_far_into_a_file_does_not_make_it_utf_16() -> None:
    with pytest.raises(BadText, match="byte 100 of the file is NUL, which is not text") as caught:
        decode(b"\0a", 100)
    assert not caught.value.stops
