"""Conversations: which turns are read, which answer is learnt, and what is refused rather than lost."""

from pathlib import Path

import pytest
from tests.data.bad_rows import SECRET, fault, records, skipping, write

from fedmira.data.formats import Turn, read_records

USER = {"role": "user", "content": "Name a colour."}
REPLY = {"role": "assistant", "content": "red"}
GOOD_CHAT = {"messages": [USER, REPLY]}


def chat(*turns: object, **others: object) -> dict[str, object]:
    return {"messages": list(turns), **others}


def test_the_last_turn_of_the_assistant_is_the_answer_to_all_turns_before(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        REPLY,
        {"role": "tool", "content": ""},
        {"role": "user", "content": "Another?"},
        {"role": "assistant", "content": "blue"},
    ]
    reading = read_records(write(tmp_path / "a.jsonl", chat(*turns, topic="art")))
    [record] = reading.records
    assert (reading.format, reading.template) == ("messages", "chat")
    assert (record.instruction, record.input, record.answers) == ("", "", ("blue",))
    assert record.turns == (
        Turn("system", "Be brief."),
        Turn("user", "Name a colour."),
        Turn("assistant", "red"),
        Turn("tool", ""),
        Turn("user", "Another?"),
    )
    assert (record.columns, record.source) == ({"topic": "art"}, "a.jsonl:1")


def test_turns_after_the_last_answer_are_left_out(tmp_path: Path) -> None:
    [record] = records(write(tmp_path / "a.jsonl", chat(USER, REPLY, USER)))
    assert (record.turns, record.answers) == ((Turn("user", "Name a colour."),), ("red",))


def test_sharegpt_is_read_with_its_own_words(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "red"}]
    reading = read_records(write(tmp_path / "a.jsonl", {"conversations": turns, "system": "Be brief.", "id": "x"}))
    [record] = reading.records
    assert (reading.format, reading.template) == ("sharegpt", "chat")
    assert record.turns == (Turn("system", "Be brief."), Turn("user", "Name a colour."))
    assert record.columns == {"id": "x"}  # the system text is a turn, and no turn is a column


