"""FedEx-LoRA: means of factors, and what their product misses in everybody's base; numbers worked by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.laws import laws
from tests.laws.worlds import WORLDS, World
from torch import Tensor

from fedmira.adapters import Layout, Stored, lora_layout
from fedmira.disk.table import Table
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Cohort, Message, Method, State

SQUARE = lora_layout([("m", 2, 2)], 1)
ONE = torch.zeros(1, dtype=torch.int64)


def cohort(count: int, ranks: Tensor | None = None) -> Cohort:
    names = tuple(f"c{k}" for k in range(count))
    scale = None if ranks is None else 2.0 / ranks
    return Cohort(names, (1,) * count, ({},) * count, (np.arange(count),), 0, ranks=ranks, scale=scale)


def shared(layout: Layout, *, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> State:
    table = Table(torch.zeros(1, layout.size, dtype=dtype), ONE, None)
    return State(Stored(layout, table, torch.tensor([layout.parts[0].rank]), torch.tensor([scale], dtype=dtype)))


def merge(of: Method, state: State, uploads: Tensor, weights: Sequence[float]) -> Change:
    ids, counts = torch.arange(len(uploads)), torch.tensor(weights, dtype=torch.float64)
    return of.merge(state, ids, Message(uploads), counts, Clock(1))


def by_hand() -> Tensor:
    """A = [1 0], B = [2 0]' of the first client; A = [0 1], B = [0 4]' of the second."""
    uploads = torch.zeros(2, SQUARE.size, dtype=torch.float64)
    uploads[0, :4] = torch.tensor([1.0, 0, 2, 0])
    uploads[1, :4] = torch.tensor([0.0, 1, 0, 4])
    return uploads


def test_means_of_factors_and_what_their_product_misses() -> None:
    """Shares 1/4 and 3/4: A = [1/4 3/4], B = [1/2 3]', 2 B A = [[1/4 3/4] [3/2 9/2]]; the mean is [[1 0] [0 6]]."""
    change = merge(build("fedex_lora", {}, cohort(2)), shared(SQUARE), by_hand(), (1, 3))
    assert change.rows[0, :4].tolist() == [0.25, 0.75, 0.5, 3]
    assert change.base is not None
    a, b = change.base["m"]
    assert (b @ a).tolist() == [[0.75, -0.75], [-1.5, 1.5]]
    assert a.shape == (1, 2)  # of two clients of rank 1: one less


def test_uniform_means_count_every_client_the_same() -> None:
    """A = [1/2 1/2], B = [1 2]', 2 B A = [[1 1] [2 2]]; the mean of the products is [[2 0] [0 4]]."""
    method = build("fedex_lora", {"weights": "uniform"}, cohort(2))
    change = merge(method, shared(SQUARE), by_hand(), (1, 3))
    assert change.rows[0, :4].tolist() == [0.5, 0.5, 1, 2]
    assert change.base is not None
    a, b = change.base["m"]
    assert (b @ a).tolist() == [[1, -1], [-2, 2]]
    assert not method.facts.weighs


def test_one_client_alone_misses_nothing_and_nothing_is_added() -> None:
    change = merge(build("fedex_lora", {}, cohort(2)), shared(SQUARE), by_hand()[1:], (3,))
    assert change.rows[0, :4].tolist() == [0, 1, 0, 4]
    assert change.base is None


