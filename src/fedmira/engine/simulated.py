"""Simulated clients: many of them in one process, in passes of a cohort.

They are a value of the Protocol `Clients`, as are a pool of their data and nobody (trainees.py). At a real site the
same code has one client.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters, Pairs, norms
from fedmira.adapters.added import BaseVersions, join_pairs
from fedmira.adapters.columns import lay_over, pack
from fedmira.disk.table import Table
from fedmira.engine.clients import Asked, Reply, Scores, Send, Tuned, everybody
from fedmira.engine.federation import Federation
from fedmira.engine.gate import MAX_NORM, Header
from fedmira.engine.memory import ASIDE_FILE, Aside, ClientMemory, Staged
from fedmira.engine.phase import Inputs, PhaseResult
from fedmira.engine.scoring import score_loss, score_test_split
from fedmira.engine.tools import Moments, Toolbox, Training
from fedmira.engine.workplace import Workplace
from fedmira.errors import MethodError
from fedmira.evaluation.measure import Serve
from fedmira.methods.base import Clock, Memory, Message, Method, use_what_was_sent
from fedmira.privacy.budget import Budget
from fedmira.privacy.uploads import Hidden, Uploads, signal_to_noise


class Simulated:
    """Clients that train together in this process, each from its own data and its own memory."""

    def __init__(
        self,
        workplace: Workplace,
        federation: Federation,
        method: Method,
        training: Training,
        *,
        scratch: Path | None = None,
    ) -> None:
        """scratch: a folder for what clients keep if it is too large for RAM."""
        if training.recompute is None:
            training = replace(training, recompute=workplace.recompute)
        training = replace(training, at_once=workplace.at_once)
        self.workplace, self.federation, self.method, self.training = workplace, federation, method, training
        self.budget: Budget | None = None  # of their examples' privacy; None: they train without
        self.uploads: Uploads | None = None  # account of what they have sent with noise; None: nobody counts
        self.memory = ClientMemory(len(federation), scratch)
        self.staged = Staged(self.memory, torch.empty(0, dtype=torch.int64), {})
        self.tuned: Table | None = None  # rows that every client fine-tuned after the last round
        self.aside: Aside | None = None  # rows that clients keep as their best so far
        self.taken_up = False  # do they use these?
        self.versions: tuple[Pairs, ...] = ()  # changes of the base that were received
        self.added: Pairs = {}  # their sum

    def ask(self, sampled: Tensor) -> Asked:
        return everybody(sampled)

    def stops(self, sampled: Tensor) -> str | None:
        return None if self.budget is None else self.budget.refuses(self._ids(sampled))

    def _ids(self, positions: Tensor) -> list[str]:
        return [self.workplace.clients[k].id for k in positions.tolist()]

    def train(self, ids: Tensor, send: Send) -> Reply:
        return self.carry_out(ids, send)

    def carry_out(self, ids: Tensor, send: Send, *, plans: Sequence[Sequence[np.ndarray]] | None = None) -> Reply:
        """Train, as in `train`. plans: the training examples of each step of each client; None: as they are drawn."""
        method, layout, clock = self.method, self.federation.layout, send.clock
        given = send(ids)
        whole, phase = self.local_phase(ids, given, clock, plans=plans)
        self._check_rows_alone(given, phase.returned)
        if self.uploads is not None:
            self.uploads.book({k: mark for one in phase.hidden for k, mark in one.marks.items()}, clock.round)
        travels = method.travels(layout, clock)
        sent = travels & method.trained(layout, clock)
        values: dict[str, Tensor] = {f"method/{name}": value for name, value in phase.memory.items()}
        if self.training.keep_optimizer:
            for of, moments in phase.moments.items():
                values |= {f"moments/{of}/{name}": value for name, value in moments.items()}
        silent: dict[int, str] = {}
        if not bool(travels.all()) or "rows" in given.absent:
            self._own_rows()
            values["row"] = phase.rows
            silent = self._unfit(ids, phase.rows)
        self.staged = self.memory.stage(ids, values)
        heard = torch.tensor([n for n, k in enumerate(ids.tolist()) if k not in silent], dtype=torch.int64)
        returned = phase.returned if not silent else phase.returned.take(heard)
        clients = [self.workplace.clients[k] for k in ids[heard].tolist()]
        federation = self.federation
        return Reply(
            ids=ids[heard],
            message=returned.map(lambda rows: pack(rows, sent)),
            headers=tuple(
                Header(
                    run_id=federation.run,
                    round=clock.round,
                    client=client.id,
                    nonce=f"{clock.round}/{client.id}",
                    base_hash=federation.base,
                    layout_hash=federation.layout_hash,
                    method=method.name,
                    weight=float(len(client.train)),
                )
                for client in clients
            ),
            losses=phase.losses[heard],
            steps=phase.steps[heard],
            validation=self._losses_of(ids[heard], returned, phase, heard, whole, clock),
            tokens=phase.tokens if self.budget is None else self._tokens(ids),
            scored=phase.scored,
            silent=silent,
            notes=self._notes(phase.hidden),
        )

    def _check_rows_alone(self, given: Message, returned: Message) -> None:
        """Raise MethodError where noise is counted on and something goes up, or on, without it."""
        if self.uploads is None or not (returned.scalars or returned.more or "rows" in given.absent):
            return
        raise MethodError(
            f"method '{self.method.name}': its clients send more than a row of what they were sent and noise, so that "
            "no epsilon holds: let Facts.uploads be 'more'"
        )

    def _notes(self, hidden: Sequence[Hidden]) -> dict[str, float]:
        """What whoever has the clients can tell of a round with noise: it is computed from updates without."""
        ratio = signal_to_noise(hidden)
        notes = {} if ratio is None else {"signal_to_noise": ratio}
        return notes if self.uploads is None else {**notes, "epsilon": self.uploads.epsilon()}

    def _tokens(self, ids: Tensor) -> int:
        """Return the mean number of tokens in the samples of a round: that of a sample would say who is in it."""
        assert self.budget is not None
        clients = [self.workplace.clients[k] for k in ids.tolist()]
        shares = self.budget.shares
        return round(sum(shares[one.id].steps * shares[one.id].rate * one.tokens for one in clients))

    def local_phase(
        self,
        ids: Tensor,
        given: Message,
        clock: Clock,
        *,
        training: Training | None = None,
        plans: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> tuple[Message, PhaseResult]:
        """Train from what was sent; return it as whole rows, and what came of it. Nothing is kept.

        training, plans: other than those of a round. Raises MethodError for these where training is private: only
        rounds are paid for.
        """
        whole = self._whole(ids, given, clock)
        start = self._adapters(ids, whole.rows)
        memory = self.memory.recall("method", ids, first=self.method.client.start(start))
        names = {name.split("/")[1] for name in self.memory.tables if name.startswith("moments/")}
        moments = {of: self.memory.recall(f"moments/{of}", ids) for of in sorted(names)}
        if self.budget is not None:
            if training is not None or plans is not None:
                raise MethodError("privacy: clients train in rounds alone, which are paid for; nothing else is")
            begins = [whole.rows, *whole.scalars.values(), *whole.more.values(), *memory.values()]
            begins += [value for of in moments.values() for value in of.values()]
            private, plans = self.budget.pay(self._ids(ids), round_number=clock.round, start=begins)
            training = replace(self.training, private=private)
        training = self.training if training is None else training
        return whole, self.work(ids, start, whole, memory, moments, training=training, clock=clock, plans=plans)

    def work(
        self,
        ids: Tensor,
        start: Adapters,
        given: Message,
        memory: Memory,
        moments: Moments,
        *,
        training: Training,
        clock: Clock,
        plans: Sequence[Sequence[np.ndarray]] | None,
    ) -> PhaseResult:
        """Train on the clients' data; arguments as of phase.local_phase."""
        inputs = Inputs(start, given, memory, moments)
        return self.workplace.executor.train(
            self.workplace, self.method, ids, inputs, training=training, clock=clock, plans=plans
        )

    def losses(self, ids: Tensor, send: Send) -> list[float | None]:
        return self.measure(ids, lambda some_ids: self.adapters(some_ids, send))

    def measure(self, ids: Tensor, serve: Serve) -> list[float | None]:
        """Return validation losses of the clients `ids` with adapters that `serve` gives by position."""
        return score_loss(self.workplace, serve, ids.tolist(), self.method.client.gate, split="validation")

    def adapters(self, ids: Tensor, send: Send) -> Adapters:
        """Return the adapters that the clients `ids` would use now, at their ranks."""
        if self.tuned is not None:
            return self._adapters(ids, self.tuned[ids])
        if self.aside is None or not self.taken_up:
            return self._newest(ids, send)
        has = self.aside.table.written[ids]
        if bool(has.all()):
            return self.federation.adapters(ids, self.aside.table[ids])
        rows = self._newest(ids, send).rows.clone()
        rows[has] = self.aside.table[ids[has]]
        return self._adapters(ids, rows)

    def _newest(self, ids: Tensor, send: Send) -> Adapters:
        """Return the adapters of the clients `ids` after the newest round."""
        given = self._whole(ids, send(ids), send.clock)
        start = self._adapters(ids, given.rows)
        if start.is_padded or start.layout.gaps or not given.rows.is_contiguous():
            start = start.with_rows(given.rows.clone(memory_format=torch.contiguous_format)).mask_()
        if self.method.client.use is use_what_was_sent:
            return start
        memory = self.memory.recall("method", ids, first=self.method.client.start(start))
        return self._used(ids, start, memory, given, send.clock)

    def alone(self, ids: Tensor, send: Send, *, steps: int) -> Adapters:
        """Return the adapters that clients would use after so many local steps from what they would be sent now.

        Nothing is kept, and the server is told nothing. A client whose row is refused has what it would use without.
        """
        whole, phase = self._train_alone(ids, send(ids), send.clock, steps=steps)
        used = self._adapters(ids, phase.returned.rows.clone())
        if self.method.client.use is not use_what_was_sent:
            used = self._used(ids, used, phase.memory, whole, send.clock)
        unfit = list(self._unfit(ids, used.rows))
        if unfit:
            places = [n for n, k in enumerate(ids.tolist()) if k in unfit]
            used.rows[places] = self._newest(ids, send).rows[places]
        return used

    def _train_alone(
        self, ids: Tensor, given: Message, clock: Clock, *, steps: int | None = None, epochs: int | None = None
    ) -> tuple[Message, PhaseResult]:
        """As local_phase, with so many steps, which may be none, or epochs, and a schedule of their own."""
        schedule = self.training.schedule.alone()
        training = replace(self.training, local_steps=steps, local_epochs=epochs, schedule=schedule)
        plans: list[list[np.ndarray]] | None = None if steps or epochs else [[] for _ in ids]
        return self.local_phase(ids, given, clock, training=training, plans=plans)

    def test(self, ids: Sequence[int], send: Send, progress: Callable[[int], None]) -> Scores:
        gate = self.method.client.gate
        return score_test_split(
            self.workplace, lambda some_ids: self.adapters(some_ids, send), ids, progress, gate=gate
        )

    def tune(self, send: Send, progress: Callable[[int], None]) -> Tuned:
        """Fine-tune in passes of clients with about as many examples, as many passes at a time as can be computed.

        In descending order of steps, which phase.cut_into_passes keeps: so who shares a pass does not depend on that.
        """
        rows, kinds = self.federation.start_rows(self.training.seed)
        tuned = Table(rows, kinds, self.memory.scratch)
        tokens = 0
        refused: dict[int, str] = {}
        figures: dict[int, Mapping[str, float]] = {}
        self.tuned = None
        alike = sorted(range(len(self.federation)), key=lambda k: -len(self.workplace.clients[k].train))
        width = self.workplace.cohort * self.workplace.executor.width
        for first in range(0, len(alike), width):
            ids = torch.tensor(alike[first : first + width])
            trained, phase, unfit = self._tune_together(ids, send)
            tuned.write(ids, trained)
            tokens += phase.tokens
            refused |= unfit
            said = [(name, phase.returned.scalars[name].tolist()) for name in self.method.facts.figures]
            figures |= {k: {name: values[n] for name, values in said} for n, k in enumerate(ids.tolist())}
            progress(first + len(ids))
        self.tuned = tuned
        return Tuned(tokens, refused, figures)

    def _tune_together(self, ids: Tensor, send: Send) -> tuple[Tensor, PhaseResult, dict[int, str]]:
        """Return the rows [n, P] that the clients `ids` use from now on, what led there, and client -> why not.

        A client whose row is refused keeps what it was sent. One that has taken up what it had set aside begins there.
        """
        assert self.method.regime.tune is not None
        kind, length = self.method.regime.tune
        given = send(ids)
        if self.taken_up:
            travels = self.method.travels(self.federation.layout, send.clock)
            rest = {name: value for name, value in given.absent.items() if name != "rows"}
            given = replace(given, rows=pack(self.adapters(ids, send).rows, travels), absent=rest)
        whole, phase = self._train_alone(ids, given, send.clock, **{kind: length})
        unfit = self._unfit(ids, phase.returned.rows)
        rows = self.federation.adapters(ids, whole.rows.clone()).mask_().rows
        fit = torch.tensor([k not in unfit for k in ids.tolist()])
        rows[fit] = phase.returned.rows[fit]
        return rows, phase, unfit

    def keep(self, ids: Tensor) -> Staged:
        chosen = {k: n for n, k in enumerate(self.staged.ids.tolist())}
        index = torch.tensor([chosen[k] for k in ids.tolist()], dtype=torch.int64)
        staged, self.staged = self.staged, Staged(self.memory, ids[:0], {})
        values = {name: value[index] for name, value in staged.values.items()}
        return Staged(self.memory, ids, values, self.aside)

    def set_aside(self, ids: Tensor, send: Send) -> None:
        """Set the rows aside a pass at a time, so that no more of them are in memory than in training."""
        if not len(ids):
            return
        aside = self._aside()
        for first in range(0, len(ids), self.workplace.cohort):
            some_ids = ids[first : first + self.workplace.cohort]
            aside.put(some_ids, self._newest(some_ids, send).rows)

    def take_up(self) -> None:
        self.taken_up = True

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        if "row" in files.get("memory", {}):
            self._own_rows()
        self.memory.restore(files)
        if ASIDE_FILE in files:
            self._aside().restore(files)

    def _aside(self) -> Aside:
        """What clients have set aside: one more row of each that has."""
        if self.aside is None:
            nothing = torch.zeros(1, self.federation.layout.size, dtype=self.federation.dtype)
            kinds = torch.zeros(len(self.federation), dtype=torch.int64)
            self.aside = Aside(Table(nothing, kinds, self.memory.scratch))
        return self.aside

    def _own_rows(self) -> Table:
        """The rows of clients that keep columns to themselves; they begin as the common start."""
        if "row" not in self.memory.tables:
            rows, kinds = self.federation.start_rows(self.training.seed)
            self.memory.add("row", Table(rows, kinds, self.memory.scratch))
        return self.memory.tables["row"]

    def _adapters(self, ids: Tensor, rows: Tensor) -> Adapters:
        """Return rows [n, P] as adapters of the clients `ids`, on the base as it is now."""
        return replace(self.federation.adapters(ids, rows), added=self.added)

    def _receive(self, base: BaseVersions | None) -> None:
        """Bring the base to the newest version."""
        versions = () if base is None else base.after(self.versions)
        same = len(versions) == len(self.versions) and all(map(operator.is_, versions, self.versions))
        if not same:
            self.versions, self.added = versions, join_pairs(versions)

    def _whole(self, ids: Tensor, given: Message, clock: Clock) -> Message:
        """Lay what was sent over each client's own row, and bring the base up to date."""
        self._receive(given.base)
        travels = self.method.travels(self.federation.layout, clock)
        if "rows" in given.absent:
            own = pack(self._own_rows()[ids], travels)
            given = replace(given, rows=torch.where(given.absent["rows"][:, None], own, given.rows))
        if bool(travels.all()):
            return given
        own_rows = self._own_rows()[ids]
        return given.map(lambda rows: lay_over(own_rows, travels, rows))

    def _used(self, ids: Tensor, start: Adapters, memory: Memory, given: Message, clock: Clock) -> Adapters:
        clients = [self.workplace.clients[k] for k in ids.tolist()]
        trained = self.method.trained(self.federation.layout, clock)
        box = Toolbox(self.workplace.base, clients, self.training, clock, start.rows, trained)
        return self.method.client.use(start, memory, given, box.tools(0, [0] * len(ids))).mask_()

    def _losses_of(
        self, ids: Tensor, returned: Message, phase: PhaseResult, places: Tensor, given: Message, clock: Clock
    ) -> list[float | None]:
        """Validation losses with the adapters that the clients would use if the server changed nothing."""
        where = {k: n for n, k in enumerate(ids.tolist())}

        def serve(some: Tensor) -> Adapters:
            index = torch.tensor([where[k] for k in some.tolist()])
            adapters = self._adapters(some, returned.rows[index])
            if self.method.client.use is use_what_was_sent:
                return adapters
            memory = {name: value[places[index]] for name, value in phase.memory.items()}
            return self._used(some, adapters.with_rows(adapters.rows.clone()), memory, given.take(places[index]), clock)

        return self.measure(ids, serve)

    def _unfit(self, ids: Tensor, rows: Tensor) -> dict[int, str]:
        """Say whose own row is not finite, or too long, to be kept."""
        lengths = norms(rows).tolist()
        reasons = ("norm" if math.isfinite(length) else "not_finite" for length in lengths)
        return {
            k: reason
            for k, length, reason in zip(ids.tolist(), lengths, reasons, strict=True)
            if not length <= MAX_NORM
        }
