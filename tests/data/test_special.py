"""Special tokens in the texts of the data: found and counted, and on request nothing but text."""

from typing import Any

import pytest
from tests.data.kinds import CHATS, KINDS, tokenizer

from fedmira.data.batches import Encoded
from fedmira.data.encode import encode_client, encode_questions
from fedmira.data.formats import Record, Turn
from fedmira.data.partition import Client
from fedmira.data.special import as_text, count_special, special_names
from fedmira.data.templates import ALPACA, NONE, make_template
from fedmira.errors import DataError
from fedmira.evaluation.measure import plain_answer
from fedmira.evaluation.rouge import SCORES, score_answer

TEMPLATES = [*CHATS, "none", "alpaca"]


def record_of(chat: str, word: str) -> Record:
    """An example with a word in every text that the model sees."""
    question, answer = f"Why is the {word} blue? ", f" The {word} two."
    if chat in CHATS:
        turns = (Turn("user", question), Turn("assistant", answer.strip()), Turn("user", question))
        return Record("", "", (answer.strip(),), {}, "f:1", turns)
    return Record(question, "", (answer,), {}, "f:1")


def encoded(chat: str, kind: str, record: Record, *, text: bool) -> Encoded:
    using: Any = tokenizer(kind, "plain", bos=True)
    using.chat_template = CHATS.get(chat)
    template = {"none": NONE, "alpaca": ALPACA}.get(chat) or make_template("chat", usual="chat", tokenizer=using)
    if text:
        template, using = as_text(template, using)
    [example] = encode_client(
        Client("c", "c", None, {}, (record,), (), (record,)), using, template=template, max_length=9999
    ).test
    assert encode_questions([template.render(record)], using, template, max_question=None) == [list(example.question)]
    return example


@pytest.mark.parametrize("chat", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_of_the_data_are_control_tokens_or_only_text(kind: str, chat: str) -> None:
    using = tokenizer(kind, "plain", bos=True)
    specials = set(using.all_special_ids) | {using.convert_tokens_to_ids(name) for name in special_names(using)}
    specials -= {using.unk_token_id}

    def controls(example: Encoded) -> list[int]:
        return [id for id in example.ids if id in specials]

    plain = encoded(chat, kind, record_of(chat, "other"), text=False)
    assert encoded(chat, kind, record_of(chat, "other"), text=True) == plain, "texts without special tokens"
    for word in ("<|im_end|>", "</s>", "<s>"):
        written = record_of(chat, word)
        assert len(controls(encoded(chat, kind, written, text=False))) > len(controls(plain))
        only_text = encoded(chat, kind, written, text=True)
        assert controls(only_text) == controls(plain), "those of the template, and no other"
        if kind not in ("wordpiece", "unigram"):  # which do not know every letter
            assert word in using.decode(only_text.ids[only_text.prompt_length :])
            text = using.decode(only_text.ids[only_text.prompt_length : -1], skip_special_tokens=True)
            assert score_answer(plain_answer(text, only_text), only_text.answers) == dict.fromkeys(SCORES, 1.0)
            assert word in only_text.answers[0]


def test_what_is_around_a_special_token_that_is_text_is_encoded_as_it_was() -> None:
    using = tokenizer("legacy prepend", "plain", bos=True)
    [prompt] = encode_questions(
        [as_text(NONE, using)[0].render(Record("The two </s> make four.", "", ("-",), {}, "f:1"))],
        as_text(NONE, using)[1],
        NONE,
        max_question=None,
    )
    assert using.decode(prompt, skip_special_tokens=True).endswith("The two </s> make four.")
    assert prompt[0] == using.bos_token_id
    assert prompt.count(using.eos_token_id) == 0


def test_special_tokens_are_counted_once_per_example_wherever_a_model_sees_them() -> None:
    names = special_names(tokenizer("byte-level", "plain", bos=False))
    assert set(names) == {"<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"}
    turns = (Turn("user", "<|im_end|>", more={"name": "<s>"}),)
    records = [
        Record("a </s> b </s>", "", ("c",), {"note": "<unk>"}, "f:1"),
        Record("a", "<|im_start|>", ("</s>",), {}, "f:2"),
        Record("", "", ("c",), {}, "f:3", turns, {"reasoning_content": "</s>"}),
    ]
    assert count_special(records, names) == {"</s>": 3, "<|im_start|>": 1, "<|im_end|>": 1, "<s>": 1}
    assert count_special(records, []) == {}


def test_a_tokenizer_that_cannot_tell_them_apart_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.special_tokens 'text': the base's tokenizer \(object\) cannot tell"):
        as_text(NONE, object())


@pytest.mark.parametrize("letter", ["\ue002", "\ue003"])
def test_a_text_with_the_characters_that_mark_them_is_refused(letter: str) -> None:
    template, _ = as_text(NONE, tokenizer("byte-level", "plain", bos=False))
    with pytest.raises(DataError, match="private-use characters"):
        template.render(Record(f"a{letter}", "", ("b",), {}, "f:1"))
