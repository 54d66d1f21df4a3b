"""Blocks that are computed again in backward: the same bits, and what is kept, counted and held against tensors."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import tiny
from torch import Tensor

from fedmira.data.batches import Batch, Encoded, collate
from fedmira.model.packed.lora import Dropout
from fedmira.model.packed.packing import PREFIX_TOKENS
from fedmira.model.packed.recompute import counting, find_blocks
from fedmira.model.passes import gradients, losses, plan_pass

RANKS = (2, 1, 2)


def texts(*, alike: bool = False) -> Batch:
    """Three clients with examples of several lengths; alike: those of a client begin with the same tokens."""
    stream = np.random.default_rng(2)
    longer = PREFIX_TOKENS if alike else 0
    sizes = ((9, 11), (12, 9, 10), (8,))
    own = [[tiny.example(stream, size + longer, answer=2) for size in of_client] for of_client in sizes]
    if alike:
        heads = [client[0].ids[:longer] for client in own]
        own = [
            [Encoded((*head, *example.ids[longer:]), example.prompt_length, ()) for example in client]
            for head, client in zip(heads, own, strict=True)
        ]
    return collate(own, pad_id=0)


def both(base: tiny.Base, batch: Batch, **options: object) -> list[tuple[Tensor, Tensor]]:
    """Losses and gradient rows without recomputation, and with it."""
    stack = tiny.adapters(tiny.layout(base, 2), RANKS, dtype=base.dtype)
    found = []
    for recompute in (False, True):
        into = torch.full_like(stack.rows, 7.0)
        values, _ = gradients(base, stack, batch, into=into, recompute=recompute, **options)  # type: ignore[arg-type]
        found.append((values, into))
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_blocks_and_the_same_bits(family: str) -> None:
    base = tiny.base(family, targets="all-linear", dtype=torch.float32)
    assert len(base.blocks) == 2
    (losses_once, once), (losses_twice, twice) = both(base, texts())
    assert torch.equal(losses_once, losses_twice)
    assert torch.equal(once, twice)
    assert bool(once.any())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packs", [True, False])
def test_dropout_shared_beginnings_and_drawn_labels_have_the_same_bits(family: str, packs: bool) -> None:
    base = replace(tiny.base(family, targets="all-linear", dtype=torch.float32), packs=packs)
    streams = lambda: [np.random.default_rng(k) for k in range(3)]  # noqa: E731
    if packs:
        assert plan_pass(base, texts(alike=True)).ids.shape[1] < int(texts(alike=True).lengths.sum())
    for options in ({"dropout": Dropout(0.4, [1, 2, 3])}, {}):
        (_, once), (_, twice) = both(base, texts(alike=True), **options)
        assert torch.equal(once, twice)
    stack = tiny.adapters(tiny.layout(base, 2), RANKS, dtype=base.dtype)
    found = []
    for recompute in (False, True):
        into = torch.zeros_like(stack.rows)
        gradients(base, stack, texts(), into=into, streams=streams(), recompute=recompute)
        found.append(into)
    assert torch.equal(*found)


def test_virtual_tokens_have_the_same_bits() -> None:
    from fedmira.adapters import prompt_layout, scales, start_adapters

    base = tiny.base("llama", targets="all-linear", dtype=torch.float32)
    ranks = torch.zeros(3, dtype=torch.int64)
    stack = start_adapters(prompt_layout(base.width, 3, 4), ranks, 1.0, torch.Generator().manual_seed(0))
    assert len(scales(ranks, 1.0)) == 3
    found = []
    for recompute in (False, True):
        into = torch.zeros_like(stack.rows)
        gradients(base, stack, texts(), into=into, recompute=recompute)
        found.append(into)
    assert torch.equal(*found)
    assert bool(found[0].any())


def test_blocks_are_as_before_after_a_pass_and_after_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.base("llama", targets="all-linear", dtype=torch.float32)
    forwards = [block.__dict__.get("forward") for block in base.blocks]
    both(base, texts())
    stack = tiny.adapters(tiny.layout(base, 2), RANKS, dtype=base.dtype)
    before, _ = losses(base, stack, texts())
    monkeypatch.setattr(torch.autograd, "backward", lambda total: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(base, stack, texts(), into=torch.zeros_like(stack.rows), recompute=True)
    assert [block.__dict__.get("forward") for block in base.blocks] == forwards
    after, _ = losses(base, stack, texts())
    assert torch.equal(before, after)


def test_activations_are_gone_before_backward_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first block's layers were given is kept in a plain pass, and collected in a recomputed one."""
    base = tiny.base("llama", targets="all-linear", dtype=torch.float32)
    name = next(name for name, _, _ in base.shapes if name.endswith("down_proj"))
    layer = base.model.get_submodule(name)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0].untyped_storage())))
    backward = torch.autograd.backward

    def watch(total: Tensor) -> None:
        gc.collect()
        alive.append(seen[0]() is not None)
        backward(total)

    monkeypatch.setattr(torch.autograd, "backward", watch)
    stack = tiny.adapters(tiny.layout(base, 2), RANKS, dtype=base.dtype)
    try:
        for recompute in (False, True):
            seen.clear()
            gradients(base, stack, texts(), into=torch.zeros_like(stack.rows), recompute=recompute)
            assert len(seen) == 1 + recompute
    finally:
        hook.remove()
    assert alive == [True, False]


