"""Greedy answers of many clients in one pass are those that PEFT generates client by client, prompt by prompt."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from fedmira.adapters import Adapters
from fedmira.model.answers import cache, generate, lanes, prefill
from fedmira.model.answers.generate import answers, padded_answers
from fedmira.model.answers.lanes import Text, count_tokens, plan_passes, suffix_limit
from fedmira.model.base.load import Base

RANKS = (1, 4, 2, 3)
NEW = 12
WINDOWS = ("mistral", "gemma2", "gemma3", "phi3", "qwen2_moe", "llama4")  # of 4 or 16 tokens
FAST = ("gpt2", "llama", "gemma3", "mixtral")  # of all families tests/parity/test_peft.py has answers
KEEPING = [
    family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
    for family in (*tiny.FAMILIES, "qwen2_moe", "llama4")
    if family not in tiny.PADDED
]


def make(family: str, dtype: torch.dtype = torch.float32, **others: Any) -> tuple[Base, Adapters]:
    base = tiny.base(family, targets="all-linear", dtype=dtype, **others)
    return base, tiny.adapters(tiny.layout(base, max(RANKS)), RANKS, dtype=dtype)


def draw_prompts(seed: int = 3, counts: tuple[int, ...] = (5, 0, 1, 9)) -> list[list[list[int]]]:
    """Uneven numbers of prompts, of 1 to 31 tokens; those of each client share a prefix."""
    stream = np.random.default_rng(seed)
    prompts = []
    for count in counts:
        prefix = stream.integers(2, tiny.VOCABULARY, 12).tolist()
        prompts.append(
            [prefix + stream.integers(2, tiny.VOCABULARY, int(stream.integers(1, 20))).tolist() for _ in range(count)]
        )
    prompts[2] = [[7]] * counts[2]
    return prompts


def by_peft(family: str, base: Base, stack: Adapters, prompts: list[list[list[int]]], end: Any = tiny.END) -> Any:
    """Every prompt alone, through PEFT's own generate."""
    plain = tiny.model(family, dtype=stack.rows.dtype)
    found = []
    for k, own in enumerate(prompts):
        model = tiny.peft_client(plain, stack, k, modules=[name for name, _, _ in base.shapes])
        texts = []
        for prompt in own:
            with torch.no_grad():
                out = model.generate(
                    input_ids=torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    do_sample=False,
                    max_new_tokens=NEW,
                    pad_token_id=tiny.END,
                    eos_token_id=end,
                )
            texts.append(base.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
        found.append(texts)
    return found


ONE_EACH = [  # a family packed, the other one padded; the rest is slow
    ("gpt2", True),
    ("llama", False),
    pytest.param("gpt2", False, marks=pytest.mark.slow),
    pytest.param("llama", True, marks=pytest.mark.slow),
]
FEWER = (4, 0, 1, 5)  # prompts of each client, for tests that answer each of them alone


@functools.cache
def by_peft_of(family: str) -> Any:
    return by_peft(family, *make(family), draw_prompts(counts=FEWER))


@contextmanager
def watched(base: Base) -> Iterator[list[torch.Size]]:
    """The shapes [rows, tokens] of every pass through the decoder."""
    shapes: list[torch.Size] = []
    hook = base.decoder.register_forward_pre_hook(
        lambda _, given, named: shapes.append(named["input_ids"].shape), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", KEEPING)
def test_answers_in_float32_are_what_peft_generates_token_for_token(family: str, packed: bool) -> None:
    base, stack = make(family)
    base = base if packed else replace(base, packs=False)
    assert generate._find_cache_facts(base) is not None
    found = answers(base, stack, draw_prompts(counts=FEWER), max_new_tokens=NEW)
    assert found == by_peft_of(family)
    assert len({text for own in found for text in own}) > 5


@pytest.mark.parametrize("family", WINDOWS)
def test_layers_with_windows_have_a_rule(family: str) -> None:
    known = generate._find_cache_facts(make(family)[0])
    assert known is not None
    assert any(rule is not None for rule in known.rules)


@pytest.mark.parametrize(
    "family", [tiny.PADDED[-1], *(pytest.param(family, marks=pytest.mark.slow) for family in tiny.PADDED[:-1])]
)
def test_bases_without_a_cache_answer_by_generate(family: str) -> None:
    base, stack = make(family)
    assert generate._find_cache_facts(base) is None
    assert answers(base, stack, draw_prompts(counts=FEWER), max_new_tokens=NEW) == by_peft_of(family)


def test_the_trial_notices_a_cache_with_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache.CachePart.store

    def wrong(self: Any, layer: int, rows: Any, places: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        real(self, layer, rows, places, key + 0.1, value)

    monkeypatch.setattr(cache.CachePart, "store", wrong)
    assert generate._find_cache_facts(make("llama")[0]) is None


@functools.cache
def answered_together(family: str, packed: bool) -> tuple[Base, Adapters, list[list[str]]]:
    """A base with adapters, and what it answers with the limits of the package."""
    base, stack = make(family)
    base = base if packed else replace(base, packs=False)
    return base, stack, answers(base, stack, draw_prompts(counts=FEWER), max_new_tokens=NEW)


BASES = (("gpt2", True), ("gemma3", True), ("llama", False))
LIMITS = ((1, 2**30, 2048, 2**24), (3, 2**30, 40, 2**24), (256, 20_000, 2048, 2**24), (256, 2**30, 1, 500))


@pytest.mark.parametrize(
    ("family", "packed", "rows", "cache_bytes", "prefill_tokens", "scores"),
    [
        pytest.param(*base, *limits, marks=[] if place % len(BASES) == number else pytest.mark.slow)
        for number, base in enumerate(BASES)
        for place, limits in enumerate(LIMITS)
    ],
)
def test_an_answer_does_not_depend_on_what_shares_its_pass(
    family: str,
    rows: int,
    cache_bytes: int,
    prefill_tokens: int,
    scores: int,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, stack, together = answered_together(family, packed)
    prompts = draw_prompts(counts=FEWER)
    monkeypatch.setattr(lanes, "ANSWER_ROWS", rows)
    monkeypatch.setattr(lanes, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(lanes, "PREFILL_TOKENS", prefill_tokens)
    monkeypatch.setattr(prefill, "PACKED_TOKENS", prefill_tokens)
    monkeypatch.setattr(cache, "SCORES", scores)
    monkeypatch.setattr(generate, "GROW_TOKENS", 3)
    assert answers(base, stack, prompts, max_new_tokens=NEW) == together
    order = torch.tensor([3, 0, 2, 1])
    turned = answers(base, stack.take(order), [prompts[k][::-1] for k in order], max_new_tokens=NEW)
    assert turned == [together[k][::-1] for k in order]


@pytest.mark.parametrize(("family", "packed"), ONE_EACH)
def test_first_tokens_of_long_suffixes_are_cached_behind_the_prefix(
    family: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client shares much and has short rests, others share nothing; rows are drawn together on the way."""
    stream = np.random.default_rng(0)

    def draw(size: int) -> list[int]:
        return stream.integers(2, tiny.VOCABULARY, size).tolist()

    prefix = draw(25)
    prompts = [
        [prefix + draw(size) for size in (1, 2, 3, 2)],
        [draw(size) for size in (20, 4, 3, 2, 2)],
        [draw(size) for size in (18, 2, 1)],
        [],
    ]
    base, stack = make(family)
    ends = [tiny.END, 3, 8, 12]
    base.model.generation_config.eos_token_id = ends  # type: ignore[union-attr]
    expected = by_peft(family, base, stack, prompts, end=ends)
    real, laid = generate._lay_out, []

    def seen(*given: Any, **named: Any) -> Any:
        rows = real(*given, **named)
        laid.append((rows.limit, max((len(text.tokens) for lane in rows.lanes for text in lane), default=0)))
        return rows

    base = base if packed else replace(base, packs=False)
    generate._find_cache_facts(base)
    monkeypatch.setattr(generate, "_lay_out", seen)
    assert answers(base, stack, prompts, max_new_tokens=NEW) == expected
    assert any(limit < longest for limit, longest in laid)
    assert len(laid) > 2  # the last one is empty


def test_keys_and_values_that_are_not_finite_stay_with_their_client() -> None:
    """In padded passes; in packed ones attention adds masked scores of its neighbours too."""
    base, stack = make("llama")
    base = replace(base, packs=False)
    prompts = draw_prompts()
    before = answers(base, stack, prompts, max_new_tokens=NEW)
    spoiled = stack.rows.clone()
    spoiled[3] = torch.nan
    found = answers(base, stack.with_rows(spoiled), prompts, max_new_tokens=NEW)
    assert found[:3] == before[:3]


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ([], 0),
        ([(0, [7])], 7),
        ([(10, [5, 3]), (4, [9, 6])], 5),  # 4 and 1 tokens more fit in the 6 places beside the second lane's 4
        ([(10, [5, 3]), (4, [9, 8])], 6),
        ([(10, [5, 3]), (4, [9, 9, 2])], 6),
        ([(10, [9, 3]), (0, [12, 1])], 9),
        ([(10, [1]), (0, [9])], 1),
    ],
)
def test_rows_are_as_long_as_the_tokens_without_room_behind_the_prefixes(
    given: list[tuple[int, list[int]]], limit: int
) -> None:
    dealt = [
        [Text(k, 10 * k + place, tuple(range(size)), after) for place, size in enumerate(sizes)]
        for k, (after, sizes) in enumerate(given)
    ]
    assert suffix_limit(dealt) == limit
    assert suffix_limit([[*lane, lane[0]] for lane in dealt]) == limit  # filler rows need no room


def test_answers_do_not_depend_on_removing_ended_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    base, stack = make("llama")
    prompts = draw_prompts()
    often = answers(base, stack, prompts, max_new_tokens=NEW)
    monkeypatch.setattr(generate._AnswerRows, "compact", lambda self: None)
    assert answers(base, stack, prompts, max_new_tokens=NEW) == often


def test_an_answer_ends_after_any_of_several_ends_of_text() -> None:
    base, stack = make("llama")
    prompts = draw_prompts()
    whole = answers(base, stack, prompts, max_new_tokens=NEW)
    words = [word for own in whole for text in own for word in text.split()[1:-1]]
    common = sorted(set(words), key=words.count)[-2:]  # ordinary words within answers
    ends = [tiny.END, *(int(word[1:]) for word in common)]
    base.model.generation_config.eos_token_id = ends  # type: ignore[union-attr]
    found = answers(base, stack, prompts, max_new_tokens=NEW)
    assert found == by_peft("llama", base, stack, prompts, end=ends)
    last = {text.split()[-1] for own in found for text in own if text}
    assert set(common) <= last
    for own, before in zip(found, whole, strict=True):
        for text, long in zip(own, before, strict=True):
            assert long.startswith(text)
            assert not set(common) & set(text.split()[:-1])


def test_an_answer_of_one_token_is_the_first_token_of_a_long_one() -> None:
    base, stack = make("gpt2")
    prompts = draw_prompts()
    long = answers(base, stack, prompts, max_new_tokens=NEW)
    short = answers(base, stack, prompts, max_new_tokens=1)
    assert short == [[" ".join(text.split()[:1]) for text in own] for own in long]


def test_no_prompts_have_no_answers() -> None:
    base, stack = make("gpt2")
    assert answers(base, stack, [[], [], [], []], max_new_tokens=NEW) == [[], [], [], []]


@pytest.mark.parametrize(("family", "packed"), ONE_EACH)
def test_a_prompt_that_fills_all_positions_is_answered_together_with_short_ones(family: str, packed: bool) -> None:
    base, stack = make(family)
    base = base if packed else replace(base, packs=False)
    stream = np.random.default_rng(0)
    prefix = stream.integers(2, tiny.VOCABULARY, 20).tolist()
    lengths = (tiny.POSITIONS - NEW - 20, tiny.POSITIONS - NEW - 25, 1)
    prompts = [[prefix + stream.integers(2, tiny.VOCABULARY, size).tolist() for size in lengths] for _ in RANKS]
    prompts[1] = [one[20:] for one in prompts[1]]  # begins with nothing in common, and is as much shorter
    assert answers(base, stack, prompts, max_new_tokens=NEW) == by_peft(family, base, stack, prompts)


@pytest.mark.parametrize(("packed", "expected"), [(True, [(1, 21 + 10 * 2)]), (False, [(1, 21), (10, 1)])])
def test_the_prefix_of_a_clients_prompts_is_computed_once(packed: bool, expected: list[tuple[int, int]]) -> None:
    base, stack = make("llama")
    base = base if packed else replace(base, packs=False)
    generate._find_cache_facts(base)
    prompts = [[[5, *range(2, 22), 3 + place] for place in range(10)], [], [], []]
    with watched(base) as shapes:
        answers(base, stack, prompts, max_new_tokens=1)
    assert sorted(shapes) == expected  # packed, an unused token follows every prompt


def test_equal_prompts_and_prompts_that_are_prefixes_of_others_are_answered() -> None:
    base, stack = make("llama")
    long = list(range(2, 22))
    prompts = [[long, long, long[:-3]], [], [], []]
    assert answers(base, stack, prompts, max_new_tokens=NEW) == by_peft("llama", base, stack, prompts)


def test_rows_that_have_ended_are_no_longer_computed() -> None:
    base, stack = make("llama")
    base.model.generation_config.eos_token_id = [tiny.END, 3, 8, 12]  # type: ignore[union-attr]
    generate._find_cache_facts(base)
    prompts = draw_prompts()
    written: list[int] = []
    decode = base.tokenizer.batch_decode
    base.tokenizer.batch_decode = lambda ids, **others: written.extend(map(len, ids)) or decode(ids, **others)  # type: ignore[func-returns-value, method-assign, assignment]
    with watched(base) as shapes:
        answers(base, stack, prompts, max_new_tokens=NEW)
    # Passes of a single token: the last steps are as many as the longest answer has tokens after its first.
    rows = [shape[0] for shape in shapes if shape[1] == 1][1 - max(written) :]
    going = [sum(count > step for count in written) for step in range(1, max(written))]
    assert going[0] > 2 * going[-1]
    assert all(count <= those < 2 * count + 2 for count, those in zip(going, rows, strict=True))


def test_a_base_in_bfloat16_answers_as_generate_does_where_it_is_sure() -> None:
    base, stack = make("llama", torch.bfloat16)
    prompts = draw_prompts()
    known = generate._find_cache_facts(base)
    assert known is not None
    assert known.token_bytes == 2 * 2 * 2 * 4 * 2  # layers, keys and values, heads, width, bytes
    found = answers(base, stack, prompts, max_new_tokens=4)
    asked_prompts = [own for own in prompts if own]
    theirs = padded_answers(base, stack.take(torch.tensor([0, 2, 3])), asked_prompts, max_new_tokens=4)
    same = [
        a == b
        for own, other in zip([f for f in found if f], theirs, strict=True)
        for a, b in zip(own, other, strict=True)
    ]
    assert sum(same) >= 0.6 * len(same)


@pytest.mark.parametrize("rows", [1, 4, 10, 256])
@pytest.mark.parametrize("cache_bytes", [1, 20_000, 2**30])
@pytest.mark.parametrize("token_bytes", [None, 256])
def test_passes_have_every_prompt_once_and_obey_their_limits(
    rows: int, cache_bytes: int, token_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "ANSWER_ROWS", rows)
    monkeypatch.setattr(lanes, "PADDED_ROWS", rows)
    monkeypatch.setattr(lanes, "CACHE_BYTES", cache_bytes)
    prompts = draw_prompts(counts=(30, 0, 1, 7))
    seen = []
    for some in plan_passes(prompts, max_new_tokens=NEW, token_bytes=token_bytes):
        counts = [len(lane.numbers) for lane in some]
        if token_bytes is None:
            assert len(counts) * max(counts) <= rows
            assert 2 * min(counts) >= max(counts)
        else:
            assert sum(counts) <= rows
            assert sum(counts) == 1 or count_tokens(some, NEW) * token_bytes <= cache_bytes
        for lane in some:
            assert [list(ids) for ids in lane.prompts] == [prompts[lane.client][place] for place in lane.numbers]
            assert len({ids[: lane.prefix_length] for ids in lane.prompts}) == 1
            assert all(len(ids) > lane.prefix_length for ids in lane.prompts)
            seen += [(lane.client, place) for place in lane.numbers]
    assert sorted(seen) == [(k, place) for k, own in enumerate(prompts) for place in range(len(own))]
