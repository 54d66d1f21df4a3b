"""The controls in the engine: who trains, on what, from where, and what a kill leaves of it."""

import json
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import small_study, tiny
from tests.engine.house import (
    RANKS,
    SCHEDULE,
    TRAIN,
    House,
    Ran,
    base,
    house,
    run,
    spoil,
    without_seconds,
)
from tests.small_study import CLIENTS, command, differences, outcome, run_folders

import fedmira
from fedmira.adapters import Adapters
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.disk.folders import RunFolder
from fedmira.engine import executor, simulated, tools
from fedmira.engine.clients import Scores
from fedmira.engine.cost import Work
from fedmira.engine.events import ClientsTuned, Event, Observer, RoundDone, silent
from fedmira.engine.phase import local_phase, plan_steps
from fedmira.engine.trainees import plan_pool
from fedmira.errors import MethodError
from fedmira.evaluation.measure import measure_loss
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method
from fedmira.study import dry_run as preview
from fedmira.study import handover

STUDIED: list[dict[str, Any]] = [
    {"name": "untouched"},
    {"name": "pooled"},
    {"name": "fedavg_ft", "steps": 2},
    {"name": "groupavg", "column": "group"},
]


def federation(**changes: Any) -> House:
    return house(metrics=["loss"], **changes)


def play(
    name: str,
    path: Path,
    *,
    of: House | None = None,
    schedule: Sequence[Sequence[int]] = SCHEDULE,
    families: str = "xyxy",
    observer: Observer = silent,
    change: Callable[[Method], Method] = lambda method: method,
    start: Scores | None = None,
    **settings: Any,
) -> Ran:
    """Run one method from what lies at `path`, or from the start."""
    of = of or federation()
    cohort = of.cohort(schedule, [{"family": family} for family in families[: len(of)]])
    method = change(build(name, settings, cohort))
    return run(of, method, path, schedule=schedule, label=name, observer=observer, start=start)


class Interrupted(Exception):
    """What stops a run in a test."""


def stop_at(kind: type[Event], count: int = 1) -> Observer:
    left = [count]

    def observer(event: Event) -> None:
        left[0] -= isinstance(event, kind)
        if isinstance(event, kind) and left[0] == 0:
            raise Interrupted

    return observer


# ---------------------------------------------------------------- untouched


