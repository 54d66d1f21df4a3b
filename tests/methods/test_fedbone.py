"""FedBone: projections worked by hand, against the algorithm as a plain loop, and against FedAvg and PFTT.

Its private part is put before the tests of PFTT's.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.hand import after, begin, make, merge, pairs, rows
from torch import Tensor

from fedmira.adapters import Adapters, Layout, lora_layout
from fedmira.adapters.parts import own_and_shared
from fedmira.errors import ConfigError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, State
from fedmira.methods.fedbone import STREAM, project

TWO = lora_layout([("m", 1, 1), ("n", 1, 1)], 1)
SQUARE = lora_layout([("m", 2, 2)], 2)


def bone(**settings: Any) -> Method:
    """FedBone with one adapter for all: rows of two numbers."""
    return make("fedbone", private=False, **settings)


def shared(method: Method, layout: Layout, *numbers: float, scale: float = 1.0) -> State:
    """The server before round 1, with these numbers as its row."""
    row = torch.tensor([[*numbers, *[0.0] * (layout.size - len(numbers))]], dtype=torch.float64)
    ranks = torch.tensor([layout.parts[0].rank])
    return method.init(Adapters(layout, row, ranks, torch.tensor([scale], dtype=torch.float64)), Clock(0))


# ---------------------------------------------------------------- projections


@pytest.mark.parametrize(("weights", "step"), [("uniform", (1.28, 2.96)), ("examples", (0.64, 3.48))])
def test_two_updates_in_conflict_lose_what_points_against_the_other(weights: str, step: tuple[float, float]) -> None:
    """d = (4, 0) and (-3, 4), whose product is -12.

    (4, 0) + 12/25 (-3, 4) = (2.56, 1.92) and (-3, 4) + 12/16 (4, 0) = (0, 4).
    """
    method = bone(weights=weights)
    change = merge(method, begin(method, (1, 1)), rows((5, 1), (-2, 5)), 1, 3)
    assert pairs(change.rows)[0] == pytest.approx([1 + step[0], 1 + step[1]])
    assert change.notes == {"conflict_percent": 100}
    assert (method.facts.weighs, method.facts.needs) == (weights == "examples", "each")


def test_two_opposite_updates_leave_the_row_where_it_is() -> None:
    """d = (2, 1) and -2 (2, 1); FedAvg moves by their mean."""
    for name, moved in (("fedbone", [1, 1]), ("fedavg", [0, 0.5])):
        method = make(name, weights="uniform", **({"private": False} if name == "fedbone" else {}))
        change = merge(method, begin(method, (1, 1)), rows((3, 2), (-3, -1)), 1, 3)
        assert pairs(change.rows)[0] == pytest.approx(moved, abs=1e-15)


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("by", ["adapter", "module"])
def test_without_conflict_it_is_fedavg(weights: str, by: str) -> None:
    """Products 3, 0 and 8."""
    method, fedavg = bone(weights=weights, by=by), make("fedavg", weights=weights)
    uploads = rows((4, 1), (1, 4), (1, 9))
    change = merge(method, begin(method, (1, 1)), uploads, 1, 3, 9)
    assert change.notes == {"conflict_percent": 0}
    torch.testing.assert_close(change.rows, merge(fedavg, begin(fedavg, (1, 1)), uploads, 1, 3, 9).rows)


def test_one_client_moves_the_row_to_its_own() -> None:
    method = bone()
    assert pairs(merge(method, begin(method, (1, 2)), rows((3, -4)), 1).rows) == [[3, -4]]


def test_clients_that_return_what_they_were_sent_change_nothing() -> None:
    """Updates of 0: no direction to project off, none to agree with."""
    method = bone()
    state = begin(method, (1, 2))
    for _ in range(2):
        change = merge(method, state, rows((1, 2), (1, 2)), 1, 3)
        assert pairs(change.rows) == [[1, 2]]
        state = after(state, change)


def test_modules_may_be_compared_alone() -> None:
    """d = (3, 0 | 2, 0) and (3, 0 | -2, 2): product 9 - 4; alone the second module's is -4, and both lose part of it.

    (2, 0) + 4/8 (-2, 2) = (1, 1) and (-2, 2) + 4/4 (2, 0) = (0, 2); their mean is (0.5, 1.5).
    """
    uploads = torch.zeros(2, TWO.size, dtype=torch.float64)
    uploads[:, :4] = torch.tensor([[3, 0, 2, 0], [3, 0, -2, 2]])
    for by, moved, conflict in (("adapter", [3, 0, 0, 1], 0), ("module", [3, 0, 0.5, 1.5], 50)):
        method = bone(by=by)
        change = merge(method, shared(method, TWO), uploads, 1, 1)
        assert change.rows[0, :4].tolist() == pytest.approx(moved)
        assert change.notes == {"conflict_percent": conflict}


def by_the_book(updates: Tensor, names: Sequence[str], *, seed: int, number: int) -> Tensor:
    """The mean of projected updates: PCGrad's algorithm, number by number, orders of clients sorted by name."""
    stream = np.random.default_rng([seed, number, STREAM])
    orders = stream.permuted(np.tile(np.arange(len(names)), (len(names), 1)), axis=1)
    sorted_updates = [updates[place] for place in sorted(range(len(names)), key=lambda place: names[place])]
    projected = []
    for mine, order in enumerate(orders):
        direction = sorted_updates[mine].clone()
        for other in order:
            product = torch.dot(direction, sorted_updates[other])
            if other != mine and product < 0:
                direction -= product / torch.dot(sorted_updates[other], sorted_updates[other]) * sorted_updates[other]
        projected.append(direction)
    return torch.stack(projected).mean(dim=0)


