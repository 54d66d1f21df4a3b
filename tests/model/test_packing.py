"""Laying examples end to end changes nothing: the same losses and gradients as padded, or as each example alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as some
from tests import tiny
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from fedmira.adapters import Adapters
from fedmira.data.batches import NO_LOSS, Batch, Encoded, collate
from fedmira.model.base.load import Base, wrap
from fedmira.model.packed.buckets import Buckets
from fedmira.model.packed.lora import Dropout
from fedmira.model.packed.packing import LONG_SUFFIX, PREFIX_TOKENS, SEGMENT_FILL, _groups, pack, pad
from fedmira.model.packed.spans import Spans
from fedmira.model.passes import gradients, losses
from fedmira.model.seam import Rule

BASE = tiny.base("gpt2", targets=["c_attn"])


def batch_of(lengths: list[list[int]], *, seed: int = 0) -> Batch:
    stream = np.random.default_rng(seed)
    texts: list[list[Encoded]] = [
        [tiny.example(stream, length, answer=int(stream.integers(1, length))) for length in own] for own in lengths
    ]
    return collate(texts, pad_id=0)


def stack_of(clients: int) -> Adapters:
    return tiny.adapters(tiny.layout(BASE, 2), [1 + k % 2 for k in range(clients)])


def measure(base: Base, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, counts and gradients of a batch."""
    stack = stack_of(len(batch.ids))
    into = torch.zeros_like(stack.rows)
    found, counts = gradients(base, stack, batch, into=into)
    sums, same = losses(base, stack, batch)
    assert torch.equal(counts, same)
    torch.testing.assert_close(sums, found * counts, rtol=1e-10, atol=1e-12)
    return found, counts, into


