"""Token ids and batches: what is trained on, what is cut, and what every local step sees."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedmira.data.batches import (
    NO_LOSS,
    Batch,
    ClientData,
    Encoded,
    Truncation,
    collate,
    count_examples,
    local_batches,
)
from fedmira.data.encode import _cut, _fit, _Prompt, _readable, encode_client
from fedmira.data.formats import Record
from fedmira.data.partition import Client
from fedmira.data.templates import NONE
from fedmira.errors import DataError, ShapeError

BOS, EOS, PAD = 0, 1, 2
WORD = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *"abcdefghij"])}


def tokenizer(
    *, bos: bool = False, eos: bool = False, same: bool = False, unknown: bool = True, end: bool = True
) -> PreTrainedTokenizerFast:
    """One token per letter a-j; `bos` and `eos` are put around texts, `same`: BOS is the end of text, as in GPT-2."""
    # without an unknown token BPE drops what it does not know, WordLevel fails
    inner = Tokenizer(models.WordLevel(WORD, unk_token="<unk>") if unknown else models.BPE(WORD, []))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    first = "</s>" if same else "<s>"
    frame = [word for word in (first if bos else "", "$A", "</s>" if eos else "") if word]
    inner.post_processor = processors.TemplateProcessing(
        single=" ".join(frame), special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    named = {"eos_token": "</s>"} if end else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=first, **named)


def client(*pairs: tuple[str, str], validation: Sequence[tuple[str, str]] = ()) -> Client:
    def made(pair: tuple[str, str]) -> Record:
        return Record(pair[0], "", (pair[1], "also right"), {}, "f:1")

    return Client("c", "The client", "g", {"k": "v"}, tuple(map(made, pairs)), tuple(map(made, validation)), ())


def encode(
    prompt: str, answer: str, *, max_length: int = 100, using: PreTrainedTokenizerFast | None = None
) -> ClientData:
    return encode_client(client((prompt, answer)), using or tokenizer(), template=NONE, max_length=max_length)


def letters(text: str) -> tuple[int, ...]:
    return tuple(WORD[letter] for letter in text)


def only(data: ClientData) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return prompt ids and labelled ids of the one training example."""
    [example] = data.train
    return example.ids[: example.prompt_length], example.ids[example.prompt_length :]


# ---------------------------------------------------------------- what is trained on


def test_an_example_is_prompt_then_answer_then_end_of_text() -> None:
    assert only(encode("a b", "c d")) == (letters("ab"), (*letters("cd"), EOS))


def test_the_first_answer_is_trained_on_and_all_are_kept_for_scoring() -> None:
    assert encode("a", "b").train[0].answers == ("b", "also right")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, letters("ab")),
        ({"bos": True}, (BOS, *letters("ab"))),
        ({"eos": True}, letters("ab")),
        ({"bos": True, "eos": True}, (BOS, *letters("ab"))),
        ({"bos": True, "same": True}, (EOS, *letters("ab"))),
        ({"bos": True, "eos": True, "same": True}, (EOS, *letters("ab"))),
    ],
)
def test_the_prompt_keeps_the_tokenizers_first_token_and_not_its_last(
    options: dict[str, bool], expected: tuple[int, ...]
) -> None:
    assert only(encode("a b", "c", using=tokenizer(**options))) == (expected, (*letters("c"), EOS))


def test_an_end_of_text_in_the_prompt_itself_is_kept() -> None:
    assert only(encode("a </s>", "c"))[0] == (*letters("a"), EOS)
    assert only(encode("a </s>", "c", using=tokenizer(eos=True)))[0] == (*letters("a"), EOS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (EOS,)),
        ({"bos": True}, (BOS,)),
        ({"eos": True}, (EOS,)),
        ({"bos": True, "eos": True}, (BOS,)),
        ({"bos": True, "same": True}, (EOS,)),
        ({"bos": True, "eos": True, "unknown": False}, (BOS,)),
        ({"unknown": False}, (EOS,)),
    ],
)
def test_an_empty_prompt_leaves_one_token_to_predict_from(options: dict[str, bool], expected: tuple[int, ...]) -> None:
    assert only(encode("", "c", using=tokenizer(**options)))[0] == expected


def test_an_answer_without_a_token_still_trains_the_end_of_text() -> None:
    assert only(encode("a", "?", using=tokenizer(unknown=False))) == (letters("a"), (EOS,))


def test_trained_tokens_and_tokens_count_the_training_examples_only() -> None:
    data = encode_client(
        client(("a b", "c"), ("a", "b c d"), validation=[("a", "b")]), tokenizer(), template=NONE, max_length=99
    )
    assert (data.trained_tokens, data.tokens) == (2 + 4, 4 + 5)