@pytest.mark.parametrize("by", ["adapter", "module"])
def test_many_clients_are_projected_as_a_plain_loop_does_it_in_whatever_order_they_are_listed(by: str) -> None:
    names = ("delta", "alpha", "echo", "bravo", "foxtrot", "charlie")
    layout = lora_layout([("m", 3, 2), ("n", 2, 2)], 1)
    numbers = sum(leaf.size for leaf in layout.parts[0].leaves)
    updates = torch.zeros(len(names), layout.size, dtype=torch.float64)
    updates[:, :numbers] = torch.randn(len(names), numbers, generator=torch.Generator().manual_seed(0)).double()
    spans = [slice(0, numbers)] if by == "adapter" else [slice(0, 5), slice(5, numbers)]
    settings = {"private": False, "attention": 0, "by": by}
    method = build("fedbone", settings, Cohort(names, (1,) * 6, ({},) * 6, (np.arange(6),), 5))
    state = shared(method, layout, *range(numbers))
    start = state.adapters.rows[torch.zeros(1, dtype=torch.int64)]
    found = merge(method, state, start + updates, *[1] * 6).rows
    book = [by_the_book(updates[:, span], names, seed=5, number=1) for span in spans]
    torch.testing.assert_close((found - start)[0, :numbers], torch.cat(book))
    assert not torch.allclose((found - start)[0], updates.mean(dim=0))
    order = [3, 0, 5, 2, 4, 1]
    assert torch.equal(merge(method, state, (start + updates)[order], *[1] * 6, ids=order).rows, found)
    listed = Cohort(tuple(names[k] for k in order), (1,) * 6, ({},) * 6, (np.arange(6),), 5)
    again = build("fedbone", settings, listed)
    assert torch.equal(merge(again, state, (start + updates)[order], *[1] * 6).rows, found)
    later = method.merge(state, torch.arange(6), Message(start + updates), torch.ones(6), Clock(2)).rows
    assert not torch.allclose(later, found), "each round has other orders"


def test_no_client_is_projected_off_its_own_update() -> None:
    """Unit vectors at 0, 100, 140 and 190 degrees: the first is turned to 10, 50 and 100, and stays against itself.

    Its length becomes cos 10 cos 40 cos 50.
    """
    angles = torch.tensor([0.0, 100, 140, 190], dtype=torch.float64).deg2rad()
    updates = torch.stack([angles.cos(), angles.sin()], dim=1)
    orders = torch.tensor([[1, 2, 3, 0]] * 4)
    turned = project((updates @ updates.T)[None], orders)[0, 0] @ updates
    length = math.prod(math.cos(math.radians(angle)) for angle in (10, 40, 50))
    at = math.radians(100)
    assert turned.tolist() == pytest.approx([length * math.cos(at), length * math.sin(at)])


