"""The only loop over rounds: play, make durable, apply, measure.

Everything that differs between methods is in the Method; everything a method must not know is in this package.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedmira.disk.folders import RoundRecord, RunFolder, View
from fedmira.engine.best import Best, Patience, copy_state
from fedmira.engine.clients import Asked, Clients, Reply, Scores, Tuned
from fedmira.engine.events import AnswersWritten, ClientsTuned, Observer, RoundDone, StoppedEarly
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger, commit, restore
from fedmira.engine.newcomers import measure_newcomers, take_in
from fedmira.engine.rates import CONSTANT, Schedule
from fedmira.engine.round import Round, Sender, mask_change, play
from fedmira.engine.scoring import final_scores, known, note, results_of, tests_of, validate, view_of
from fedmira.errors import MethodError
from fedmira.graphs.graph import Graph
from fedmira.methods.base import Clock, Method

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """How long a run is and when it is measured. every: rounds between validations of all clients.

    keep: which adapters are tested and exported: those after the last round, or of the lowest validation loss.
    patience: validations without an improvement by more than threshold nats after which it ends; None = never.
    """

    rounds: int
    every: int
    seed: int
    learning_rate: float
    schedule: Schedule = CONSTANT
    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    threshold: float = 0.0

    def is_due(self, number: int) -> bool:
        """Is everybody validated after this round?"""
        return number % self.every == 0 or number == self.rounds


@dataclass(frozen=True, eq=False)
class Ended:
    """What a run has come to. send: what the adapters that are kept come from; graph: what was learned, if one was.

    test: of every client with the adapter that it keeps. chosen [K]: the best round of each client, whose adapter it
    keeps; 0 = none was chosen, it keeps that of the last. stopped_early: why the run ended early, None = it did not.
    """

    send: Sender
    graph: Graph | None
    test: Scores
    chosen: Sequence[int]
    stopped_early: str | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """One method with one seed while it is carried out."""

    federation: Federation
    method: Method
    clients: Clients
    course: Course
    folder: RunFolder
    ledger: Ledger
    last_sampled: Tensor  # [K] round in which each client was sampled last, 0 = never
    schedule: Sequence[np.ndarray]  # clients of each round
    observer: Observer

    @property
    def sender(self) -> Sender:
        """What the server would send now."""
        return Sender(self.method, self.ledger, self.clock)

    @property
    def clock(self) -> Clock:
        """Of the next round."""
        return self.clock_of(self.ledger.round + 1)

    def clock_of(self, number: int) -> Clock:
        """Of any round."""
        return Clock(number, learning_rate=self.course.schedule.of_round(self.peak, number))

    @property
    def peak(self) -> float:
        """The learning rate that a schedule multiplies: the config's, or the method's own."""
        rate = self.method.regime.learning_rate
        return self.course.learning_rate if rate is None else rate

    @property
    def is_personal(self) -> bool:
        """Is each client validated with a separate adapter, so that each has its own best round?"""
        return view_of(self.method) == "personal"

    @property
    def best_is_with_clients(self) -> bool:
        """Do clients set the best adapters aside, because the server cannot know them?"""
        return self.is_personal or self.method.regime.trainees == "pool"

    @property
    def stopped_early(self) -> str | None:
        """Why no round follows, although the run is not at its last one; None = it goes on, or has ended."""
        patience, following = self.ledger.patience, self.schedule[self.ledger.round : self.course.rounds]
        if patience is not None and patience.is_exhausted and following:
            return patience.reason
        return self.clients.stops(torch.from_numpy(following[0])) if following else None

    @property
    def moved(self) -> Tensor:
        """Which clients [K] are no longer at the common start, where each has a row: sampled, or joined later."""
        since = self.federation.since
        return self.last_sampled > 0 if since is None else (self.last_sampled > 0) | (since > 1)

    def progress(self, clients: int) -> Callable[[int], None]:
        return lambda done: self.observer(AnswersWritten(done, clients))


def run_rounds(
    federation: Federation,
    method: Method,
    clients: Clients,
    schedule: Sequence[np.ndarray],
    folder: RunFolder,
    *,
    course: Course,
    start: Scores,
    observer: Observer,
    ram_bytes: int | None = None,
) -> Ended:
    """Carry one method with one seed from the newest checkpoint to the last round.

    A round counts once its checkpoint is written; then it is applied and measured, and its line goes to metrics.jsonl.
    A crash loses at most the round under way. The newest durable round is measured again after a resume. ram_bytes: of
    the server's rows, from which on they are in a file of the folder, as of a Table. Raises MethodError if the best
    adapters are to be kept of a method with which that cannot be done.
    """
    validation = torch.tensor([math.nan if value is None else value for value in start.validation], dtype=torch.float64)
    best = None
    if course.keep == "best" and method.regime.trainees != "nobody":
        best = Best(len(federation) if view_of(method) == "personal" else 1)
    patience = None if course.patience is None else Patience(course.patience, course.threshold)
    state = federation.first_state(course.seed, method, folder.path, ram_bytes=ram_bytes)
    ledger = Ledger(federation, state, validation, best, patience)
    last_sampled = torch.zeros(len(federation), dtype=torch.int64)
    run = Run(federation, method, clients, course, folder, ledger, last_sampled, schedule, observer)
    facts = restore(folder.checkpoints, ledger, clients, after=partial(take_in, ledger, method))
    for number, ids in enumerate(schedule[: ledger.round], 1):
        last_sampled[torch.from_numpy(ids)] = number
    folder.cut_back(ledger.round - 1)
    if ledger.round == 0:
        folder.append(None, results_of(federation.names, 0, view_of(method), start))
    drawn = method.has_row_of_each and federation.layout.virtual_tokens > 0
    if ledger.round == 0 and drawn:  # drawn virtual tokens change the base before anybody has trained
        validate(clients, method, ledger, run.sender, torch.arange(len(federation)), due=False)
    if ledger.round:
        log.info("resumed after round %d", ledger.round)
        _measure(run, facts, torch.from_numpy(schedule[ledger.round - 1]))
        measure_newcomers(clients, ledger, method, run.sender, folder, start)
    while ledger.round < course.rounds and run.stopped_early is None:
        record = _one_round(run, schedule[ledger.round])
        observer(RoundDone(record, course.rounds))
    if run.stopped_early is not None:
        observer(StoppedEarly(ledger.round, course.rounds, run.stopped_early))
        log.info("stopped early after round %d of %d: %s", ledger.round, course.rounds, run.stopped_early)
    return _end(run, start, everyone_is_tested=not method.has_row_of_each or drawn)


def _end(run: Run, start: Scores, *, everyone_is_tested: bool) -> Ended:
    """Test the adapters that are kept, and where others are kept than those of the last round, these too."""
    ledger, method, names = run.ledger, run.method, run.federation.names
    view: View = "personal" if method.regime.tune is not None else view_of(method)
    tunings: list[tuple[float, Tuned]] = []  # seconds, and what came of it

    def test(send: Sender, ids: Sequence[int]) -> Scores:
        if method.regime.tune is not None:
            tunings.append(_tune(run, send))
        count = len(run.federation) if everyone_is_tested or method.regime.tune is not None else len(ids)
        return final_scores(run.clients, method, ledger, send, ids, start, run.progress(count))

    send, best, chosen = run.sender, ledger.best, torch.zeros(len(names), dtype=torch.int64)
    last: Scores | None = None
    changed = chosen > 0
    if best is not None and bool((best.round > 0).any()):
        chosen = best.round if run.is_personal else best.round.expand(len(names))
        # where each client has a row, its adapter changes in its own rounds alone
        changed = (chosen > 0) & (chosen < (run.last_sampled if method.has_row_of_each else ledger.round))
        if bool(changed.any()):
            last = test(send, changed.nonzero().flatten().tolist())
        if best.state is None:
            run.clients.take_up()
        else:
            send = replace(send, clock=run.clock_of(int(best.round) + 1), state=best.state)
    rounds = [number or ledger.round for number in chosen.tolist()]
    final = test(send, run.moved.nonzero().flatten().tolist())
    run.folder.append(None, tests_of(names, rounds, view, final))
    if any(number < ledger.round for number in rounds):
        whole = final if last is None else _laid_over(final, last, changed)
        tests = tests_of(names, [ledger.round] * len(names), view, whole)
        again = {name for name, number in zip(names, rounds, strict=True) if number < ledger.round}
        run.folder.append(None, [row for row in tests if row.client in again])
    if tunings:
        seconds, tokens = sum(one for one, _ in tunings), sum(tuned.tokens for _, tuned in tunings)
        figures = _figures(run, tunings[-1][1])
        run.folder.update(replace(run.folder.facts, seconds_tuning=seconds, tokens_tuning=tokens, figures=figures))
    run.folder.update(replace(run.folder.facts, validation_loss=_validation_at_end(run, send)))
    graph = None if method.facts.learned is None else method.facts.learned(ledger.state)
    return Ended(send, graph, final, chosen.tolist(), run.stopped_early)


def _validation_at_end(run: Run, send: Sender) -> float | None:
    """Mean validation loss over clients, with the adapters that are kept; None where no client has that split."""
    ledger, everyone = run.ledger, torch.arange(len(run.federation))
    losses = ledger.validation
    if run.method.regime.tune is not None:
        values = run.clients.losses(everyone, send)
        losses = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    elif ledger.best is not None and bool((ledger.best.round > 0).any()):
        best = ledger.best.loss.expand(len(everyone)) if len(ledger.best.loss) == 1 else ledger.best.loss
        losses = torch.where(ledger.best.round.expand(len(everyone)) > 0, best, losses)
    measured = losses[~losses.isnan()]
    return float(measured.mean()) if len(measured) else None


def _laid_over(scores: Scores, others: Scores, changed: Tensor) -> Scores:
    """Return test scores with those of others for the clients that are `changed` [K]."""
    places = changed.tolist()
    test = {
        metric: [others.test[metric][k] if places[k] else value for k, value in enumerate(values)]
        for metric, values in scores.test.items()
    }
    return Scores(scores.validation, test)


def _one_round(run: Run, sampled: np.ndarray) -> RoundRecord:
    """One round, from sampling to its line of metrics.jsonl."""
    began = time.monotonic()
    ledger, clients = run.ledger, run.clients
    take_in(ledger, run.method)  # again, unless the newest checkpoint is older than a client's first round
    ids = torch.from_numpy(sampled)
    asked = clients.ask(ids)
    played = play(run.method, ledger, clients, asked.ids, run.clock)
    if played.change.base and ledger.best is not None and run.best_is_with_clients:
        raise MethodError(
            f"evaluation.keep: best with method '{run.method.name}': its merges add to the base of everybody, and "
            "clients that each keep the adapter of another round would each need another base; use evaluation.keep=last"
        )
    after: list[float | None] | None = None
    if run.method.regime.tolerance is not None:
        played, after = _let_refuse(run, played, run.method.regime.tolerance)
    facts = {**_facts(run, played, asked, ids), "loss_after": after}
    for name, reason in facts["refused"].items():
        shown = run.federation.called.shown(name)
        log.warning("round %d: the upload of client '%s' was refused: %s", ledger.round + 1, shown, reason)
    kept = clients.keep(played.answered)
    ledger.received(played.reply.ids)
    commit(run.folder.checkpoints, ledger, played.change, kept, facts)
    if kept is not None:
        kept.apply()
    ledger.apply(played.change)
    ledger.round += 1
    run.last_sampled[ids] = ledger.round
    del played, kept  # rows of everybody, which are in the ledger now
    return _measure(run, facts, ids, began=began)


def _let_refuse(run: Run, played: Round, tolerance: float) -> tuple[Round, list[float | None]]:
    """Let clients whose loss a reply would worsen by more than `tolerance` keep what they uploaded.

    Returns the round so changed, and the losses of the clients asked. A client without a validation split, or whose
    upload was refused, has no say.
    """
    ledger, change = run.ledger, played.change
    proposed = Sender(run.method, ledger, replace(run.clock, round=run.clock.round + 1), ledger.after(change))
    after = run.clients.losses(played.ids, proposed)
    before = dict(zip(played.reply.ids.tolist(), played.reply.validation, strict=True))
    uploaded = {k: n for n, k in enumerate(played.answered.tolist())}
    rows = change.rows.clone()
    losses, refused = list(after), 0
    for n, k in enumerate(played.ids.tolist()):
        old, new = before.get(k), after[n]
        if k in uploaded and old is not None and new is not None and new > old + tolerance:
            rows[change.ids == k] = played.uploads.rows[uploaded[k]]
            losses[n] = old
            refused += 1
    changed = replace(change, rows=rows, notes={**change.notes, "refused_replies": refused})
    return replace(played, change=mask_change(run.method, ledger, changed)), losses


def _facts(run: Run, played: Round, asked: Asked, sampled: Tensor) -> dict[str, Any]:
    """What the record of a round says of training and merge, as JSON: all that is known before the round is applied.

    Figures of a sampled client are those of the client that was asked for it.
    """
    names, reply = run.federation.names, played.reply
    places = {k: n for n, k in enumerate(reply.ids.tolist())}
    admitted = set(played.answered.tolist())
    asked_for = [int(asked.ids[n]) if n >= 0 else None for n in asked.of.tolist()]
    whose = [None if k is None else places.get(k) for k in asked_for]
    clients = [names[k] for k in sampled.tolist()]
    unmoved = run.method.has_row_of_each and len(admitted) == len(played.ids) and _left_as_uploaded(played)
    return {
        "clients": clients,
        "answered": [name for name, k in zip(clients, asked_for, strict=True) if k in admitted],
        "train_loss": [math.nan if n is None else float(reply.losses[n]) for n in whose],
        "steps": [0 if n is None else int(reply.steps[n]) for n in whose],
        "loss_before": [
            reply.validation[n] if n is not None and k in admitted else None
            for n, k in zip(whose, asked_for, strict=True)
        ],
        "bytes_up": played.bytes_up,
        "bytes_down": played.bytes_down,
        "seconds_training": played.seconds_training,
        "seconds_merge": played.seconds_merge,
        "tokens": reply.tokens,
        "scored": reply.scored,
        "figures": {
            name: [
                _figure(reply.message.scalars[name], n) if k in admitted else None
                for n, k in zip(whose, asked_for, strict=True)
            ]
            for name in (run.method.facts.figures if admitted else ())
        },
        "notes": {**played.change.notes, **reply.notes, **_rates(run, reply)},
        "refused": {
            name: played.refused[k]
            for name, k in zip(clients, asked_for, strict=True)
            if k is not None and k in played.refused
        },
        "unmoved": unmoved,
    }


def _figure(values: Tensor, place: int | None) -> float | None:
    """One client's figure; None where it has not told it."""
    return None if place is None or float(values[place]) == -1 else float(values[place])


