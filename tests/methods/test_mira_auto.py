"""MIRA with `lambda: auto`: numbers worked by hand, what it is where nothing is left to choose, and what is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws import laws
from tests.laws.worlds import ALL, NEXT, WORLDS, Scene
from torch import Tensor

from fedmira.adapters import Adapters, Stored, lora_layout
from fedmira.errors import ConfigError
from fedmira.graphs.step import couple
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, State, Tools
from fedmira.methods.choosing import _change

LAYOUT = lora_layout([("attn.q", 1, 1), ("mlp.up", 1, 1)], 1)  # four numbers: A and B of q, A and B of up
K = 4
FAMILY = {"kind": "groups", "column": "family"}
COHORT = Cohort(tuple("abcd"), (1, 3, 2, 2), tuple({"family": "x"} for _ in range(K)), (np.arange(K),), 0)


def auto(graph: Mapping[str, Any] | None = None, **choice: Any) -> Method:
    settings = {"lambda": "auto", **({} if graph is None else {"graph": dict(graph)})}
    return build("mira", {**settings, **({"choice": choice} if choice else {})}, COHORT)


def rows(*numbers: Sequence[float]) -> Tensor:
    found = torch.zeros(len(numbers), LAYOUT.size, dtype=torch.float64)
    found[:, :4] = torch.tensor(numbers, dtype=torch.float64)
    return found


def adapters(values: Tensor) -> Adapters:
    return Adapters(LAYOUT, values.clone(), torch.ones(len(values), dtype=torch.int64), torch.ones(len(values)))


class Table:
    """Rows of all clients, as a method reads them."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, ids: Tensor) -> Tensor:
        return self.values[ids]

    def numpy(self) -> np.ndarray:
        return self.values.numpy()


def state_of(method: Method, values: Tensor, examples: Sequence[float], **shared: Tensor) -> State:
    """The server's state with these rows, of clients that had these examples when they trained last, 0 = never."""
    stored = Stored(LAYOUT, Table(values), torch.ones(K, dtype=torch.int64), torch.ones(K))  # type: ignore[arg-type]
    state = method.init(stored, Clock(0))
    weights = torch.tensor(examples, dtype=torch.float64)
    more = {"sum": (weights[:, None] * values).sum(0)[None]} if "sum" in state.shared else {}
    return replace(state, shared={**state.shared, **more, **shared}, tables={**state.tables, "examples": weights})


def tools(targets: Tensor, tokens: Sequence[Sequence[float]] | None = None, *, reports: bool = True) -> Tools:
    """Losses 1/2 |w - target|^2 of every example alike. tokens [S, N]: of each example; None: one of one token."""
    counts = torch.ones(len(targets), 1) if tokens is None else torch.tensor(tokens)
    counts = counts.double()

    def each(found: Adapters) -> tuple[Tensor, Tensor]:
        loss = (found.rows[:, :4] - targets).square().sum(dim=1) / 2
        return loss[:, None] * counts, counts

    never: Any = None
    return Tools(Clock(2), never, never, never, never, never, each, reports)


def choose(method: Method, state: State, ids: Tensor, using: Tools) -> tuple[Tensor, Message]:
    """What clients start from, and what they send if they do not move from there."""
    given = method.message(state, ids, Clock(2))
    memory: Memory
    start, memory = method.client.begin(adapters(given.rows), {}, given, using)
    message, _ = method.client.finish(start, memory, given, using)
    return start.rows[:, :4], message


W = rows((0, 0, 0, 0), (4, 0, 0, 0), (8, 0, 0, 0), (0, 8, 0, 0))


def test_the_means_are_those_of_the_others_that_have_trained() -> None:
    """given: b and c for a, of weight 1 each (d never trained); global: (1 x 0 + 3 x 4 + 2 x 8) / 6, a included."""
    method = auto(FAMILY, graphs=["given", "global"])
    message = method.message(state_of(method, W, (1, 3, 2, 0)), torch.tensor([0, 3]), Clock(2))
    assert message.more["given"][:, :2].tolist() == [[6, 0], [4, 0]]
    assert message.more["global"][:, :2].tolist() == [[28 / 6, 0], [28 / 6, 0]]
    assert torch.equal(message.rows, W[[0, 3]])