def test_a_client_keeps_its_name_group_columns_and_splits() -> None:
    data = encode_client(client(("a", "b"), validation=[("c", "d")]), tokenizer(), template=NONE, max_length=99)
    assert (data.id, data.name, data.group, data.columns) == ("c", "The client", "g", {"k": "v"})
    assert [example.ids for example in data.validation] == [(*letters("cd"), EOS)]
    assert data.test == ()


def test_a_tokenizer_that_fails_on_a_word_is_an_error_without_the_word() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    with pytest.raises(DataError, match="needs an unknown token") as caught:
        encode("a", "zebra", using=PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))
    assert "zebra" not in str(caught.value)


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    with pytest.raises(DataError, match="no end-of-text token"):
        encode("a", "b", using=tokenizer(end=False))


# ---------------------------------------------------------------- truncation; prompt 4, answer 2, end 1: 7 tokens


@pytest.mark.parametrize(
    ("max_length", "prompt", "answer", "cut"),
    [
        (8, "abcd", "ef.", (0, 0)),
        (7, "abcd", "ef.", (0, 0)),
        (6, "bcd", "ef.", (1, 0)),
        (4, "d", "ef.", (1, 0)),
        (3, "d", "ef", (1, 1)),
        (2, "d", "e", (1, 1)),
    ],
)
def test_the_prompt_is_cut_at_its_start_and_then_the_answer_at_its_end(
    max_length: int, prompt: str, answer: str, cut: tuple[int, int]
) -> None:
    data = encode("a b c d", "e f", max_length=max_length)
    expected = tuple(EOS if letter == "." else WORD[letter] for letter in answer)
    assert only(data) == (letters(prompt), expected)
    assert data.truncation == Truncation(1, *cut, 0)


@pytest.mark.parametrize(
    ("max_length", "prompt", "answer", "cut"),
    [
        (8, "abcd", "ef.", (0, 0)),
        (7, "bcd", "ef.", (1, 0)),
        (5, "d", "ef.", (1, 0)),
        (4, "", "ef.", (1, 0)),
        (3, "", "ef", (1, 1)),
        (2, "", "e", (1, 1)),
    ],
)
@pytest.mark.parametrize("same", [False, True])
def test_the_first_token_of_the_tokenizer_stays_first(
    same: bool, max_length: int, prompt: str, answer: str, cut: tuple[int, int]
) -> None:
    data = encode("a b c d", "e f", max_length=max_length, using=tokenizer(bos=True, eos=True, same=same))
    expected = tuple(EOS if letter == "." else WORD[letter] for letter in answer)
    assert only(data) == ((EOS if same else BOS, *letters(prompt)), expected)
    assert data.truncation == Truncation(1, *cut, 0)


@pytest.mark.parametrize(("length", "cut"), [(7, 0), (8, 0), (9, 1), (80, 1)])
def test_prompts_of_one_less_the_same_one_more_and_ten_times_the_length(length: int, cut: int) -> None:
    prompt = " ".join("a" * (length - 2))  # answer and end of text are two more
    data = encode(prompt, "b", max_length=8)
    assert len(data.train[0].ids) == min(length, 8)
    assert only(data)[1] == (*letters("b"), EOS)
    assert data.truncation == Truncation(1, cut, 0, 0)


@pytest.mark.parametrize(("length", "cut"), [(7, 0), (8, 0), (9, 1), (80, 1)])
def test_answers_of_one_less_the_same_one_more_and_ten_times_the_length(length: int, cut: int) -> None:
    answer = " ".join("b" * (length - 2))  # one prompt token and the end of text are two more
    data = encode("a", answer, max_length=8)
    assert len(data.train[0].ids) == min(length, 8)
    assert (only(data)[1][-1] == EOS) == (not cut)
    assert data.truncation == Truncation(1, 0, cut, 0)


def test_dropped_examples_are_counted_and_a_client_left_with_none_is_named() -> None:
    with pytest.raises(
        DataError, match=r"client 'The client': no training example .* data.max_length = 1 \(1 dropped\)"
    ):
        encode("a", "b", max_length=1)


