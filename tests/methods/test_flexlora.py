"""FlexLoRA: numbers worked by hand, the dense formula, clients of any rank, the laws with ranks known, a killed run."""

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small_study
from tests.laws import laws
from tests.laws.worlds import ALPHA, NEXT, WORLDS, World
from tests.small_study import command, differences, outcome
from torch import Tensor

from fedmira.adapters import Adapters, Layout, lora_layout, start_adapters, updates
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, State, use_what_was_sent

FIRST = Clock(1)
SQUARE = lora_layout([("m", 2, 2)], 2)  # A [2, 2], B [2, 2]


def cohort(ranks: Tensor | None, *, alpha: float = 16.0) -> Cohort:
    clients = 3 if ranks is None else len(ranks)
    scale = None if ranks is None else alpha / ranks.double()
    known: dict[str, Any] = {"ranks": ranks, "scale": scale}
    return Cohort(tuple(f"c{k}" for k in range(clients)), (1,) * clients, ({},) * clients, (), 0, **known)


def method(ranks: Tensor | None, *, alpha: float = 16.0, **settings: Any) -> Method:
    return build("flexlora", settings, cohort(ranks, alpha=alpha))


def begin(layout: Layout, ranks: Tensor, *, alpha: float = 16.0, dtype: torch.dtype = torch.float32) -> State:
    """The common start of the shared row, at the largest rank of each module."""
    row = start_adapters(layout, ranks.amax(dim=0, keepdim=True), alpha, torch.Generator().manual_seed(0))
    return State(Adapters(layout, row.rows.to(dtype), row.ranks, row.scale.to(dtype)))


def trained(layout: Layout, ranks: Tensor, *, alpha: float = 16.0, dtype: torch.dtype = torch.float32) -> Adapters:
    """What clients of these ranks may return: A and B random, of a size that makes products of about 1."""
    stream = torch.Generator().manual_seed(7)
    rows = 0.3 * torch.randn(len(ranks), layout.size, generator=stream, dtype=torch.float64)
    return Adapters(layout, rows.to(dtype), ranks, alpha / ranks.double()).mask_()


def after(of: Method, state: State, uploads: Tensor, weights: Sequence[float], ids: Sequence[int] = ()) -> State:
    """One merge, applied."""
    who = torch.tensor(ids or range(len(uploads)))
    change = of.merge(state, who, Message(uploads), torch.tensor(weights, dtype=torch.float64), FIRST)
    assert change.ids.tolist() == [0]
    return State(state.adapters.take(change.ids, rows=change.rows))


def serve(of: Method, state: State, ids: Sequence[int], ranks: Tensor, *, alpha: float = 16.0) -> Adapters:
    """What these clients are sent, and use as it is."""
    assert of.client.use is use_what_was_sent
    own = ranks[torch.tensor(ids)]
    rows = of.message(state, torch.tensor(ids), FIRST).rows
    return Adapters(state.adapters.layout, rows, own, (alpha / own.double()).to(rows.dtype))


def best(matrix: Tensor, rank: int) -> Tensor:
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


def dense(uploads: Adapters, module: str, weights: Sequence[float]) -> Tensor:
    """sum_k p_k (alpha / r_k) B_k A_k in float64, as it is written in the paper."""
    shares = torch.tensor(weights, dtype=torch.float64)
    products = Adapters(uploads.layout, uploads.rows.double(), uploads.ranks, uploads.scale).product(module)
    return torch.einsum("k,kdv->dv", shares / shares.sum(), products)


def update(served: Adapters, module: str) -> Tensor:
    return Adapters(served.layout, served.rows.double(), served.ranks, served.scale.double()).product(module)


# ---------------------------------------------------------------- numbers


def by_hand() -> tuple[Tensor, Tensor]:
    """Ranks 1 and 2, alpha = 2: scales 2 and 1. Updates 2 [[1, 0], [0, 0]] and 1 [[0, 0], [0, 6]]."""
    uploads = torch.zeros(2, SQUARE.size)
    uploads[0, :8] = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])  # A = [[1, 0], -], B = [[1, -], [0, -]]
    uploads[1, :8] = torch.tensor([0.0, 1, 0, 0, 0, 0, 6, 0])  # A = [[0, 1], [0, 0]], B = [[0, 0], [6, 0]]
    return torch.tensor([1, 2]), uploads


