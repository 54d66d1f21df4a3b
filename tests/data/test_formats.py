"""Reading examples: how each format is recognised, what becomes of its rows, and which rows are refused."""

import gzip
import json
from pathlib import Path

import pytest
from tests.data.bad_rows import PAIR, SECRET, fault, records, write

from fedmira.data import formats
from fedmira.data.formats import Record, read_records

DOLLY = {"instruction": "Name a colour.", "context": "", "response": "red", "category": "open_qa"}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
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


def read(path: Path, **options: object) -> tuple[str, list[Record]]:
    reading = read_records(path, **options)  # type: ignore[arg-type]
    return reading.format, reading.records


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz", "data.jsonl.gz", "DATA.JSONL"])
def test_dolly_is_recognised_in_every_container(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = json.dumps(DOLLY) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read(path) == ("dolly", [Record("Name a colour.", "", ("red",), DOLLY, f"{name}:1")])


def test_alpaca_rows_carry_instruction_input_and_output(tmp_path: Path) -> None:
    name, [record] = read(write(tmp_path / "a.json", ALPACA))
    assert (name, record.instruction, record.input, record.answers) == ("alpaca", "Add.", "1 2", ("3",))


def test_a_prompt_becomes_an_instruction_without_input(tmp_path: Path) -> None:
    name, [record] = read(write(tmp_path / "a.jsonl", PAIR))
    assert (name, record.instruction, record.input, record.answers) == ("prompt_completion", "1 + 1 =", "", ("2",))


def test_a_completion_may_list_several_answers(tmp_path: Path) -> None:
    _, [record] = read(write(tmp_path / "a.jsonl", {"prompt": "p", "completion": ["2", "two"]}))
    assert record.answers == ("2", "two")


def test_an_empty_prompt_is_allowed_but_an_empty_completion_is_not(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", {"prompt": "", "completion": "x"}))[1][0].instruction == ""
    assert "a.jsonl:1: 'completion' is empty" in fault(
        write(tmp_path / "a.jsonl", {"prompt": "p", "completion": " \n"})
    )


def test_our_natural_instructions_line_gives_one_record_per_instance(tmp_path: Path) -> None:
    name, records = read(write(tmp_path / "tasks.jsonl", OUR_TASK))
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
    name, records = read(path)
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
    assert read(path)[1][0].instruction == "One.\nTwo."


def test_the_older_slice_takes_its_category_from_upstream_categories(tmp_path: Path) -> None:
    task = {key: value for key, value in OUR_TASK.items() if key != "category"}
    assert read(write(tmp_path / "t.jsonl", task))[1][0].columns["category"] == "Number"


def test_a_folder_is_read_by_file_name_and_adds_the_column_file(tmp_path: Path) -> None:
    for name in ("task002_b", "task001_a"):
        (tmp_path / f"{name}.json").write_text(json.dumps(UPSTREAM_TASK))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "._task001_a.json").write_bytes(b"\0\0")  # macOS leaves these
    _, records = read(tmp_path)
    assert [record.columns["task"] for record in records] == ["task001_a"] * 2 + ["task002_b"] * 2
    assert [record.columns["file"] for record in records] == ["task001_a"] * 2 + ["task002_b"] * 2


def test_a_rows_own_column_file_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {**PAIR, "file": "mine"})
    assert read(tmp_path)[1][0].columns["file"] == "mine"


def test_scalars_become_text_and_nothing_else_becomes_a_column(tmp_path: Path) -> None:
    row = {**PAIR, "n": 7, "half": 0.5, "good": True, "none": None, "list": [1], "map": {}}
    _, [record] = read(write(tmp_path / "a.jsonl", row))
    assert record.columns == {**PAIR, "n": "7", "half": "0.5", "good": "true"}


def test_columns_map_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "1 + 1?", "reply": "2", "subject": "sums"})
    name, [record] = read(path, columns={"prompt": "question", "completion": "reply", "task": "subject"})
    assert (name, record.instruction, record.answers) == ("prompt_completion", "1 + 1?", ("2",))
    assert record.columns["task"] == "sums"