def test_truncation_counts_add_up_over_all_splits() -> None:
    made = client(("a b c", "d"), ("a", "b c d e"), validation=[("a", "b"), ("a b c d", "e")])
    assert encode_client(made, tokenizer(), template=NONE, max_length=4).truncation == Truncation(4, 2, 1, 0)
    assert Truncation(1, 2, 3, 4) + Truncation(10, 20, 30, 40) == Truncation(11, 22, 33, 44)


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text("abc", max_size=12),
    answer=st.text("def", min_size=1, max_size=12),
    max_length=st.integers(2, 20),
    bos=st.booleans(),
    eos=st.booleans(),
    same=st.booleans(),
)
def test_every_example_fits_keeps_a_prompt_token_and_trains_a_prefix_of_its_answer(
    prompt: str, answer: str, max_length: int, bos: bool, eos: bool, same: bool
) -> None:
    using = tokenizer(bos=bos, eos=eos, same=same)
    data = encode(" ".join(prompt), " ".join(answer), max_length=max_length, using=using)
    given, trained = only(data)
    whole = (*letters(answer), EOS)
    assert len(given) + len(trained) <= max_length
    assert len(given) >= 1
    assert trained == whole[: len(trained)]
    assert len(trained) == min(len(whole), max_length - 1)
    if bos:
        assert given[0] == (EOS if same else BOS)
    kept = given[1:] if bos or not prompt else given
    assert kept == letters(prompt)[len(prompt) - len(kept) :]
    assert data.truncation.prompts_cut == (len(kept) < len(prompt))
    assert data.truncation.answers_cut == (len(trained) < len(whole))


# ---------------------------------------------------------------- batches


def example(prompt: int, answer: int) -> Encoded:
    return Encoded(tuple(range(10, 10 + prompt + answer)), prompt, ("x",))


def test_a_batch_is_padded_on_the_right_and_labelled_on_answers_only() -> None:
    batch = collate([[example(2, 1)], [example(1, 3)]], pad_id=PAD, multiple=1)
    assert batch.ids.tolist() == [[[10, 11, 12, PAD]], [[10, 11, 12, 13]]]
    assert batch.labels.tolist() == [[[NO_LOSS, NO_LOSS, 12, NO_LOSS]], [[NO_LOSS, 11, 12, 13]]]
    assert batch.lengths.tolist() == [[3], [4]]
    assert {batch.ids.dtype, batch.labels.dtype, batch.lengths.dtype} == {torch.int64}


def test_the_length_is_rounded_up_to_a_multiple() -> None:
    assert [collate([[example(1, n)]], pad_id=PAD, multiple=8).ids.shape[-1] for n in (1, 7, 8)] == [8, 8, 16]


def test_clients_with_fewer_examples_are_filled_with_empty_ones() -> None:
    batch = collate([[example(1, 1), example(1, 2)], [example(1, 1)], []], pad_id=PAD)
    assert batch.ids.shape == (3, 2, 3)
    assert batch.lengths.tolist() == [[2, 3], [2, 0], [0, 0]]
    assert (batch.ids[2] == PAD).all()
    assert (batch.labels[2] == NO_LOSS).all()


def test_a_batch_size_sets_the_number_of_examples() -> None:
    assert collate([[example(1, 1)]], pad_id=PAD, batch_size=4).ids.shape == (1, 4, 2)


def test_clients_without_any_example_give_an_empty_batch() -> None:
    batch: Batch = collate([[], []], pad_id=PAD)
    assert batch.ids.shape == (2, 1, 1)
    assert batch.lengths.sum() == 0


def test_more_examples_than_the_batch_size_are_refused() -> None:
    with pytest.raises(ShapeError, match="up to 2 examples: need a client, and at most 1"):
        collate([[example(1, 1)] * 2], pad_id=PAD, batch_size=1)


def test_a_batch_of_no_client_is_refused() -> None:
    with pytest.raises(ShapeError, match="0 clients"):
        collate([], pad_id=PAD)


@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=3), min_size=1, max_size=4))
def test_every_example_can_be_read_back_from_a_batch(shapes: list[list[tuple[int, int]]]) -> None:
    examples = [[example(*pair) for pair in own] for own in shapes]
    batch = collate(examples, pad_id=PAD)
    for client_at, own in enumerate(examples):
        for place, one in enumerate(own):
            length = int(batch.lengths[client_at, place])
            assert tuple(batch.ids[client_at, place, :length].tolist()) == one.ids
            assert int((batch.labels[client_at, place] != NO_LOSS).sum()) == len(one.ids) - one.prompt_length


# ---------------------------------------------------------------- local steps


def steps(count: int, **options: int | None) -> list[list[int]]:
    given = {"seed": 1, "round": 2, "key": 3, "batch_size": 4, "steps": None, "epochs": None, **options}
    return [batch.tolist() for batch in local_batches(count, **given)]  # type: ignore[arg-type]


