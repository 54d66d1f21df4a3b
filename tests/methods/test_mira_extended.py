"""What MIRA has beyond the paper: exact solver, product space, clipping, learned graphs, the public code's defect."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout, start_adapters
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, State

LAYOUT = lora_layout([("first", 5, 4), ("second", 3, 6)], 2)
CLIENTS = 5
RANKS = torch.tensor([2, 1, 2, 2, 1])
ALPHA = 3.0
WEIGHTS = {(0, 1): 1.0, (0, 2): 0.5, (1, 2): 0.7, (2, 3): 0.25, (3, 4): 1.5}
FIRST = Clock(1)


def cohort(*rounds: tuple[int, ...], profiles: np.ndarray | None = None) -> Cohort:
    schedule = rounds or (tuple(range(CLIENTS)),)
    return Cohort(
        tuple(f"c{k}" for k in range(CLIENTS)),
        (1,) * CLIENTS,
        ({},) * CLIENTS,
        tuple(np.array(ids) for ids in schedule),
        seed=0,
        profile=lambda column: np.zeros((CLIENTS, 1)) if profiles is None else profiles,
    )


def mira(folder: Path, *rounds: tuple[int, ...], **settings: Any) -> Method:
    """MIRA on WEIGHTS, c = 0.3, unless told otherwise."""
    path = folder / "graph.csv"
    lines = [f"c{one},c{other},{weight}" for (one, other), weight in WEIGHTS.items()]
    path.write_text("\n".join(["client,neighbour,weight", *lines]) + "\n", encoding="utf-8")
    chosen = {"lambda": 0.3, "normalise": "none", "graph": {"kind": "file", "path": str(path)}, **settings}
    return build("mira", chosen, cohort(*rounds))


def adapters(seed: int = 0, *, ranks: Tensor = RANKS, scale: float = 1.0) -> Adapters:
    rows = torch.randn(len(ranks), LAYOUT.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Adapters(LAYOUT, scale * rows, ranks, ALPHA / ranks.double()).mask_()


def merged(method: Method, uploads: Adapters, ids: tuple[int, ...], stored: Adapters | None = None) -> Tensor:
    who = torch.tensor(ids)
    state = method.init(stored or adapters(9), Clock(0))
    change = method.merge(state, who, Message(uploads.rows[who]), torch.ones(len(who)), FIRST)
    assert torch.equal(change.ids, who)
    return change.rows


def similarities() -> np.ndarray:
    found = np.zeros((CLIENTS, CLIENTS))
    for (one, other), weight in WEIGHTS.items():
        found[one, other] = found[other, one] = weight
    return found


def products(held: Adapters) -> list[Tensor]:
    return [held.product(name) for name in ("first", "second")]


def as_adapters(rows: Tensor, ids: tuple[int, ...], ranks: Tensor = RANKS) -> Adapters:
    own = ranks[torch.tensor(ids)]
    return Adapters(LAYOUT, rows, own, ALPHA / own.double())


# ---------------------------------------------------------------- the exact solver


@pytest.mark.parametrize("strength", [0.01, 0.3, 5.0, 1e4])
@pytest.mark.parametrize("normalise", ["none", "symmetric"])
@pytest.mark.parametrize("ids", [(0, 1, 2, 3, 4), (0, 2, 3)])
def test_the_exact_solver_gives_the_minimiser_at_any_coupling(
    tmp_path: Path, strength: float, normalise: str, ids: tuple[int, ...]
) -> None:
    """1/2 ||W - V||^2 + c/2 tr(W^T L W) has no gradient at the answer, and is larger around it."""
    uploads = adapters(1)
    settings = {"lambda": strength, "solver": "exact", "normalise": normalise}
    found = merged(mira(tmp_path, ids, **settings), uploads, ids).requires_grad_()
    inside = torch.from_numpy(similarities()[np.ix_(ids, ids)])
    if normalise == "symmetric":
        roots = inside.sum(dim=1).sqrt()
        inside = inside / torch.outer(roots, roots)
    laplacian = torch.diag(inside.sum(dim=1)) - inside
    given = uploads.rows[torch.tensor(ids)]
    value = (found - given).square().sum() / 2 + strength / 2 * (found * (laplacian @ found)).sum()
    (gradient,) = torch.autograd.grad(value, found)
    assert float(gradient.abs().max()) < 1e-6 * max(1.0, strength)
    expected = torch.linalg.solve(torch.eye(len(ids)).double() + strength * laplacian, given)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [0.3, 50.0])
def test_the_exact_solver_takes_stored_neighbours_as_they_are(tmp_path: Path, strength: float) -> None:
    """(I + c L_SS) W_S = V_S + c A_SN W_N, with the degrees towards all neighbours in L_SS."""
    uploads, stored, ids, others = adapters(1), adapters(2), (0, 2), (1, 3)
    method = mira(tmp_path, ids, **{"lambda": strength}, solver="exact", neighbours="stored")
    found = merged(method, uploads, ids, stored)
    weights = torch.from_numpy(similarities())
    inside, outside = weights[list(ids)][:, list(ids)], weights[list(ids)][:, list(others)]
    degrees = inside.sum(dim=1) + outside.sum(dim=1)
    operator = torch.eye(2).double() + strength * (torch.diag(degrees) - inside)
    right = uploads.rows[list(ids)] + strength * outside @ stored.rows[list(others)]
    torch.testing.assert_close(found, torch.linalg.solve(operator, right), rtol=1e-9, atol=1e-9)


def test_the_exact_solver_on_a_complete_graph_tends_to_the_uniform_mean() -> None:
    uploads, everyone = adapters(1, ranks=torch.full((CLIENTS,), 2)), tuple(range(CLIENTS))
    method = build("mira", {"lambda": 1e9, "solver": "exact", "graph": {"kind": "uniform"}}, cohort())
    found = merged(method, uploads, everyone)
    mean = uploads.rows.mean(dim=0, keepdim=True).expand_as(found)
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-6)


def test_the_exact_solver_needs_no_limit_of_coupling(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="solver: exact"):
        mira(tmp_path, **{"lambda": 5})
    mira(tmp_path, **{"lambda": 5}, solver="exact")


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("seed", range(4))
def test_a_client_without_neighbours_keeps_its_factors_to_the_bit(seed: int, space: str, tmp_path: Path) -> None:
    """Between others: the inverse of the whole round has weights of 1e-20 there."""
    stream = np.random.default_rng(seed)
    order = stream.permutation(CLIENTS)
    path = tmp_path / "graph.csv"
    pairs = list(itertools.combinations(order[: CLIENTS - 1], 2))
    lines = [f"c{one},c{other},{stream.random():.17g}" for one, other in pairs]
    path.write_text("\n".join(["client,neighbour,weight", *lines]) + "\n", encoding="utf-8")
    graph = {"kind": "file", "path": str(path)}
    method = build("mira", {"lambda": 3.0, "space": space, "solver": "exact", "graph": graph}, cohort())
    uploads, alone = adapters(seed), int(order[-1])
    rows = merged(method, uploads, tuple(range(CLIENTS)))
    assert torch.equal(rows[alone], uploads.rows[alone])
    assert not any(torch.equal(rows[k], uploads.rows[k]) for k in order[:-1].tolist())


# ---------------------------------------------------------------- the product space


def dense_step(uploads: Adapters, ids: tuple[int, ...], strength: float) -> list[Tensor]:
    """The explicit step on dense updates, each cut to its client's rank by a dense decomposition."""
    inside = torch.from_numpy(similarities()[np.ix_(ids, ids)])
    weights = torch.eye(len(ids)).double() - strength * (torch.diag(inside.sum(dim=1)) - inside)
    answers = []
    for whole in products(uploads.take(torch.tensor(ids))):
        mixed = torch.einsum("kl,lij->kij", weights, whole)
        u, s, v = torch.linalg.svd(mixed, full_matrices=False)
        for place, k in enumerate(ids):
            s[place, int(RANKS[k]) :] = 0
        answers.append(u @ (s[..., None] * v))
    return answers