def test_one_renamed_column_still_finds_the_input(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "1 2", "reply": "3"})
    name, [record] = read(path, columns={"answer": "reply"})
    assert (name, record.input) == ("alpaca", "1 2")


def test_natural_instructions_keys_can_be_renamed_too(tmp_path: Path) -> None:
    row = {"name": "t", "definition": "d", "instances": [{"x": "1", "y": "2"}]}
    columns = {"task": "name", "input": "x", "answer": "y"}
    _, [record] = read(write(tmp_path / "a.jsonl", row), columns=columns)
    assert (record.columns["task"], record.input, record.answers) == ("t", "1", ("2",))


def test_instructions_without_any_input_are_read(tmp_path: Path) -> None:
    name, [record] = read(write(tmp_path / "a.jsonl", {"instruction": "Sing.", "output": "la"}))
    assert (name, record.input) == ("alpaca", "")


def test_an_input_under_another_formats_name_is_not_dropped_silently(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "context": "1 2", "output": "3"}
    assert "no known format" in fault(write(tmp_path / "a.jsonl", row))
    assert read(tmp_path / "a.jsonl", columns={"input": "context"})[1][0].input == "1 2"
    assert "'context' would not be read" in fault(tmp_path / "a.jsonl", format="alpaca")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"Prompt": "p", "completion": "c"}, 'prompt: "Prompt"'),
        ({"instruction": "i", "Response": "r"}, 'answer: "Response"'),
        ({"Messages": []}, 'messages: "Messages"'),
        ({"text\u200b": "t"}, 'text: "text\\u200b"'),
    ],
)
def test_keys_that_are_nearly_known_are_named_with_what_to_write(
    tmp_path: Path, row: dict[str, object], told: str
) -> None:
    assert fault(write(tmp_path / "a.jsonl", row)).endswith(f"data.columns (our name: yours): {{{told}}}")


def test_a_key_that_a_later_row_spells_otherwise_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIR, {"Prompt": "p", "completion": "c"})
    assert "a.jsonl:2: no 'prompt', but \"Prompt\": keys are read exactly as they are written" in fault(path)


def test_a_text_is_an_answer_to_nothing(tmp_path: Path) -> None:
    name, [record] = read(write(tmp_path / "a.jsonl", {"text": "Once upon a time.", "topic": "tales"}))
    assert (name, record.instruction, record.input, record.answers) == ("text", "", "", ("Once upon a time.",))
    assert record.columns == {"text": "Once upon a time.", "topic": "tales"}


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (DOLLY, "dolly"),
        (ALPACA, "alpaca"),
        (PAIR, "prompt_completion"),
        (OUR_TASK, "natural_instructions"),
        (CHAT, "messages"),
        (SHAREGPT, "sharegpt"),
        ({**CHAT, **PAIR}, "messages"),
        ({**SHAREGPT, **ALPACA}, "sharegpt"),
        ({"conversation": CHAT["messages"]}, "messages"),
        ({"question": "q", "answer": "a"}, "prompt_completion"),
    ],
)
def test_a_column_text_changes_no_other_format(tmp_path: Path, row: dict[str, object], name: str) -> None:
    assert read(write(tmp_path / "a.jsonl", row))[0] == name
    if "question" not in row:
        assert read(write(tmp_path / "b.jsonl", {"text": "x", **row}))[0] == name