def test_two_clients_of_ranks_one_and_two() -> None:
    """1/4 [[2, 0], [0, 0]] + 3/4 [[0, 0], [0, 6]] = [[0.5, 0], [0, 4.5]]; the largest direction is the second."""
    ranks, uploads = by_hand()
    flex = method(ranks, alpha=2.0)
    state = after(flex, begin(SQUARE, ranks, alpha=2.0), uploads, (1, 3))
    served = serve(flex, state, [0, 1], ranks, alpha=2.0)
    assert served.ranks.tolist() == [1, 2]
    assert served.scale.tolist() == [2, 1]
    assert served.product("m")[0].tolist() == [[0, 0], [0, 4.5]]
    assert served.product("m")[1].tolist() == [[0.5, 0], [0, 4.5]]
    assert served.rows[0, :8].tolist() == [0, 1, 0, 0, 0, 0, 2.25, 0]  # B of the first holds 4.5 / 2
    assert served.rows[1, :8].tolist() == [0, 1, 1, 0, 0, 0.5, 4.5, 0]


def test_uniform_weights_count_every_client_the_same() -> None:
    ranks, uploads = by_hand()
    flex = method(ranks, alpha=2.0, weights="uniform")
    state = after(flex, begin(SQUARE, ranks, alpha=2.0), uploads, (1, 3))
    assert serve(flex, state, [1], ranks, alpha=2.0).product("m")[0].tolist() == [[1, 0], [0, 3]]
    assert not flex.facts.weighs


def test_the_mean_is_over_products_and_not_over_factors() -> None:
    """A = B = 1 and A = B = 3 with scale 1: the mean of the products is 5, the product of the means 4."""
    layout = lora_layout([("m", 1, 1)], 1)
    uploads = torch.zeros(2, layout.size)
    uploads[:, :2] = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    ranks = torch.tensor([1, 1])
    flex = method(ranks, alpha=1.0)
    state = after(flex, begin(layout, ranks, alpha=1.0), uploads, (1, 1))
    assert serve(flex, state, [0], ranks, alpha=1.0).product("m").item() == pytest.approx(5, rel=1e-6)


def test_who_answered_says_whose_rank_and_scale_an_upload_has() -> None:
    """Only client 1 answers: its scale is 1, and not that of client 0."""
    ranks, uploads = by_hand()
    flex = method(ranks, alpha=2.0)
    state = after(flex, begin(SQUARE, ranks, alpha=2.0), uploads[1:], (3,), ids=(1,))
    assert serve(flex, state, [1], ranks, alpha=2.0).product("m")[0].tolist() == [[0, 0], [0, 6]]


def test_weights_that_sum_to_zero_are_refused() -> None:
    ranks, uploads = by_hand()
    with pytest.raises(MethodError, match="2 clients sum to 0"):
        after(method(ranks), begin(SQUARE, ranks), uploads, (0, 0))


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"weigths.*weights"):
        method(None, weigths="uniform")


# ---------------------------------------------------------------- the dense formula

MIXED = torch.tensor([8, 30, 200])
# The sum of ranks, 238, is below both sides of the first two, and not below 120.
WIDE = lora_layout([("one", 260, 320), ("two", 260, 320), ("narrow", 120, 300)], 200)


@pytest.fixture(scope="module")
def merged() -> tuple[Method, State, Adapters]:
    flex, uploads = method(MIXED), trained(WIDE, MIXED)
    return flex, after(flex, begin(WIDE, MIXED), uploads.rows, (5, 1, 2)), uploads


@pytest.mark.parametrize("client", range(3), ids=lambda k: f"rank {int(MIXED[k])}")
@pytest.mark.parametrize("module", ["one", "two", "narrow"])
def test_every_client_is_served_the_dense_mean_cut_to_its_own_rank(
    module: str, client: int, merged: tuple[Method, State, Adapters]
) -> None:
    flex, state, uploads = merged
    expected = best(dense(uploads, module, (5, 1, 2)), int(MIXED[client]))
    served = serve(flex, state, [client], MIXED)
    assert served.rows.dtype == torch.float32
    torch.testing.assert_close(update(served, module)[0], expected, rtol=1e-5, atol=1e-5)
    assert float(expected.abs().max()) > 0.1
    assert not served.rows[~WIDE.rank_mask(MIXED[client : client + 1])].any()