def test_a_client_without_examples_is_projected_off_by_nobody() -> None:
    """By examples. Uniformly (4, 0) would lose its component along (-3, 4)."""
    method = bone(weights="examples")
    change = merge(method, begin(method, (1, 1)), rows((5, 1), (-2, 5)), 3, 0)
    assert pairs(change.rows) == [[5, 1]]


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("attention", [0, 1, 2.5])
def test_updates_that_point_where_the_last_round_went_count_more(attention: float) -> None:
    """h = (2, 0). d = (2, 0) and (0, 6) have cosines 1 and 0: weights e^a / (e^a + 1) and 1 / (e^a + 1)."""
    method = bone(attention=attention)
    state = begin(method, (0, 0))
    state = after(state, merge(method, state, rows((2, 0)), 1))
    change = merge(method, state, rows((4, 0), (2, 6)), 1, 9)
    most = math.exp(attention) / (math.exp(attention) + 1)
    assert pairs(change.rows)[0] == pytest.approx([2 + 2 * most, 6 * (1 - most)])
    assert change.shared is not None
    assert pairs(change.shared["h"])[0] == pytest.approx([2 * most, 6 * (1 - most)])


def test_attention_goes_with_the_weights_of_the_mean() -> None:
    """As above with a = 1 and 1 and 3 examples: e / (e + 3) and 3 / (e + 3)."""
    method = bone(weights="examples")
    state = begin(method, (0, 0))
    state = after(state, merge(method, state, rows((2, 0)), 1))
    change = merge(method, state, rows((4, 0), (2, 6)), 1, 3)
    assert pairs(change.rows)[0] == pytest.approx([2 + 2 * math.e / (math.e + 3), 18 / (math.e + 3)])


def test_an_update_of_0_points_nowhere() -> None:
    """h = (2, 0). d = (0, 6) and (0, 0) have cosines 0 and 0, so that the mean is (0, 3)."""
    method = bone()
    state = begin(method, (0, 0))
    state = after(state, merge(method, state, rows((2, 0)), 1))
    assert pairs(merge(method, state, rows((2, 6), (2, 0)), 1, 1).rows)[0] == pytest.approx([2, 3])


# ---------------------------------------------------------------- ranks


def test_a_client_of_a_smaller_rank_moves_its_own_pairs_only() -> None:
    """Ranks 2 and 1 of alpha 2, scales 1 and 2. The second is sent B / 2; its step of 1 there is one of 2 in the row.

    The first moves the second pair alone, so that products are 0 and the row moves by half of each.
    """
    ranks = torch.tensor([2, 1])
    cohort = Cohort(("c0", "c1"), (1, 1), ({},) * 2, (np.arange(2),), 0, ranks=ranks, scale=2.0 / ranks.double())
    method = build("fedbone", {"private": False}, cohort)
    state = shared(method, SQUARE, 1, 2, 3, 4, 6, 7, 8, 9)  # A [2, 2], B [2, 2]
    sent = method.message(state, torch.arange(2), Clock(1)).rows
    assert sent[:, :8].tolist() == [[1, 2, 3, 4, 6, 7, 8, 9], [1, 2, 0, 0, 3, 0, 4, 0]]
    assert torch.equal(merge(method, state, sent.clone(), 1, 1).rows, sent[:1])
    sent[0, 3] += 4
    sent[1, 4] += 1
    assert merge(method, state, sent, 1, 1).rows[0, :8].tolist() == [1, 2, 3, 6, 7, 7, 8, 9]


# ---------------------------------------------------------------- the private part


def test_without_conflict_it_is_pftt() -> None:
    """Updates of positive numbers: the shared part is PFTT's, and the private one stays the server's."""
    layout = own_and_shared(lora_layout([("m", 1, 1)], 1))
    methods = [make("fedbone", weights="uniform"), make("pftt", weights="uniform")]
    found = []
    for method in methods:
        state = shared(method, layout, 5, 6)
        start = state.adapters.rows[torch.zeros(1, dtype=torch.int64)]
        uploads = start.repeat(3, 1)
        uploads[:, 16:18] += torch.tensor([[1, 2], [3, 4], [8, 0]])
        found.append(merge(method, state, uploads, 1, 1, 1).rows)
    torch.testing.assert_close(found[0], found[1])
    assert found[0][0, [0, 1, 16, 17]].tolist() == pytest.approx([5, 6, 4, 2])


def test_without_a_private_part_all_clients_have_one_adapter_of_lora() -> None:
    assert [bone().personal, make("fedbone").personal] == [False, True]
    assert bone().layout is None


@pytest.mark.parametrize(("key", "value"), [("attention", -1), ("by", "layer"), ("private", 1), ("projection", True)])
def test_settings_that_make_no_sense_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        make("fedbone", **{key: value})