@pytest.mark.parametrize("key", ["messages", "conversation", "conversations"])
@pytest.mark.parametrize(
    "turn", [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt"), ("from", "content", "u", "a")]
)
def test_both_formats_accept_either_spelling_of_a_turn(
    tmp_path: Path, key: str, turn: tuple[str, str, str, str]
) -> None:
    role, content, _, _ = turn
    asks, says = ("human", "gpt") if turn[2] == "u" else turn[2:]
    row = {key: [{role: asks, content: "q"}, {role: says, content: "a"}]}
    [record] = records(write(tmp_path / "a.jsonl", row))
    assert (record.turns, record.answers) == ((Turn("user", "q"),), ("a",))


@pytest.mark.parametrize(
    ("word", "role"),
    [
        *(("system", "system"), ("developer", "system"), ("user", "user"), ("human", "user"), ("prompter", "user")),
        *(("assistant", "assistant"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("model", "assistant")),
        *(("bot", "assistant"), ("ai", "assistant"), ("tool", "tool"), ("function", "tool"), ("observation", "tool")),
        *(("function_response", "tool"), ("Human", "user"), (" GPT ", "assistant")),
    ],
)
def test_roles_have_several_names(tmp_path: Path, word: str, role: str) -> None:
    [record] = records(write(tmp_path / "a.jsonl", chat({"role": word, "content": "x"}, REPLY)))
    assert record.turns == (Turn(role, "x"),)


def test_nulls_written_by_a_table_count_as_missing(tmp_path: Path) -> None:
    nothing = {"from": None, "value": None, "name": None, "tool_calls": None, "function_call": None}
    row = chat({**nothing, **USER}, {**nothing, **REPLY, "tool_calls": []}, system=None, tools="[]", functions=[])
    [record] = records(write(tmp_path / "a.jsonl", row))
    assert (record.turns, record.answers) == ((Turn("user", "Name a colour."),), ("red",))


def test_a_prompt_and_a_completion_may_be_lists_of_turns(tmp_path: Path) -> None:
    reading = read_records(write(tmp_path / "a.jsonl", {"prompt": [USER, REPLY, USER], "completion": [REPLY]}))
    [record] = reading.records
    assert (reading.format, reading.template) == ("messages", "chat")
    assert [turn.role for turn in record.turns] == ["user", "assistant", "user"]
    assert record.answers == ("red",)


def test_the_answer_to_a_list_of_turns_must_be_in_the_completion(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": [USER, REPLY], "completion": [USER]})
    assert "a.jsonl:1: no assistant turn to learn from in 'completion'" in fault(path)


def test_lists_of_turns_are_not_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": [USER], "completion": [REPLY]})
    message = fault(path, format="prompt_completion")
    assert "'prompt' is a list, not text; lists of turns are read by data.format messages" in message


@pytest.mark.parametrize("system", [None, "", "  "])
def test_an_empty_system_column_adds_no_turn(tmp_path: Path, system: str | None) -> None:
    [record] = records(write(tmp_path / "a.jsonl", chat(USER, REPLY, system=system)))
    assert [turn.role for turn in record.turns] == ["user"]


def test_one_system_text_given_twice_is_one_turn(tmp_path: Path) -> None:
    first = {"role": "system", "content": "Be brief."}
    [record] = records(write(tmp_path / "a.jsonl", chat(first, USER, REPLY, system="Be brief.")))
    assert [turn.role for turn in record.turns] == ["system", "user"]


def test_a_renamed_system_column_is_not_a_column_either(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", chat(USER, REPLY, rules="Be brief."), chat(USER, REPLY))
    first, second = records(path, columns={"system": "rules"})
    assert (first.turns[0], first.columns) == (Turn("system", "Be brief."), {})
    assert [turn.role for turn in second.turns] == ["user"]


PARTS = [{"type": "text", "text": SECRET}]
BAD_CHATS = {
    "no list": ({"messages": SECRET}, "'messages' is text, not a list of turns"),
    "null": ({"messages": None}, "'messages' is null, not a list of turns"),
    "an empty list": (chat(), "'messages' is an empty list, not a list of turns"),
    "a turn that is text": (chat(SECRET, REPLY), "'messages', turn 1 of 2: found text where a turn"),
    "a turn that is null": (chat(USER, None), "'messages', turn 2 of 2: found null where a turn"),
    "no role": (chat({"content": SECRET}, REPLY), "turn 1 of 2: no 'role' (or 'from')"),
    "a role of null": (chat({"role": None, "content": SECRET}, REPLY), "turn 1 of 2: no 'role' (or 'from')"),
    "a role that is a number": (chat({"role": 1, "content": SECRET}, REPLY), "turn 1 of 2: 'role' is a number"),
    "no content": (chat({"role": "user", "text": SECRET}, REPLY), "turn 1 of 2: no 'content'"),
    "a content of null": (chat(USER, {"role": "assistant", "content": None}), "turn 2 of 2: 'content' is null"),
    "a content in parts": (chat({"role": "user", "content": PARTS}, REPLY), "turn 1 of 2: 'content' is a list"),
    "a content that is a number": (chat({"role": "user", "content": 5}, REPLY), "turn 1 of 2: 'content' is a number"),
    "a NUL": (chat({"role": "user", "content": SECRET + "\0"}, REPLY), "turn 1 of 2: 'content' contains a NUL"),
    "half a character": (chat({"role": "user", "content": "\ud800"}, REPLY), "turn 1 of 2: 'content' contains half"),
    "tool calls": (
        chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"name": SECRET}]}),
        "turn 2 of 2: 'tool_calls' is not read: only text is",
    ),
    "a function call": (chat(USER, {**REPLY, "function_call": {"name": SECRET}}), "'function_call' is not read"),
    "tools": (
        chat(USER, REPLY, tools=[{"name": SECRET}]),
        "'tools' is not read: conversations with tools are not supported",
    ),
    "functions": (chat(USER, REPLY, functions=SECRET), "'functions' is not read"),
    "an unknown role": (chat({"role": "narrator", "content": "x"}, REPLY), "'role': 'narrator' is not a known role"),
    "a role that may be text": (chat({"role": SECRET, "content": "x"}, REPLY), "'role': it is not a known role"),
    "no assistant": (chat(USER, USER), "no assistant turn to learn from"),
    "nothing before the assistant": (chat(REPLY), "no turn precedes the assistant's only turn"),
    "an empty answer": (chat(USER, {"role": "assistant", "content": ""}), "turn 2 of 2: 'content' of the assistant is"),
    "an earlier empty answer": (
        chat(USER, {"role": "assistant", "content": " \n"}, USER, REPLY),
        "turn 2 of 4: 'content' of the assistant is empty",
    ),
    "two system texts": (
        chat({"role": "system", "content": SECRET}, USER, REPLY, system="x"),
        "two system texts: 'system' and the first turn; keep one",
    ),
    "a system that is no text": (chat(USER, REPLY, system=[SECRET]), "'system' is a list, not text"),
    "no messages": ({"note": SECRET}, "no 'messages'"),
    "a column with a NUL": (chat(USER, REPLY, note=SECRET + "\0"), "'note' contains a NUL character"),
}


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_a_bad_conversation_is_found_skipped_and_never_shown(tmp_path: Path, kind: str) -> None:
    row, expected = BAD_CHATS[kind]
    path = write(tmp_path / "a.jsonl", GOOD_CHAT, row, GOOD_CHAT)
    message = fault(path)
    assert "1 fault:\n  - a.jsonl:2: " in message
    assert expected in message
    assert SECRET not in message
    reading = skipping(path)
    assert [skipped.where for skipped in reading.skipped] == ["a.jsonl:2"]
    assert (len(reading.records), reading.read) == (2, 3)


def test_an_unknown_role_comes_with_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"conversations": [{"from": "narrator", "value": "x"}]})
    message = fault(path)
    assert "'from': 'narrator' is not a known role; known: system, developer, user, human" in message


def test_a_conversation_may_be_a_parquet_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [GOOD_CHAT, chat({**USER, "name": "me"}, REPLY), chat(USER, {"role": "assistant", "content": None})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    reading = skipping(tmp_path / "a.parquet")
    turns = [Turn("user", "Name a colour."), Turn("user", "Name a colour.", more={"name": "me"})]
    assert [record.turns for record in reading.records] == [(turn,) for turn in turns]
    assert [str(skipped) for skipped in reading.skipped] == [
        "a.parquet, row 3: 'messages', turn 2 of 2: 'content' is null, not text"
    ]
