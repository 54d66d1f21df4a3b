"""Clients of two numbers whose losses are quadratic, so that steps and merges of a method can be worked by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Cohort, Memory, Message, Method, State, Tools

LAYOUT = lora_layout([("m", 1, 1)], 1)  # A and B, a number each; the rest of a row is padding
Pair = Sequence[float]


def make(name: str, *, clients: int = 3, **settings: Any) -> Method:
    """Build a method for clients that have 1, 3, 9, ... examples."""
    names = tuple(f"c{k}" for k in range(clients))
    examples = tuple(3**k for k in range(clients))
    return build(name, settings, Cohort(names, examples, ({},) * clients, (np.arange(clients),), 0))


def rows(*pairs: Pair) -> Tensor:
    """Rows [n, P] whose A and B are given."""
    found = torch.zeros(len(pairs), LAYOUT.size, dtype=torch.float64)
    found[:, :2] = torch.tensor(pairs, dtype=torch.float64)
    return found


def pairs(values: Tensor) -> list[list[float]]:
    """A and B of rows [n, P]."""
    return values[:, :2].tolist()


def adapters(values: Tensor) -> Adapters:
    ones = torch.ones(len(values), dtype=torch.int64)
    return Adapters(LAYOUT, values, ones, ones.double())


def begin(method: Method, *stored: Pair) -> State:
    """The server before round 1, with these rows as the start."""
    return method.init(adapters(rows(*stored)), Clock(0))


def merge(
    method: Method, state: State, uploads: Tensor | Message, *weights: float, ids: Sequence[int] | None = None
) -> Change:
    """What the server makes of uploads [n, P] of the clients `ids`, by default the first n."""
    message = uploads if isinstance(uploads, Message) else Message(uploads)
    who = torch.tensor(range(len(message.rows)) if ids is None else ids)
    return method.merge(state, who, message, torch.tensor(weights, dtype=torch.float64), Clock(1))


def after(state: State, change: Change) -> State:
    """The server once a change is applied."""
    table, tables = state.adapters.rows.clone(), dict(state.tables)
    table[change.ids] = change.rows
    for name, value in change.tables.items():
        tables[name] = tables[name].index_copy(0, change.ids, value)
    shared = state.shared if change.shared is None else change.shared
    return State(replace(state.adapters, rows=table), shared, tables)


@dataclass
class Clients:
    """Clients with loss 1/2 ||w - target_k||^2, so gradient w - target_k, and plain gradient steps at one rate.

    moments: the names under which the optimizer was asked for, in order; pushed: A and B of the gradients it was given.
    """

    method: Method
    targets: Tensor
    rate: float = 0.5
    memory: Memory | None = None
    moments: list[str] = field(default_factory=list)
    pushed: list[list[list[float]]] = field(default_factory=list)

    def train(self, given: Tensor | Message, *, steps: int = 1) -> Message:
        """Carry out a local phase from rows [S, P] that were sent; keep the memory."""
        given = given if isinstance(given, Message) else Message(given)
        half, own = self.method.client, adapters(given.rows.clone())
        memory = half.start(own) if self.memory is None else self.memory
        own, memory = half.begin(own, memory, given, self.tools(0, steps))
        for step in range(steps):
            own, memory = half.step(own, memory, given, self.tools(step, steps))
        message, self.memory = half.finish(own, memory, given, self.tools(steps, steps))
        return message

    def use(self, given: Tensor | Message) -> list[list[float]]:
        """A and B of the adapters that the clients would use now."""
        given = given if isinstance(given, Message) else Message(given)
        own = adapters(given.rows.clone())
        memory = self.method.client.start(own) if self.memory is None else self.memory
        return pairs(self.method.client.use(own, memory, given, self.tools(0, 0)).rows)

    def tools(self, step: int, steps: int) -> Tools:
        counts = torch.full((len(self.targets),), steps)
        clock = Clock(1, step=step, steps=counts, learning_rate=self.rate)
        return Tools(clock, self._grad, self._update, lambda name: [], never, never, never)

    def _grad(self, current: Adapters) -> tuple[Tensor, Tensor]:
        gap = current.rows - self.targets
        return gap.square().sum(dim=1) / 2, gap

    def _update(self, current: Adapters, gradient: Tensor, *, of: str = "main", who: Tensor | None = None) -> Adapters:
        takes = torch.ones(len(current), dtype=torch.bool) if who is None else who
        if bool(takes.any()):
            self.moments.append(of)
            self.pushed.append(pairs(gradient))
        current.rows.sub_(gradient * self.rate * takes[:, None])
        return current


def never(*arguments: object, **options: object) -> Any:
    raise AssertionError("this tool is not for this method, or not here")