@pytest.mark.parametrize("ids", [(0, 1, 2, 3, 4), (0, 1, 2), (1, 4)])
def test_the_step_in_product_space_is_the_dense_step_cut_to_each_rank(tmp_path: Path, ids: tuple[int, ...]) -> None:
    uploads = adapters(1)
    found = as_adapters(merged(mira(tmp_path, ids, space="product"), uploads, ids), ids)
    for mine, dense in zip(products(found), dense_step(uploads, ids, 0.3), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.mask_().rows, found.rows)


@pytest.mark.parametrize("settings", [{}, {"solver": "exact"}, {"clip": 1.0}, {"neighbours": "stored"}])
def test_in_product_space_nothing_depends_on_how_an_update_is_factored(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """(B, A) and (B Q, Q^-1 A) are the same update: every client's answer is the same update too."""
    ids = (0, 1, 2, 3)
    uploads, turned = adapters(1, ranks=torch.full((CLIENTS,), 2)), adapters(1, ranks=torch.full((CLIENTS,), 2))
    one = torch.tensor([[1.5, 0.4], [-0.7, 0.9]], dtype=torch.float64)
    turn = torch.stack([torch.linalg.matrix_power(one, k) for k in range(CLIENTS)])  # each client's own
    for first, second in LAYOUT.parts[0].pairs():
        turned.leaf(first).copy_(torch.linalg.inv(turn) @ turned.leaf(first))
        turned.leaf(second).copy_(turned.leaf(second) @ turn)
    full = torch.full((CLIENTS,), 2)
    stored = adapters(5, ranks=full)
    method = mira(tmp_path, ids, space="product", **settings)
    answers = [products(as_adapters(merged(method, some, ids, stored), ids, full)) for some in (uploads, turned)]
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    factorwise = mira(tmp_path, ids, **settings)
    plain = [products(as_adapters(merged(factorwise, some, ids, stored), ids, full))[0] for some in (uploads, turned)]
    assert not torch.allclose(*plain, rtol=1e-2, atol=1e-2)  # factor by factor it does depend on it


def test_a_client_without_neighbours_keeps_its_factors_and_nobody_gets_a_dead_direction(tmp_path: Path) -> None:
    """4 has no co-sampled neighbour; the others' updates are all of rank 1, and a second direction can still train."""
    uploads = adapters(1, ranks=torch.full((CLIENTS,), 2))
    for first, second in LAYOUT.parts[0].pairs():
        uploads.leaf(first)[:, 1] = 0
        uploads.leaf(second)[:, :, 1] = 0
        uploads.leaf(first)[1:] = uploads.leaf(first)[:1]  # one and the same direction for all
        uploads.leaf(second)[1:] = uploads.leaf(second)[:1]
    ids = (0, 1, 2, 4)
    full = torch.full((CLIENTS,), 2)
    stored = adapters(9, ranks=full)
    found = as_adapters(merged(mira(tmp_path, ids, space="product"), uploads, ids, stored), ids, full)
    assert torch.equal(found.rows[3], uploads.rows[4])
    for first, second in LAYOUT.parts[0].pairs():
        a, b = found.leaf(first)[:3], found.leaf(second)[:3]
        assert float(b[:, :, 1].abs().max()) < 1e-9
        torch.testing.assert_close(a[:, 1].norm(dim=-1), torch.ones(3).double())
        assert float((a[:, 0] * a[:, 1]).sum(dim=-1).abs().max()) < 1e-9


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("blow", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("normalise", ["none", "row"])
def test_a_neighbour_moves_nobody_further_than_its_weight_times_tau(
    tmp_path: Path, blow: float, normalise: str
) -> None:
    """||w_k(with l) - w_k(with l's difference 0)|| <= c a_kl tau, and just that where the difference was cut."""
    tau, everyone = 0.5, tuple(range(CLIENTS))
    method = mira(tmp_path, clip=tau, normalise=normalise)
    weights = similarities()
    if normalise == "row":
        weights = weights / weights.sum(axis=1, keepdims=True)
    attacker = 2
    uploads = adapters(1, ranks=torch.full((CLIENTS,), 2))
    uploads.rows[attacker] *= blow
    with_it = merged(method, uploads, everyone)
    for k in (0, 1, 3):
        alike = uploads.with_rows(uploads.rows.clone())
        alike.rows[attacker] = uploads.rows[k]  # no difference, no pull
        moved = float((with_it[k] - merged(method, alike, everyone)[k]).norm())
        assert moved == pytest.approx(0.3 * weights[k, attacker] * tau, rel=1e-9)


@pytest.mark.parametrize("space", ["factors", "product"])
def test_a_stored_neighbour_moves_nobody_further_than_its_weight_times_tau_either(tmp_path: Path, space: str) -> None:
    """Client 1 alone in its round; 2 is stored where 1 is, and 0, of weight 1, far away."""
    tau, ids = 0.5, (1,)
    full = torch.full((CLIENTS,), 2)
    uploads, stored = adapters(1, ranks=full), adapters(9, ranks=full, scale=100.0)
    stored.rows[2] = uploads.rows[1]
    method = mira(tmp_path, ids, clip=tau, neighbours="stored", space=space)
    answer = as_adapters(merged(method, uploads, ids, stored), ids, full)
    before = uploads.take(torch.tensor([1]))
    if space == "factors":
        moved = float((answer.rows - before.rows).norm())
        assert moved == pytest.approx(0.3 * 1.0 * tau)
    else:  # the cut to the client's rank moves it once more, by no more than the step did
        moved = sum(float((a - b).square().sum()) for a, b in zip(products(answer), products(before), strict=True))
        assert moved**0.5 <= 2 * 0.3 * 1.0 * tau


@pytest.mark.parametrize("attackers", [1, 2, 3])
@pytest.mark.parametrize("blow", [1.0, 100.0, 1e4])
def test_poisoned_neighbours_do_not_drag_the_honest_along(attackers: int, blow: float) -> None:
    """Twelve clients around a common optimum, ten rounds: honest ones end about as near to it as without attackers."""
    count, tau = 12, 2.0
    layout = lora_layout([("m", 8, 8)], 2)
    ids = tuple(range(count))
    federation = Cohort(tuple(f"c{k}" for k in ids), (1,) * count, ({},) * count, (np.arange(count),), 0)
    method = build("mira", {"lambda": 0.2, "graph": {"kind": "uniform"}, "clip": tau}, federation)

    def drift(bad: int) -> float:
        stream = torch.Generator().manual_seed(3)
        rows = torch.zeros(count, layout.size, dtype=torch.float64)
        targets = 0.3 * torch.randn(count, layout.size, generator=stream, dtype=torch.float64)
        begun = Adapters(layout, rows, torch.full((count,), 2), torch.ones(count).double())
        for number in range(10):
            uploads = begun.rows + 0.5 * (targets - begun.rows)
            uploads[:bad] = blow * torch.randn(bad, layout.size, generator=stream, dtype=torch.float64)
            change = method.merge(
                State(begun), torch.arange(count), Message(uploads), torch.ones(count), Clock(number + 1)
            )
            begun = begun.with_rows(change.rows)
        return float((begun.rows[3:] - targets[3:]).norm(dim=1).mean())

    assert drift(attackers) <= 1.2 * drift(0)


def test_a_threshold_above_every_difference_changes_nothing(tmp_path: Path) -> None:
    uploads, everyone = adapters(1), tuple(range(CLIENTS))
    plain = merged(mira(tmp_path), uploads, everyone)
    torch.testing.assert_close(merged(mira(tmp_path, clip=1e6), uploads, everyone), plain)


# ---------------------------------------------------------------- graphs from data and from training


def test_a_knn_graph_joins_clients_with_like_profiles_and_shuffling_it_keeps_the_degrees() -> None:
    profiles = np.array([[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.1], [0.1, 0.9, 0]], dtype=float)
    settings = {"graph": {"kind": "knn", "degree": 2}}
    known = build("mira", settings, cohort(profiles=profiles)).facts.graph
    assert known is not None
    dense = known.weights.toarray()
    assert np.array_equal(dense, dense.T)
    assert dense[0, 1] > 0
    assert not dense[:2, 2:].any()
    assert (dense > 0).sum(axis=1).max() <= 2
    control = build("mira", {"graph": {**settings["graph"], "shuffled": True}}, cohort(profiles=profiles)).facts.graph
    assert control is not None
    mixed = control.weights.toarray()
    assert sorted((mixed > 0).sum(axis=1)) == sorted((dense > 0).sum(axis=1))
    assert sorted(mixed[mixed > 0]) == sorted(dense[dense > 0])
    assert not np.array_equal(mixed, dense)


LEARNED = [
    {"of": of, "measure": measure, "scope": scope}
    for of, measure, scope in itertools.product(("adapters", "updates"), ("cosine", "distance"), ("whole", "layer"))
]


def families(begun: Adapters) -> Adapters:
    """Uploads in two families: 0, 1, 2 go one way from where they begin, 3 and 4 another, each with its own noise."""
    ways = torch.randn(2, LAYOUT.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(CLIENTS, LAYOUT.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return begun.with_rows(begun.rows + ways[[0, 0, 0, 1, 1]] + 0.1 * noise).mask_()


@pytest.mark.parametrize("space", ["factors", "product"])
@pytest.mark.parametrize("learned", LEARNED, ids=lambda one: " ".join(one.values()))
def test_a_learned_graph_finds_the_families(space: str, learned: dict[str, str]) -> None:
    full = torch.full((CLIENTS,), 2)
    start = start_adapters(LAYOUT, full, ALPHA, torch.Generator().manual_seed(0))
    begun = Adapters(LAYOUT, start.rows.double(), full, start.scale.double())
    method = build("mira", {"space": space, "graph": {"kind": "learned", "degree": 2, **learned}}, cohort())
    assert method.facts.graph is None
    assert method.facts.learned is not None
    state = method.init(begun, Clock(0))
    everyone = torch.arange(CLIENTS)
    uploads = families(begun)
    if space == "product":  # a random way in factors is none in products: move B alone
        for first, _ in LAYOUT.parts[0].pairs():
            uploads.leaf(first).copy_(begun.leaf(first))
    assert not method.facts.learned(state).weights.toarray().any()  # nobody is known yet
    change = method.merge(state, everyone, Message(uploads.rows), torch.ones(CLIENTS), FIRST)
    found = method.facts.learned(State(begun, state.shared, dict(change.tables))).weights.toarray()
    assert np.array_equal(found, found.T)
    inside = np.array([[one // 3 == other // 3 for other in range(CLIENTS)] for one in range(CLIENTS)])
    strongest = np.where(found > 0, found, -np.inf).argmax(axis=1)
    assert all(inside[k, strongest[k]] for k in range(CLIENTS))
    assert (found > 0).sum(axis=1).max() <= 2
    if space == "factors":
        assert change.notes["sketch_agreement"] > 0.9


def test_a_clients_sketch_is_taken_again_when_its_turn_has_come_and_only_then() -> None:
    method = build("mira", {"graph": {"kind": "learned", "every": 3}}, cohort((0, 1), (1, 2), (1, 2), (0, 1)))
    begun = adapters(0)
    state = method.init(begun, Clock(0))
    tables = {name: value.clone() for name, value in state.tables.items()}
    history = []
    for number, ids in enumerate(((0, 1), (1, 2), (1, 2), (0, 1)), start=1):
        who = torch.tensor(ids)
        uploads = adapters(number).rows[who]
        change = method.merge(
            State(begun, state.shared, tables), who, Message(uploads), torch.ones(len(who)), Clock(number)
        )
        for name, value in change.tables.items():
            tables[name][who] = value
        history.append(tables["sketch"].clone())
    assert not torch.equal(history[0][1], torch.zeros_like(history[0][1]))
    assert torch.equal(history[1][1], history[0][1])  # rounds 2 and 3 are not its turn
    assert torch.equal(history[2][1], history[0][1])
    assert not torch.equal(history[1][2], history[0][2])  # first seen in round 2
    assert not torch.equal(history[3][1], history[2][1])  # round 4 is
    assert torch.equal(history[3][2], history[2][2])  # not sampled
    assert tables["seen"].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("measure", ["cosine", "distance"])
def test_clients_that_move_alike_from_different_places_are_alike_by_their_updates_only(measure: str) -> None:
    """Every client begins elsewhere; 0, 1, 2 take one and the same step, 3 and 4 another."""
    full = torch.full((CLIENTS,), 2)
    begun = adapters(0, ranks=full, scale=10.0)
    ways = torch.randn(2, LAYOUT.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uploads = begun.with_rows(begun.rows + ways[[0, 0, 0, 1, 1]]).mask_()
    similar = {}
    for of in ("updates", "adapters"):
        settings = {"graph": {"kind": "learned", "degree": 2, "of": of, "measure": measure}}
        method = build("mira", settings, cohort())
        state = method.init(begun, Clock(0))
        change = method.merge(state, torch.arange(CLIENTS), Message(uploads.rows), torch.ones(CLIENTS), FIRST)
        assert method.facts.learned is not None
        found = method.facts.learned(State(begun, state.shared, dict(change.tables))).weights.toarray()
        similar[of] = [float(found[pair]) for pair in ((0, 1), (0, 2), (1, 2), (3, 4))]
    assert similar["updates"] == pytest.approx([1, 1, 1, 1])
    assert max(similar["adapters"]) < 0.9


def test_with_stored_neighbours_a_client_is_joined_to_those_of_earlier_rounds() -> None:
    settings = {"neighbours": "stored", "lambda": 0.3, "graph": {"kind": "learned", "degree": 2}}
    method = build("mira", settings, cohort((0, 1, 3, 4), (2,)))
    full = torch.full((CLIENTS,), 2)
    begun = adapters(0, ranks=full)
    state, uploads = method.init(begun, Clock(0)), families(begun)
    early = torch.tensor([0, 1, 3, 4])
    change = method.merge(state, early, Message(uploads.rows[early]), torch.ones(4), FIRST)
    tables = {name: value.clone() for name, value in state.tables.items()}
    held = begun.with_rows(begun.rows.clone())
    held.rows[early] = change.rows
    for name, value in change.tables.items():
        tables[name][early] = value
    last = torch.tensor([2])
    answer = method.merge(State(held, state.shared, tables), last, Message(uploads.rows[last]), torch.ones(1), Clock(2))
    moved = (answer.rows[0] - uploads.rows[2])[:, None]

    def left(family: list[int]) -> float:
        """Of the move, what does not lead towards these clients' stored rows."""
        ways = (held.rows[family] - uploads.rows[2]).T
        return float((ways @ torch.linalg.lstsq(ways, moved).solution - moved).norm() / moved.norm())

    assert left([0, 1]) < 1e-9
    assert left([3, 4]) > 0.1


# ---------------------------------------------------------------- the defect, and settings that do not go together


def test_with_the_reply_lost_a_client_begins_from_its_own_upload() -> None:
    with pytest.warns(UserWarning, match="defect"):
        method = build("mira", {"reply": "lost"}, cohort())
    sent, own = adapters(1), adapters(2)
    first = method.client.start(sent)
    begun, memory = method.client.begin(sent, first, Message(sent.rows), None)  # type: ignore[arg-type]
    assert torch.equal(begun.rows, sent.rows)
    returned, kept = method.client.finish(own, memory, Message(sent.rows), None)  # type: ignore[arg-type]
    assert torch.equal(returned.rows, own.rows)
    again, _ = method.client.begin(sent, kept, Message(sent.rows), None)  # type: ignore[arg-type]
    assert torch.equal(again.rows, own.rows)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"clip": 1.0, "solver": "exact"}, "solver: explicit"),
        ({"accept": {"tolerance": 0.1}, "reply": "lost"}, "never lets it see"),
        ({"clip": 0.0}, "greater than 0"),
        ({"graph": {"kind": "knn", "every": 2}}, "has no every"),
        ({"graph": {"kind": "learned", "column": "family"}}, "has no column"),
        ({"graph": {"kind": "knn", "features": "histogram"}}, "needs 'column'"),
        ({"graph": {"kind": "learned", "sketch": 100}}, "256"),
        ({"graph": {"kind": "random", "degree": 3}}, "has no degree"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        build("mira", settings, cohort())
