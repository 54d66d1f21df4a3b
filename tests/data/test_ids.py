"""Ids that are trained on are those of the whole text, for every kind of tokenizer under every template."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
from tests.data.kinds import ADDED, CHATS, KINDS, REASONING, REASONING_ALWAYS, tokenizer
from transformers import PreTrainedTokenizerFast

from fedmira.data.batches import Encoded
from fedmira.data.encode import encode_client, encode_questions
from fedmira.data.formats import Record
from fedmira.data.partition import Client
from fedmira.data.records import Turn
from fedmira.data.templates import ALPACA, NONE, Template, make_template
from fedmira.errors import DataError
from fedmira.evaluation.measure import plain_answer
from fedmira.evaluation.rouge import SCORES, score_answer
from fedmira.study.dry_run import pieces_of

SINGLES = {"none": NONE, "alpaca": ALPACA, "file": None}
QUESTIONS = ("Why is the sky blue?", "And the others?", "Then is it\nthe end?")
ANSWERS = ("The two make four.", "the light, more than the red", "42")


def conversation(turns: int) -> Record:
    spoken: list[Turn] = []
    for number in range(turns):
        spoken += [Turn("user", QUESTIONS[number]), Turn("assistant", ANSWERS[number])]
    return Record("", "", (spoken.pop().text,), {}, "f:1", tuple(spoken))


def encoded(record: Record, template: Template, using: PreTrainedTokenizerFast) -> Encoded:
    client = Client("c", "c", None, {}, (record,), (), (record,))
    data = encode_client(client, using, template=template, max_length=10_000)
    assert data.train[0].ids == data.test[0].ids
    return data.test[0]


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


ANY = [(kind, "plain", bos) for kind in KINDS for bos in (False, True)] + [
    (kind, added, False) for kind in ("byte-level", "metaspace first", "legacy prepend") for added in list(ADDED)[1:]
]


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(("kind", "added", "bos"), ANY)
def test_a_conversation_has_the_ids_of_its_whole_text(kind: str, added: str, bos: bool, chat: str, turns: int) -> None:
    using = tokenizer(kind, added, bos=bos)
    using.chat_template = CHATS[chat]
    record = conversation(turns)
    template = make_template("chat", usual="chat", tokenizer=using)
    example = encoded(record, template, using)
    every = [*record.turns, Turn("assistant", record.answers[0])]
    whole = using.apply_chat_template(messages(every), tokenize=True, return_dict=False)
    end = using.eos_token_id
    length = len(example.ids) - int(whole[len(example.ids) - 1 : len(example.ids)] != [end])
    assert list(example.ids[:length]) == whole[:length], "the whole text by the tokenizer itself"
    assert example.ids[-1] == end
    assert example.ids[-2] != end, "one end of text"
    asked = using.apply_chat_template(
        messages(record.turns), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(example.question) == asked, "the prompt that is asked with"
    if chat != "thinking" or turns == 1:
        assert list(example.ids[: example.prompt_length]) == asked, "and trained with"
    assert encode_questions([template.render(record)], using, template, max_question=None) == [asked]
    spoken = [using.decode(example.ids[start:stop], skip_special_tokens=True) for start, stop in example.labelled]
    wanted = [turn.text for turn in every if turn.role == "assistant"]
    assert len(spoken) == len(wanted)
    for found, text in zip(spoken, wanted, strict=True):
        words = using.decode(using(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
        before, between, after = squeezed(found).partition(squeezed(words))
        assert between, "the answer is labelled"
        assert after in ("", "<|im_end|>"), "to the end of its turn, which is text where it is not special"
        assert not re.sub("think|[<>/]", "", before), "and nothing before it but what the model has to write"


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", SINGLES)
@pytest.mark.parametrize(("kind", "added", "bos"), ANY)
def test_a_single_request_has_the_ids_of_its_whole_text(
    kind: str, added: str, bos: bool, name: str, tmp_path: Any
) -> None:
    using = tokenizer(kind, added, bos=bos)
    path = tmp_path / "own.jinja"
    path.write_text("Q: {{ instruction }}\nA:")
    template = SINGLES[name] or make_template(str(path), usual="none", tokenizer=using)
    record = Record("Why is the sky blue?\n" if name == "none" else QUESTIONS[0], "", (f" {ANSWERS[0]}",), {}, "f:1")
    example = encoded(record, template, using)
    prompt = template.render(record).question
    assert list(example.ids) == [*using(prompt + record.answers[0])["input_ids"], using.eos_token_id]
    assert list(example.ids[: example.prompt_length]) == using(prompt)["input_ids"] == list(example.question)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_the_tokenizer_would_join_to_its_prompt_goes_on_after_it(kind: str) -> None:
    """Both cannot be had: the ids of the whole text, and the prompt as it is asked. The prompt comes first."""
    using = tokenizer(kind, "plain", bos=False)
    example = encoded(Record("Why is the o", "", ("thers",), {}, "f:1"), NONE, using)
    assert list(example.question) == list(example.ids[: example.prompt_length]) == using("Why is the o")["input_ids"]
    joined = using.decode(example.ids, skip_special_tokens=True)
    assert joined.replace(" ", "").casefold() == "whyistheothers"
    if kind not in ("wordpiece", "unigram"):  # which have no token for the middle of a word without its mark
        assert joined.endswith("others")


@pytest.mark.parametrize("chat", [*CHATS, *SINGLES])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_written_exactly_as_it_was_trained_scores_1(kind: str, chat: str, tmp_path: Any) -> None:
    using = tokenizer(kind, "plain", bos=True)
    if chat in CHATS:
        using.chat_template = CHATS[chat]
        template, record = make_template("chat", usual="chat", tokenizer=using), conversation(2)
    else:
        path = tmp_path / "own.jinja"
        path.write_text("{{ bos_token }}" * 0 + "Q: {{ instruction }}\nA:")
        template = SINGLES[chat] or make_template(str(path), usual="none", tokenizer=using)
        record = Record("Why?\n", "", ("Zürich is the two, isn't it?</s>",), {}, "f:1")
    example = encoded(record, template, using)
    end = using.eos_token_id
    trained_answer = list(example.ids[example.prompt_length :])
    assert trained_answer[-1] == end
    assert trained_answer.count(end) == 1
    text = using.decode(trained_answer[:-1], skip_special_tokens=True)
    assert score_answer(plain_answer(text, example), example.answers) == dict.fromkeys(SCORES, 1.0)
    other = plain_answer(text.replace("two", "six").replace("light", "night"), example)
    assert score_answer(other, example.answers)["exact_match"] == 0.0


def test_a_file_that_writes_the_leading_token_itself_gets_no_second(tmp_path: Any) -> None:
    using = tokenizer("metaspace first", "plain", bos=True)
    path = tmp_path / "own.jinja"
    path.write_text("<s>Q: {{ instruction }}\nA:")
    template = make_template(str(path), usual="none", tokenizer=using)
    example = encoded(Record("Why?", "", ("Because",), {}, "f:1"), template, using)
    assert example.ids.count(using.bos_token_id) == 1
    assert example.question.count(using.bos_token_id) == 1


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_shown_as_the_text_that_its_ids_are(kind: str, chat: str) -> None:
    using = tokenizer(kind, "plain", bos=False)
    using.chat_template = CHATS[chat]
    example = encoded(conversation(2), make_template("chat", usual="chat", tokenizer=using), using)
    pieces = pieces_of(example, using.decode)
    assert "".join(text for text, _ in pieces) == using.decode(example.ids)
    assert [trained for _, trained in pieces] == [False, True, False, True]


def test_half_a_character_before_a_mark_is_shown_once() -> None:
    using = tokenizer("byte-level", "plain", bos=False)
    ids = using("ä")["input_ids"]
    assert len(ids) == 2
    example = Encoded((*ids, using.eos_token_id), 1, ("",))
    assert "".join(text for text, _ in pieces_of(example, using.decode)) == using.decode(example.ids) == "ä</s>"


@pytest.mark.parametrize("kind", ["byte-level", "metaspace first", "legacy prepend", "unigram"])
@pytest.mark.parametrize("source", [REASONING, REASONING_ALWAYS], ids=["last", "always"])
def test_a_reasoning_is_trained_on_where_the_template_shows_it(kind: str, source: str) -> None:
    using = tokenizer(kind, "plain", bos=False)
    using.chat_template = source
    first, last = "The sky is blue.", "The two and the two."
    turns = (
        Turn("user", "Why?", more={"name": "Ida"}),
        Turn("assistant", "Because.", more={"reasoning_content": first}),
        Turn("user", "And then?"),
    )
    record = Record("", "", ("four",), {}, "f:1", turns, {"reasoning_content": last})
    example = encoded(record, make_template("chat", usual="chat", tokenizer=using), using)
    every = [{"role": turn.role, "content": turn.text, **turn.more} for turn in turns]
    answer = {"role": "assistant", "content": "four", "reasoning_content": last}
    whole = using.apply_chat_template([*every, answer], tokenize=True, return_dict=False)
    assert list(example.ids[:-1]) == whole[: len(example.ids) - 1]
    spoken = [squeezed(using.decode(example.ids[start:stop])) for start, stop in example.labelled]
    shown_first = f"<think>{first}</think>Because.<|im_end|>" if source == REASONING_ALWAYS else "Because.<|im_end|>"
    assert spoken == [squeezed(shown_first), squeezed(f"<think>{last}</think>four<|im_end|></s>")]
    written = using.decode(example.ids[example.prompt_length : -1], skip_special_tokens=True)
    for text in (written, written.replace("two", "one"), "four"):  # also another reasoning, and none
        assert score_answer(plain_answer(text, example), example.answers) == dict.fromkeys(SCORES, 1.0)
    assert score_answer(plain_answer(written.replace("four", "five"), example), example.answers)["exact_match"] == 0


@pytest.mark.parametrize(
    ("role", "key"), [("assistant", "reasoning_content"), ("assistant", "thinking"), ("user", "name")]
)
@pytest.mark.parametrize("chat", CHATS)
def test_a_key_that_the_template_does_not_show_is_refused(chat: str, role: str, key: str) -> None:
    using = tokenizer("byte-level", "plain", bos=False)
    using.chat_template = CHATS[chat]
    turns = tuple(Turn(who, "Why?", more={key: "Ida"} if who == role else {}) for who in ("user", "assistant", "user"))
    template = make_template("chat", usual="chat", tokenizer=using)
    with pytest.raises(DataError, match=f"does not show '{key}' of the {role}'s turn in f:1; remove the key"):
        template.render(Record("", "", ("four",), {}, "f:1", turns))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_two_leading_tokens_or_two_ends(kind: str, chat: str) -> None:
    """Neither where the template writes one that the data write too, nor where the tokenizer does."""
    using = tokenizer(kind, "plain", bos=True)
    using.chat_template = CHATS[chat] if chat == "generation marks" else "{{ bos_token }}" + CHATS[chat]
    turns = (Turn("user", "Why?</s>"), Turn("assistant", "So.</s>"), Turn("user", "Then?"))
    example = encoded(
        Record("", "", ("four</s></s>",), {}, "f:1", turns), make_template("chat", usual="chat", tokenizer=using), using
    )
    bos, end = using.bos_token_id, using.eos_token_id
    for ids in (example.ids, example.question):
        assert ids[0] == bos
        assert ids.count(bos) == 1
        assert (end, end) not in itertools.pairwise(ids)
    assert example.ids[-1] == end
