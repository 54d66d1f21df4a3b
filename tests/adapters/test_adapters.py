"""Rows and their layout: where every factor lies, what belongs to a rank, what is a view and what a copy."""

from dataclasses import replace

import pytest
import torch

from fedmira.adapters import ALIGN, Adapters, Layout, lora_layout, norms, prompt_layout, start_adapters
from fedmira.errors import ShapeError

TWO = lora_layout([("q", 3, 2), ("v", 2, 2)], 2)  # A [2, 3], B [2, 2], A [2, 2], B [2, 2]: 6 + 4 + 4 + 4


def rows(*ranks: int, layout: Layout = TWO, alpha: float = 4.0) -> Adapters:
    count = torch.arange(1.0, 1 + len(ranks) * layout.size).view(len(ranks), -1)
    own = torch.tensor(ranks)
    return Adapters(layout, count, own, alpha / own)


def test_leaves_follow_each_other_and_the_row_ends_on_a_cache_line() -> None:
    assert [(leaf.module, leaf.factor, leaf.start, leaf.stop) for leaf in TWO.parts[0].leaves] == [
        ("q", "A", 0, 6),
        ("q", "B", 6, 10),
        ("v", "A", 10, 14),
        ("v", "B", 14, 18),
    ]
    assert TWO.parameters == 18
    assert TWO.size == 32
    assert TWO.size % ALIGN == 0


def test_a_leaf_is_a_view_of_all_clients() -> None:
    adapters = rows(2, 2)
    first, second = next(iter(adapters.layout.part("lora").pairs()))
    assert adapters.leaf(first)[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert adapters.leaf(second)[1].tolist() == [[39, 40], [41, 42]]
    adapters.leaf(first)[1, 0, 0] = -1
    assert adapters.rows[1, 0] == -1


def test_the_product_of_a_module_is_scale_times_b_times_a() -> None:
    """B A = [[7, 8], [9, 10]] [[1, 2, 3], [4, 5, 6]], alpha / r = 4 / 2."""
    found = rows(2).product("q")
    assert found.tolist() == [[[2 * 39, 2 * 54, 2 * 69], [2 * 49, 2 * 68, 2 * 87]]]


def test_a_module_without_an_adapter_has_no_product() -> None:
    with pytest.raises(ShapeError, match="'k' has no adapter"):
        rows(2).product("k")


def test_rank_one_of_two_keeps_the_first_row_of_a_and_the_first_column_of_b() -> None:
    mask = TWO.rank_mask(torch.tensor([1, 2]))
    assert mask[0].int().tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0] + [0] * 14
    assert mask[1].int().tolist() == [1] * 18 + [0] * 14


def test_masking_zeroes_in_place_what_a_rank_does_not_have() -> None:
    adapters = rows(1, 2)
    assert adapters.mask_() is adapters
    assert adapters.rows[0, :10].tolist() == [1, 2, 3, 0, 0, 0, 7, 0, 9, 0]
    assert adapters.rows[1, :10].tolist() == list(range(33, 43))


def test_a_masked_pair_adds_nothing_to_the_product() -> None:
    adapters = rows(1).mask_()
    cut = Adapters(lora_layout([("q", 3, 2)], 1), torch.zeros(1, 16), torch.tensor([1]), torch.tensor([4.0]))
    cut.rows[0, :5] = torch.tensor([1.0, 2, 3, 7, 9])
    assert torch.equal(adapters.product("q"), cut.product("q"))


def test_taken_rows_are_copies_and_a_head_is_a_view() -> None:
    adapters = rows(2, 1)
    taken, front = adapters.take(torch.tensor([1, 0, 1])), adapters.head(1)
    assert taken.ranks.tolist() == [1, 2, 1]
    assert taken.rows[1, 0] == 1
    taken.rows.zero_()
    assert adapters.rows[0, 0] == 1
    front.rows.zero_()
    assert adapters.rows[0, 0] == 0
    assert adapters.rows[1, 0] == 33


def test_rows_of_another_layout_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 31\).*\[K, 32\]"):
        Adapters(TWO, torch.zeros(1, 31), torch.ones(1), torch.ones(1))


def test_a_rank_and_a_scale_are_needed_for_each_row() -> None:
    with pytest.raises(ShapeError, match="2 rows with 1 ranks and 2 scales"):
        Adapters(TWO, torch.zeros(2, 32), torch.ones(1), torch.ones(2))


@pytest.mark.parametrize(("shapes", "rank"), [([], 2), ([("q", 2, 2)], 0)])
def test_a_layout_needs_a_module_and_a_rank(shapes: list[tuple[str, int, int]], rank: int) -> None:
    with pytest.raises(ShapeError, match="at least one adapted module"):
        lora_layout(shapes, rank)


def test_a_part_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ShapeError, match=r"'prompt'.*\['lora'\]"):
        TWO.part("prompt")


