"""dFedU: who is sent whose row, the step that a client takes from them, and MIRA where both are the same."""

import functools
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import small_study
from tests.laws import laws
from tests.laws.variants import FILES, GRAPHS, SYMMETRIC, write
from tests.laws.worlds import ALL, EVERYONE, WORLDS, Scene, World
from tests.methods.hand import Clients, after, begin, merge, pairs, rows
from torch import Tensor

import fedmira
from fedmira.config.faults import check_config
from fedmira.disk.folders import RunFolder
from fedmira.engine.round import Sender, play
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, State
from fedmira.study import dry_run

NEXT = Clock(2)
CHAIN = "client,neighbour,weight\nc0,c1,1\nc1,c2,0.5\n"  # degrees 1, 1.5, 0.5
UNIFORM = {"kind": "uniform"}


def cohort(clients: int, *, rounds: tuple[tuple[int, ...], ...] | None = None) -> Cohort:
    schedule = rounds if rounds is not None else (tuple(range(clients)),)
    names = tuple(f"c{k}" for k in range(clients))
    return Cohort(names, (1,) * clients, ({},) * clients, tuple(np.array(ids) for ids in schedule), seed=0)


def dfedu(of: Cohort, **settings: Any) -> Method:
    return build("dfedu", {"normalise": "none", **settings}, of)


def of_file(folder: Path, text: str, clients: int, **settings: Any) -> Method:
    path = folder / "graph.csv"
    path.write_text(text, encoding="utf-8")
    return dfedu(cohort(clients), **{"lambda": 0.2, "graph": {"kind": "file", "path": str(path)}, **settings})


def chain(folder: Path, **settings: Any) -> Method:
    """Three clients in a row, similarities 1 and 0.5, c = 0.2."""
    return of_file(folder, CHAIN, 3, **settings)


def served(method: Method, clients: int, uploads: dict[int, float]) -> State:
    """The server once these clients have answered; the others are at 99, where all start."""
    state = begin(method, *[(99, 99)] * clients)
    values = rows(*((value, value) for value in uploads.values()))
    return after(state, merge(method, state, values, *[1] * len(uploads), ids=list(uploads)))


def begun(method: Method, state: State, *ids: int) -> list[float]:
    """The first number of what the clients `ids` begin their next local steps from."""
    message = method.message(state, torch.tensor(ids), NEXT)
    return [one for one, _ in pairs(Clients(method, message.rows).train(message, steps=0).rows)]


def sent(method: Method, state: State, *ids: int) -> list[list[float]]:
    """The first numbers of the rows that each of these clients is sent."""
    message = method.message(state, torch.tensor(ids), NEXT)
    assert bool(message.absent["rows"].all())  # a client has its own
    return [
        [float(row[place, 0]) for name, row in message.more.items() if not message.absent[name][place]]
        for place in range(len(ids))
    ]


# ---------------------------------------------------------------- along edges


def test_a_client_is_sent_the_rows_of_its_neighbours_and_no_other(tmp_path: Path) -> None:
    method = chain(tmp_path)
    state = served(method, 3, {0: 5, 1: 10, 2: 20})
    assert sent(method, state, 0, 1, 2) == [[10], [5, 20], [10]]
    message = method.message(state, torch.tensor([2, 1]), NEXT)
    assert {name: value.tolist() for name, value in message.scalars.items()} == {
        "neighbour_0": [0.1, 0.2],
        "neighbour_1": [0, 0.1],
    }
    assert message.absent["neighbour_1"].tolist() == [True, False]
    assert not bool(message.more["neighbour_1"][0].any())


def test_an_edge_may_lead_one_way(tmp_path: Path) -> None:
    method = of_file(tmp_path, "client,neighbour,weight\nc0,c1,1\nc1,c0,0\n", 2)
    state = served(method, 2, {0: 0, 1: 10})
    assert sent(method, state, 0, 1) == [[10], []]
    assert begun(method, state, 0, 1) == [2, 10]