@settings(max_examples=25, deadline=None)
@given(
    some.lists(some.lists(some.integers(2, 14), min_size=0, max_size=4), min_size=1, max_size=5).filter(
        lambda lengths: any(lengths)
    ),
    some.integers(0, 100),
)
def test_a_packed_pass_gives_what_a_padded_one_gives_for_any_lengths(lengths: list[list[int]], seed: int) -> None:
    """Clients without any example included."""
    batch = batch_of(lengths, seed=seed)
    for one, other in zip(measure(BASE, batch), measure(replace(BASE, packs=False), batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@given(some.lists(some.lists(some.integers(2, 30), min_size=1, max_size=4), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_pass_has_every_token_once_and_little_filler(lengths: list[list[int]]) -> None:
    batch = batch_of(lengths)
    plan = pack(batch, pad_id=0)
    assert plan.attention is not None
    assert plan.positions is not None
    total = sum(sum(own) for own in lengths)
    assert total <= plan.ids.shape[1] <= total / SEGMENT_FILL
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    for segment in plan.segments:
        for client, real, view in zip(
            plan.order[segment.first : segment.stop].tolist(),
            segment.real,
            segment.view(plan.ids[0, :, None]),
            strict=True,
        ):
            own = torch.cat([batch.ids[client, place, :length] for place, length in enumerate(lengths[client])])
            assert real == slice(0, len(own))
            assert torch.equal(view[real, 0], own)
    gathered = pack(batch, pad_id=0, fused=True).attention
    assert isinstance(gathered, Buckets)  # these take every token to one row and back
    assert torch.equal(gathered.index[gathered.back], torch.arange(plan.ids.shape[1]))


def test_positions_restart_at_every_example() -> None:
    """One client with 3 and 2 tokens, another with 5: one segment of five tokens each, nothing filled."""
    plan = pack(batch_of([[3, 2], [5]]), pad_id=0)
    assert plan.positions is not None
    assert plan.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]
    assert [(one.first, one.stop, one.start, one.tokens) for one in plan.segments] == [(0, 2, 0, 5)]


def test_a_label_is_predicted_by_the_token_before_it() -> None:
    ids = torch.tensor([[[5, 6, 7, 0], [8, 9, 0, 0]]])
    labels = torch.tensor([[[NO_LOSS, 6, 7, NO_LOSS], [NO_LOSS, 9, NO_LOSS, NO_LOSS]]])
    batch = Batch(ids, labels, torch.tensor([[3, 2]]))
    plan, padded = pack(batch, pad_id=0), pad(batch)
    assert plan.labelled.tolist() == [0, 1, 3]
    assert padded.labelled.tolist() == [0, 1, 4]
    assert plan.targets.tolist() == padded.targets.tolist() == [6, 7, 9]
    assert plan.counts.tolist() == padded.counts.tolist() == [3]


def test_clients_of_similar_size_share_a_segment_and_others_get_separate_ones() -> None:
    plan = pack(batch_of([[10], [30], [29], [30]]), pad_id=0)
    assert plan.order.tolist() == [1, 3, 2, 0]
    assert [(one.tokens, [own.stop for own in one.real]) for one in plan.segments] == [(30, [30, 30, 29]), (10, [10])]


def test_the_filler_of_a_segment_may_be_longer_than_the_positions_of_the_base() -> None:
    """960 tokens beside 888: the smaller client is filled with 72 tokens, the base knows 64 positions."""
    lengths = [[60] * 16, [60] * 14 + [48]]
    assert sum(lengths[0]) - sum(lengths[1]) > tiny.POSITIONS
    assert sum(lengths[1]) >= SEGMENT_FILL * sum(lengths[0])
    batch = batch_of(lengths)
    (segment,) = pack(batch, pad_id=0).segments  # else nobody is filled up
    assert segment.tokens == 960
    for one, other in zip(measure(BASE, batch), measure(replace(BASE, packs=False), batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_families_with_rotary_positions_and_windows_are_packed_too(family: str) -> None:
    base = tiny.base(family, targets="all-linear", dtype=torch.float32)
    assert base.packs
    stack = tiny.adapters(tiny.layout(base, 2), (2, 1, 2), dtype=torch.float32)
    batch = batch_of([[4, 14], [9, 2, 3], [17]])
    into, other = torch.zeros_like(stack.rows), torch.zeros_like(stack.rows)
    packed, _ = gradients(base, stack, batch, into=into)
    padded, _ = gradients(replace(base, packs=False), stack, batch, into=other)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(into, other, rtol=1e-4, atol=1e-5)


LONG = [[4, 24], [17, 2, 21], [30]]
NARROW = {"mistral": "sliding_window", "qwen2_moe": "sliding_window", "llama4": "attention_chunk_size"}


@pytest.mark.parametrize(("family", "key"), NARROW.items(), ids=NARROW)
@pytest.mark.parametrize("reach", [4, 16, 40])
def test_windows_and_chunks_are_obeyed_in_packed_passes_of_long_texts(family: str, key: str, reach: int) -> None:
    """A base is tried on 9 tokens when it is loaded, which 16 and 40 do not touch; these texts have up to 30.

    Mistral hands its window to attention, the others have it in the mask alone; Llama 4 cuts texts into chunks.
    """
    base = tiny.base(family, targets="all-linear", **{key: reach})
    assert base.packs
    stack = tiny.adapters(tiny.layout(base, 2), (2, 1, 2))
    batch = batch_of(LONG)
    into, other = torch.zeros_like(stack.rows), torch.zeros_like(stack.rows)
    packed, _ = gradients(base, stack, batch, into=into)
    padded, _ = gradients(replace(base, packs=False), stack, batch, into=other)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(into, other, rtol=1e-4, atol=1e-5)
    open_base = tiny.base(family, targets="all-linear", **{key: 60})
    everything, _ = gradients(open_base, stack, batch, into=other)
    assert bool(((everything - packed).abs() > 1e-4).all()) == (reach < 17)  # each client has a text of 17 or more


def test_the_mask_of_a_window_is_computed_once_per_bucket_and_only_where_a_text_is_longer() -> None:
    """Texts of 5 and 3 tokens, seen through a window of 4: two buckets, of which the first needs a mask."""
    plan = pack(batch_of([[3, 5]]), pad_id=0, fused=True).attention
    assert isinstance(plan, Buckets)
    assert plan.shapes == ((1, 5), (1, 3))
    calls = []

    def sees(batch: Tensor, head: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        calls.append((queries.flatten().tolist(), keys.flatten().tolist()))
        return (keys <= queries) & (keys > queries - 4)

    rule = Rule(sees, 4)
    mask = plan.mask(rule, 0)
    assert mask is plan.mask(rule, 0)
    assert mask is not None
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert plan.mask(rule, 1) is None
    assert calls == [([3, 4, 5, 6, 7], [3, 4, 5, 6, 7])]  # places in the sequence, behind the other text


def test_short_texts_share_a_span_and_see_nothing_of_each_other() -> None:
    plan = pack(batch_of([[3, 2]]), pad_id=0).attention
    assert isinstance(plan, Spans)
    rule = Rule(lambda batch, head, queries, keys: keys > queries - 2, 2)
    ((block,),) = plan.blocks(rule, torch.float32)
    assert (block.bias == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert plan.blocks(rule, torch.float32) is plan.blocks(rule, torch.float32)
    ((plain,),) = plan.blocks(Rule(rule.sees, 3), torch.float32)  # no text is longer than the window
    assert (plain.bias == 0).int().tolist()[2] == [1, 1, 1, 0, 0]


def alike(heads: list[int], rests: list[list[int]], *, labels: int = 2) -> Batch:
    """Clients whose examples begin with `heads` equal tokens; the last `labels` tokens of each have a label."""
    stream = np.random.default_rng(1)
    texts = []
    for head, own in zip(heads, rests, strict=True):
        start = stream.integers(2, tiny.VOCABULARY, head).tolist()
        texts.append(
            [
                Encoded((*start, *stream.integers(2, tiny.VOCABULARY, rest).tolist()), head + rest - labels, ("",))
                for rest in own
            ]
        )
    return collate(texts, pad_id=0)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in tiny.PADDED])
def test_a_shared_prefix_is_computed_once_and_changes_no_loss_or_gradient(family: str) -> None:
    dtype = tiny.DTYPES.get(family, torch.float64)
    wide = {"sliding_window": 40} if family in ("mistral", "gemma2", "gemma3", "phi3") else {}
    base = tiny.base(family, targets="all-linear", dtype=dtype, **wide)
    batch = alike([12, 0, 9, 20], [[4, 3, 6], [5, 9], [3], [2, 8, 2, 5]])
    assert pack(batch, pad_id=0, share=True).ids.shape[1] < 0.7 * pack(batch, pad_id=0).ids.shape[1]
    stack = tiny.adapters(tiny.layout(base, 2), (2, 1, 2, 1), dtype=dtype)
    shared_rows, separate_rows = torch.zeros_like(stack.rows), torch.zeros_like(stack.rows)
    one, counts = gradients(base, stack, batch, into=shared_rows)
    other, same = gradients(
        replace(base, reach=1), stack, batch, into=separate_rows
    )  # no prefix is shared beyond a window
    assert torch.equal(counts, same)
    limits = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    if family == "mixtral":  # its router's softmax is in float32
        limits = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(one, other, **limits)
    torch.testing.assert_close(shared_rows, separate_rows, **limits)
    assert bool(shared_rows.any())


def test_positions_continue_from_the_prefix_which_ends_before_the_token_that_predicts_a_label() -> None:
    """Ten equal tokens; the label of the second example is its token 9, so token 8 must be in its suffix."""
    first = Encoded((2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13), 11, ("",))
    second = Encoded((2, 3, 4, 5, 6, 7, 8, 9, 10, 11), 9, ("",))
    plan = pack(collate([[first, second]], pad_id=0), pad_id=0, share=True)
    assert plan.positions is not None
    assert plan.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 8, 9]]
    assert plan.labelled.tolist() == [10, 12]
    assert plan.targets.tolist() == [13, 11]


def test_examples_share_a_prefix_unless_it_is_short_or_their_suffixes_are_long() -> None:
    batch = alike([100, PREFIX_TOKENS - 1], [[150, LONG_SUFFIX, 150, LONG_SUFFIX + 1, 20, 30], [3, 4]])
    plan = pack(batch, pad_id=0, share=True)
    assert [(one.client, one.examples, one.prefix_length) for own in _groups(batch) for one in own] == [
        (0, (0, 1, 2), 100),
        (0, (3,), 0),
        (0, (4, 5), 100),
        (1, (0,), 0),
        (1, (1,), 0),
    ]
    tokens = 3 * 100 + 300 + LONG_SUFFIX + LONG_SUFFIX + 1 + 50 + 2 * (PREFIX_TOKENS - 1) + 7
    assert tokens <= plan.ids.shape[1] <= 1.05 * tokens + 32


def test_no_prefix_is_shared_under_dropout_or_beyond_a_window() -> None:
    base = tiny.base("mistral", targets="all-linear")
    assert base.reach == 4
    assert tiny.base("llama").reach is None
    batch = alike([12], [[4, 3, 6]])
    seen: list[int] = []
    hook = base.decoder.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    stack = tiny.adapters(tiny.layout(base, 2), (2,))
    into = torch.zeros_like(stack.rows)
    gradients(base, stack, batch, into=into)
    open_base = replace(base, reach=None)
    gradients(open_base, stack, batch, into=into, dropout=Dropout(0.5, [1]))
    gradients(open_base, stack, batch, into=into)
    hook.remove()
    total = int(batch.lengths.sum())
    assert seen[0] >= total
    assert seen[1] >= total
    assert seen[2] < total


def test_attention_with_sinks_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-OSS lets a head look at nothing: its softmax has one score more."""
    config = transformers.GptOssConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=None,
        eos_token_id=tiny.END,
    )
    with caplog.at_level("INFO"):
        model = transformers.GptOssForCausalLM(config).eval()
        base = wrap(model, tiny.tokenizer(), name="x", targets="auto", fingerprint="x")
    assert not base.packs
    assert "UnsupportedAttention: attention with ['s_aux']" in caplog.text


def test_all_tensors_of_a_pass_but_its_order_move_to_its_device() -> None:
    """On the device "meta", which holds shapes alone; only the order of clients stays on the host."""
    for plan in (pack(batch_of([[3, 2], [5]]), pad_id=0), pad(batch_of([[3, 2], [5]]))):
        moved = plan.to(torch.device("meta"))
        parts = {**vars(moved), **({} if moved.attention is None else vars(moved.attention))}
        assert [name for name, part in parts.items() if isinstance(part, Tensor) and not part.is_meta] == ["order"]


class OwnMask(transformers.LlamaForCausalLM):
    """A decoder that passes its own mask to every layer."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(self.bring, with_kwargs=True)

    @staticmethod
    def bring(module: nn.Module, args: object, given: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        length = given["input_ids"].shape[1]
        if not given.get("use_cache", True):
            given["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        return args, given


def test_a_base_that_passes_a_mask_to_its_layers_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        base = wrap(OwnMask(tiny.config("llama")).eval(), tiny.tokenizer(), name="x", targets="auto", fingerprint="x")
    assert not base.packs
    assert "OwnMask is trained on padded batches" in caplog.text
    assert "mask from elsewhere" in caplog.text


class OwnPattern(transformers.LlamaForCausalLM):
    """A decoder that adds a pattern to its causal mask: no token sees the one right before it."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(self.bring, with_kwargs=True)

    def bring(self, module: nn.Module, args: object, given: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        if not given.get("use_cache", True):
            given["attention_mask"] = create_causal_mask(
                self.config,
                self.model.embed_tokens(given["input_ids"]),
                None,
                None,
                position_ids=given.get("position_ids"),
                and_mask_function=lambda batch, head, query, key: query - key != 1,
            )
        return args, given


def test_a_base_that_adds_a_pattern_to_its_mask_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        model = OwnPattern(tiny.config("llama")).eval()
        base = wrap(model, tiny.tokenizer(), name="x", targets="auto", fingerprint="x")
    assert not base.packs
    assert "UnsupportedAttention: attention with a mask of the model's own" in caplog.text


def test_a_model_has_its_own_attention_again_after_a_pass() -> None:
    before = BASE.model.config._attn_implementation
    measure(BASE, batch_of([[3], [4]]))
    assert BASE.model.config._attn_implementation == before
    assert not BASE.stack.pairs
