"""Ids that are trained on are those of the whole text, for every kind of tokenizer under every template."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedmira.data.batches import Encoded
from fedmira.data.encode import encode_client, encode_questions
from fedmira.data.formats import Record
from fedmira.data.partition import Client
from fedmira.data.records import Turn
from fedmira.data.templates import ALPACA, NONE, Template, make_template
from fedmira.evaluation.measure import plain_answer
from fedmira.evaluation.rouge import SCORES, score_answer
from fedmira.study.dry_run import pieces_of

CORPUS = [
    "The two and the two make four. Then the other one said: the end, is it not?",
    "Why is the sky blue? Because the air scatters the blue light more than the red.",
    "<|user|>\nHow are the others?\n<|assistant|>\nThey are well, thanks.\n### Response:\nThe answer is 42.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
] * 3
MARKS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")


def trained(core: Tokenizer, kind: str) -> Tokenizer:
    special = list(MARKS)
    trainer: Any
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "wordpiece":
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=220, special_tokens=special, unk_token="<unk>", initial_alphabet=["\n", "/", "|"]
        )
    lines = [line for text in CORPUS for line in text.split("\n")]
    core.train_from_iterator(CORPUS if kind == "bpe" else lines, trainer)
    return core


def byte_level(*, prefix: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    return trained(core, "bpe")


def sentence_pieces() -> models.BPE:
    """Merges of words and their leading spaces; a line break is a byte of its own, as in Llama's vocabulary."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    lines = [line for text in CORPUS for line in text.split("\n")]
    core.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, special_tokens=list(MARKS)))
    learned = json.loads(core.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(pair) for pair in learned["merges"]]
    return models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)


def metaspace(scheme: str) -> Tokenizer:
    core = Tokenizer(sentence_pieces())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    return core


def legacy() -> Tokenizer:
    """Llama's own: a normalizer puts a space before every stretch of text, also after a special token."""
    core = Tokenizer(sentence_pieces())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def wordpiece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return trained(core, "wordpiece")


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return trained(core, "unigram")


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(prefix=False),
    "byte-level, prefix space": lambda: byte_level(prefix=True),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "legacy prepend": legacy,
    "wordpiece": wordpiece,
    "unigram": unigram,
}
ADDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "single_word": {"single_word": True},
    "normalized": {"normalized": True},
}


@functools.cache
def tokenizer(kind: str, added: str, *, bos: bool) -> PreTrainedTokenizerFast:
    core = KINDS[kind]()
    special = added != "normalized"  # a special token is never normalized
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in MARKS[:3]])
    core.add_tokens([AddedToken(word, special=special, **ADDED[added]) for word in MARKS[3:]])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


CHATS = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "markers of text": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "generation marks": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[/INST]{% generation %}"
    " {{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}[INST] {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[/INST]{% endif %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trimmed": "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
}
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
