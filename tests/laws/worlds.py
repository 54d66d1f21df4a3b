"""Two small federations in which every method must obey the laws: a quadratic one and a tiny transformer, in float64.

Six clients of two families, ranks 1 and 2 in one stack, uneven numbers of examples. Client 5 is never sampled in the
first two rounds, so that a law sees trained, returning and first-time clients at once. Rounds are the engine's own:
the same `play`, table of rows, memory of clients and gate as in a study.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from tests import tiny
from torch import Tensor

from fedmira.adapters import Adapters, Layout, lora_layout
from fedmira.adapters.optim import on_columns, sgd
from fedmira.data.batches import ClientData, Truncation
from fedmira.data.partition import client_key
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger
from fedmira.engine.memory import ClientMemory
from fedmira.engine.phase import PhaseResult
from fedmira.engine.round import Sender, play
from fedmira.engine.simulated import Simulated
from fedmira.engine.tools import Moments, Training
from fedmira.engine.workplace import Workplace
from fedmira.methods.base import Change, Clock, Cohort, Memory, Message, Method, Tools

CLIENTS = 6
FAMILIES = ("a", "a", "a", "b", "b", "b")
EXAMPLES = (5, 2, 3, 4, 2, 3)
RANKS = (2, 1, 2, 2, 1, 2)
ALPHA = 3.0
BEFORE = ((0, 2, 3), (1, 3, 4))  # rounds 1 and 2
NEXT = (0, 1, 3, 5)  # round 3: 0 and 1 come back, 3 never paused, 5 is new
EVERYONE = tuple(range(CLIENTS))
RATE = 0.2
STEPS = 3  # of the quadratic world

ALL = torch.tensor(EVERYONE)


@dataclass(eq=False)
class Scene:
    """A federation under a method, after some rounds: the server's ledger, and the clients."""

    method: Method
    ledger: Ledger
    clients: Simulated

    @property
    def clock(self) -> Clock:
        return Clock(self.ledger.round + 1, learning_rate=RATE)

    def send(self, ids: Tensor) -> Message:
        """What the server would send now, as it travels."""
        return Sender(self.method, self.ledger, self.clock)(ids)

    def phase(self, ids: Tensor, given: Message) -> PhaseResult:
        """What a local phase gives; nothing is kept."""
        return self.clients.local_phase(ids, given, self.clock)[1]

    def seen(self, ids: Tensor, given: Message) -> Tensor:
        """What was sent, laid over each client's own row, within its rank [n, P]."""
        rows = self.clients._whole(ids, given, self.clock).rows
        return self.ledger.federation.adapters(ids, rows.clone()).mask_().rows

    def play(self, ids: Tensor) -> Change:
        """Carry out a whole round as the engine does; return what was applied."""
        played = play(self.method, self.ledger, self.clients, ids, self.clock)
        self.clients.keep(played.answered).apply()
        self.ledger.received(played.reply.ids)
        self.ledger.apply(played.change)
        self.ledger.round += 1
        return played.change

    def used(self, ids: Tensor = ALL) -> Tensor:
        """The rows that clients would use now [n, P]."""
        return self.clients.adapters(ids, Sender(self.method, self.ledger, self.clock)).rows

    def copy(self) -> "Scene":
        """The same scene, of which nothing is shared that a round changes."""
        ledger, clients = copy.copy(self.ledger), copy.copy(self.clients)
        state = ledger.state
        stored = replace(state.adapters, rows=copy.deepcopy(state.adapters.rows))
        tables = {name: value.clone() for name, value in state.tables.items()}
        ledger.state = replace(state, adapters=stored, shared=dict(state.shared), tables=tables)
        ledger.validation, ledger.known = ledger.validation.clone(), ledger.known.clone()
        memory = clients.memory
        clients.memory = ClientMemory(memory.clients, None, copy.deepcopy(memory.tables), set(memory.remembered))
        return Scene(self.method, ledger, clients)

    @property
    def rows(self) -> Tensor:
        """All rows of the server."""
        return self.ledger.table[torch.arange(len(self.ledger.table))]

    def remembered(self, ids: Tensor = ALL) -> dict[str, Tensor]:
        """All that clients keep."""
        return {name: table[ids] for name, table in self.clients.memory.tables.items()}


