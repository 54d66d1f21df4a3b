"""Keys beside the texts of an example: what changes its meaning is read or refused by name, the others are listed."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.bad_rows import SECRET, fault, records, write

from fedmira.data.formats import Record, Turn, read_records
from fedmira.data.unread import LOSS_MARKS

USER = {"role": "user", "content": "Name a colour."}
REPLY = {"role": "assistant", "content": "red"}
MORE = [{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "blue"}]
PAIR = {"prompt": "Name a colour.", "completion": "red"}
ALPACA = {"instruction": "Name a colour.", "output": "red"}
CHAT = {"messages": [USER, REPLY]}
SPELT = {"messages": ("role", "content", "user", "assistant"), "conversations": ("from", "value", "human", "gpt")}


def conversation(key: str, first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """A conversation with two answers, which have further keys."""
    role, content, asks, says = SPELT[key]
    turns = [(asks, "Name a colour.", {}), (says, "red", first), (asks, "Another?", {}), (says, "blue", last)]
    return {key: [{role: who, content: text, **more} for who, text, more in turns]}


# ---------------------------------------------------------------- marks of loss


@pytest.mark.parametrize("key", SPELT)
@pytest.mark.parametrize("mark", LOSS_MARKS)
@pytest.mark.parametrize("no", [0, 0.0, False, "0", "false"])
def test_no_loss_is_taken_on_a_turn_that_says_so(tmp_path: Path, key: str, mark: str, no: object) -> None:
    path = write(tmp_path / "a.jsonl", conversation(key, {mark: no}, {mark: 1}), conversation(key, {}, {mark: no}))
    first, second = records(path)
    assert (first.answers, [turn.trained for turn in first.turns if turn.role == "assistant"]) == (("blue",), [False])
    assert (second.answers, second.turns) == (("red",), (Turn("user", "Name a colour."),))


@pytest.mark.parametrize("mark", LOSS_MARKS)
@pytest.mark.parametrize("yes", [1, 1.0, True, "1", "True", None, ""])
def test_a_turn_that_says_it_is_trained_on_or_says_nothing_is(tmp_path: Path, mark: str, yes: object) -> None:
    [record] = records(write(tmp_path / "a.jsonl", conversation("messages", {mark: yes}, {mark: yes})))
    assert (record.answers, record.turns[1]) == (("blue",), Turn("assistant", "red"))


@pytest.mark.parametrize("value", [0.5, 2, -1, "some", [1], {"a": 1}])
def test_a_mark_that_is_neither_yes_nor_no_is_refused(tmp_path: Path, value: object) -> None:
    message = fault(write(tmp_path / "a.jsonl", conversation("messages", {"weight": value}, {})))
    assert "a.jsonl:1: 'messages', turn 2 of 4: 'weight' is " in message
    assert "a turn is trained on (1 or true) or not (0 or false)" in message
    assert "some" not in message


def test_a_conversation_without_a_turn_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [USER, {**REPLY, "weight": 0}]})
    assert "a.jsonl:1: every assistant turn is marked not to be trained on" in fault(path)


def test_loss_on_a_turn_of_the_user_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [{**USER, "train": True}, REPLY]})
    assert "'train' is true in a turn of the user: loss is taken on the assistant's turns only" in fault(path)


@pytest.mark.parametrize("row", [PAIR, ALPACA, CHAT, {"text": "red"}])
@pytest.mark.parametrize(("mark", "no"), [("weight", 0), ("train", False), ("loss", "false")])
def test_a_row_that_is_not_to_be_trained_on_is_refused(
    tmp_path: Path, row: dict[str, Any], mark: str, no: object
) -> None:
    path = write(tmp_path / "a.jsonl", row, {**row, mark: no})
    assert f"a.jsonl:2: '{mark}' says that the row is not trained on" in fault(path)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "key",
    ["tool_calls", "function_call", "tool_call_id", "prefix", "prefill", "refusal", "images", "audio", "attachments"],
)
@pytest.mark.parametrize("value", [SECRET, [SECRET], {"a": SECRET}, True])
def test_keys_of_turns_that_change_their_meaning_are_refused(tmp_path: Path, key: str, value: object) -> None:
    message = fault(write(tmp_path / "a.jsonl", CHAT, {"messages": [USER, {**REPLY, key: value}]}))
    assert f"a.jsonl:2: 'messages', turn 2 of 2: '{key}' is not read" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        (PAIR, ("system", "history", "context", "choices", "prefix", "reasoning", "images", "chosen", "rejected")),
        (ALPACA, ("system", "system_prompt", "history", "options", "image", "rejected")),
        (
            CHAT,
            (
                "tools",
                "functions",
                "system_prompt",
                "images",
                "videos",
                "documents",
                "chat_template_kwargs",
                "chosen",
                "rejected",
            ),
        ),
        ({"text": "red"}, ("images", "audio")),
    ],
)
def test_keys_of_rows_that_change_their_meaning_are_refused(
    tmp_path: Path, row: dict[str, Any], keys: tuple[str, ...]
) -> None:
    for key in keys:
        message = fault(write(tmp_path / "a.jsonl", row, {**row, key: [SECRET]}))
        assert f"a.jsonl:2: '{key}' " in message
        assert SECRET not in message
        read = records(write(tmp_path / "a.jsonl", row, *({**row, key: empty} for empty in (None, "", [], {}))))
        assert [record.answers for record in read] == [("red",)] * 5


@pytest.mark.parametrize("no", [False, "false", "False"])
@pytest.mark.parametrize("row", [PAIR, {"prompt": [USER], "completion": [REPLY]}])
def test_an_example_of_a_bad_answer_is_refused(tmp_path: Path, row: dict[str, Any], no: object) -> None:
    path = write(tmp_path / "a.jsonl", {**row, "label": True}, {**row, "label": no})
    assert "a.jsonl:2: 'label' is false: the row is an example of a bad answer" in fault(path)


@pytest.mark.parametrize("label", [0, 1, "sport", "0", True])
def test_other_labels_are_columns(tmp_path: Path, label: object) -> None:
    [record] = records(write(tmp_path / "a.jsonl", {**PAIR, "label": label}))
    assert "label" in record.columns


def test_preferences_are_refused_and_the_chosen_texts_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "Name a colour.", "chosen": "red", "rejected": SECRET})
    assert "there is no training on preferences; to train on the chosen texts: data.columns" in fault(path)
    [record] = records(path, columns={"prompt": "prompt", "completion": "chosen"})
    assert (record.instruction, record.answers) == ("Name a colour.", ("red",))


def test_chosen_conversations_can_be_named_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": SECRET}]})
    assert "{messages: chosen} for lists of turns" in fault(path)
    [record] = records(path, columns={"messages": "chosen"})
    assert (record.answers, record.unread) == (("red",), ("'rejected'",))


def test_texts_beside_a_request_are_left_out_where_the_needed_ones_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**PAIR, "system": "Be brief.", "history": [["a", "b"]]})
    assert "'system' is not read" in fault(path)
    [record] = records(path, columns={"prompt": "prompt", "completion": "completion"})
    assert (record.answers, record.columns["system"]) == (("red",), "Be brief.")


# ---------------------------------------------------------------- what is given to the template, what is listed


def test_a_reasoning_and_a_name_are_kept_for_the_template(tmp_path: Path) -> None:
    turns = [{**USER, "name": "Ada"}, {**REPLY, "reasoning_content": "Roses are."}, *MORE[:1]]
    [record] = records(
        write(tmp_path / "a.jsonl", {"messages": [*turns, {**MORE[1], "reasoning_content": "The sky is."}]})
    )
    assert [dict(turn.more) for turn in record.turns] == [{"name": "Ada"}, {"reasoning_content": "Roses are."}, {}]
    assert record.more == {"reasoning_content": "The sky is."}


def test_keys_that_are_not_read_are_listed_and_empty_and_known_ones_are_not(tmp_path: Path) -> None:
    turn = {**REPLY, "id": 7, "timestamp": "now", "emotion": "glad", "mood": None}
    rows = [{**CHAT, "topic": "art"}, {"messages": [USER, turn], "scores": [1, 2], "spans": []}]
    first, second = records(write(tmp_path / "a.jsonl", *rows))
    assert (first.unread, second.unread) == ((), ("'scores'", "'emotion' of turns"))


def test_a_table_of_natural_instructions_lists_nothing(tmp_path: Path) -> None:
    task = {
        "Definition": ["Add."],
        "Positive Examples": [{"input": "1", "output": "2"}],
        "Contributors": ["A", "B"],
        "Instances": [{"input": "1 1", "output": ["2"]}],
        "task": "t",
    }
    reading = read_records(write(tmp_path / "a.jsonl", task))
    assert [record.unread for record in reading.records] == [()]


def test_a_key_that_may_be_text_is_not_shown(tmp_path: Path) -> None:
    strange = "x" * 50 + "\n"
    [record] = records(write(tmp_path / "a.jsonl", {"messages": [USER, {**REPLY, strange: "y"}]}))
    assert isinstance(record, Record)
    assert record.unread == ("a column of turns",)


# ---------------------------------------------------------------- other spellings, and two keys for one thing


@pytest.mark.parametrize(
    ("row", "key"),
    [
        (PAIR, "System"),
        (PAIR, "System Prompt"),
        (PAIR, "chatHistory"),
        (PAIR, "IMAGE"),
        (ALPACA, "Chat-History"),
        (CHAT, "System"),
        (CHAT, "systemPrompt"),
        (CHAT, "Tools"),
        ({"text": "red"}, "Images"),
    ],
)
def test_a_key_of_a_row_has_its_meaning_in_any_spelling(tmp_path: Path, row: dict[str, Any], key: str) -> None:
    message = fault(write(tmp_path / "a.jsonl", row, {**row, key: SECRET}))
    assert f"a.jsonl:2: '{key}' is not read" in message
    assert SECRET not in message


def test_a_mark_has_its_meaning_in_any_spelling(tmp_path: Path) -> None:
    [record] = records(write(tmp_path / "a.jsonl", conversation("messages", {"Loss Mask": 0}, {"Weight": 1})))
    assert [turn.trained for turn in record.turns if turn.role == "assistant"] == [False]
    assert record.unread == ()
    assert "'label' is false" in fault(write(tmp_path / "a.jsonl", {**PAIR, "Label": False}))
    assert "'Weight' says that the row is not" in fault(write(tmp_path / "a.jsonl", {**PAIR, "Weight": 0}))


@pytest.mark.parametrize("key", ["toolCalls", "Tool_Calls", "train_detail"])
def test_a_key_of_a_turn_is_refused_in_any_spelling(tmp_path: Path, key: str) -> None:
    message = fault(write(tmp_path / "a.jsonl", {"messages": [USER, {**REPLY, key: [SECRET]}]}))
    assert f"turn 2 of 2: '{key}' is not read" in message


@pytest.mark.parametrize(
    ("more", "pair"),
    [({"from": "gpt"}, "'role' and 'from' differ"), ({"value": SECRET}, "'content' and 'value' differ")],
)
def test_two_keys_for_one_thing_that_differ_are_refused(tmp_path: Path, more: dict[str, str], pair: str) -> None:
    message = fault(write(tmp_path / "a.jsonl", {"messages": [{**USER, **more}, REPLY]}))
    assert f"turn 1 of 2: {pair}; keep one" in message
    assert SECRET not in message


@pytest.mark.parametrize("more", [{"from": "human"}, {"value": USER["content"]}, {"value": ""}, {"from": None}])
def test_two_keys_for_one_thing_that_agree_are_read(tmp_path: Path, more: dict[str, Any]) -> None:
    [record] = records(write(tmp_path / "a.jsonl", {"messages": [{**USER, **more}, REPLY]}))
    assert record.turns == (Turn("user", "Name a colour."),)


def test_of_two_keys_for_a_text_the_one_that_is_not_empty_is_read(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "", "value": "Name a colour."}
    [record] = records(write(tmp_path / "a.jsonl", {"messages": [turn, REPLY]}))
    assert record.turns == (Turn("user", "Name a colour."),)


@pytest.mark.parametrize("key", ["completion", "answer", "Response", "output"])
def test_an_answer_beside_turns_that_end_with_a_question_is_refused(tmp_path: Path, key: str) -> None:
    message = fault(write(tmp_path / "a.jsonl", {"messages": [USER, REPLY, USER], key: SECRET}))
    assert f"a.jsonl:1: '{key}' is not read, and the last turn is the user's" in message
    assert len(records(write(tmp_path / "a.jsonl", {"messages": [USER, REPLY], key: "red"}))) == 1


@pytest.mark.parametrize(
    ("row", "key"), [(CHAT, "context"), (CHAT, "document"), (CHAT, "history"), (PAIR, "instruction")]
)
def test_what_belongs_to_a_request_is_refused_unless_it_is_in_a_text(
    tmp_path: Path, row: dict[str, Any], key: str
) -> None:
    message = fault(write(tmp_path / "a.jsonl", row, {**row, key: SECRET}))
    assert f"a.jsonl:2: '{key}' is not read: no text that is read contains it" in message
    assert len(records(write(tmp_path / "a.jsonl", {**row, key: "Name  a\ncolour."}))) == 1


def test_a_second_list_of_turns_is_reported(tmp_path: Path) -> None:
    [record] = records(write(tmp_path / "a.jsonl", {**CHAT, "conversation": [USER, REPLY, *MORE]}))
    assert (record.answers, record.unread) == (("red",), ("'conversation'",))