def _rates(run: Run, reply: Reply) -> dict[str, float]:
    """Note the mean learning rate over the local steps of a round, where a schedule changes it."""
    schedule, counts = run.course.schedule, reply.steps.tolist()
    if schedule.is_constant or not counts:
        return {}
    number = run.ledger.round + 1
    sums = [count * schedule.mean(run.peak, round_number=number, steps=count) for count in counts]
    return {"learning_rate": math.fsum(sums) / sum(counts)}


def _left_as_uploaded(played: Round) -> bool:
    """Did the merge leave every client with what it returned?"""
    change = played.change
    if not len(change.ids):
        return True  # nothing travels
    return torch.equal(change.ids, played.answered) and torch.equal(change.rows, played.uploads.rows)


def _measure(run: Run, facts: Mapping[str, Any], sampled: Tensor, *, began: float | None = None) -> RoundRecord:
    """Score the newest round, which is durable, and write its line of metrics.jsonl.

    began: when the round did; None where an earlier process carried it out.
    """
    again = time.monotonic()
    ledger, asked = run.ledger, run.clients.ask(sampled)
    due = run.course.is_due(ledger.round) or run.stopped_early is not None
    facts = dict(facts)
    unmoved, after = facts.pop("unmoved"), facts.pop("loss_after")
    if not len(asked.ids):  # nobody trains: the losses known are still true
        after = facts["loss_before"] = known(ledger.validation[sampled])
    elif unmoved and after is None:  # nothing needs to be scored twice
        after = facts["loss_before"]
    if after is None:
        after = validate(run.clients, run.method, ledger, run.sender, sampled, due=due)
    else:
        note(ledger, sampled, after)
    if asked.pooled:
        facts["loss_before"] = after if facts["answered"] else [None] * len(sampled)
    everyone = known(ledger.validation)
    measured = [value for value in everyone if value is not None]
    mean = sum(measured) / len(measured) if due and measured else None
    if due:
        _choose(run, mean)
    earlier = 0.0 if began is not None else facts["seconds_training"] + facts["seconds_merge"]
    record = RoundRecord(
        round=ledger.round,
        loss_after=after,
        validation_loss=mean,
        seconds=earlier + time.monotonic() - (again if began is None else began),
        stopped_early=run.stopped_early,
        **facts,
    )
    results = results_of(run.federation.names, record.round, view_of(run.method), Scores(everyone, {})) if due else []
    run.folder.append(record, results)
    return record