def test_where_nobody_has_trained_a_client_gets_its_own_row_and_nothing_is_scored() -> None:
    method = auto(FAMILY)
    state = state_of(method, W, (0, 0, 0, 0))
    never: Any = None
    blind = Tools(Clock(1), never, never, never, never, never, never)
    start, message = choose(method, state, torch.tensor([0, 1]), blind)
    assert torch.equal(start, W[:2, :4])
    assert message.scalars["alpha"].tolist() == [0, 0]
    assert message.scalars["told"].tolist() == [0, 0]


def test_a_client_takes_the_candidate_that_its_own_validation_loss_likes_best() -> None:
    """a at 0 wants 3: half of its way to 6 (given). b at 4 wants 4 and stays. d at (0, 8) never trained: all of it."""
    method = auto(FAMILY, graphs=["given"], prior=0)
    state = state_of(method, W, (1, 3, 2, 0))
    targets = torch.tensor([[3.0, 0, 0, 0], [4, 0, 0, 0], [4, 0, 0, 0]], dtype=torch.float64)
    start, message = choose(method, state, torch.tensor([0, 1, 3]), tools(targets))
    assert start[:, :2].tolist() == [[3, 0], [4, 0], [4, 0]]
    assert message.scalars["alpha"].tolist() == [0.5, 0, 1]
    assert message.scalars["change_2"].tolist() == pytest.approx([-4.5, 0, -30])  # alpha 1/2
    assert message.scalars["told"].tolist() == [1, 1, 1]


def test_the_change_is_shrunk_to_what_clients_report_on_average() -> None:
    """a's own change at alpha 1 is +1 with two examples; others report -1: with prior 6, (2 - 6) / 8 = -1/2 wins."""
    method = auto(FAMILY, graphs=["given"], alphas=[0, 1], prior=6)
    reported = {"changes": torch.tensor([0.0, -1.0]).double(), "reports": torch.ones(1, dtype=torch.float64)}
    state = state_of(method, W, (1, 3, 2, 0), **reported)
    at = 3 - 1 / 6  # |6 - x|^2 / 2 - |x|^2 / 2 = 18 - 6 x = 1
    using = tools(torch.tensor([[at, 0, 0, 0]], dtype=torch.float64), [[1, 1]])
    start, message = choose(method, state, torch.tensor([0]), using)
    assert message.scalars["change_1"].tolist() == pytest.approx([1.0])
    assert start[0, 0] == 6
    alone = auto(FAMILY, graphs=["given"], alphas=[0, 1], prior=1)  # (2 - 1) / 3 > 0
    assert choose(alone, state, torch.tensor([0]), using)[0][0, 0] == 0


def test_a_client_without_validation_goes_by_the_others_or_by_what_is_set() -> None:
    method = auto(FAMILY, graphs=["given"], alphas=[0, 0.5, 1], otherwise=0.5)
    unknown = state_of(method, W, (1, 3, 2, 0))
    none = tools(torch.zeros(1, 4, dtype=torch.float64), [[0]])
    start, message = choose(method, unknown, torch.tensor([0]), none)
    assert start[0, 0] == 3
    assert message.scalars["told"].tolist() == [0]
    reported = {"changes": torch.tensor([0.0, -1.0, -2.0]).double(), "reports": torch.ones(1, dtype=torch.float64)}
    known = state_of(method, W, (1, 3, 2, 0), **reported)
    assert choose(method, known, torch.tensor([0]), none)[0][0, 0] == 6


def test_a_margin_in_standard_errors_keeps_a_doubtful_candidate_out() -> None:
    """Changes -3, -1, +1 of three examples of one token: mean -1, standard error sqrt(4 + 0 + 4) sqrt(3 / 2) / 3."""
    first, other = np.array([[3.0, 2.0, 1.0]]), np.array([[0.0, 1.0, 2.0]])
    change, error = _change(first, other, np.ones((1, 3)))
    assert change.tolist() == [-1]
    assert error.tolist() == pytest.approx([np.sqrt(8 * 3 / 2) / 3])
    assert error[0] == pytest.approx(np.std([-3, -1, 1], ddof=1) / np.sqrt(3))
    weighted, _ = _change(np.array([[2.0, 1.0, 0.0]]), np.array([[1.0, 4.0, 0.0]]), np.array([[1.0, 3.0, 0.0]]))
    assert weighted.tolist() == [0.5]  # per token