@dataclass(frozen=True, eq=False)
class World:
    """A federation without its method.

    people: method, federation, names of clients, those with other data -> the clients. width: of the base's embeddings.
    """

    cohort: Cohort
    federation: Federation
    people: Callable[[Method, Federation, Sequence[str], frozenset[str]], Simulated]
    width: int
    disturbed: frozenset[str] = frozenset()

    @property
    def layout(self) -> Layout:
        return self.federation.layout

    @property
    def ranks(self) -> Tensor:
        return self.federation.ranks

    def under(self, method: Method) -> "World":
        """This world with the rows that a method carries."""
        return replace(self, federation=self.federation.under(method, self.width))

    def disturb(self, clients: Sequence[int]) -> "World":
        """The same world, but these clients hold other data."""
        return replace(self, disturbed=frozenset(self.cohort.ids[k] for k in clients))

    def rename(self, order: Sequence[int]) -> "World":
        """The same clients at other positions: position p holds what was client order[p]."""
        where = {old: new for new, old in enumerate(order)}
        names = tuple(self.cohort.ids[k] for k in order)
        cohort = Cohort(
            names,
            tuple(self.cohort.examples[k] for k in order),
            tuple(self.cohort.columns[k] for k in order),
            tuple(np.sort([where[int(k)] for k in ids]) for ids in self.cohort.schedule),
            self.cohort.seed,
        )
        federation = replace(self.federation, names=names, ranks=self.federation.ranks[list(order)])
        return replace(self, cohort=cohort, federation=federation)

    def adapters(self, ids: Tensor, rows: Tensor) -> Adapters:
        return self.federation.adapters(ids, rows)

    def weights(self, ids: Tensor) -> Tensor:
        return torch.tensor(self.cohort.examples, dtype=torch.float64)[ids]

    def start(self, method: Method) -> Scene:
        """The common start, before any round."""
        state = self.federation.first_state(0, method)
        ledger = Ledger(self.federation, state, torch.zeros(CLIENTS, dtype=torch.float64))
        return Scene(method, ledger, self.people(method, self.federation, self.cohort.ids, self.disturbed))

    def reach(self, method: Method, *, again: bool = False) -> Scene:
        """The scene after two trained rounds with half of the clients each.

        It is reached once for a method and copied, unless `again`.
        """
        key = self._key(method)
        if again or key not in REACHED:
            scene = self.start(method)
            for ids in self.cohort.schedule[: len(BEFORE)]:
                scene.play(torch.from_numpy(ids))
            if again:
                return scene
            REACHED[key] = scene
        return REACHED[key].copy()

    def third(self, method: Method) -> tuple[Change, Scene]:
        """The scene after round 3 as well, and what that round changed; carried out once for a method and copied."""
        key = self._key(method)
        if key not in PLAYED:
            scene = self.reach(method)
            PLAYED[key] = scene.play(torch.from_numpy(self.cohort.schedule[len(BEFORE)])), scene
        change, scene = PLAYED[key]
        return change, scene.copy()

    def trained(self, method: Method) -> PhaseResult:
        """What the local phase of round 3 gives; carried out once for a method and copied."""
        key = self._key(method)
        if key not in TRAINED:
            scene, ids = self.reach(method), torch.from_numpy(self.cohort.schedule[len(BEFORE)])
            TRAINED[key] = scene.phase(ids, scene.send(ids))
        return copy.deepcopy(TRAINED[key])

    def _key(self, method: Method) -> tuple[Any, ...]:
        return (id(method), self.disturbed, self.cohort.ids, self.federation.layout_hash)


# By method and world. Scenes hold their methods, so that ids stay theirs.
REACHED: dict[tuple[Any, ...], Scene] = {}
PLAYED: dict[tuple[Any, ...], tuple[Change, Scene]] = {}
TRAINED: dict[tuple[Any, ...], PhaseResult] = {}


def world(
    layout: Layout,
    people: Callable[[Method, Federation, Sequence[str], frozenset[str]], Simulated],
    *,
    width: int,
) -> World:
    names = tuple(f"c{k}" for k in EVERYONE)
    cohort = Cohort(
        names,
        EXAMPLES,
        tuple({"family": family} for family in FAMILIES),
        tuple(np.array(ids) for ids in (*BEFORE, NEXT, EVERYONE)),
        seed=4,
    )
    federation = Federation(names, layout, torch.tensor(RANKS), ALPHA, dtype=torch.float64)
    return World(cohort, federation, people, width)


@functools.cache
def _normal(name: str, disturbed: bool, size: int) -> np.ndarray:
    """Where the loss of a client of this name is least; other data is another place."""
    return np.random.default_rng([client_key(name), int(disturbed), client_key("target")]).normal(size=size)