def test_an_epoch_sees_every_example_once_and_its_last_batch_is_smaller() -> None:
    batches = steps(10, epochs=1)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(index for batch in batches for index in batch) == list(range(10))


def test_an_epoch_is_the_permutation_of_the_documented_stream() -> None:
    order = [np.random.default_rng([1, 2, 3, epoch]).permutation(5).tolist() for epoch in (0, 1)]
    assert steps(5, epochs=2, batch_size=5) == order
    assert order[0] != order[1]


def test_steps_are_the_first_batches_of_as_many_epochs_as_needed() -> None:
    assert steps(10, steps=5) == steps(10, epochs=2)[:5]
    assert steps(10, steps=3) == steps(10, epochs=1)


def test_a_client_smaller_than_a_batch_repeats_its_examples_in_every_step() -> None:
    assert [sorted(batch) for batch in steps(2, steps=3)] == [[0, 1]] * 3


@pytest.mark.parametrize("changed", [{"seed": 9}, {"round": 9}, {"key": 9}])
def test_seed_round_and_client_each_change_the_order(changed: dict[str, int]) -> None:
    assert steps(20, epochs=1) == steps(20, epochs=1)
    assert steps(20, epochs=1) != steps(20, epochs=1, **changed)


@pytest.mark.parametrize(
    ("count", "options"),
    [(0, {"steps": 1}), (3, {}), (3, {"steps": 1, "epochs": 1}), (3, {"steps": 0}), (3, {"steps": 1, "batch_size": 0})],
)
def test_invalid_step_counts_are_refused(count: int, options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="local batches"):
        steps(count, **options)


@pytest.mark.parametrize(
    ("count", "steps_", "epochs"), [(10, 5, None), (10, 3, None), (2, 3, None), (9, None, 2), (7, 4, None)]
)
def test_the_examples_of_a_round_are_counted_without_drawing_them(
    count: int, steps_: int | None, epochs: int | None
) -> None:
    taken = sum(len(batch) for batch in steps(count, steps=steps_, epochs=epochs))
    assert count_examples(count, batch_size=4, steps=steps_, epochs=epochs) == taken


PROMPT = " ".join("abcdefghij" * 3)


def test_the_question_does_not_depend_on_how_long_the_answer_is() -> None:
    """An example is cut for its answer; the prompt that an answer is written to is cut for the base only."""
    asked = []
    for answer in ("a", " ".join("abcdefghij")):
        own = client(("a", "b"), validation=[(PROMPT, answer)])
        data = encode_client(own, tokenizer(bos=True), template=NONE, max_length=20, max_question=16)
        [one] = data.validation
        assert one.prompt_length == 20 - len(answer.split()) - 1
        asked.append(one.question)
    assert asked[0] == asked[1] == (BOS, *letters("fghij" + "abcdefghij"))


def test_cut_questions_are_counted_for_what_is_answered_only() -> None:
    own = client((PROMPT, "a"), (PROMPT, "b"), validation=[(PROMPT, "a"), ("a b", "c")])
    data = encode_client(own, tokenizer(), template=NONE, max_length=40, max_question=16)
    assert data.truncation == Truncation(examples=4, questions_cut=1)


def test_a_prompt_for_generation_is_never_longer_than_an_example() -> None:
    own = client(("a", "b"), validation=[(PROMPT, "a")])
    data = encode_client(own, tokenizer(), template=NONE, max_length=6, max_question=100)
    assert len(data.validation[0].question) == 6


def test_a_cut_keeps_no_more_than_there_is_room_for() -> None:
    assert _cut([1, 2, 3, 4], 2, 1) == ([1], 3)
    assert _cut([1, 2, 3, 4], 2, 3) == ([1, 2, 4], 1)


def test_loss_on_an_earlier_turn_begins_after_the_leading_ids_that_a_cut_keeps() -> None:
    """Ids 0, 1 are the tokenizer's; 3 of the rest go, and with them the start of the turn at 3 to 7."""
    prompt = _Prompt(range(10), 2, trained=((3, 8),))
    example, _ = _fit(prompt, [20, 21], max_length=9, max_question=None, texts=("t",))
    assert example is not None
    assert example.ids == (0, 1, 5, 6, 7, 8, 9, 20, 21)
    assert example.earlier == ((2, 5),)


def test_an_end_of_text_that_is_also_the_unknown_token_does_not_stay_in_a_reference() -> None:
    both = tokenizer()
    both.unk_token = "</s>"
    assert _readable("a b </s>", both) == "a b"