def test_the_untouched_base_makes_no_pass_and_has_its_scores_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = federation().start()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass through the base")

    for module, names in (
        (executor, ("measure_loss", "measure_answers", "local_phase")),
        (simulated, ("score_loss",)),
        (tools, ("measure_loss", "gradients", "losses")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    found = play("untouched", tmp_path / "run", start=scored)
    values = {(row["client"], row["split"], row["round"]): row["value"] for row in found.results}
    assert len(values) == 4 * (4 + 2)  # validation after rounds 0 to 3, test at both ends
    assert all(value == values[client, split, "0"] for (client, split, _), value in values.items())
    assert {row["view"] for row in found.results} == {"global"}


def test_a_round_of_the_untouched_base_is_a_record_of_nothing(tmp_path: Path) -> None:
    found = play("untouched", tmp_path / "run")
    for record, ids in zip(found.records, SCHEDULE, strict=True):
        assert record["clients"] == [f"c{k}" for k in ids]
        assert (record["answered"], record["steps"], record["train_loss"]) == ([], [0, 0], [None, None])
        assert (record["tokens"], record["bytes_up"], record["bytes_down"]) == (0, 0, 0)
        assert record["loss_before"] == record["loss_after"]
    start = found.house.start()
    assert found.records[1]["loss_after"] == [start.validation[k] for k in SCHEDULE[1]]
    served = found.serve(torch.arange(4))
    assert all(not served.leaf(second).any() for _, second in found.house.layout.parts[0].pairs())


# ---------------------------------------------------------------- pooled


def test_the_pool_takes_as_many_steps_and_examples_as_its_clients_would_together(tmp_path: Path) -> None:
    """Texts of three tokens. Steps: 3 + 1, 1 + 2, 3 + 1; examples: 5 + 2, 2 + 3, 5 + 2."""
    of = federation(clients=[tiny.client(f"c{k}", train=size, longest=3) for k, size in enumerate(TRAIN)])
    found = play("pooled", tmp_path / "run", of=of)
    assert [record["steps"] for record in found.records] == [[4, 4], [3, 3], [4, 4]]
    assert [record["tokens"] for record in found.records] == [21, 15, 21]
    assert {record["bytes_up"] + record["bytes_down"] for record in found.records} == {0}
    told = play("pooled", tmp_path / "told", of=of, steps=5)
    assert [(record["steps"], record["tokens"]) for record in told.records] == [([5, 5], 30)] * 3


@pytest.mark.parametrize("length", [{"local_epochs": 2}, {"local_steps": 7, "local_epochs": None}])
def test_batches_of_the_pool_are_cut_from_permutations_of_everything(length: dict[str, int | None]) -> None:
    of = federation(**length)
    training = of.training
    ids = torch.tensor([0, 2])
    plan = plan_pool(of.workplace, ids, training, round_number=2)
    clients = [of.clients[k] for k in ids.tolist()]
    assert [len(batch) for batch in plan] == [
        len(batch) for client in clients for batch in plan_steps(client, training, 2)
    ]
    drawn = np.concatenate(plan)
    assert sorted(drawn[: sum(TRAIN)].tolist()) == list(range(sum(TRAIN)))  # each once before any comes again
    again, later = (np.concatenate(plan_pool(of.workplace, ids, training, round_number=number)) for number in (2, 3))
    assert np.array_equal(again, drawn)
    assert not np.array_equal(later, drawn)


def test_a_pool_of_equal_texts_trains_as_one_client_that_takes_all_the_steps(tmp_path: Path) -> None:
    """Three clients with the same text: two of them with two steps each are one client with four."""
    model = tiny.client("c0", train=1)
    same = [replace(model, id=f"c{k}", name=f"c{k}") for k in range(3)]
    steps = {"local_epochs": None, "ranks": (2, 2, 2), "count": 1}
    found = play("pooled", tmp_path / "pool", of=federation(clients=same, local_steps=2, **steps), schedule=[(0, 2)])
    alone = play("local", tmp_path / "one", of=federation(clients=same[:1], local_steps=4, **steps), schedule=[(0,)])
    assert torch.equal(found.rows, alone.rows.expand(3, -1))
    assert found.records[0]["train_loss"] == alone.records[0]["train_loss"] * 2


def test_data_of_a_client_that_is_never_sampled_are_in_the_pool(tmp_path: Path) -> None:
    others = [tiny.client(f"c{k}", train=size, seed=int(k == 3)) for k, size in enumerate(TRAIN)]
    for name, same in (("pooled", False), ("fedavg", True)):
        one = play(name, tmp_path / f"{name}-one")
        other = play(name, tmp_path / f"{name}-other", of=federation(clients=others))
        assert torch.equal(one.rows, other.rows) == same, name


def test_everyone_is_served_and_scored_with_what_the_pool_returned(tmp_path: Path) -> None:
    found = play("pooled", tmp_path / "run")
    assert torch.equal(found.rows, found.rows[:1].expand_as(found.rows))
    everyone = range(4)
    expected = {
        split: measure_loss(base(), found.serve, found.house.clients, everyone, split=split, cohort=8)
        for split in ("validation", "test")
    }
    last = {(row["client"], row["split"]): float(row["value"]) for row in found.results if row["round"] == "3"}
    for split, losses in expected.items():
        assert [last[f"c{k}", split] for k in everyone] == pytest.approx(losses)
    assert found.records[-1]["loss_before"] == found.records[-1]["loss_after"]
    assert found.records[-1]["loss_after"] == pytest.approx([expected["validation"][k] for k in SCHEDULE[-1]])


@pytest.mark.parametrize(("keep", "taken"), [(False, [4, 3, 4]), (True, [4, 7, 11])])
def test_the_pool_has_moments_of_its_own_that_outlive_a_stop(tmp_path: Path, keep: bool, taken: list[int]) -> None:
    of = federation(keep_optimizer=keep)
    whole = play("pooled", tmp_path / "whole", of=of)
    assert [steps for phase in whole.phases for steps in phase.moments["main"]["steps"].tolist()] == taken
    with pytest.raises(Interrupted):
        play("pooled", tmp_path / "run", of=of, observer=stop_at(RoundDone, 2))
    assert torch.equal(play("pooled", tmp_path / "run", of=of).rows, whole.rows)


def test_a_pool_that_returns_no_numbers_changes_nothing_in_that_round(tmp_path: Path) -> None:
    found = play("pooled", tmp_path / "run", change=spoil(1))
    assert found.records[0]["refused"] == {"c0": "not_finite", "c1": "not_finite"}
    assert (found.records[0]["answered"], found.records[0]["loss_before"]) == ([], [None, None])
    start = found.house.start()
    assert found.records[0]["loss_after"] == pytest.approx([start.validation[k] for k in SCHEDULE[0]])
    assert found.records[1]["answered"] == ["c1", "c2"]


# ---------------------------------------------------------------- fedavg_ft


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return play("fedavg_ft", tmp_path_factory.mktemp("tuned") / "run", epochs=2)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return play("fedavg", tmp_path_factory.mktemp("shared") / "run")


def test_the_rounds_before_fine_tuning_are_those_of_fedavg(tuned: Ran, shared: Ran) -> None:
    assert without_seconds(tuned.records) == without_seconds(shared.records)
    own, others = (
        [[row[key] for key in ("client", "round", "view", "value")] for row in ran.results if row["split"] != "test"]
        for ran in (tuned, shared)
    )
    assert own == others


def test_every_client_ends_where_it_gets_alone_from_the_shared_row(tuned: Ran, shared: Ran) -> None:
    """Also client 3, which was never sampled; each at its own rank."""
    of = tuned.house
    training = replace(of.training, local_epochs=2)
    for k in range(4):
        one = torch.tensor([k])
        given = shared.serve(one).rows
        blank = Adapters(of.layout, given, of.ranks[one], 3 / of.ranks[one].float())
        local = build("local", {}, Cohort(("c0",), (1,), ({},), (), 0))
        last: Any = {"training": training, "clock": Clock(4), "cohort": 1}
        alone = local_phase(base(), local, [of.clients[k]], blank, Message(given), {}, **last)
        served = tuned.serve(one)
        torch.testing.assert_close(served.rows, alone.returned.rows, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(served.rows, blank.with_rows(given.clone()).mask_().rows, atol=1e-3)
        assert (served.ranks.tolist(), served.scale.tolist()) == ([RANKS[k]], [3 / RANKS[k]])
    assert not tuned.rows[~of.layout.rank_mask(of.ranks)].any()


def test_final_scores_are_of_each_clients_own_adapter_and_called_personal(tuned: Ran, shared: Ran) -> None:
    expected = measure_loss(base(), tuned.serve, tuned.house.clients, range(4), split="test", cohort=8)
    last = [row for row in tuned.results if row["split"] == "test" and row["round"] == "3"]
    assert [row["view"] for row in last] == ["personal"] * 4
    assert [float(row["value"]) for row in last] == pytest.approx(expected)
    assert [row["value"] for row in last] != [
        row["value"] for row in shared.results if row["split"] == "test" and row["round"] == "3"
    ]
    assert tuned.folder.facts.tokens_tuning == 2 * sum(client.tokens for client in tuned.house.clients)


def test_steps_are_counted_where_they_are_asked_for(tmp_path: Path) -> None:
    """Texts of three tokens, two to a batch: 5 steps on 5, 2, 3 and 4 texts take 9, 10, 8 and 10 of them."""
    of = federation(clients=[tiny.client(f"c{k}", train=size, longest=3) for k, size in enumerate(TRAIN)])
    found = play("fedavg_ft", tmp_path / "run", of=of, steps=5)
    assert found.folder.facts.tokens_tuning == 3 * (9 + 10 + 8 + 10)


def test_clients_fine_tuned_in_smaller_passes_end_close_to_where_they_end_in_one(tmp_path: Path, tuned: Ran) -> None:
    seen: list[int] = []

    def observer(event: Event) -> None:
        if isinstance(event, ClientsTuned):
            seen.append(event.done)

    found = play("fedavg_ft", tmp_path / "run", of=federation(cohort=3), observer=observer, epochs=2)
    assert seen == [3, 4]
    torch.testing.assert_close(found.rows, tuned.rows, rtol=1e-3, atol=1e-4)


def test_a_pool_that_stands_for_the_first_client_alone_is_measured_as_any_other(tmp_path: Path) -> None:
    """It answers in the name of client 0: whom the server asks is then whom it sampled."""
    found = play("pooled", tmp_path / "run", schedule=((0,), (0,), (0,)))
    assert [record["loss_before"] for record in found.records] == [record["loss_after"] for record in found.records]
    assert all(record["loss_before"] != [None] for record in found.records)


def test_groups_of_one_are_training_alone_whatever_the_ranks(tmp_path: Path) -> None:
    """A shared row is used as it was trained: cut to the client's rank, at its own alpha / rank."""
    alone, grouped = (
        play("local", tmp_path / "local"),
        play("groupavg", tmp_path / "grouped", families="wxyz", column="family"),
    )
    for k in range(4):
        mine, theirs = (found.serve(torch.tensor([k])) for found in (alone, grouped))
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.ranks, theirs.ranks)
        assert torch.equal(mine.scale, theirs.scale)
    losses = [[record["loss_after"] for record in found.records] for found in (alone, grouped)]
    assert losses[0] == losses[1]


def test_a_stop_amid_fine_tuning_leads_to_the_same_bits(tmp_path: Path) -> None:
    of = federation(cohort=2, keep_optimizer=True)
    whole = play("fedavg_ft", tmp_path / "whole", of=of)
    with pytest.raises(Interrupted):
        play("fedavg_ft", tmp_path / "run", of=of, observer=stop_at(ClientsTuned))
    found = play("fedavg_ft", tmp_path / "run", of=of)
    assert torch.equal(found.rows, whole.rows)
    assert found.results == whole.results
    assert without_seconds(found.records) == without_seconds(whole.records)


def test_a_client_that_fine_tunes_to_no_number_keeps_what_it_was_sent_at_its_own_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 0, of rank 1 here, has the most steps; the fine-tuning of three rounds is round 4."""
    of = federation(ranks=(1, 2, 1, 2))
    shared = play("fedavg", tmp_path / "shared", of=of).rows
    with caplog.at_level(logging.WARNING):
        found = play("fedavg_ft", tmp_path / "run", of=of, change=spoil(4))
    assert torch.equal(shared, shared * of.layout.rank_mask(of.ranks))
    assert not torch.equal(shared[0], shared[1])
    assert [torch.equal(found.rows[k], shared[k]) for k in range(4)] == [True, False, False, False]
    assert "'c0' fine-tuned was refused (not_finite)" in caplog.text


# ---------------------------------------------------------------- groupavg


@pytest.mark.filterwarnings("ignore:mira")
def test_groups_of_two_with_everyone_present_are_mira_on_cliques_with_a_coupling_of_a_half(tmp_path: Path) -> None:
    of = federation(ranks=(2, 2, 2, 2), optimizer="sgd")
    always: Any = {"of": of, "schedule": [(0, 1, 2, 3)] * 3}
    graph = {"kind": "groups", "column": "family"}
    found = play("groupavg", tmp_path / "mean", column="family", weights="uniform", **always)
    mira = play("mira", tmp_path / "mira", normalise="none", graph=graph, **always, **{"lambda": 0.5})
    torch.testing.assert_close(found.rows, mira.rows, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.rows[:2], found.rows[2:])
    assert not torch.allclose(found.rows[0], found.rows[1])
    for one, other in zip(found.records, mira.records, strict=True):
        for key in ("train_loss", "loss_before", "loss_after"):
            assert one[key] == pytest.approx(other[key], rel=1e-4), key


def test_a_group_is_moved_by_its_own_clients_alone_and_rests_without_them(tmp_path: Path) -> None:
    """x: 0 and 2; y: 1 and 3. Only x is sampled: y stays at the start, where B = 0."""
    found = play("groupavg", tmp_path / "run", schedule=[(0,), (2,), (0, 2)], column="family")
    module = found.house.layout.parts[0].leaves[0].module
    moved = [bool(found.serve(torch.tensor([k])).product(module).any()) for k in range(4)]
    assert moved == [True, False, True, False]
    assert torch.equal(found.rows[0], found.rows[2])
    assert [record["notes"] for record in found.records] == [{"groups": 1}] * 3


def test_groups_stopped_after_a_round_go_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = play("groupavg", tmp_path / "whole", column="family")
    with pytest.raises(Interrupted):
        play("groupavg", tmp_path / "run", column="family", observer=stop_at(RoundDone, 2))
    assert torch.equal(play("groupavg", tmp_path / "run", column="family").rows, whole.rows)


# ---------------------------------------------------------------- what a refused upload leaves behind


@pytest.mark.filterwarnings("ignore:mira")
def test_what_a_client_keeps_is_as_it_was_after_a_refused_upload_and_a_stop(tmp_path: Path) -> None:
    """Client 2 first comes in round 3, where its upload is refused; after the stop it begins as if it were new."""
    lost: Any = {"schedule": [(0, 1), (0, 1), (1, 2), (1, 2)], "of": federation(count=4), "change": spoil(3)}
    lost |= {"reply": "lost", "graph": {"kind": "uniform"}, "lambda": 0.1}
    whole = play("mira", tmp_path / "whole", **lost)
    assert whole.records[2]["refused"] == {"c2": "not_finite"}
    with pytest.raises(Interrupted):
        play("mira", tmp_path / "run", observer=stop_at(RoundDone, 3), **lost)
    assert torch.equal(play("mira", tmp_path / "run", **lost).rows, whole.rows)


# ---------------------------------------------------------------- whole studies


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture
def make(inputs: tuple[Path, Path], tmp_path: Path) -> Callable[..., Config]:
    def made(name: str = "study", **changes: Any) -> Config:
        kept = {"keep_optimizer": True, **changes.pop("training", {})}
        raw = small_study.settings(*inputs, tmp_path / name, training=kept, **{"methods": STUDIED, **changes})
        return check_config(raw)

    return made


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = tmp_path_factory.mktemp("undisturbed") / "study"
    raw = small_study.settings(*inputs, study, methods=STUDIED, training={"keep_optimizer": True})
    fedmira.run(check_config(raw))
    return study


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, 120, 240, 360, 440])
def test_controls_that_are_killed_go_on_to_the_same_bits(
    count: int, inputs: tuple[Path, Path], tmp_path: Path, undisturbed: Path
) -> None:
    study = tmp_path / "study"
    raw = small_study.settings(*inputs, study, methods=STUDIED, training={"keep_optimizer": True})
    config = small_study.save_config(tmp_path / "study.yaml", raw)
    assert command("run", config, die_at=count).code == -signal.SIGKILL
    ended = command("resume", study)
    assert ended.code == 0, ended.err
    assert differences(outcome(study), outcome(undisturbed)) == []
    assert {RunFolder(run).facts.state for run in run_folders(study)} == {"complete"}


@pytest.mark.slow
def test_more_rounds_later_equal_as_many_from_the_start(make: Callable[..., Config], undisturbed: Path) -> None:
    short = fedmira.run(make("short", federation={"rounds": 2}))
    grown = fedmira.resume(short.path, [f"federation.rounds={small_study.ROUNDS}"])
    assert differences(outcome(grown.path), outcome(undisturbed)) == []


def test_cards_say_whose_the_adapter_is_and_who_trained(undisturbed: Path) -> None:
    drawn = {client for line in fedmira.Run(undisturbed / "pooled" / "seed-3").rounds for client in line["clients"]}
    never = next(client for client in CLIENTS if client not in drawn)

    def card(method: str) -> str:
        return (undisturbed / method / "seed-3" / "adapters" / never / "README.md").read_text(encoding="utf-8")

    assert "- adapter: this client's own\n" in card("fedavg_ft")
    assert "changes nothing" not in card("fedavg_ft")
    assert "of which this client trained in 4" in card("pooled")
    assert "of which this client trained in 0" in card("untouched")
    assert "trained on:" not in card("untouched")
    clients = json.loads((undisturbed / "pooled" / "seed-3" / "clients.json").read_bytes())
    counts = sum(client["examples"]["train"] for client in clients.values())
    assert f"trained on: {counts} examples" in card("pooled")
    for method in ("untouched", "pooled"):
        assert "- adapter: shared by all clients of the run\n" in card(method)
    assert "- adapter: shared by all clients of its group\n" in card("groupavg")


@pytest.mark.slow
def test_the_plan_counts_the_work_and_the_disk_of_the_controls(
    make: Callable[..., Config], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = preview.plan_study(make("planned"))
    for one in fedmira.Study(undisturbed).runs:
        label = one.facts.label
        assert {line["bytes_up"] + line["bytes_down"] for line in one.rounds} == {plan.bytes_per_round[label]}
        trained = sum(line["tokens"] for line in one.rounds) + (one.facts.tokens_tuning or 0)
        assert plan.work[label].trained == pytest.approx(trained)  # every text of this study has the same length
    assert plan.work["untouched"] == Work(0, 0, 0)
    assert plan.run_seconds["untouched"] == 0
    ever, row = fedmira.Study(undisturbed).runs[0].facts.ever_sampled, 4 * plan.parameters
    kept = {"untouched": 0, "pooled": 1 + 2, "fedavg_ft": 1 + 2 * ever, "groupavg": 2 + 2 * ever}  # rows and moments
    assert plan.disk["checkpoints"] == preview.COPIES * row * sum(kept.values())
    assert plan.memory["rows"] == row * (kept["fedavg_ft"] + len(CLIENTS))
    for label, most in kept.items():
        sizes = [path.stat().st_size for path in undisturbed.glob(f"{label}/*/checkpoints/*/*.safetensors")]
        assert sum(sizes) <= preview.COPIES * row * most + 500 * len(sizes)  # headers, ids and losses
    monkeypatch.setattr(handover, "LINK_BYTES", 0)
    linked = preview.plan_study(make("planned"))
    done = fedmira.run(make("linked"))
    assert differences(outcome(done.path), outcome(undisturbed)) == []
    files = {
        run.facts.label: {path.stat().st_ino for path in run.path.glob("adapters/*/adapter_model.safetensors")}
        for run in done.runs
    }
    assert {label: len(own) for label, own in files.items()} == {
        "untouched": 1,
        "pooled": 1,
        "fedavg_ft": 6,
        "groupavg": 2,
    }
    assert linked.disk["adapters"] == (1 + 1 + 6 + 2) * 4 * plan.parameters


def test_a_group_column_that_changed_is_no_way_to_go_on(make: Callable[..., Config], tmp_path: Path) -> None:
    """Rows of groups would go to others: the run knows its groups by their graph."""
    folder = RunFolder(fedmira.run(make(methods=STUDIED[-1:])).path / "groupavg" / "seed-3")
    assert folder.facts.graph_sha256
    folder.update(replace(folder.facts, graph_sha256="0" * 64))
    with pytest.raises(MethodError, match="not the one this run began with"):
        fedmira.resume(tmp_path / "study", ["federation.rounds=5"])