@pytest.mark.parametrize("normalise", ["none", "row", "symmetric"])
def test_who_has_sent_nothing_is_nobodys_neighbour_and_takes_no_step(normalise: str, tmp_path: Path) -> None:
    """Nor is it counted in a degree: of two that are joined by 1 each has the other alone."""
    method = chain(tmp_path, normalise=normalise)
    state = served(method, 3, {0: 0, 1: 10})
    assert sent(method, state, 0, 1, 2) == [[10], [0], []]
    assert begun(method, state, 0, 1, 2) == pytest.approx([2, 8, 99])


def test_before_anybody_has_trained_nothing_is_sent() -> None:
    method = dfedu(cohort(3), graph=UNIFORM)
    message = method.message(begin(method, *[(99, 99)] * 3), torch.arange(3), Clock(1))
    assert message.more == {}
    assert message.scalars == {}


@pytest.mark.parametrize("normalise", ["none", "row", "symmetric"])
def test_what_a_client_is_sent_does_not_depend_on_who_else_is(normalise: str) -> None:
    method = dfedu(cohort(5), graph={"kind": "random"}, normalise=normalise)
    state = served(method, 5, {0: 0, 1: 10, 3: 30, 4: 40})
    assert begun(method, state, 0, 1, 2, 3, 4) == [begun(method, state, k)[0] for k in range(5)]


def test_the_server_stores_and_forwards_rows_to_the_bit_and_keeps_nothing_else_of_them() -> None:
    method = dfedu(cohort(3), graph=UNIFORM)
    state, uploads = begin(method, *[(99, 99)] * 3), torch.randn(3, 16, dtype=torch.float64)
    change = merge(method, state, uploads, 1, 1, 1)
    assert torch.equal(change.rows, uploads)
    assert change.shared is None
    assert {name: value.tolist() for name, value in change.tables.items()} == {"trained": [True] * 3}
    more = method.message(after(state, change), torch.arange(3), NEXT).more
    assert torch.equal(more["neighbour_0"], uploads[[1, 0, 0]])
    assert torch.equal(more["neighbour_1"], uploads[[2, 2, 1]])


# ---------------------------------------------------------------- the step


def test_three_tasks_in_a_row(tmp_path: Path) -> None:
    """0 + 0.2 x 10;  10 - 0.2 (10 - 5);  20 - 0.2 x 0.5 x 10."""
    method = chain(tmp_path)
    state = served(method, 3, {0: 0, 1: 10, 2: 20})
    assert begun(method, state, 0, 1, 2) == pytest.approx([2, 9, 19])


def test_three_tasks_with_each_pull_shared_among_the_neighbours(tmp_path: Path) -> None:
    """0 + 0.2 x 10;  10 - 0.2 (2/3 x 10 - 1/3 x 10);  20 - 0.2 x 10."""
    method = chain(tmp_path, normalise="row")
    state = served(method, 3, {0: 0, 1: 10, 2: 20})
    assert begun(method, state, 0, 1, 2) == pytest.approx([2, 10 - 2 / 3, 18])


def test_three_tasks_in_the_symmetric_form(tmp_path: Path) -> None:
    """1 / sqrt(1 x 1.5) = 0.81650 and 0.5 / sqrt(1.5 x 0.5) = 0.57735."""
    method = chain(tmp_path, normalise="symmetric")
    expected = [1.6330, 10 - 0.2 * (8.1650 - 5.7735), 20 - 1.1547]
    assert begun(method, served(method, 3, {0: 0, 1: 10, 2: 20}), 0, 1, 2) == pytest.approx(expected, abs=1e-4)


def test_the_newest_row_of_a_neighbour_counts(tmp_path: Path) -> None:
    method = chain(tmp_path)
    state = served(method, 3, {0: 0, 1: 10, 2: 20})
    state = after(state, merge(method, state, rows((50, 50)), 1, ids=[1]))
    assert begun(method, state, 0, 2) == pytest.approx([10, 23])


@pytest.mark.filterwarnings("ignore:dfedu")
def test_on_a_complete_graph_with_a_coupling_of_one_over_n_everybody_has_the_mean() -> None:
    method = dfedu(cohort(3), graph=UNIFORM, **{"lambda": 1 / 3})
    assert begun(method, served(method, 3, {0: 0, 1: 3, 2: 9}), 0, 1, 2) == pytest.approx([4, 4, 4])


