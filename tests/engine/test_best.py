"""The best round by validation: the right one, with the bits it had, for every kind of method, before and after a stop.

And runs that stop early, which are runs of fewer rounds.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests import tiny
from tests.engine.house import TRAIN, House, Ran, house, run, without_seconds
from torch import Tensor

from fedmira.adapters import Pairs
from fedmira.disk import table
from fedmira.engine.best import Best, Patience
from fedmira.engine.clients import Scores
from fedmira.engine.cost import Work, count_run
from fedmira.engine.events import Event, StoppedEarly
from fedmira.engine.scoring import view_of
from fedmira.engine.simulated import Simulated
from fedmira.errors import MethodError
from fedmira.methods import build, names
from fedmira.methods.base import Method, State
from fedmira.methods.wrappers import only, server_optimizer, tuned_after

# client 3 never trains and 2 does once; a rate at which losses rise again
SCHEDULE = ((0, 1), (1, 2), (0, 1), (0, 2), (0, 1))
ROUNDS = len(SCHEDULE)
RATE = 0.35
RATES = {"flexlora": 1.0, "fedex_lora": 2.0, "scaffold": 2.0, "ffa_lora": 2.0, "rolora": 4.0, "pooled": 1.5}
GROUPS = [{"g": "x"}, {"g": "y"}, {"g": "x"}, {"g": "y"}]


def method(name: str, of: House) -> Method:
    plain: dict[str, Callable[[], Method]] = {
        "private": lambda: only(named("fedavg"), travels="A"),
        "tuned": lambda: tuned_after(named("fedavg"), steps=1),
        "server": lambda: server_optimizer(named("fedavg"), learning_rate=0.3),
    }

    def named(name: str) -> Method:
        settings: dict[str, dict[str, Any]] = {
            "mira": {"lambda": 0.3, "graph": {"kind": "uniform"}},
            "groupavg": {"column": "g"},
        }
        return build(name, settings.get(name, {}), of.cohort(SCHEDULE, GROUPS))

    return plain[name]() if name in plain else named(name)


def world(*, keep: str = "best", **changes: Any) -> House:
    settings = {"count": ROUNDS, "learning_rate": RATE, "evaluation": {"keep": keep, "metrics": ["loss"]}, **changes}
    return house(**settings)


@pytest.fixture(scope="module")
def start() -> Scores:
    return world().start()


@dataclass(frozen=True, eq=False)
class Steps:
    """A run that keeps the last round, stopped after every round: what each client used then."""

    rows: list[Tensor]  # [K, P] after rounds 1, 2, ...
    added: list[Pairs]
    ran: Ran

    def losses(self) -> list[list[float]]:
        """Validation losses [round][client], as results.csv has them."""
        found = [[math.nan] * len(TRAIN) for _ in range(ROUNDS)]
        for row in self.ran.results:
            if row["split"] == "validation" and row["round"] != "0" and row["value"]:
                found[int(row["round"]) - 1][int(row["client"][1:])] = float(row["value"])
        return found


def step_by_step(name: str, folder: Path, start: Scores) -> Steps:
    of = world(keep="last", learning_rate=RATES.get(name, RATE))
    rows, added, ran = [], [], None
    for number in range(1, ROUNDS + 1):
        ran = run(of, method(name, of), folder / "steps", schedule=SCHEDULE, rounds=number, start=start)
        served = ran.serve(torch.arange(len(of)))
        rows.append(served.rows.clone())
        added.append(served.added)
    assert ran is not None
    return Steps(rows, added, ran)


def best_rounds(played: Method, losses: list[list[float]]) -> list[int]:
    """By the definition: the earliest of the lowest, of each client or of the mean; 0 = the client never trained."""
    columns = [[sum(row) / len(row) for row in losses] for _ in TRAIN]
    if view_of(played) == "personal":
        columns = [list(column) for column in zip(*losses, strict=True)]
    if played.has_row_of_each:
        for k, column in enumerate(columns):
            first = min((number for number, ids in enumerate(SCHEDULE, 1) if k in ids), default=ROUNDS + 1)
            column[: first - 1] = [math.inf] * (first - 1)
    return [0 if math.isinf(min(column)) else 1 + column.index(min(column)) for column in columns]


# those of the tree, but for one that trains nobody and two whose rows change once more after the last round
KINDS = (*(name for name in names() if name not in ("untouched", "fedavg_ft", "dfedu")), "private", "server")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("fedavg", "mira", "private", "fedex_lora") else pytest.param(name, marks=pytest.mark.slow)
        for name in KINDS
    ],
)
def test_every_client_keeps_the_bits_of_the_round_whose_validation_was_lowest(
    name: str, tmp_path: Path, start: Scores
) -> None:
    steps = step_by_step(name, tmp_path, start)
    of = world(learning_rate=RATES.get(name, RATE))
    wanted = best_rounds(method(name, of), steps.losses())
    assert set(wanted) - {0, ROUNDS}, "the last round is the best of everybody: nothing is shown; choose another rate"
    for number in (3, ROUNDS):  # what was kept when it stopped has to come back
        ran = run(of, method(name, of), tmp_path / "best", schedule=SCHEDULE, rounds=number, start=start)
    assert list(ran.ended.chosen) == wanted
    for k, number in enumerate(wanted):
        served = ran.serve(torch.tensor([k]))
        assert torch.equal(served.rows[0], steps.rows[(number or ROUNDS) - 1][k]), (k, number)
        before = steps.added[(number or ROUNDS) - 1]
        assert served.added.keys() == before.keys()
        assert all(torch.equal(a, b) for m in before for a, b in zip(served.added[m], before[m], strict=True))
    # what comes of a run does not depend on what is kept of it
    assert without_seconds(ran.records) == without_seconds(steps.ran.records)
    tested = [row for row in ran.results if row["split"] == "test" and row["round"] != "0"]
    rounds = [[int(row["round"]) for row in tested if row["client"] == f"c{k}"] for k in range(len(TRAIN))]
    assert [sorted(own) for own in rounds] == [sorted({number or ROUNDS, ROUNDS}) for number in wanted]
    last = {row["client"]: float(row["value"]) for row in tested if row["round"] == str(ROUNDS)}
    plain = {
        row["client"]: float(row["value"])
        for row in steps.ran.results
        if row["split"] == "test" and row["round"] == str(ROUNDS)
    }
    assert last == pytest.approx(plain, rel=1e-6)


def test_the_last_step_of_dfedu_starts_from_each_clients_best(tmp_path: Path, start: Scores) -> None:
    """Chosen by what each client had before that step."""
    of, kept = world(learning_rate=0.7), world(keep="last", learning_rate=0.7)
    plain = run(kept, method("dfedu", kept), tmp_path / "last", schedule=SCHEDULE, start=start)
    wanted = best_rounds(method("dfedu", of), Steps([], [], plain).losses())
    assert set(wanted) - {0, ROUNDS}
    ran = run(of, method("dfedu", of), tmp_path / "best", schedule=SCHEDULE, start=start)
    assert list(ran.ended.chosen) == wanted
    changed = [not torch.equal(one, other) for one, other in zip(ran.rows, plain.rows, strict=True)]
    assert changed == [number not in (0, ROUNDS) for number in wanted]


def test_what_is_fine_tuned_at_the_end_is_the_best_shared_row(tmp_path: Path, start: Scores) -> None:
    """Tuned from the best round, both are tested: as a run of so many rounds, and as one that keeps the last."""
    of = world()
    ran = run(of, method("tuned", of), tmp_path / "best", schedule=SCHEDULE, start=start)
    (number,) = set(ran.ended.chosen)
    assert 0 < number < ROUNDS
    plain = world(keep="last")
    short = run(plain, method("tuned", plain), tmp_path / "short", schedule=SCHEDULE, rounds=number, start=start)
    assert torch.equal(ran.rows, short.rows)
    assert {row["round"] for row in ran.results if row["split"] == "test"} == {"0", str(number), str(ROUNDS)}
    assert (ran.folder.facts.tokens_tuning or 0) > (short.folder.facts.tokens_tuning or 0) > 0  # both count


def test_the_test_split_has_no_say(tmp_path: Path) -> None:
    """Other test examples: the same rounds and the same bits are kept."""

    def other_tests(k: int, size: int) -> Any:
        client = tiny.client(f"c{k}", train=size)
        return replace(client, test=tiny.client(f"other{k}", train=1, test=3).test)

    kept = []
    for name in ("mira", "server"):
        for number, clients in enumerate((None, [other_tests(k, size) for k, size in enumerate(TRAIN)])):
            of = world(clients=clients)
            kept.append(run(of, method(name, of), tmp_path / f"{name}{number}", schedule=SCHEDULE))
        one, other = kept[-2:]
        assert [r for r in one.results if r["split"] == "test"] != [r for r in other.results if r["split"] == "test"]
        assert one.ended.chosen == other.ended.chosen
        assert torch.equal(one.rows, other.rows)


def test_a_client_without_validation_examples_keeps_the_last(tmp_path: Path) -> None:
    clients = [tiny.client(f"c{k}", train=size, validation=0 if k == 0 else 2) for k, size in enumerate(TRAIN)]
    of, plain = world(clients=clients), world(clients=clients, keep="last")
    ran = run(of, method("local", of), tmp_path / "best", schedule=SCHEDULE)
    last = run(plain, method("local", plain), tmp_path / "last", schedule=SCHEDULE)
    assert ran.ended.chosen[0] == ran.ended.chosen[3] == 0
    assert torch.equal(ran.rows[[0, 3]], last.rows[[0, 3]])
    assert [row["round"] for row in ran.results if row["client"] == "c0" and row["split"] == "test"] == ["0", "5"]


def test_only_rounds_after_which_everybody_is_validated_are_candidates(tmp_path: Path, start: Scores) -> None:
    """Round 3 of 3 is one, as the last, and no longer when the run goes on."""
    of = world(evaluation={"keep": "best", "metrics": ["loss"], "every": 2})
    whole = run(of, method("mira", of), tmp_path / "whole", schedule=SCHEDULE, start=start)
    assert {0, 2} <= set(whole.ended.chosen) <= {0, 2, 4, 5}
    first = run(of, method("mira", of), tmp_path / "parts", schedule=SCHEDULE, rounds=3, start=start)
    assert 3 in first.ended.chosen
    parts = run(of, method("mira", of), tmp_path / "parts", schedule=SCHEDULE, start=start)
    assert parts.ended.chosen == whole.ended.chosen
    assert torch.equal(parts.rows, whole.rows)


def test_best_rows_go_to_a_file_where_rows_are_too_many_for_memory(
    tmp_path: Path, start: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = world(cohort=1)
    in_memory = run(of, method("mira", of), tmp_path / "memory", schedule=SCHEDULE, start=start)
    monkeypatch.setattr(table, "RAM_BYTES", 0)
    served: list[int] = []
    newest = Simulated._newest
    monkeypatch.setattr(
        Simulated, "_newest", lambda self, ids, send: served.append(len(ids)) or newest(self, ids, send)
    )
    ran = run(of, method("mira", of), tmp_path / "file", schedule=SCHEDULE, start=start)
    assert isinstance(ran.clients, Simulated)
    assert ran.clients.aside is not None
    assert ran.clients.aside.table.mapped
    assert max(served) == 1  # of a pass, however many improve
    assert torch.equal(ran.rows, in_memory.rows)


def test_a_delta_holds_the_rows_of_those_that_improved_and_no_others(tmp_path: Path, start: Scores) -> None:
    of = world(learning_rate=0.001)
    run(of, method("mira", of), tmp_path / "run", schedule=SCHEDULE, start=start)
    deltas = 0
    for path in (tmp_path / "run" / "checkpoints").glob("*/aside.safetensors"):
        manifest = json.loads((path.parent / "manifest.json").read_bytes())
        if not manifest["full"]:  # what the round before it improved
            assert {*load_file(path)["ids"].tolist()} <= {*SCHEDULE[manifest["round"] - 2]}
            deltas += 1
    assert deltas


def test_clients_that_each_keep_a_round_need_one_base(tmp_path: Path, start: Scores) -> None:
    of = world(ranks=(2, 2, 2, 2))
    with pytest.raises(MethodError, match=r"evaluation.keep: best with method 'fedex_lora'.*use evaluation.keep=last"):
        run(of, only(method("fedex_lora", of), travels="A"), tmp_path / "run", schedule=SCHEDULE, start=start)


def test_nobody_trains_and_nothing_is_chosen(tmp_path: Path, start: Scores) -> None:
    of = world()
    ran = run(of, method("untouched", of), tmp_path / "run", schedule=SCHEDULE, start=start)
    assert set(ran.ended.chosen) == {0}
    assert {row["round"] for row in ran.results if row["split"] == "test"} == {"0", str(ROUNDS)}


@pytest.mark.parametrize("name", ["mira", "fedavg", "tuned"])
def test_a_plan_counts_both_tests_and_both_fine_tunings(name: str) -> None:
    of = world()

    def count(ends: int) -> Work:
        schedule = of.cohort(SCHEDULE).schedule
        options: dict[str, Any] = {"training": of.training, "every": 1, "max_examples": None}
        return count_run(of.clients, schedule, method=method(name, of), writes=True, ends=ends, **options)

    one, both = count(1), count(2)
    tested = of.clients[:3] if name == "mira" else of.clients
    assert both.scored - one.scored == sum(len(example.ids) for client in tested for example in client.test)
    assert both.answers == 2 * one.answers == 2 * sum(len(client.test) for client in tested)
    assert (both.trained > one.trained) == (name == "tuned")


# ---------------------------------------------------------------- laws of the choice


LOSSES = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(st.lists(LOSSES, min_size=3, max_size=3), min_size=1, max_size=8), st.integers(0, 8))
def test_the_earliest_of_the_lowest_finite_losses_is_chosen_also_over_a_stop(
    rounds: list[list[float]], stop: int
) -> None:
    """A checkpoint is a delta or full; what is chosen comes back from the chain of them."""
    nothing: Any = None
    state: State = State(nothing)
    best, chain = Best(3), []
    for number, losses in enumerate(rounds, 1):
        if number == stop:
            best = Best(3)
            for files in chain:
                best.restore({"best": files} if files else {}, state)
        before = best.loss.clone()
        units = best.offer(torch.tensor(losses, dtype=torch.float64), number)
        assert torch.equal(best.loss[units] < before[units], torch.ones(len(units), dtype=torch.bool))
        files = best.files(full=number % 3 == 0).get("best", {})
        chain.append({name: torch.as_tensor(value).clone() for name, value in files.items()})  # type: ignore[arg-type]
        best.fresh[:] = False
    for unit in range(3):
        column = [losses[unit] if math.isfinite(losses[unit]) else math.inf for losses in rounds]
        wanted = 0 if math.isinf(min(column)) else 1 + column.index(min(column))
        assert int(best.round[unit]) == wanted
        assert float(best.loss[unit]) == min(column)


@given(
    st.lists(st.floats(0, 4).map(lambda value: round(value, 1)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.25]),
)
def test_patience_ends_a_run_where_transformers_would(means: list[float], patience: int, threshold: float) -> None:
    callback = transformers.EarlyStoppingCallback(patience, threshold)
    arguments = transformers.TrainingArguments.__new__(transformers.TrainingArguments)
    arguments.metric_for_best_model, arguments.greater_is_better = "loss", False
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    mine = Patience(patience, threshold)
    for mean in means:
        mine.note(mean)
        callback.on_evaluate(arguments, state, control, {"eval_loss": mean})
        if state.best_metric is None or mean < state.best_metric:  # as the Trainer does afterwards
            state.best_metric = mean
        assert mine.is_exhausted == control.should_training_stop
        again = Patience(patience, threshold)
        again.restore(mine.as_tensor())
        assert again == mine
        if mine.is_exhausted:
            break


@pytest.mark.parametrize("mean", [None, math.nan, math.inf, -math.inf])
def test_a_mean_that_is_no_number_does_not_improve(mean: float | None) -> None:
    patience = Patience(2)
    for value in (2.0, mean):
        patience.note(value)
    assert (patience.lowest, patience.waited) == (2.0, 1)


# ---------------------------------------------------------------- stopping early


def stopping(*, keep: str = "last", **options: Any) -> House:
    return world(early_stopping={"patience": 2, **options}, evaluation={"keep": keep, "metrics": ["loss"]}, keep=keep)


def test_a_run_that_stops_early_is_a_run_of_so_many_rounds(tmp_path: Path, start: Scores) -> None:
    events: list[Event] = []
    of, plain = stopping(threshold=10.0), world(keep="last")
    ran = run(of, method("mira", of), tmp_path / "early", schedule=SCHEDULE, start=start, observer=events.append)
    assert len(ran.records) == 3  # the first validation improves on nothing; two do not by 10 nats
    short = run(plain, method("mira", plain), tmp_path / "short", schedule=SCHEDULE, rounds=3, start=start)
    assert torch.equal(ran.rows, short.rows)
    assert ran.results == short.results
    reason = ran.ended.stopped_early
    assert reason is not None
    assert reason.startswith(
        "the mean validation loss did not fall by more than 10 in 2 validations in a row (lowest: "
    )
    assert [record.get("stopped_early") for record in ran.records] == [None, None, reason]
    assert [event for event in events if isinstance(event, StoppedEarly)] == [StoppedEarly(3, ROUNDS, reason)]
    assert short.ended.stopped_early is None


def test_more_rounds_for_a_run_that_stopped_change_nothing(tmp_path: Path, start: Scores) -> None:
    """As if it had had them from the beginning: it would have stopped at the same round."""
    of = stopping(threshold=10.0)
    first = run(of, method("mira", of), tmp_path / "run", schedule=SCHEDULE, rounds=4, start=start)
    more = run(of, method("mira", of), tmp_path / "run", schedule=SCHEDULE, rounds=5, start=start)
    assert without_seconds(first.records) == without_seconds(more.records)
    assert first.results == more.results
    assert more.ended.stopped_early == first.ended.stopped_early is not None


def test_patience_that_ends_with_the_last_round_stops_nothing(tmp_path: Path, start: Scores) -> None:
    """Round 3 is validated because it is the last of 3; of 5 it is not, and the run goes on."""
    of = stopping(threshold=10.0)
    of = replace(
        of, config=of.config.model_copy(update={"evaluation": of.config.evaluation.model_copy(update={"every": 2})})
    )
    for number in (3, 5):
        ran = run(of, method("mira", of), tmp_path / "run", schedule=SCHEDULE, rounds=number, start=start)
        assert ran.ended.stopped_early is None
    whole = run(of, method("mira", of), tmp_path / "whole", schedule=SCHEDULE, start=start)
    assert torch.equal(ran.rows, whole.rows)
    assert ran.results == whole.results


def test_a_run_that_stops_early_keeps_the_best_of_its_rounds(tmp_path: Path, start: Scores) -> None:
    of = stopping(threshold=10.0, keep="best")
    ran = run(of, method("fedavg", of), tmp_path / "run", schedule=SCHEDULE, start=start)
    means = [record["validation_loss"] for record in ran.records]
    assert set(ran.ended.chosen) == {1 + means.index(min(means))}


def test_a_run_that_waits_for_one_validation_says_so() -> None:
    patience = Patience(1)
    patience.note(1.5)
    patience.note(2.0)
    assert patience.is_exhausted
    assert patience.reason == "the mean validation loss did not fall in one validation (lowest: 1.5000 nats)"