def test_a_loss_that_has_diverged_is_a_change_of_a_hundred_nats() -> None:
    inf = np.inf
    change, error = _change(np.array([[1.0], [inf], [inf]]), np.array([[inf], [1.0], [inf]]), np.ones((3, 1)))
    assert change.tolist() == [100, -100, 0]
    assert np.isfinite(error).all()


def test_groups_of_modules_are_chosen_for_one_after_the_other() -> None:
    """a at 0 with the mean at (6, 0, 6, 0) wants 6 in attention and 0 elsewhere: alpha 1 there, 0 in the rest."""
    method = auto(FAMILY, graphs=["given"], alphas=[0, 1], prior=0, by="module_group")
    values = rows((0, 0, 0, 0), (6, 0, 6, 0), (6, 0, 6, 0), (6, 0, 6, 0))
    state = state_of(method, values, (1, 1, 1, 1))
    using = tools(torch.tensor([[6.0, 0, 0, 0]], dtype=torch.float64))
    start, message = choose(method, state, torch.tensor([0]), using)
    q = [leaf.start for leaf in LAYOUT.parts[0].leaves if leaf.module == "attn.q"]
    assert 0 in q
    assert start[0, 0] == 6
    assert start[0, 2] == 0
    assert (message.scalars["alpha_attention"].item(), message.scalars["alpha_rest"].item()) == (1, 0)


def test_alphas_that_are_not_scored_lie_on_the_parabola_through_three() -> None:
    """The losses of these tests are parabolas themselves: the same choice, with 3 passes instead of 5."""
    plain, thrifty = (auto(FAMILY, graphs=["given"], prior=0, scored=scored) for scored in ("all", "parabola"))
    state = state_of(plain, W, (1, 3, 2, 0))
    targets = torch.tensor([[1.6, 0, 0, 0], [1, 6, 0, 0]], dtype=torch.float64)
    counted = []

    def counting(using: Tools) -> Tools:
        each = using.each
        return replace(using, each=lambda found: (counted.append(1), each(found))[1])

    ids = torch.tensor([0, 3])
    (expected, all_said), first = choose(plain, state, ids, counting(tools(targets))), len(counted)
    found, said = choose(thrifty, state, ids, counting(tools(targets)))
    assert (first, len(counted) - first) == (5, 3) == (plain.regime.scorings, thrifty.regime.scorings)
    assert torch.equal(found, expected)
    assert said.scalars["alpha"].tolist() == [0.25, 0.25]
    for name, value in said.scalars.items():
        torch.testing.assert_close(value, all_said.scalars[name])


def test_uploads_are_stored_as_they_are_and_what_is_reported_becomes_a_running_mean() -> None:
    method = auto(FAMILY, graphs=["given", "global"], alphas=[0, 1])
    state = state_of(method, W, (1, 3, 2, 0))
    ids = torch.tensor([0, 3])
    uploads = rows((1, 1, 1, 1), (2, 2, 2, 2))
    said = {"told": torch.tensor([1.0, 0.0]), "change_1": torch.tensor([-4.0, 0.0]), "change_2": torch.tensor([2.0, 0])}
    message = Message(uploads, {**said, "alpha": torch.tensor([1.0, -1.0]), "graph": torch.tensor([0.0, -1.0])})
    change = method.merge(state, ids, message, torch.tensor([1.0, 2.0]).double(), Clock(2))
    assert torch.equal(change.rows, uploads)
    assert change.shared is not None
    assert change.shared["changes"].tolist() == [0, -4, 2]
    assert change.tables["examples"].tolist() == [1, 2]
    total = 1 * uploads[0] + 3 * W[1] + 2 * W[2] + 2 * uploads[1]
    torch.testing.assert_close(change.shared["sum"][0], total)
    assert change.notes == {"pull_percent": 100}
    again = method.merge(
        replace(state, shared=change.shared), ids, message, torch.tensor([1.0, 2.0]).double(), Clock(3)
    )
    assert again.shared is not None
    assert again.shared["changes"].tolist() == [0, -4, 2]


def test_a_client_that_shares_no_figures_tells_nothing_of_its_choice() -> None:
    method = auto(FAMILY, graphs=["given"], prior=0)
    state = state_of(method, W, (1, 3, 2, 0))
    using = tools(torch.tensor([[3.0, 0, 0, 0]], dtype=torch.float64), reports=False)
    start, message = choose(method, state, torch.tensor([0]), using)
    assert start[0, 0] == 3
    assert set(message.scalars) == {"alpha", "graph", "told", *(f"change_{j}" for j in range(1, 5))}
    told = {name: value.item() for name, value in message.scalars.items()}
    assert told.pop("alpha") == told.pop("graph") == -1
    assert set(told.values()) == {0}