def test_the_record_of_a_round_has_the_step_that_its_clients_began_with(tmp_path: Path) -> None:
    """Client 0 is moved by 0.2 and client 2 by 0.1; in the first round nobody was moved."""
    method = chain(tmp_path)
    state = begin(method, *[(99, 99)] * 3)
    change = merge(method, state, rows((0, 0), (1, 1), (2, 2)), 1, 1, 1)
    assert change.notes == {"pull_percent": 0}
    later = method.merge(after(state, change), torch.tensor([0, 2]), Message(rows((0, 0), (2, 2))), torch.ones(2), NEXT)
    assert later.notes["pull_percent"] == pytest.approx(15)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("rounds", [1, 2])
def test_an_unstable_step_is_refused_with_the_limit_also_if_it_is_only_the_one_after_the_last_round(
    rounds: int,
) -> None:
    of = cohort(3, rounds=((0, 1, 2),) * rounds)
    with pytest.raises(MethodError, match=r"dfedu: eta x lambda = 0\.7 must be below 0\.6667 .*normalise: row"):
        dfedu(of, graph=UNIFORM, **{"lambda": 0.7})


def test_the_limit_is_that_of_steps_among_all_that_have_trained() -> None:
    """Of six, four train: 2 / 4. Two of them at a time among four have the same limit, and MIRA among two another."""
    of = cohort(6, rounds=((0, 1), (4, 5), (0, 1)))
    assert build("mira", {"normalise": "none", "lambda": 0.45, "graph": UNIFORM}, of).personal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert dfedu(of, graph=UNIFORM, **{"lambda": 0.45}).personal
        with pytest.raises(MethodError, match=r"must be below 0\.5 "):
            dfedu(of, graph=UNIFORM, **{"lambda": 0.55})


def test_an_asymmetric_graph_may_lead_to_the_mean_of_the_neighbours_but_no_further(tmp_path: Path) -> None:
    text = "client,neighbour,weight\nc0,c1,2\nc1,c0,1\n"
    method = of_file(tmp_path, text, 2, **{"lambda": 0.5})
    assert begun(method, served(method, 2, {0: 0, 1: 8}), 0, 1) == [8, 4]
    with pytest.raises(MethodError, match=r"below 0\.5 .*row sum of an asymmetric graph"):
        of_file(tmp_path, text, 2, **{"lambda": 0.51})


@pytest.mark.filterwarnings("ignore:dfedu")
def test_where_fewer_have_trained_than_was_planned_nobody_goes_beyond_the_mean_of_its_neighbours() -> None:
    """Six alike are stable below 1/3. Five others pull by 5 x 0.3, as planned; four by 4 x 0.3, which becomes 1."""
    method = dfedu(cohort(6), graph=UNIFORM, **{"lambda": 0.3})
    assert begun(method, served(method, 6, {0: 0} | dict.fromkeys(range(1, 6), 4)), 0) == pytest.approx([6])
    four = {0: 0} | dict.fromkeys(range(1, 5), 4)
    assert begun(method, served(method, 6, four), 0) == pytest.approx([4])
    late = dfedu(cohort(6, rounds=((0, 1, 2, 3, 4), (5,))), graph=UNIFORM, **{"lambda": 0.3})
    assert begun(late, served(late, 6, four), 0) == pytest.approx(
        [4.8]
    )  # before round 2 these are all that were planned


def test_a_learned_graph_is_refused_with_the_reason_and_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"needs a server that compares adapters.* or method mira"):
        dfedu(cohort(3), graph={"kind": "learned"})