def test_modules_decomposed_together_are_what_they_are_alone(
    merged: tuple[Method, State, Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    flex, state, uploads = merged
    batches = list(updates._batches(WIDE.parts[0], uploads))
    assert [[first.module for _, first, _ in some] for _, some in batches] == [["one", "two"], ["narrow"]]
    monkeypatch.setattr(updates, "BATCH", 1)
    assert len(list(updates._batches(WIDE.parts[0], uploads))) == 3
    alone = after(flex, begin(WIDE, MIXED), uploads.rows, (5, 1, 2))
    for module in ("one", "two"):
        one, other = (update(serve(flex, some, range(3), MIXED), module) for some in (state, alone))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("most", [(3, 5), (5, 5)], ids=str)
def test_modules_of_one_client_may_differ_in_rank(most: tuple[int, int]) -> None:
    """As of type T3: each module has its own cut and its own scale, also beside one of the same shape."""
    layout = lora_layout([("attn", 40, 36), ("mlp", 40, 36)], most)
    ranks = torch.tensor([[3, 5], [most[0], 2], [1, 4]])
    flex, uploads = method(ranks), trained(layout, ranks, dtype=torch.float64)
    state = after(flex, begin(layout, ranks, dtype=torch.float64), uploads.rows, (1, 2, 3))
    served = serve(flex, state, range(3), ranks)
    for place, module in enumerate(("attn", "mlp")):
        for k in range(3):
            expected = best(dense(uploads, module, (1, 2, 3)), int(ranks[k, place]))
            torch.testing.assert_close(update(served, module)[k], expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("client", [0, 1, 2])
def test_one_client_alone_keeps_its_update(client: int) -> None:
    """Where there is room for it: a client of rank 5 sees all of what one of rank 3 has learned."""
    layout, ranks = lora_layout([("m", 40, 36), ("n", 9, 7)], 5), torch.tensor([3, 5, 1])
    flex, uploads = method(ranks), trained(layout, ranks, dtype=torch.float64)
    state = after(flex, begin(layout, ranks, dtype=torch.float64), uploads.rows[client][None], (4,), ids=(client,))
    for k in range(3):
        served = serve(flex, state, [k], ranks)
        for module in ("m", "n"):
            whole = uploads.product(module)[client]
            torch.testing.assert_close(update(served, module)[0], best(whole, int(ranks[k])), rtol=1e-9, atol=1e-9)
            if ranks[k] >= ranks[client]:
                torch.testing.assert_close(update(served, module)[0], whole, rtol=1e-9, atol=1e-9)


def test_directions_that_nobody_learned_can_train() -> None:
    """One client of rank 3 answers, one of rank 5 is served: two pairs with B = 0 and rows of A orthonormal to all."""
    layout, ranks = lora_layout([("m", 40, 36)], 5), torch.tensor([3, 5])
    flex, uploads = method(ranks), trained(layout, ranks, dtype=torch.float64)
    state = after(flex, begin(layout, ranks, dtype=torch.float64), uploads.rows[:1], (1,), ids=(0,))
    served = serve(flex, state, [1], ranks)
    first, second = layout.parts[0].leaves
    a, b = served.leaf(first)[0], served.leaf(second)[0]
    torch.testing.assert_close(a @ a.T, torch.eye(5, dtype=torch.float64))
    assert not b[:, 3:].any()
    assert bool((b[:, :3] != 0).any(dim=0).all())


def test_every_client_has_its_own_scale_and_the_same_alpha() -> None:
    ranks = torch.tensor([1, 2, 4])
    layout = lora_layout([("m", 12, 9)], 4)
    flex, uploads = method(ranks), trained(layout, ranks)
    state = after(flex, begin(layout, ranks), uploads.rows, (1, 1, 1))
    served = serve(flex, state, [2, 0, 1], ranks)
    assert served.ranks.tolist() == [4, 1, 2]
    assert (served.scale * served.ranks).tolist() == [16, 16, 16]


@pytest.mark.parametrize("ranks", [None, torch.tensor([2, 2, 2])], ids=["not told", "all the same"])
def test_clients_of_one_rank_cost_no_copy_of_the_shared_row(ranks: Tensor | None) -> None:
    state = begin(SQUARE, torch.tensor([2, 2, 2]))
    flex = method(ranks)
    sent = flex.message(state, torch.arange(3), FIRST).rows
    assert sent.shape == (3, SQUARE.size)
    assert sent.untyped_storage().nbytes() == SQUARE.size * 4  # one row, looked at three times


def test_sending_leaves_the_shared_row_as_it_is() -> None:
    ranks, uploads = by_hand()
    flex = method(ranks, alpha=2.0)
    state = after(flex, begin(SQUARE, ranks, alpha=2.0), uploads, (1, 3))
    one = torch.tensor([0])
    before = state.adapters.rows[one].clone()
    flex.message(state, torch.tensor([0, 1]), FIRST).rows.zero_()
    assert torch.equal(state.adapters.rows[one], before)


# ---------------------------------------------------------------- laws, with the clients' ranks told


def told(world: World) -> World:
    """The same federation, whose methods know that its clients have ranks 1 and 2."""
    return replace(world, cohort=replace(world.cohort, ranks=world.ranks, scale=ALPHA / world.ranks.double()))


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    return told(WORLDS[request.param]())


@pytest.fixture(params=["examples", "uniform"])
def settings(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"weights": request.param}


# What is sent differs by rank: `a returning client` is below, in products.
@pytest.mark.parametrize("law", [law for law in laws.LAWS if "a_returning_client" not in law])
def test_the_laws_hold_for_clients_of_different_rank(law: str, world: World, settings: dict[str, str]) -> None:
    laws.LAWS[law](build("flexlora", settings, world.cohort), world)


def test_renaming_clients_renames_their_ranks_too(world: World, settings: dict[str, str]) -> None:
    laws.law_renaming_clients_renames_the_answer(
        build("flexlora", settings, world.cohort),
        world,
        rebuild=lambda other: build("flexlora", settings, told(other).cohort),
    )


def test_an_absent_client_has_no_influence(world: World, settings: dict[str, str]) -> None:
    laws.law_an_absent_client_has_no_influence(build("flexlora", settings, world.cohort), world)


def test_a_returning_client_starts_from_the_mean_of_products_cut_to_its_rank(world: World) -> None:
    flex = build("flexlora", {}, world.cohort)
    scene, ids = world.reach(flex), torch.tensor(NEXT)
    returned = scene.phase(ids, scene.send(ids)).returned
    scene.play(ids)
    again = world.adapters(ids, flex.message(scene.ledger.state, ids, Clock(4)).rows)
    used = world.adapters(ids, scene.used(ids))
    assert torch.equal(again.rows, used.rows)
    uploads = world.adapters(ids, returned.rows)
    for first, _ in world.layout.parts[0].pairs():
        mean = dense(uploads, first.module, world.weights(ids).tolist())
        for place, k in enumerate(NEXT):
            expected = best(mean, int(world.ranks[k]))
            torch.testing.assert_close(again.product(first.module)[place], expected, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


def write_config(inputs: tuple[Path, Path], study: Path) -> Path:
    """Four rounds with six clients of ranks 1 to 20, of which the base has room for 16."""
    changes: dict[str, Any] = {
        "lora": {"r": 8, "ranks": [1, 3, 20, 3, 1, 2]},
        "methods": [{"name": "flexlora"}],
        "training": {"keep_optimizer": True},
    }
    return small_study.save_config(study.with_suffix(".yaml"), small_study.settings(*inputs, study, **changes))


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    study = tmp_path_factory.mktemp("undisturbed") / "study"
    ended = command("run", write_config(inputs, study))
    assert ended.code == 0, ended.err
    return outcome(study)


# Just before the n-th thing that becomes durable; the run has begun, is under way, is near its end.
@pytest.mark.parametrize(
    "count", [pytest.param(10, marks=pytest.mark.slow), 18, pytest.param(30, marks=pytest.mark.slow)]
)
def test_a_killed_run_of_mixed_ranks_ends_with_the_same_bits(
    count: int, inputs: tuple[Path, Path], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    config, study = write_config(inputs, tmp_path / "study"), tmp_path / "study"
    assert command("run", config, die_at=count).code == -signal.SIGKILL
    begun = (study / "config.yaml").is_file()
    ended = command("resume", study) if begun else command("run", config)
    assert ended.code == 0, ended.err
    assert differences(outcome(study), undisturbed) == []