@pytest.mark.parametrize(
    ("columns", "row", "answer"),
    [
        ({"text": "body"}, {"body": "b"}, "b"),
        ({"messages": "log"}, {"log": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "b"),
        ({"conversations": "log"}, {"log": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "b"),
        ({"answer": "label"}, {"instruction": "a", "context": "", "label": "b"}, "b"),
    ],
)
def test_every_format_can_be_found_under_other_names(
    tmp_path: Path, columns: dict[str, str], row: dict[str, object], answer: str
) -> None:
    path = write(tmp_path / "a.jsonl", {**row, "who": "me"})
    [record] = records(path, columns={**columns, "task": "who"})
    assert record.answers == (answer,)
    assert record.columns["task"] == "me"


def test_a_question_and_an_answer_and_nothing_else_are_a_prompt_and_a_completion(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "1 + 1?", "answer": "2", "id": "x", "category": "sums"})
    reading = read_records(path)
    assert (reading.format, reading.records[0].instruction, reading.records[0].answers) == (
        "prompt_completion",
        "1 + 1?",
        ("2",),
    )
    assert reading.keys == {"prompt": "question", "completion": "answer"}


def test_a_question_with_more_beside_it_is_read_only_when_it_is_named(tmp_path: Path) -> None:
    row = {"question": "Who?", "answer": "me", "context": SECRET}
    path = write(tmp_path / "a.jsonl", row)
    assert "only if no other column may be part of the question" in fault(path)
    assert "'context' is beside 'question' and 'answer' and would not be read" in fault(
        path, format="prompt_completion"
    )
    assert records(path, columns={"prompt": "question", "completion": "answer"})[0].instruction == "Who?"
    write(path, {"question": "1?", "answer": "1"}, row)
    assert "a.jsonl:2: 'context' is beside 'question' and 'answer'" in fault(path)
    assert SECRET not in fault(path)


@pytest.mark.parametrize(("key", "value"), [("history", [["a", "b"]]), ("system", "Be brief."), ("history", "x")])
def test_a_history_or_system_of_an_instruction_is_not_dropped_silently(tmp_path: Path, key: str, value: object) -> None:
    message = fault(write(tmp_path / "a.jsonl", {**ALPACA, key: value}))
    assert f"a.jsonl:1: '{key}' is not read: if it is part of the request, write it in the prompt" in message


@pytest.mark.parametrize(("key", "value"), [("history", []), ("history", None), ("system", "")])
def test_an_empty_history_or_system_is_ignored(tmp_path: Path, key: str, value: object) -> None:
    assert read(write(tmp_path / "a.jsonl", {**ALPACA, key: value}))[0] == "alpaca"


TEMPLATES = {
    "natural_instructions": "alpaca",
    "dolly": "alpaca",
    "alpaca": "alpaca",
    "prompt_completion": "none",
    "messages": "chat",
    "sharegpt": "chat",
    "text": "none",
}


def test_each_format_brings_its_usual_template(tmp_path: Path) -> None:
    assert {entry.name: entry.template for entry in formats.FORMATS} == TEMPLATES
    assert read_records(write(tmp_path / "a.jsonl", DOLLY)).template == "alpaca"
    assert read_records(write(tmp_path / "b.jsonl", PAIR)).template == "none"


def test_the_table_lists_the_formats_of_the_config() -> None:
    from typing import get_args

    from fedmira.config.sections import DataConfig

    allowed = get_args(DataConfig.model_fields["format"].annotation)
    assert ("auto", *(entry.name for entry in formats.FORMATS)) == allowed


def test_what_was_read_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", PAIR, {"prompt": "p"}, PAIR)
    write(tmp_path / "b.jsonl", PAIR)
    (tmp_path / "c.jsonl").touch()
    reading = read_records(tmp_path, on_bad_row="skip")
    assert reading.counts == {"tables": 3, "empty": 1, "others": 0, "kept": 3, "skipped": 1}
    assert (reading.read, len(reading.records), len(reading.skipped)) == (4, 3, 1)


# ---------------------------------------------------------------- faults


def test_a_key_missing_where_the_first_row_has_it_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ALPACA, {"instruction": "Sing.", "output": "la"})
    assert "a.jsonl:2: no 'input'" in fault(path)