class Quadratic(Simulated):
    """loss_k = 1/2 ||w - target_k||^2, gradient w - target_k; three steps of SGD with momentum.

    Each of a client's B examples is a label y ~ N(w, 1) with loss 1/2 ||w - y||^2: with labels drawn from the model the
    gradient of their mean is noise / sqrt(B), and B times its square is on average the curvature, 1.
    """

    disturbed: frozenset[str] = frozenset()

    def targets(self, ids: Tensor) -> Tensor:
        """What each client is drawn to [n, P]; a row's alignment padding belongs to nobody."""
        names, layout = [self.federation.names[k] for k in ids.tolist()], self.federation.layout
        rows = [_normal(name, name in self.disturbed, layout.size) for name in names]
        return torch.from_numpy(np.stack(rows)) * layout.rank_mask(torch.tensor([2]))

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
        plans: object = None,
    ) -> PhaseResult:
        layout, half = self.federation.layout, self.method.client
        adapters = start.with_rows(given.rows.clone()).mask_()
        given = given.map(lambda rows: start.with_rows(rows.clone()).mask_().rows)
        trained = self.method.trained(layout, clock)
        optimizer = on_columns(training.optimizer, trained)
        moments = {of: {name: value.clone() for name, value in some.items()} for of, some in moments.items()}
        moments.setdefault("main", optimizer.start(adapters.rows))
        targets, losses = self.targets(ids), torch.zeros(len(ids), dtype=torch.float64)

        def loss(adapters: Adapters, *, on: Literal["validation", "batch"] = "validation") -> Tensor:
            return (adapters.rows - targets).square().sum(dim=1) / 2

        def each(adapters: Adapters) -> tuple[Tensor, Tensor]:
            return loss(adapters)[:, None], torch.ones(len(adapters), 1, dtype=torch.float64)

        def grad(adapters: Adapters) -> tuple[Tensor, Tensor]:
            losses.add_(loss(adapters))
            return loss(adapters), (adapters.rows - targets) * trained

        def update(adapters: Adapters, gradient: Tensor, *, of: str = "main", who: Tensor | None = None) -> Adapters:
            own = moments.setdefault(of, optimizer.start(adapters.rows))
            rest = [] if who is None else (~who).nonzero().flatten().tolist()
            kept = [(value, value[rest]) for value in (adapters.rows, *own.values()) if rest]
            optimizer.update(adapters.rows, gradient, own, RATE)
            for value, before in kept:
                value[rest] = before
            return adapters.mask_()

        def rng(name: str) -> Sequence[np.random.Generator]:
            names = [self.federation.names[k] for k in ids.tolist()]
            return [np.random.default_rng([clock.round, client_key(one), client_key(name)]) for one in names]

        def curvature(adapters: Adapters) -> tuple[Tensor, Tensor]:
            examples = torch.tensor([len(self.workplace.clients[k].train) for k in ids.tolist()])
            drawn = torch.from_numpy(np.stack([stream.normal(size=layout.size) for stream in rng("curvature")]))
            noise = drawn * layout.rank_mask(torch.tensor([2])) * trained
            return examples, noise / examples.double().sqrt()[:, None]

        def tools(step: int) -> Tools:
            at = replace(clock, step=step, steps=torch.full((len(ids),), STEPS), learning_rate=RATE)
            return Tools(at, grad, update, rng, curvature, loss, each)

        memory = {name: value.clone() for name, value in memory.items()}
        adapters, memory = half.begin(adapters, memory, given, tools(0))
        for step in range(STEPS):
            adapters, memory = half.step(adapters, memory, given, tools(step))
        message, memory = half.finish(adapters, memory, given, tools(STEPS))
        steps = torch.full((len(ids),), STEPS)
        return PhaseResult(adapters.rows, message, memory, moments, losses / STEPS, steps, 0)

    def measure(self, ids: Tensor, serve: Callable[[Tensor], Adapters]) -> list[float | None]:
        return [float(value) for value in (serve(ids).rows - self.targets(ids)).square().sum(dim=1) / 2]


def _training() -> Training:
    return Training(sgd(momentum=0.5), RATE, 2, 2, None, 1.0, True, 0.0, seed=4)


def quadratic() -> World:
    """Quadratic losses."""
    nothing: Any = None

    def people(method: Method, federation: Federation, names: Sequence[str], disturbed: frozenset[str]) -> Simulated:
        clients = tuple(
            ClientData(name, name, None, {}, (nothing,) * EXAMPLES[int(name[1:])], (), (), Truncation())
            for name in names
        )
        found = Quadratic(Workplace(nothing, clients, 3), federation, method, replace(_training(), seed=0))
        found.disturbed = disturbed
        return found

    return world(lora_layout([("first", 3, 2), ("second", 2, 2)], 2), people, width=3)


@functools.cache
def _gpt2() -> tiny.Base:
    return tiny.base("gpt2", targets=["c_attn", "attn.c_proj"], n_layer=1)


def transformer(**training: Any) -> World:
    """GPT-2 of one layer through the engine's own local phase; two clipped steps of SGD with momentum, three in a pass.

    training: fields of Training that differ.
    """
    base = _gpt2()

    def people(method: Method, federation: Federation, names: Sequence[str], disturbed: frozenset[str]) -> Simulated:
        clients = tuple(tiny.client(name, train=EXAMPLES[int(name[1:])], seed=int(name in disturbed)) for name in names)
        return Simulated(Workplace(base, clients, 3), federation, method, replace(_training(), seed=0, **training))

    return world(tiny.layout(base, 2), people, width=base.width)


WORLDS: dict[str, Callable[[], World]] = {"quadratic": quadratic, "transformer": transformer}