def test_the_fingerprint_tells_layouts_apart() -> None:
    others = [
        lora_layout([("q", 3, 2), ("v", 2, 2)], 1),
        lora_layout([("v", 2, 2), ("q", 3, 2)], 2),
        lora_layout([("q", 3, 2), ("k", 2, 2)], 2),
        lora_layout([("q", 2, 3), ("v", 2, 2)], 2),
        lora_layout([("q", 3, 2), ("v", 2, 2)], 2, name="private"),
    ]
    assert len({layout.fingerprint for layout in [TWO, *others]}) == 6
    assert lora_layout([("q", 3, 2), ("v", 2, 2)], 2).fingerprint == TWO.fingerprint


def test_all_clients_start_alike_at_the_base() -> None:
    layout = lora_layout([("q", 100, 3)], 4)
    start = start_adapters(layout, torch.tensor([4, 4, 2]), 8.0, torch.Generator().manual_seed(0))
    assert torch.equal(start.rows[0], start.rows[1])
    assert start.scale.tolist() == [2, 2, 4]
    assert not start.product("q").any()
    drawn = start.leaf(layout.parts[0].leaves[0])
    assert float(drawn.abs().max()) <= 0.1  # 1 / sqrt(in)
    assert float(drawn[0].std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)
    assert torch.equal(drawn[2, :2], drawn[0, :2])
    assert not drawn[2, 2:].any()


def test_the_start_depends_on_its_generator_only() -> None:
    draws = [start_adapters(TWO, torch.tensor([2]), 4.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0].rows, draws[1].rows)
    assert not torch.equal(draws[0].rows, draws[2].rows)


