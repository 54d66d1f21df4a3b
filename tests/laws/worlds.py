"""Two small federations in which every method must obey the laws: a quadratic one and a tiny transformer, in float64.

Six clients of two families, ranks 1 and 2 in one stack, uneven numbers of examples. Client 5 is never sampled in the
first two rounds, so that a law sees trained, returning and first-time clients at once.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tests import tiny
from torch import Tensor

from fedmira.adapters import Adapters, Layout, lora_layout, scales, start_adapters
from fedmira.adapters.optim import sgd
from fedmira.data.batches import ClientData
from fedmira.data.partition import client_key
from fedmira.engine.ledger import Ledger
from fedmira.engine.phase import Training, local_phase
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

# (method, clients, what they were sent, what they kept, clock) -> what they return, what they keep
Kept = tuple[Message, Memory]
Phase = Callable[[Method, Tensor, Message, Memory, Clock], Kept]


@dataclass(frozen=True, eq=False)
class World:
    """A federation without its method. phases: order of the clients, those with other data -> their local phase.

    again: the same world with another layout of rows; width: of its embeddings.
    """

    cohort: Cohort
    layout: Layout
    ranks: Tensor
    phases: Callable[[Sequence[str], frozenset[str]], Phase]
    again: Callable[[Layout], "World"]
    width: int
    disturbed: frozenset[str] = frozenset()

    def under(self, method: Method) -> "World":
        """This world with the rows that a method carries."""
        return self if method.layout is None else self.again(method.layout(self.layout, self.width))

    def train(
        self, method: Method, ids: Tensor, given: Message, memory: Memory, *, number: int = 3
    ) -> tuple[Message, Memory]:
        return self.phases(self.cohort.ids, self.disturbed)(method, ids, given, memory, Clock(number))

    def disturb(self, clients: Sequence[int]) -> "World":
        """The same world, but these clients hold other data."""
        return replace(self, disturbed=frozenset(self.cohort.ids[k] for k in clients))

    def rename(self, order: Sequence[int]) -> "World":
        """The same clients at other positions: position p holds what was client order[p]."""
        where = {old: new for new, old in enumerate(order)}
        cohort = Cohort(
            tuple(self.cohort.ids[k] for k in order),
            tuple(self.cohort.examples[k] for k in order),
            tuple(self.cohort.columns[k] for k in order),
            tuple(np.sort([where[int(k)] for k in ids]) for ids in self.cohort.schedule),
            self.cohort.seed,
        )
        return replace(self, cohort=cohort, ranks=self.ranks[list(order)])

    def adapters(self, ids: Tensor, rows: Tensor) -> Adapters:
        return Adapters(self.layout, rows, self.ranks[ids], scales(self.ranks[ids], ALPHA).double())

    def weights(self, ids: Tensor) -> Tensor:
        return torch.tensor(self.cohort.examples, dtype=torch.float64)[ids]

    def start(self, method: Method) -> Ledger:
        """The common start, before any round."""
        ranks = self.ranks if method.personal else self.ranks.amax().expand(1)
        drawn = start_adapters(self.layout, ranks, ALPHA, torch.Generator().manual_seed(0))
        begun = Adapters(self.layout, drawn.rows.double(), drawn.ranks, drawn.scale.double())
        return Ledger(method.init(begun, Clock(0)), torch.zeros(CLIENTS, dtype=torch.float64))

    def play(self, method: Method, ledger: Ledger, ids: Tensor) -> Change:
        """One whole round, as the engine does it; returns what was applied."""
        ledger.round += 1
        clock = Clock(ledger.round)
        given = method.send(ledger.state, ids, clock)
        memory = ledger.recall(ids, first=method.private(self.adapters(ids, given.rows)))
        returned, kept = self.train(method, ids, given, memory, number=ledger.round)
        change = method.merge(ledger.state, ids, returned, self.weights(ids), clock)
        if method.personal:
            change = replace(change, rows=self.adapters(change.ids, change.rows).mask_().rows)
        ledger.remember(ids, kept, CLIENTS)
        ledger.apply(change)
        return change

    def reach(self, method: Method) -> Ledger:
        """The state after two trained rounds with half of the clients each."""
        ledger = self.start(method)
        for ids in self.cohort.schedule[: len(BEFORE)]:
            self.play(method, ledger, torch.from_numpy(ids))
        return ledger


def world(
    layout: Layout,
    phases: Callable[[Sequence[str], frozenset[str]], Phase],
    *,
    again: Callable[[Layout], World],
    width: int,
) -> World:
    cohort = Cohort(
        tuple(f"c{k}" for k in EVERYONE),
        EXAMPLES,
        tuple({"family": family} for family in FAMILIES),
        tuple(np.array(ids) for ids in (*BEFORE, NEXT, EVERYONE)),
        seed=4,
    )
    return World(cohort, layout, ranks_in(layout), phases, again, width)


def ranks_in(layout: Layout) -> Tensor:
    """Ranks of the clients, 0 where a row has no low-rank factors."""
    return torch.tensor(RANKS) if layout.parts[0].kind == "lora" else torch.zeros(CLIENTS, dtype=torch.int64)


def quadratic(layout: Layout | None = None) -> World:
    """loss_k = 1/2 ||w - target_k||^2, gradient w - target_k; three steps of SGD with momentum.

    Each of a client's B examples is a label y ~ N(w, 1) with loss 1/2 ||w - y||^2: with labels drawn from the model the
    gradient of their mean is noise / sqrt(B), and B times its square is on average the curvature, 1.
    """
    layout = layout or lora_layout([("first", 3, 2), ("second", 2, 2)], 2)
    optimizer = sgd(momentum=0.5)

    def phases(ids: Sequence[str], disturbed: frozenset[str]) -> Phase:
        streams = [np.random.default_rng([client_key(name), int(name in disturbed)]) for name in ids]
        drawn = torch.from_numpy(np.stack([stream.normal(size=layout.size) for stream in streams]))
        targets = drawn * layout.rank_mask(torch.tensor([2]))  # a row's alignment padding belongs to nobody
        ranks = ranks_in(layout)[[int(name[1:]) for name in ids]]

        def train(
            method: Method, chosen: Tensor, given: Message, memory: Memory, clock: Clock
        ) -> tuple[Message, Memory]:
            own = ranks[chosen]
            adapters = Adapters(layout, given.rows.clone(), own, scales(own, ALPHA).double()).mask_()
            held = {name: value.clone() for name, value in memory.items()}
            for name, value in optimizer.start(adapters.rows).items():
                held.setdefault(name, value)

            def grad(current: Adapters) -> tuple[Tensor, Tensor]:
                gap = current.rows - targets[chosen]
                return gap.square().sum(dim=1) / 2, gap

            def update(current: Adapters, push: Tensor, kept: Memory) -> tuple[Adapters, Memory]:
                moments = {name: kept[name] for name in optimizer.keys}
                optimizer.update(current.rows, push, moments, RATE)
                return current.mask_(), kept

            def rng(purpose: str) -> Sequence[np.random.Generator]:
                return [
                    np.random.default_rng([clock.round, client_key(ids[k]), client_key(purpose)])
                    for k in chosen.tolist()
                ]

            def curvature(current: Adapters) -> tuple[Tensor, Tensor]:
                examples = torch.tensor([EXAMPLES[int(ids[k][1:])] for k in chosen.tolist()])
                noise = torch.from_numpy(np.stack([stream.normal(size=layout.size) for stream in rng("curvature")]))
                return examples, noise * layout.rank_mask(torch.tensor([2])) / examples.double().sqrt()[:, None]

            def tools(step: int) -> Tools:
                steps = torch.full((len(chosen),), 3)
                return Tools(replace(clock, step=step, steps=steps, learning_rate=RATE), grad, update, rng, curvature)

            adapters, held = method.begin(adapters, held, given, tools(0))
            for step in range(3):
                adapters, held = method.step(adapters, held, given, tools(step))
            return method.finish(adapters, held, given, tools(3))

        return train

    return world(layout, phases, again=quadratic, width=3)


@functools.cache
def _gpt2() -> tiny.Base:
    return tiny.base("gpt2", targets=["c_attn"])


def transformer(layout: Layout | None = None) -> World:
    """A tiny GPT-2 through the engine's own local phase; two steps of SGD with momentum, clipped, two per pass."""
    base = _gpt2()
    layout = layout or tiny.layout(base, 2)
    training = Training(sgd(momentum=0.5), RATE, 2, 2, None, 1.0, True, 0.0, seed=4)

    def phases(ids: Sequence[str], disturbed: frozenset[str]) -> Phase:
        def data(name: str) -> ClientData:
            return tiny.client(name, train=EXAMPLES[int(name[1:])], seed=int(name in disturbed))

        clients = [data(name) for name in ids]
        ranks = ranks_in(layout)[[int(name[1:]) for name in ids]]

        def train(
            method: Method, chosen: Tensor, given: Message, memory: Memory, clock: Clock
        ) -> tuple[Message, Memory]:
            blank = Adapters(layout, given.rows, ranks[chosen], scales(ranks[chosen], ALPHA).double())
            result = local_phase(
                base,
                method,
                [clients[k] for k in chosen.tolist()],
                blank,
                given,
                memory,
                training=training,
                clock=clock,
                cohort=3,
            )
            return result.returned, result.memory

        return train

    return world(layout, phases, again=transformer, width=base.width)


WORLDS = {"quadratic": quadratic, "transformer": transformer}
