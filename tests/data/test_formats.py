"""Reading examples: every format in both containers, and every kind of bad row found with its line."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.data import formats, rows
from fedmira.data.formats import Record, read_records
from fedmira.errors import DataError

DOLLY = {"instruction": "Name a colour.", "context": "", "response": "red", "category": "open_qa"}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
PAIR = {"prompt": "1 + 1 =", "completion": "2"}
OUR_TASK = {
    "task": "task9_add",
    "category": "Mathematics",
    "upstream_categories": ["Number", "Code"],
    "license": ["Unknown"],
    "positive_examples": [{"input": "x", "output": "y"}],
    "definition": "Add the numbers.",
    "instances": [
        {"id": "task9-a", "input": "1 2", "output": ["3", "three"]},
        {"id": "b", "input": "0 0", "output": ["0"]},
    ],
}
UPSTREAM_TASK = {
    "Categories": ["Question Answering", "Other"],
    "Domains": ["Wikipedia"],
    "Definition": ["Answer the question."],
    "Positive Examples": [],
    "Instances": [{"id": "task001-1", "input": "Who?", "output": "me"}, {"input": "Where?", "output": ["here"]}],
}
SECRET = "Zq7secretZq7"


def write(path: Path, *rows: object) -> Path:
    """Write rows as the extension asks: one per line, or a list; compressed if it ends in .gz."""
    text = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in path.name else json.dumps(list(rows))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def fault(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz", "data.jsonl.gz", "DATA.JSONL"])
def test_dolly_is_recognised_in_every_container(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = json.dumps(DOLLY) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_records(path) == ("dolly", [Record("Name a colour.", "", ("red",), DOLLY, f"{name}:1")])


def test_alpaca_rows_carry_instruction_input_and_output(tmp_path: Path) -> None:
    name, [record] = read_records(write(tmp_path / "a.json", ALPACA))
    assert (name, record.instruction, record.input, record.answers) == ("alpaca", "Add.", "1 2", ("3",))


def test_a_prompt_becomes_an_instruction_without_input(tmp_path: Path) -> None:
    name, [record] = read_records(write(tmp_path / "a.jsonl", PAIR))
    assert (name, record.instruction, record.input, record.answers) == ("prompt_completion", "1 + 1 =", "", ("2",))


def test_a_completion_may_list_several_answers(tmp_path: Path) -> None:
    _, [record] = read_records(write(tmp_path / "a.jsonl", {"prompt": "p", "completion": ["2", "two"]}))
    assert record.answers == ("2", "two")


def test_an_empty_prompt_is_allowed_but_an_empty_completion_is_not(tmp_path: Path) -> None:
    assert read_records(write(tmp_path / "a.jsonl", {"prompt": "", "completion": "x"}))[1][0].instruction == ""
    assert "a.jsonl:1: 'completion' is empty" in fault(
        write(tmp_path / "a.jsonl", {"prompt": "p", "completion": " \n"})
    )


def test_our_natural_instructions_line_gives_one_record_per_instance(tmp_path: Path) -> None:
    name, records = read_records(write(tmp_path / "tasks.jsonl", OUR_TASK))
    assert name == "natural_instructions"
    assert [(r.instruction, r.input, r.answers, r.source) for r in records] == [
        ("Add the numbers.", "1 2", ("3", "three"), "tasks.jsonl#task9-a"),
        ("Add the numbers.", "0 0", ("0",), "tasks.jsonl#b"),
    ]
    assert records[0].columns == {
        "task": "task9_add",
        "category": "Mathematics",
        "upstream_categories": "Number; Code",
        "license": "Unknown",
    }


def test_an_upstream_task_takes_its_name_from_the_file_and_its_category_from_the_first(tmp_path: Path) -> None:
    path = tmp_path / "task001_who.json"
    path.write_text(json.dumps(UPSTREAM_TASK, indent=2))
    name, records = read_records(path)
    assert name == "natural_instructions"
    assert records[0].columns == {
        "task": "task001_who",
        "category": "Question Answering",
        "Categories": "Question Answering; Other",
        "Domains": "Wikipedia",
    }
    assert [record.answers for record in records] == [("me",), ("here",)]
    assert [record.source for record in records] == ["task001_who.json#task001-1", "task001_who.json:1#1"]


def test_a_definition_may_be_a_text_or_a_list_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "task1.json"
    path.write_text(json.dumps({**UPSTREAM_TASK, "Definition": ["One.", "Two."]}))
    assert read_records(path)[1][0].instruction == "One.\nTwo."


def test_the_older_slice_takes_its_category_from_upstream_categories(tmp_path: Path) -> None:
    task = {key: value for key, value in OUR_TASK.items() if key != "category"}
    assert read_records(write(tmp_path / "t.jsonl", task))[1][0].columns["category"] == "Number"


def test_a_folder_is_read_by_file_name_and_adds_the_column_file(tmp_path: Path) -> None:
    for name in ("task002_b", "task001_a"):
        (tmp_path / f"{name}.json").write_text(json.dumps(UPSTREAM_TASK))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "._task001_a.json").write_bytes(b"\0\0")  # macOS leaves these
    _, records = read_records(tmp_path)
    assert [record.columns["task"] for record in records] == ["task001_a"] * 2 + ["task002_b"] * 2
    assert [record.columns["file"] for record in records] == ["task001_a"] * 2 + ["task002_b"] * 2


def test_a_rows_own_column_file_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {**PAIR, "file": "mine"})
    assert read_records(tmp_path)[1][0].columns["file"] == "mine"


def test_scalars_become_text_and_nothing_else_becomes_a_column(tmp_path: Path) -> None:
    row = {**PAIR, "n": 7, "half": 0.5, "good": True, "none": None, "list": [1], "map": {}}
    _, [record] = read_records(write(tmp_path / "a.jsonl", row))
    assert record.columns == {**PAIR, "n": "7", "half": "0.5", "good": "true"}


def test_columns_name_what_is_called_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "1 + 1?", "reply": "2", "subject": "sums"})
    name, [record] = read_records(path, columns={"prompt": "question", "completion": "reply", "task": "subject"})
    assert (name, record.instruction, record.answers) == ("prompt_completion", "1 + 1?", ("2",))
    assert record.columns["task"] == "sums"


def test_one_renamed_column_still_finds_the_input(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "1 2", "reply": "3"})
    name, [record] = read_records(path, columns={"answer": "reply"})
    assert (name, record.input) == ("alpaca", "1 2")


def test_natural_instructions_keys_can_be_renamed_too(tmp_path: Path) -> None:
    row = {"name": "t", "definition": "d", "instances": [{"x": "1", "y": "2"}]}
    columns = {"task": "name", "input": "x", "answer": "y"}
    _, [record] = read_records(write(tmp_path / "a.jsonl", row), columns=columns)
    assert (record.columns["task"], record.input, record.answers) == ("t", "1", ("2",))


def test_instructions_without_any_input_are_read(tmp_path: Path) -> None:
    name, [record] = read_records(write(tmp_path / "a.jsonl", {"instruction": "Sing.", "output": "la"}))
    assert (name, record.input) == ("alpaca", "")


def test_an_input_under_another_formats_name_is_not_lost_in_silence(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "context": "1 2", "output": "3"}
    assert "no known format" in fault(write(tmp_path / "a.jsonl", row))
    assert read_records(tmp_path / "a.jsonl", columns={"input": "context"})[1][0].input == "1 2"
    assert "'context' would not be read" in fault(tmp_path / "a.jsonl", format="alpaca")


def test_the_table_lists_the_formats_of_the_config() -> None:
    from typing import get_args

    from fedmira.config import DataConfig

    allowed = get_args(DataConfig.model_fields["format"].annotation)
    assert ("auto", *(entry.name for entry in formats.FORMATS)) == allowed


# ---------------------------------------------------------------- text


def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "\xc3\xa9", "completion": "x"}\r\n\r\n')
    assert [record.instruction for record in read_records(path)[1]] == ["é"]


def test_line_separators_inside_a_text_do_not_end_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c", "completion": "x"}\n', encoding="utf-8")
    assert read_records(path)[1][0].instruction == "a\u2028b\x85c"


def test_blank_lines_keep_the_count_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(PAIR) + "\n   \n" + json.dumps(PAIR))
    assert [record.source for record in read_records(path)[1]] == ["a.jsonl:2", "a.jsonl:4"]


def test_rows_of_a_list_know_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"prompt": "a",\n  "completion": "b"},\n {"prompt": "c", "completion": "d"}\n]\n')
    assert [record.source for record in read_records(path)[1]] == ["a.json:2", "a.json:4"]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_text_survives_the_reading(text: str) -> None:
    line = json.dumps({"prompt": text, "completion": "x"}, ensure_ascii=False).encode()
    place = rows.Place("f", "f", 1, False)
    [(_, row)] = rows._read_lines([line], place)  # type: ignore[misc]
    assert row["prompt"] == text


# ---------------------------------------------------------------- faults

GOOD = json.dumps(PAIR).encode()
BAD_LINES = {
    "not JSON at all": (b"hello", "not JSON: expecting value at column 1"),
    "cut short": (b'{"prompt": "' + SECRET.encode(), "not JSON: unterminated string starting at column 12"),
    "two rows on one line": (GOOD + GOOD, "not JSON: more text after the first value"),
    "single quotes": (b"{'prompt': 'a', 'completion': 'b'}", "not JSON: expecting property name"),
    "a trailing comma": (b'{"prompt": "a", "completion": "b",}', "not JSON"),
    "a raw tab in a text": (b'{"prompt": "a\tb", "completion": "b"}', "not JSON: invalid control character"),
    "a bad escape": (rb'{"prompt": "\q", "completion": "b"}', "not JSON: invalid \\escape"),
    "a list": (b'["a", "b"]', "found a list where a row"),
    "null": (b"null", "found null where a row"),
    "a text": (b'"Zq7secretZq7"', "found text where a row"),
    "no completion": (b'{"prompt": "Zq7secretZq7"}', "no 'completion'"),
    "no prompt": (b'{"completion": "b"}', "no 'prompt'"),
    "a null completion": (b'{"prompt": "a", "completion": null}', "'completion' is null, not text"),
    "a number": (b'{"prompt": "a", "completion": 5}', "'completion' is a number, not text"),
    "a truth value": (b'{"prompt": true, "completion": "b"}', "'prompt' is a truth value, not text"),
    "an object": (b'{"prompt": "a", "completion": {"x": 1}}', "'completion' is an object, not text"),
    "a list as prompt": (b'{"prompt": ["a"], "completion": "b"}', "'prompt' is a list, not text"),
    "an empty completion": (b'{"prompt": "a", "completion": ""}', "'completion' is empty"),
    "no answer in the list": (b'{"prompt": "a", "completion": []}', "'completion' is an empty list"),
    "one empty answer": (b'{"prompt": "a", "completion": ["b", ""]}', "'completion' is empty"),
    "a number among the answers": (b'{"prompt": "a", "completion": ["b", 1]}', "'completion' is a number, not text"),
    "Latin-1": (b'{"prompt": "caf\xe9", "completion": "b"}', "is not UTF-8"),
    "a NUL byte": (b'{"prompt": "a\0b", "completion": "b"}', "of the file is NUL"),
    "an escaped NUL": (rb'{"prompt": "a\u0000", "completion": "b"}', "'prompt' contains a NUL character"),
    "half a character": (rb'{"prompt": "\ud83d", "completion": "b"}', "'prompt' contains half a character"),
    "a NUL in another column": (rb'{"prompt": "a", "completion": "b", "x": "\u0000"}', "'x' contains a NUL"),
    "a key twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "a key is given twice"),
    "NaN": (b'{"prompt": "a", "completion": "b", "x": NaN}', "NaN is no JSON number"),
    "a bomb of brackets": (b"[" * 100_000, "JSON nested too deeply"),
    "a number of 5000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "a number with too many digits"),
}


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
    assert "a.json:2: " in message or "(line 2)" in message or "of the file is NUL" in message


def test_the_offset_of_a_bad_byte_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + b'{"prompt": "\xff"}')
    assert f"a.jsonl:2: byte {3 + len(GOOD) + 1 + 12} of the file is not UTF-8" in fault(path)


def test_utf_16_is_one_fault_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(((json.dumps(PAIR) + "\n") * 9).encode("utf-16"))
    assert "1 fault:" in fault(path)
    assert "looks like UTF-16; save it as UTF-8" in fault(path)


def test_five_faults_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIR, *[{"prompt": "p"}] * 7)
    message = fault(path)
    assert "7 faults, the first 5:" in message
    assert message.count("\n") == 5
    assert "a.jsonl:6" in message
    assert "a.jsonl:7" not in message


def test_a_key_missing_where_the_first_row_has_it_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ALPACA, {"instruction": "Sing.", "output": "la"})
    assert "a.jsonl:2: no 'input'" in fault(path)


def test_an_instance_without_output_is_a_fault_that_names_it(tmp_path: Path) -> None:
    task = {**OUR_TASK, "instances": [{"id": "a", "input": "x", "output": ["y"]}, {"id": "b", "input": "x"}]}
    assert "t.jsonl:1, instance 2 of 2: no 'output'" in fault(write(tmp_path / "t.jsonl", task))


@pytest.mark.parametrize("output", [[], "", [""], None, 3])
def test_an_instance_with_an_output_that_is_no_answer_is_a_fault(tmp_path: Path, output: object) -> None:
    task = {**OUR_TASK, "instances": [{"id": "a", "input": "x", "output": output}]}
    assert "t.jsonl:1, instance 1 of 1: 'output' is" in fault(write(tmp_path / "t.jsonl", task))


@pytest.mark.parametrize("instances", [[], {}, None, "x"])
def test_a_task_without_a_list_of_instances_is_a_fault(tmp_path: Path, instances: object) -> None:
    assert "not a list with an instance" in fault(write(tmp_path / "t.jsonl", {**OUR_TASK, "instances": instances}))


def test_a_line_without_a_task_name_is_a_fault(tmp_path: Path) -> None:
    assert "t.jsonl:1: no 'task'" in fault(write(tmp_path / "t.jsonl", UPSTREAM_TASK))


def test_the_sources_never_show_an_id_that_may_be_text(tmp_path: Path) -> None:
    task = {**OUR_TASK, "instances": [{"id": "a long sentence", "input": "x", "output": "y"}]}
    assert read_records(write(tmp_path / "t.jsonl", task))[1][0].source == "t.jsonl:1#0"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_empty_file_is_a_fault(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{name}: holds no example" in fault(tmp_path / name)


def test_an_empty_list_is_a_fault_and_so_is_an_empty_file_in_a_folder(tmp_path: Path) -> None:
    assert "holds no example" in fault(write(tmp_path / "a.json"))
    write(tmp_path / "b.jsonl", PAIR)
    assert "a.json: holds no example" in fault(tmp_path)


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
def test_a_list_that_is_no_json_is_a_fault(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert expected in fault(tmp_path / "a.json")


@pytest.mark.parametrize("damage", [b"not gzip", gzip.compress(GOOD * 100)[:-12], gzip.compress(GOOD)[:15] + b"xxxx"])
def test_a_damaged_archive_is_a_fault(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(damage)
    assert "a.jsonl.gz: damaged, or not a gzip file" in fault(tmp_path / "a.jsonl.gz")


def test_unknown_keys_are_listed_with_what_each_format_reads(tmp_path: Path) -> None:
    message = fault(write(tmp_path / "a.jsonl", {"question": SECRET, "reply": "x", f"{SECRET}?": 1}))
    assert "a.jsonl:1: no known format has the keys found here (question, reply)" in message
    assert "alpaca: instruction, input, output" in message
    assert SECRET not in message


def test_an_unknown_format_suggests_the_nearest(tmp_path: Path) -> None:
    message = fault(tmp_path, format="dollie")
    assert "data.format 'dollie' is unknown (did you mean 'dolly'?)" in message


def test_an_unknown_column_name_suggests_the_nearest(tmp_path: Path) -> None:
    message = fault(tmp_path, columns={"promt": "question"})
    assert "'promt' is no name of ours (did you mean 'prompt'?)" in message


def test_a_column_of_another_format_is_refused(tmp_path: Path) -> None:
    assert "'prompt' is no name of ours" in fault(tmp_path, format="dolly", columns={"prompt": "question"})


def test_a_renamed_task_that_is_not_there_suggests_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**PAIR, "subject": "x"})
    assert "no 'subjct' (did you mean 'subject'?), which data.columns.task names" in fault(
        path, columns={"task": "subjct"}
    )


def test_a_missing_file_suggests_the_nearest_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PAIR)
    assert "no such file or folder (did you mean 'train.jsonl'?)" in fault(tmp_path / "trian.jsonl")


def test_a_file_of_another_kind_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    assert "reads .json, .jsonl, .json.gz, .jsonl.gz files" in fault(tmp_path / "a.csv")


def test_a_folder_without_data_says_so(tmp_path: Path) -> None:
    assert "the folder holds no .json" in fault(tmp_path)


def test_a_file_and_its_compressed_copy_are_not_read_as_two(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", PAIR)
    write(tmp_path / "a.jsonl.gz", PAIR)
    assert "more than one file is called 'a'" in fault(tmp_path)