@pytest.mark.parametrize(
    "settings", [{"lambda": -0.1}, {"lambda": "auto"}, {"eta": -1}, {"neighbours": "stored"}], ids=str
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        dfedu(cohort(2), **settings)


# ---------------------------------------------------------------- MIRA


@functools.cache
def world_of(kind: str) -> World:
    return WORLDS[kind]()


def twins(world: World, folder: Path, graph: str, normalise: str, rounds: Sequence[Sequence[int]]) -> list[Method]:
    """dFedU and both kinds of MIRA, for the same rounds."""
    chosen = dict(GRAPHS[graph])
    if graph in FILES:
        chosen["path"] = str(write(folder / "graph.csv", FILES[graph]))
    settings = {"lambda": 0.05 if normalise == "none" else 0.3, "normalise": normalise, "graph": chosen}
    of = replace(world.cohort, schedule=tuple(np.array(ids) for ids in rounds))
    near = [{"neighbours": neighbours} for neighbours in ("sampled", "stored")]
    return [build("dfedu", settings, of), *(build("mira", {**settings, **one}, of) for one in near)]


def uploads_of(scene: Scene, rounds: Sequence[Sequence[int]]) -> list[Tensor]:
    """What clients return, round by round."""
    found = []
    for ids in map(torch.tensor, rounds):
        found.append(scene.phase(ids, scene.send(ids)).returned.rows)
        scene.play(ids)
    return found


def differ(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((mine - theirs).abs().max()) for mine, theirs in zip(one, other, strict=True))


def step_at_the_end(scene: Scene) -> Tensor:
    """The rows in use after the last round, when clients have fetched once more."""
    send = Sender(scene.method, scene.ledger, scene.clock)
    scene.clients.tune(send, lambda done: None)
    return scene.clients.adapters(ALL, send).rows


@pytest.mark.parametrize("normalise", ["none", "row", "symmetric"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_with_everybody_in_every_round_uploads_are_those_of_mira(graph: str, normalise: str, tmp_path: Path) -> None:
    world, rounds = world_of("quadratic"), [EVERYONE] * 4
    here, *there = (
        uploads_of(world.start(method), rounds) for method in twins(world, tmp_path, graph, normalise, rounds)
    )
    assert [differ(here, one) < 1e-12 for one in there] == [True, True]
    alone = uploads_of(world.start(build("local", {}, world.cohort)), rounds)
    assert differ(here, alone) > 1e-2


@pytest.mark.parametrize("graph", ["groups", "uniform"])
def test_with_everybody_in_every_round_final_adapters_are_those_of_mira(graph: str, tmp_path: Path) -> None:
    world, rounds = world_of("transformer"), [EVERYONE] * 2
    scenes = [world.start(method) for method in twins(world, tmp_path, graph, "row", rounds)]
    here, *there = (uploads_of(scene, rounds) for scene in scenes)
    assert [differ(here, one) < 1e-12 for one in there] == [True, True]
    before, final = scenes[0].used(), step_at_the_end(scenes[0])
    assert [differ([final], [scene.used()]) < 1e-12 for scene in scenes[1:]] == [True, True]
    assert differ([final], [before]) > 1e-4


def test_with_parts_of_the_graph_in_different_rounds_uploads_are_those_of_mira(tmp_path: Path) -> None:
    world, rounds = world_of("quadratic"), [(0, 1, 2), (3, 4, 5), (3, 4, 5), (0, 1, 2), EVERYONE, EVERYONE]
    for graph, same in (("groups", True), ("uniform", False)):
        here, *there = (
            uploads_of(world.start(method), rounds) for method in twins(world, tmp_path, graph, "row", rounds)
        )
        assert [differ(here, one) < 1e-12 for one in there] == [same, same]


@pytest.mark.parametrize("kind", WORLDS)
def test_without_its_penalty_it_is_local_training_to_the_bit_and_nothing_is_forwarded(kind: str) -> None:
    world = world_of(kind)
    alone, local = build("dfedu", {"lambda": 0}, world.cohort), build("local", {}, world.cohort)
    laws.law_a_zero_penalty_is_the_simpler_neighbour(alone, world, simpler=local)
    assert world.third(alone)[1].send(ALL).more == {}
    with pytest.raises(AssertionError):
        laws.law_a_zero_penalty_is_the_simpler_neighbour(build("dfedu", {}, world.cohort), world, simpler=local)


# ---------------------------------------------------------------- both worlds


def on_edges(world: World, folder: Path) -> Method:
    """A graph of five edges; client 0 has the neighbours 1 and 3."""
    path = write(folder / "graph.csv", SYMMETRIC)
    return build("dfedu", {"lambda": 0.3, "graph": {"kind": "file", "path": str(path)}}, world.cohort)


@pytest.mark.parametrize("kind", WORLDS)
def test_rows_of_clients_that_are_not_joined_do_not_reach_a_client(kind: str, tmp_path: Path) -> None:
    """Other stored rows of all but its neighbours: the same bits for it. And of one neighbour: others."""
    world = world_of(kind)
    scene = world.third(on_edges(world, tmp_path))[1]
    one, stored = torch.tensor([0]), scene.rows

    def disturbed(*ids: int) -> Tensor:
        other = scene.copy()
        other.ledger.table.write(torch.tensor(ids, dtype=torch.int64), 0.5 * stored[list(ids)])
        return other.phase(one, other.send(one)).rows

    plain = disturbed()
    assert torch.equal(disturbed(2, 4, 5), plain)
    assert torch.equal(disturbed(0), plain)  # its own it has itself
    assert not torch.equal(disturbed(1), plain)
    assert not torch.equal(disturbed(3), plain)


def test_bytes_down_are_a_row_at_the_receivers_rank_for_each_edge(tmp_path: Path) -> None:
    """In round 3 client 0 has the neighbours 1 and 3, 1 has 0 and 2, 3 has 0 and 4; 5 has not trained."""
    world = world_of("quadratic")
    scene = world.start(on_edges(world, tmp_path))
    ids = torch.tensor([0, 2, 3])
    first = play(scene.method, scene.ledger, scene.clients, ids, scene.clock)
    assert first.bytes_down == 0
    scene = world.reach(scene.method)
    ids = torch.tensor([0, 1, 3, 5])
    played = play(scene.method, scene.ledger, scene.clients, ids, scene.clock)
    small, large = (8 * int(world.layout.sizes(torch.tensor([rank]))) for rank in (1, 2))  # of 8 bytes a number
    assert played.bytes_down == 2 * large + 2 * small + 2 * large + 6 * 8
    assert played.bytes_up == 3 * large + small


# ---------------------------------------------------------------- a study


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    here = tmp_path_factory.mktemp("dfedu")
    return small_study.save_base(here / "base"), small_study.save_data(here / "data.jsonl")


def test_a_study_ends_with_the_adapters_of_mira_and_with_the_bytes_that_its_plan_names(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two groups of three: each client is sent two rows from the second round on."""
    settings = {"lambda": 0.25, "graph": {"kind": "groups", "column": "group"}}
    methods = [{"name": name, **settings} for name in ("mira", "dfedu")]
    changes = {"federation": {"participation": 1.0, "rounds": 2}, "evaluation": {"metrics": ["loss"]}}
    raw = small_study.settings(*inputs, tmp_path / "study", methods=methods, **changes)
    plan = dry_run.plan_study(check_config(raw))
    mira, ours = fedmira.run(check_config(raw)).runs
    for client in small_study.CLIENTS:
        one, other = (run.adapters(client) for run in (mira, ours))
        torch.testing.assert_close(adapter(one), adapter(other), rtol=1e-4, atol=1e-6)
    assert ours.facts.validation_loss == pytest.approx(mira.facts.validation_loss, abs=1e-5)
    row = 4 * plan.parameters
    down = [record["bytes_down"] for record in ours.rounds]
    assert down == [0, 6 * 2 * (row + 8)]
    assert plan.bytes_per_round["dfedu"] == 6 * 2 * row + 6 * row
    assert json.loads((ours.path / "graph.json").read_text(encoding="utf-8"))


def adapter(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_study_that_is_continued_has_the_bits_of_one_that_was_not(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows that clients keep are in the checkpoints: nobody is sent its own."""
    for name, rounds in (("whole", small_study.ROUNDS), ("short", 2)):
        changes = {"methods": [{"name": "dfedu"}], "federation": {"rounds": rounds}}
        fedmira.run(check_config(small_study.settings(*inputs, tmp_path / name, **changes)))
    fedmira.resume(tmp_path / "short", [f"federation.rounds={small_study.ROUNDS}"])
    found = [small_study.outcome(tmp_path / name) for name in ("whole", "short")]
    assert small_study.differences(*found) == []
    assert any(record["bytes_down"] for record in RunFolder(tmp_path / "whole" / "dfedu" / "seed-3").records())
