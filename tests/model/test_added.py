"""Pairs that are added to the base: a pass gives what it would if the weights were other weights."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import tiny
from torch import Tensor

from fedmira.adapters import Adapters, Pairs, lora_layout
from fedmira.adapters.added import BaseVersions, check_pairs, fold, join_pairs
from fedmira.data.batches import Encoded, collate
from fedmira.errors import ShapeError
from fedmira.evaluation.measure import measure_answers
from fedmira.model.base.load import wrap
from fedmira.model.packed.lora import Dropout
from fedmira.model.passes import gradients, losses

FAMILIES = ("gpt2", "llama", "falcon")  # Conv1D, Linear, and one that is padded


def pairs_of(base: tiny.Base, rank: int, *, seed: int = 0) -> Pairs:
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=stream, dtype=torch.float64)

    return {name: (draw(rank, inputs), draw(outputs, rank)) for name, inputs, outputs in base.shapes}


def changed(family: str, pairs: Pairs) -> tiny.Base:
    """The same base with other weights: W + B A."""
    model = tiny.model(family, dtype=tiny.DTYPES.get(family, torch.float64))
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            weight = model.get_submodule(name).weight
            weight += (b @ a).T if type(model.get_submodule(name)).__name__ == "Conv1D" else b @ a
    return wrap(model, tiny.tokenizer(), name=family, targets="auto", fingerprint=family)


def texts() -> list[list[Encoded]]:
    stream = np.random.default_rng(2)
    return [[tiny.example(stream, size, answer=2) for size in sizes] for sizes in ((4, 6), (12, 9, 7), (3,))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_losses_and_gradients_are_those_of_other_weights(family: str, rate: float) -> None:
    base = tiny.base(family)
    pairs = pairs_of(base, 3)
    stack = tiny.adapters(tiny.layout(base, 2), (2, 1, 2))
    on_pairs, batch = replace(stack, added=pairs), collate(texts(), pad_id=0)
    found, wanted = torch.zeros_like(stack.rows), torch.zeros_like(stack.rows)
    dropout = Dropout(rate, (1, 2, 3))
    mine = gradients(base, on_pairs, batch, into=found, dropout=dropout)[0]
    theirs = gradients(changed(family, pairs), stack, batch, into=wanted, dropout=dropout)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    untouched = losses(base, stack, batch)[0]
    assert not torch.allclose(losses(base, on_pairs, batch)[0], untouched)
    assert torch.equal(losses(base, stack, batch)[0], untouched), "a pass leaves nothing behind"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_other_weights(family: str) -> None:
    base = tiny.base(family)
    pairs = pairs_of(base, 3)
    stack = tiny.adapters(tiny.layout(base, 2), (2, 1, 2))
    clients = [tiny.client(f"c{k}", train=1, test=4) for k in range(3)]

    def answers(of: tiny.Base, adapters: Adapters) -> dict[tuple[int, int], str]:
        found: dict[tuple[int, int], str] = {}
        measure_answers(
            of,
            adapters.take,
            clients,
            range(3),
            split="test",
            cohort=3,
            metrics=("exact_match",),
            max_new_tokens=6,
            max_examples=None,
            progress=lambda done: None,
            written=lambda k, place, text: found.update({(k, place): text}),
        )
        return found

    mine = answers(base, replace(stack, added=pairs))
    assert mine == answers(changed(family, pairs), stack)
    assert mine != answers(base, stack)


@pytest.mark.parametrize("rank", [2, 30])
def test_versions_add_up_also_beyond_the_full_rank(rank: int) -> None:
    """Beyond rank min(d, v) a sum is kept as itself, and takes no more room."""
    base = tiny.base("llama", targets=["q_proj", "v_proj", "down_proj"])
    versions = [pairs_of(base, rank, seed=seed) for seed in range(3)]
    joined = join_pairs(versions)
    for name, inputs, outputs in base.shapes:
        a, b = joined[name]
        expected = sum(pairs[name][1] @ pairs[name][0] for pairs in versions)
        torch.testing.assert_close(b @ a, expected, rtol=1e-12, atol=1e-13)
        assert len(a) == min(3 * rank, inputs, outputs)


def test_one_adapter_of_the_untouched_base_is_the_adapter_and_the_pairs() -> None:
    base = tiny.base("llama", targets=["q_proj", "v_proj"])
    stack = tiny.adapters(tiny.layout(base, 2), (2, 1))
    pairs = {name: pair for name, pair in pairs_of(base, 3).items() if name.endswith("q_proj")}
    batch = collate(texts()[:1], pad_id=0)
    for k in range(2):
        alone = replace(stack.take(torch.tensor([k])), added=copy.deepcopy(pairs))
        whole = fold(alone)
        assert whole.added == {}
        assert whole.ranks.tolist() == [[2 - k + 3 * name.endswith("q_proj") for name, _, _ in base.shapes]]
        torch.testing.assert_close(losses(base, whole, batch)[0], losses(base, alone, batch)[0], rtol=1e-12, atol=1e-13)
    assert fold(stack.take(torch.tensor([0]))).layout is stack.layout


def test_clients_are_sent_all_that_the_one_furthest_behind_lacks() -> None:
    versions = tuple({"m": (torch.full((1, 2), number), torch.ones(3, 1))} for number in (1.0, 2.0, 3.0))
    said = BaseVersions(versions, torch.tensor([2, 0, 3]))
    for index, first in (([0, 1], 0), ([0, 2], 2), ([2], 3)):
        taken = said.take(torch.tensor(index))
        assert (taken.first, [float(pairs["m"][0][0, 0]) for pairs in taken.pairs]) == (first, [1.0, 2.0, 3.0][first:])
    assert said.bytes_missing == [count * 4 * (2 + 3) for count in (1, 3, 0)]


def test_a_pair_of_rank_0_is_refused() -> None:
    with pytest.raises(ShapeError, match="q >= 1"):
        check_pairs({"m": (torch.zeros(0, 2), torch.zeros(3, 0))}, lora_layout([("m", 2, 3)], 1))