def test_an_instance_without_output_is_a_fault_that_names_it(tmp_path: Path) -> None:
    task = {**OUR_TASK, "instances": [{"id": "a", "input": "x", "output": ["y"]}, {"id": "b", "input": "x"}]}
    assert "t.jsonl:1, instance 2 of 2: no 'output'" in fault(write(tmp_path / "t.jsonl", task))


@pytest.mark.parametrize("output", [[], "", [""], None, 3])
def test_an_instance_whose_output_is_not_an_answer_is_a_fault(tmp_path: Path, output: object) -> None:
    task = {**OUR_TASK, "instances": [{"id": "a", "input": "x", "output": output}]}
    assert "t.jsonl:1, instance 1 of 1: 'output' is" in fault(write(tmp_path / "t.jsonl", task))


@pytest.mark.parametrize("instances", [[], {}, None, "x"])
def test_a_task_without_a_list_of_instances_is_a_fault(tmp_path: Path, instances: object) -> None:
    assert "not a list with an instance" in fault(write(tmp_path / "t.jsonl", {**OUR_TASK, "instances": instances}))


def test_a_line_without_a_task_name_is_a_fault(tmp_path: Path) -> None:
    assert "t.jsonl:1: no 'task'" in fault(write(tmp_path / "t.jsonl", UPSTREAM_TASK))


def test_the_sources_never_show_an_id_that_may_be_text(tmp_path: Path) -> None:
    task = {**OUR_TASK, "instances": [{"id": "a long sentence", "input": "x", "output": "y"}]}
    assert read(write(tmp_path / "t.jsonl", task))[1][0].source == "t.jsonl:1#0"


def test_unknown_keys_are_listed_with_what_each_format_reads(tmp_path: Path) -> None:
    message = fault(write(tmp_path / "a.jsonl", {"question": SECRET, "reply": "x", f"{SECRET}?": 1}))
    assert "a.jsonl:1: no known format has these keys (question, reply)" in message
    assert "alpaca: instruction, input, output" in message
    assert SECRET not in message


def test_an_unknown_format_suggests_the_nearest(tmp_path: Path) -> None:
    message = fault(tmp_path, format="dollie")
    assert "data.format 'dollie' is unknown (did you mean 'dolly'?)" in message


def test_an_unknown_column_name_suggests_the_nearest(tmp_path: Path) -> None:
    message = fault(tmp_path, columns={"promt": "question"})
    assert "'promt' is not one of our names (did you mean 'prompt'?)" in message


def test_a_column_of_another_format_is_refused(tmp_path: Path) -> None:
    assert "'prompt' is not one of our names" in fault(tmp_path, format="dolly", columns={"prompt": "question"})


def test_a_renamed_task_that_does_not_exist_suggests_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**PAIR, "subject": "x"})
    assert "no 'subjct' (did you mean 'subject'?), which data.columns.task names" in fault(
        path, columns={"task": "subjct"}
    )


def test_a_renamed_system_that_does_not_exist_suggests_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [], "sys_prompt": "x"})
    assert "no 'sysprompt' (did you mean 'sys_prompt'?), which data.columns.system names" in fault(
        path, columns={"system": "sysprompt"}, format="messages"
    )


def test_an_unknown_way_with_bad_rows_is_refused(tmp_path: Path) -> None:
    assert "data.on_bad_row 'drop' is unknown; known: error, skip" in fault(tmp_path, on_bad_row="drop")


def test_each_bad_instance_of_a_task_is_skipped_and_counted(tmp_path: Path) -> None:
    task = {**OUR_TASK, "instances": [{"input": "x", "output": ["y"]}, {"input": SECRET}, {"input": "x", "output": 1}]}
    reading = read_records(write(tmp_path / "t.jsonl", task), on_bad_row="skip")
    assert (len(reading.records), reading.read) == (1, 3)
    assert [str(skipped) for skipped in reading.skipped] == [
        "t.jsonl:1, instance 2 of 3: no 'output'",
        "t.jsonl:1, instance 3 of 3: 'output' is a number, not text",
    ]