def test_the_start_is_drawn_from_the_range_that_peft_draws_from() -> None:
    import peft

    plain = torch.nn.Sequential(torch.nn.Linear(64, 8))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=32, target_modules=["0"]))
    drawn = theirs.base_model.model[0].lora_A["default"].weight.detach()
    ours = start_adapters(lora_layout([("0", 64, 8)], 32), torch.tensor([32]), 1.0, torch.Generator().manual_seed(0))
    leaf = ours.leaf(ours.layout.parts[0].leaves[0])
    for some in (drawn, leaf):
        assert float(some.abs().max()) == pytest.approx(1 / 8, rel=0.01)
        assert float(some.std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_norms_are_of_rows_and_do_not_overflow() -> None:
    found = norms(torch.tensor([[3.0, 4.0], [3e30, 4e30]]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([5, 5e30])


def test_norms_of_a_few_rows_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    at_once = norms(rows)
    for numbers in (1, 2500):
        monkeypatch.setattr("fedmira.adapters.NORM_NUMBERS", numbers)
        assert torch.equal(norms(rows), at_once)
    assert norms(rows[:0]).shape == (0,)


# ---------------------------------------------------------------- ranks by module

UNEVEN = lora_layout([("attn", 3, 2), ("mlp", 2, 2)], (1, 3))  # A [1, 3], B [2, 1], A [3, 2], B [2, 3]: 3 + 2 + 6 + 6


def by_module(*ranks: tuple[int, int], alpha: float = 6.0) -> Adapters:
    count = torch.arange(1.0, 1 + len(ranks) * UNEVEN.size).view(len(ranks), -1)
    own = torch.tensor(ranks)
    return Adapters(UNEVEN, count, own, alpha / own)


def test_a_module_has_room_for_its_own_rank_only() -> None:
    part = UNEVEN.part("lora")
    assert [leaf.shape for leaf in part.leaves] == [(1, 3), (2, 1), (3, 2), (2, 3)]
    assert (part.rank, part.ranks, UNEVEN.parameters) == (3, [1, 3], 17)
    assert UNEVEN.fingerprint != lora_layout([("attn", 3, 2), ("mlp", 2, 2)], 3).fingerprint
    assert lora_layout([("attn", 3, 2), ("mlp", 2, 2)], (2, 2)) == lora_layout([("attn", 3, 2), ("mlp", 2, 2)], 2)


@pytest.mark.parametrize("ranks", [(1,), (1, 2, 3), (1, 0)])
def test_every_module_needs_a_rank(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="for all or each"):
        lora_layout([("attn", 3, 2), ("mlp", 2, 2)], ranks)


def test_the_mask_of_a_module_follows_its_own_rank() -> None:
    mask = UNEVEN.rank_mask(torch.tensor([[1, 2], [1, 3]])).int().tolist()
    assert mask[0] == [1] * 5 + [1, 1, 1, 1, 0, 0] + [1, 1, 0, 1, 1, 0] + [0] * 15
    assert mask[1] == [1] * 17 + [0] * 15
    assert UNEVEN.rank_mask(torch.tensor([2])).int().tolist()[0] == mask[0]  # one rank for all, where there is room


def test_the_product_of_a_module_has_its_own_scale() -> None:
    """attn: 6 / 1 x [4, 5] [1, 2, 3]; mlp: 6 / 3 x [[12, 13, 14], [15, 16, 17]] [[6, 7], [8, 9], [10, 11]]."""
    adapters = by_module((1, 3))
    assert adapters.product("attn")[0].tolist() == [[24, 48, 72], [30, 60, 90]]
    assert adapters.product("mlp")[0].tolist() == [[2 * 316, 2 * 355], [2 * 388, 2 * 436]]
    assert (adapters.ranks_of(0).tolist(), adapters.ranks_of(1).tolist()) == ([1], [3])


def test_masking_zeroes_each_module_beyond_its_own_rank_and_of_full_ones_only_what_aligns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = by_module((1, 2), (1, 3)).mask_()
    assert adapters.rows[0, 5:17].tolist() == [6, 7, 8, 9, 0, 0, 12, 13, 0, 15, 16, 0]
    assert adapters.rows[1, :17].tolist() == list(range(33, 50))
    full = by_module((1, 3), (1, 3))
    before = full.rows.clone()
    monkeypatch.delattr(Layout, "rank_mask")  # no mask of all columns is made
    assert torch.equal(full.mask_().rows[:, :17], before[:, :17])
    assert not full.rows[:, 17:].any()


@pytest.mark.parametrize("layout", [TWO, prompt_layout(3, 2, 2)])
def test_what_only_aligns_a_row_is_cleaned_whoever_else_is_in_the_stack(layout: Layout) -> None:
    """A client's row must not depend on the ranks beside it: by themselves full ranks need no mask."""
    assert layout.gaps == [slice(layout.parts[0].leaves[-1].stop, layout.size)]
    stack = rows(1, 2, 2, layout=layout).mask_()
    alone = rows(2, 2, 2, layout=layout).mask_()
    assert torch.equal(stack.rows[1:], alone.rows[1:])
    for gap in layout.gaps:
        assert not stack.rows[:, gap].any()
    assert Layout((replace(TWO.parts[0], stop=18),)).gaps == []


def test_taken_and_first_clients_keep_their_ranks_by_module() -> None:
    adapters = by_module((1, 2), (1, 3))
    assert adapters.take(torch.tensor([1])).ranks.tolist() == [[1, 3]]
    assert adapters.head(1).scale.tolist() == [[6, 3]]


def test_ranks_and_scales_by_module_need_one_for_each() -> None:
    with pytest.raises(ShapeError, match=r"ranks are \(1, 3\): need \[K\] or, one for each module, \[K, 2\]"):
        Adapters(UNEVEN, torch.zeros(1, 32), torch.ones(1, 3), torch.ones(1, 2))
    with pytest.raises(ShapeError, match=r"scale are \(1, 1\)"):
        Adapters(UNEVEN, torch.zeros(1, 32), torch.ones(1, 2), torch.ones(1, 1))


def test_clients_of_any_ranks_by_module_start_alike() -> None:
    start = start_adapters(UNEVEN, torch.tensor([[1, 3], [1, 1]]), 6.0, torch.Generator().manual_seed(0))
    assert start.scale.tolist() == [[6, 2], [6, 6]]
    first = UNEVEN.part("lora").leaves[2]
    assert torch.equal(start.leaf(first)[0, 0], start.leaf(first)[1, 0])
    assert start.leaf(first)[0].all()
    assert not start.leaf(first)[1, 1:].any()


def test_a_row_is_as_long_as_its_client_has_rank() -> None:
    shapes = [("a", 3, 5), ("b", 7, 2)]
    whole = lora_layout(shapes, 4)
    assert whole.sizes(torch.tensor([1, 2, 4])).tolist() == [lora_layout(shapes, rank).size for rank in (1, 2, 4)]
    each = torch.tensor([[1, 3], [4, 2]])
    assert whole.sizes(each).tolist() == [lora_layout(shapes, ranks).size for ranks in ([1, 3], [4, 2])]
    prompt = prompt_layout(6, 3, 2)
    assert prompt.sizes(torch.zeros(2, dtype=torch.int64)).tolist() == [prompt.size] * 2


def test_rows_given_to_take_stand_in_as_they_are_without_a_copy_of_those_that_they_replace() -> None:
    made = start_adapters(lora_layout([("a", 3, 2)], 2), torch.tensor([1, 2, 2]), 4.0, torch.Generator())
    rows = torch.ones(2, made.layout.size)
    taken = made.take(torch.tensor([2, 0]), rows=rows)
    assert taken.rows is rows
    assert taken.ranks.tolist() == [2, 1]
    assert torch.equal(taken.scale, made.take(torch.tensor([2, 0])).scale)


def test_a_rank_above_a_modules_own_counts_as_that_of_the_module() -> None:
    """q has rank 4, v rank 1: 4 (3 + 2) + 1 (2 + 2) = 24 numbers, in two cache lines."""
    uneven = lora_layout([("q", 3, 2), ("v", 2, 2)], [4, 1])
    assert uneven.sizes(torch.tensor([4])).tolist() == [32]


def test_the_fingerprint_includes_where_each_factor_begins() -> None:
    (part,) = TWO.parts
    moved = tuple(replace(leaf, start=leaf.start + ALIGN) for leaf in part.leaves)
    assert Layout((replace(part, leaves=moved),)).fingerprint != TWO.fingerprint