def test_freed_memory_is_limited_before_large_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.base("llama", targets="all-linear", dtype=torch.float32)
    looked: list[None] = []
    monkeypatch.setattr("fedmira.model.packed.recompute._garbage.limit", lambda: looked.append(None))
    both(base, texts())
    assert not looked
    monkeypatch.setattr("fedmira.model.packed.recompute.LARGE_BYTES", 1)
    both(base, texts())
    assert len(looked) == 2 * len(base.blocks)  # of the recomputed pass: forward, and again


def test_factors_are_copied_at_each_use_where_blocks_are_computed_again() -> None:
    """A plain pass has all factors beside the rows while it runs; a recomputed one reads the rows themselves."""
    base = tiny.base("llama", targets="all-linear", dtype=torch.float32)
    stack = tiny.adapters(tiny.layout(base, 2), (2, 2, 2), dtype=base.dtype)
    rows = stack.rows.untyped_storage().data_ptr()
    for frugal in (False, True):
        with base.stack.filled(stack, dtype=base.dtype, device=base.device, frugal=frugal):
            pairs = [pair for found in base.stack.pairs.values() for pair in found]
            assert pairs
            assert all((pair.a.untyped_storage().data_ptr() == rows) == frugal for pair in pairs)
            assert all((pair.b.untyped_storage().data_ptr() == rows) == frugal for pair in pairs)


def test_what_is_kept_is_counted_block_by_block() -> None:
    """Two blocks of one linear layer that keeps its input, 3 x 4 floats each."""
    stem, first, second = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))
    x = torch.ones(3, 4, requires_grad=True)
    weights = [layer.weight for layer in (stem, first, second)]
    for weight in weights:
        weight.requires_grad_()
    with counting([first, second], weights) as kept:
        y = torch.relu(stem(x))  # x is kept, and the output of relu
        z = torch.relu(second(torch.relu(first(y))))
        total = z.sum()
    total.backward()
    floats = 3 * 4 * 4
    # outside: x and three outputs of relu, of which two are what the blocks are given, and what they keep
    assert sum(kept.outside.values()) == 4 * floats
    assert [sum(block.values()) for block in kept.inside] == [floats, floats]
    assert kept.plain == 4 * floats
    assert kept.recomputed == 4 * floats
    assert sum(kept.streams.values()) == 2 * floats


def test_a_recomputed_pass_keeps_less_than_a_third() -> None:
    """Of eight blocks, what they are given and one of them remain."""
    base = tiny.base("llama", targets="all-linear", dtype=torch.float32, num_hidden_layers=8)
    stack = tiny.adapters(tiny.layout(base, 2), RANKS, dtype=base.dtype)
    with counting(base.blocks, list(base.model.parameters())) as kept:
        gradients(base, stack, texts(), into=torch.zeros_like(stack.rows))
    with counting(base.blocks, list(base.model.parameters())) as again:
        gradients(base, stack, texts(), into=torch.zeros_like(stack.rows), recompute=True)
    assert 3 * kept.recomputed < kept.plain
    assert len(again.inside) >= len(kept.inside) == 8


def test_nested_blocks_are_one() -> None:
    base = tiny.base("llama", targets="all-linear")
    assert find_blocks(base.decoder) == base.blocks
    assert len(find_blocks(torch.nn.ModuleList([base.blocks[0]]))) == 1