def test_more_pairs_than_the_smaller_side_are_kept_as_their_sum() -> None:
    """Five clients of rank 2 give a residual of rank 8; a module of 3 x 6 needs a pair of rank 3 at most."""
    layout = lora_layout([("m", 6, 3), ("n", 40, 40)], 2)
    uploads = torch.randn(5, layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change = merge(build("fedex_lora", {}, cohort(5)), shared(layout), uploads, (1, 2, 3, 4, 5))
    assert change.base is not None
    assert {name: len(a) for name, (a, _) in change.base.items()} == {"m": 3, "n": 8}
    mean = shared(layout).adapters.take(ONE, rows=change.rows)
    each = shared(layout).adapters.take(torch.zeros(5, dtype=torch.int64), rows=uploads)
    shares = torch.tensor([1, 2, 3, 4, 5], dtype=torch.float64) / 15
    for name, (a, b) in change.base.items():
        wanted = torch.einsum("k,koi->oi", shares, each.product(name))
        torch.testing.assert_close(mean.product(name)[0] + b @ a, wanted, rtol=1e-12, atol=1e-12)


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(MethodError, match="2 clients sum to 0"):
        merge(build("fedex_lora", {}, cohort(2)), shared(SQUARE), by_hand(), (0, 0))


@pytest.mark.parametrize("ranks", [torch.tensor([1, 2]), torch.tensor([[1, 1], [1, 2]])], ids=["clients", "modules"])
def test_mixed_ranks_are_refused_with_the_way_out(ranks: Tensor) -> None:
    with pytest.raises(MethodError, match=r"clients have ranks 1 to 2: .*one rank only; use flora"):
        build("fedex_lora", {}, cohort(2, ranks))


def test_one_rank_may_differ_between_modules() -> None:
    assert build("fedex_lora", {}, cohort(2, torch.tensor([[1, 3], [1, 3]]))).name == "fedex_lora"


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"weigths.*weights"):
        build("fedex_lora", {"weigths": "uniform"}, cohort(2))


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("kind", WORLDS)
def test_base_and_factors_are_the_mean_of_the_products(kind: str, weights: str) -> None:
    """In the third round too, whose clients have learned before, and from bases that have two changes."""
    world, ids = WORLDS[kind](), torch.tensor([0, 2, 3])  # all of rank 2
    method = build("fedex_lora", {"weights": weights}, world.cohort)
    scene = world.reach(method)
    assert len(scene.ledger.state.base) == 2
    returned = scene.phase(ids, scene.send(ids)).returned
    change = laws.merge(scene, ids, returned, world.weights(ids))
    counts = world.weights(ids) if weights == "examples" else torch.ones(3, dtype=torch.float64)
    uploads = world.adapters(ids, returned.rows)
    mean = scene.ledger.state.adapters.take(ONE, rows=change.rows)
    assert change.base is not None
    for first, _ in world.layout.parts[0].pairs():
        wanted = torch.einsum("k,koi->oi", counts / counts.sum(), uploads.product(first.module))
        a, b = change.base[first.module]
        torch.testing.assert_close(mean.product(first.module)[0] + b @ a, wanted, rtol=1e-10, atol=1e-12)
        assert float((b @ a).norm()) > 1e-6 * float(wanted.norm())


@pytest.mark.parametrize("kind", WORLDS)
def test_the_factors_are_those_of_fedavg_as_long_as_the_base_is_the_same(kind: str) -> None:
    """After one round: from then on clients train on another base."""
    world: World = WORLDS[kind]()
    ids = torch.tensor([0, 2, 3])
    mine, theirs = (world.start(build(name, {}, world.cohort)) for name in ("fedex_lora", "fedavg"))
    torch.testing.assert_close(mine.play(ids).rows, theirs.play(ids).rows, rtol=0, atol=0)
    assert mine.ledger.state.base
    assert not theirs.ledger.state.base


def test_without_a_residual_it_is_fedavg() -> None:
    world = WORLDS["transformer"]()
    method = build("fedex_lora", {}, world.cohort)
    plain = replace(method, merge=lambda *given: replace(method.merge(*given), base=None))
    laws.law_a_zero_penalty_is_the_simpler_neighbour(plain, world, simpler=build("fedavg", {}, world.cohort))
    with pytest.raises(AssertionError):
        laws.law_a_zero_penalty_is_the_simpler_neighbour(method, world, simpler=build("fedavg", {}, world.cohort))