def _choose(run: Run, mean: float | None) -> None:
    """Keep the newest round where its validation losses are the lowest so far. mean: of all clients; None = unknown."""
    ledger = run.ledger
    if ledger.patience is not None:
        ledger.patience.note(mean)
    if ledger.best is None:
        return
    losses = torch.tensor([math.nan if mean is None else mean], dtype=torch.float64)
    if run.is_personal:
        losses = ledger.validation.clone()
        if run.method.has_row_of_each:  # whoever never trained is at the common start, which is not a candidate
            losses[run.last_sampled == 0] = math.nan
    units = ledger.best.offer(losses, ledger.round)
    if not len(units):
        return
    if run.best_is_with_clients:
        run.clients.set_aside(units, run.sender)
    else:
        ledger.best.state = copy_state(ledger.state, rows_only=run.method.send is None)


def _figures(run: Run, tuned: Tuned) -> dict[str, list[float | None]] | None:
    """What each client tells of what it did after the last round."""
    everyone = range(len(run.federation))
    told = {name: [tuned.figures.get(k, {}).get(name, -1) for k in everyone] for name in run.method.facts.figures}
    return {name: [None if value == -1 else value for value in values] for name, values in told.items()} or None


def _tune(run: Run, send: Sender) -> tuple[float, Tuned]:
    """Let every client fine-tune what it would be sent by `send`; return the seconds and what came of it.

    Nothing of it enters the ledger: after a kill it is done again, to the same bits, and more rounds later go on from
    what the server has.
    """
    began, clients = time.monotonic(), len(run.federation)
    tuned = run.clients.tune(send, lambda done: run.observer(ClientsTuned(done, clients)))
    for k, reason in tuned.refused.items():
        name = run.federation.called.shown(run.federation.names[k])
        log.warning("what client '%s' fine-tuned was refused (%s): it keeps what it was sent", name, reason)
    return time.monotonic() - began, tuned