# ---------------------------------------------------------------- where nothing is left to choose


@pytest.mark.parametrize("kind", WORLDS)
def test_with_no_pull_to_choose_it_is_local_training(kind: str) -> None:
    world = WORLDS[kind]()
    method = build("mira", {"lambda": "auto", "choice": {"alphas": [0]}}, world.cohort)
    laws.law_a_zero_penalty_is_the_simpler_neighbour(method, world, simpler=build("local", {}, world.cohort))


@pytest.mark.parametrize("kind", WORLDS)
def test_all_of_the_mean_of_everybody_is_fedavg_where_everybody_is_present(kind: str) -> None:
    world = WORLDS[kind]()
    settings = {"lambda": "auto", "choice": {"alphas": [1], "graphs": ["global"]}}
    world = replace(world, federation=replace(world.federation, ranks=torch.full_like(world.ranks, 2)))
    scenes = [world.start(build(name, own, world.cohort)) for name, own in (("mira", settings), ("fedavg", {}))]
    for _ in range(3):
        for scene in scenes:
            scene.play(ALL)
    mine, theirs = (begun(scene, ALL) for scene in scenes)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert float((mine - mine[:1]).abs().max()) == 0


@pytest.mark.parametrize("kind", WORLDS)
def test_a_fixed_share_is_the_step_of_mira_with_stored_neighbours_at_the_next_fetch(kind: str) -> None:
    """w_k - eta lambda sum_l a~_kl (w_k - w_l) with eta lambda = 0.3, taken from the rows that are stored (8)."""
    world = WORLDS[kind]()
    settings = {"lambda": "auto", "graph": FAMILY, "choice": {"alphas": [0.3], "graphs": ["given"]}}
    method = build("mira", settings, world.cohort)
    scene = world.reach(method)
    scene.play(ALL)  # so that everybody has trained
    ids, stored = np.array(NEXT), scene.rows
    assert method.facts.graph is not None
    near = couple(method.facts.graph, ids, kind="row", stored=True)
    weights = torch.from_numpy(np.concatenate([near.within, near.outside], axis=1))
    everyone = torch.from_numpy(np.concatenate([ids, near.neighbours]))
    own = stored[ids]
    expected = own - 0.3 * (own - weights @ stored[everyone])
    expected = world.federation.adapters(torch.from_numpy(ids), expected).mask_().rows
    torch.testing.assert_close(begun(scene, torch.from_numpy(ids)), expected, rtol=1e-9, atol=1e-11)


def begun(scene: Scene, ids: Tensor) -> Tensor:
    """The rows that clients would begin their next round from, within their ranks."""
    given = scene.send(ids)
    federation = scene.ledger.federation
    start = federation.adapters(ids, given.rows.clone()).mask_()
    given = given.map(lambda values: federation.adapters(ids, values.clone()).mask_().rows)
    never: Any = None
    blind = Tools(scene.clock, never, never, never, never, never, never)
    return scene.method.client.begin(start, {}, given, blind)[0].rows


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lambda": "auto", "space": "product"}, "space: not with lambda: auto"),
        ({"lambda": "auto", "eta": 0.5, "solver": "exact"}, "eta, solver: not with lambda: auto"),
        ({"lambda": "auto", "clip": 1.0}, "clip: not with"),
        ({"lambda": 0.1, "choice": {"prior": 3}}, "choice is for lambda: auto"),
        ({"lambda": "automatic"}, "auto"),
        ({"lambda": "auto", "choice": {"alphas": [0, 0.5, 0.5]}}, "has a value twice"),
        ({"lambda": "auto", "choice": {"alphas": [0, 2]}}, "less than or equal to 1"),
        ({"lambda": "auto", "choice": {"alphas": []}}, "alphas"),
        ({"lambda": "auto", "choice": {"graphs": ["groups"]}}, "graphs"),
        ({"lambda": "auto", "choice": {"otherwise": 0.3}}, "otherwise: 0.3 is not one of alphas"),
        ({"lambda": "auto", "choice": {"priors": 3}}, "unknown key"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        build("mira", settings, COHORT)
