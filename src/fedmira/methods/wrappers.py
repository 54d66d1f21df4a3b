"""Methods made of methods: each wrapper takes a Method and returns one. From YAML: `with: [{name: clipped, norm: 1}]`.

    proximal          g_k + mu (w_k - w_sent)                          FedProx, Li et al. 2020 (arXiv:1812.06127)
    only              some factors train or travel                    FFA-LoRA (arXiv:2403.12313), RoLoRA, FedSA-LoRA
    server_optimizer  the mean update is a gradient for the server     FedOpt, Reddi et al. 2021 (arXiv:2003.00295)
    tuned_after       every client fine-tunes separately after the last round
    accepting         a client keeps a reply only if it does not worsen its validation loss
    lost_reply        the server's result never reaches its client (a defect of public code, for comparison)
    clipped, noised   a client's update is shortened, and Gaussian noise is added to it

The first in the list is the innermost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from fedmira.adapters import Adapters, Layout, Stored, norms
from fedmira.adapters.columns import every_column, factor_columns
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.errors import MethodError
from fedmira.methods.base import (
    Change,
    Clock,
    Columns,
    Memory,
    Message,
    Method,
    Settings,
    State,
    Tools,
)

Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Options(Settings, defer_build=True):
    """Base of every wrapper's settings; pydantic builds their checks when they are first used."""


class Proximal(Options):
    """Settings of `proximal`."""

    mu: float = Field(ge=0)  # pull back to the row that was sent, per unit of distance; 0 = none


def proximal(method: Method, *, mu: float) -> Method:
    """Add mu/2 ||w_k - w_sent||^2 to every client's loss: its gradient becomes g_k + mu (w_k - w_sent)."""
    if mu == 0:
        return method

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        def grad(adapters: Adapters) -> tuple[Tensor, Tensor]:
            losses, gradient = tools.grad(adapters)
            return losses, gradient.add_(adapters.rows - given.rows, alpha=mu)

        return method.client.step(adapters, memory, given, replace(tools, grad=grad))

    return replace(method, client=replace(method.client, step=step))


class Only(Options):
    """Settings of `only`."""

    trained: Literal["all", "A", "B", "alternating"] = "all"  # alternating: B in odd rounds, A in even ones
    travels: Literal["all", "A", "B"] = "all"


def only(method: Method, *, trained: str = "all", travels: str = "all") -> Method:
    """Train, or send, only some factors; the others stay as they are, or with the client.

    FFA-LoRA: trained B, travels B. RoLoRA: trained alternating. FedSA-LoRA: travels A. What clients do not return stays
    as the server has it, to the bit: a mean of equal numbers is not always that number.
    """

    def narrow(columns: Columns, which: str) -> Columns:
        def narrowed(layout: Layout, clock: Clock) -> Tensor:
            factor = ("B" if clock.round % 2 else "A") if which == "alternating" else which
            chosen = every_column(layout) if factor == "all" else factor_columns(layout, "A" if factor == "A" else "B")
            return columns(layout, clock) & chosen

        return columns if which == "all" else narrowed

    moved, sent = narrow(method.trained, trained), narrow(method.travels, travels)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        change = method.merge(state, ids, returned, weights, clock)
        layout = state.adapters.layout
        came = moved(layout, clock) & sent(layout, clock)
        return replace(change, rows=torch.where(came, change.rows, state.adapters.rows[change.ids]))

    return replace(method, merge=merge, trained=moved, travels=sent)


class ServerOptimizer(Options):
    """Settings of `server_optimizer`; defaults as in the paper's experiments."""

    variant: Literal["momentum", "adam", "yogi", "adagrad"] = "adam"
    learning_rate: Positive = 0.01  # eta of the server
    betas: tuple[Beta, Beta] = (0.9, 0.99)  # of the first and second moment; momentum uses the first
    tau: Positive = 1e-3  # added to the root of the second moment; smaller = more adaptive


def server_optimizer(
    method: Method,
    *,
    variant: str = "adam",
    learning_rate: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
) -> Method:
    """Use the change of a merge as a gradient for the server's own optimizer.

    D = merged - w;  m = b1 m + (1 - b1) D;  w = w + eta m / (sqrt(v) + tau)
    adam: v = b2 v + (1 - b2) D^2;  yogi: v = v - (1 - b2) D^2 sign(v - D^2);  adagrad: v = v + D^2
    momentum: m = b1 m + D, w = w + eta m
    Raises MethodError where the server has a row of each client.
    """
    if method.has_row_of_each:
        raise MethodError(f"server_optimizer moves rows that clients share; '{method.name}' has a row of each client")
    first, second = betas

    def init(start: Stored, clock: Clock) -> State:
        state = method.init(start, clock)
        zeros = torch.zeros(start.rows.shape, dtype=start.rows.dtype)
        return replace(state, shared={**state.shared, "server.m": zeros, "server.v": zeros + tau**2})

    def inner(state: State) -> State:
        return replace(state, shared={k: v for k, v in state.shared.items() if not k.startswith("server.")})

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        return method.message(inner(state), ids, clock)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        change = method.merge(inner(state), ids, returned, weights, clock)
        m, v = state.shared["server.m"].clone(), state.shared["server.v"].clone()
        before, rows = state.adapters.rows[change.ids], change.ids
        update = change.rows - before
        m[rows] = first * m[rows] + (update if variant == "momentum" else (1 - first) * update)
        square = update.square()
        if variant == "adam":
            v[rows] = second * v[rows] + (1 - second) * square
        elif variant == "yogi":
            v[rows] -= (1 - second) * square * (v[rows] - square).sign()
        elif variant == "adagrad":
            v[rows] += square
        step = m[rows] if variant == "momentum" else m[rows] / (v[rows].sqrt() + tau)
        shared = {**(inner(state).shared if change.shared is None else change.shared), "server.m": m, "server.v": v}
        return replace(change, rows=before + learning_rate * step, shared=shared)

    return replace(method, init=init, send=send, merge=merge)


class TunedAfter(Options):
    """Settings of `tuned_after`."""

    steps: int | None = Field(default=None, ge=1)  # local steps of every client after the last round
    epochs: int | None = Field(default=None, ge=1)  # or passes over its own training examples; neither = one pass


def tuned_after(method: Method, *, steps: int | None = None, epochs: int | None = None) -> Method:
    """Let every client fine-tune the shared row separately after the last round; the server never sees the result."""
    return replace(method, regime=replace(method.regime, tune=("steps", steps) if steps else ("epochs", epochs or 1)))


class Accepting(Options):
    """Settings of `accepting`."""

    tolerance: float = Field(default=0.0, ge=0)  # nats by which its validation loss may worsen


def accepting(method: Method, *, tolerance: float = 0.0) -> Method:
    """Let a client keep its upload if the reply would worsen its validation loss by more than `tolerance`."""
    return replace(method, regime=replace(method.regime, tolerance=tolerance))


class LostReply(Options):
    """Settings of `lost_reply`: none."""


def lost_reply(method: Method) -> Method:
    """Let every client start from its last upload instead of the server's reply: a defect of public code."""
    if not method.has_row_of_each:
        raise MethodError(f"lost_reply is about replies to each client; '{method.name}' has rows that clients share")
    warnings.warn(
        f"{method.name}: reply: lost reproduces a defect of the public code; do not train with it", stacklevel=2
    )

    def start(adapters: Adapters) -> Memory:
        return {**method.client.start(adapters), "upload": adapters.rows.clone()}

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return method.client.begin(adapters.with_rows(memory["upload"].clone()), memory, given, tools)

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        message, memory = method.client.finish(adapters, memory, given, tools)
        return message, {**memory, "upload": adapters.rows.clone()}

    return replace(method, client=replace(method.client, start=start, begin=begin, finish=finish))


class Clipped(Options):
    """Settings of `clipped`."""

    norm: Positive  # longest update of a client


def clipped(method: Method, *, norm: float) -> Method:
    """Shorten each client's update to the length `norm` at most, over the columns that it sends.

    w_k = w_sent + d min(1, norm / ||d||),   d = w_k - w_sent
    """

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        message, memory = method.client.finish(adapters, memory, given, tools)
        sent = _sent(method, adapters, tools.clock)
        update = (message.rows - given.rows) * sent
        share = (norm / norms(update).clamp(min=norm)).to(update.dtype)[:, None]
        # from what was sent on: what is left of a long row minus nearly all of it is off by the long row's last digits
        rows = torch.where((share < 1) & (sent > 0), given.rows + update * share, message.rows)
        return replace(message, rows=rows), memory

    return replace(method, client=replace(method.client, finish=finish))


class Noised(Options):
    """Settings of `noised`."""

    sigma: float = Field(ge=0)  # standard deviation of each number; 0 = none
    secret: bool = True  # false: from the run's seed: it can be repeated, and taken off by whoever knows the seed
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5  # of the epsilon that a study counts; well below 1 / clients


def noised(method: Method, *, sigma: float, secret: bool = True, delta: float = 1e-5) -> Method:
    """Add N(0, sigma^2) to each number that a client sends, within its rank, from a secret key or its own stream.

    A row that is not finite is sent as it came, with noise: what it was cannot be seen. After `clipped`, and with
    secret noise, a study counts what that promises each client, at `delta` (docs/privacy.md).
    """

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        message, memory = method.client.finish(adapters, memory, given, tools)
        finite = message.rows.isfinite().all(dim=1, keepdim=True)
        rows = torch.where(finite, message.rows, given.rows)
        sent = _sent(method, adapters, tools.clock)
        hidden = adapters.with_rows(sent.repeat(len(rows), 1)).mask_().rows
        noise = (tools.noise or from_streams)(
            (rows - given.rows) * hidden, sigma * hidden, None if secret else tools.rng("noise")
        )
        return replace(message, rows=adapters.with_rows(rows + noise).mask_().rows), memory

    return replace(method, client=replace(method.client, finish=finish))


def from_streams(updates: Tensor, deviations: Tensor, streams: Sequence[np.random.Generator] | None) -> Tensor:
    """Return normal numbers with these deviations [S, P] from a stream of each client, for its update [S, P].

    Raises MethodError without streams: noise that is to be secret needs a key.
    """
    if streams is None:
        raise MethodError("noise: there is no secret key here; with secret: false it comes from the run's seed")
    drawn = np.stack([stream.normal(size=updates.shape[1]) for stream in streams])
    return torch.from_numpy(drawn).to(updates) * deviations


def _sent(method: Method, adapters: Adapters, clock: Clock) -> Tensor:
    """The columns that clients send [P], as numbers 0 and 1."""
    columns = method.travels(adapters.layout, clock) & method.trained(adapters.layout, clock)
    return columns.to(adapters.rows)


WRAPPERS: Mapping[str, tuple[type[Settings], Callable[..., Method]]] = {
    "proximal": (Proximal, proximal),
    "only": (Only, only),
    "server_optimizer": (ServerOptimizer, server_optimizer),
    "tuned_after": (TunedAfter, tuned_after),
    "accepting": (Accepting, accepting),
    "lost_reply": (LostReply, lost_reply),
    "clipped": (Clipped, clipped),
    "noised": (Noised, noised),
}
ALIASES = {"clip": "clipped", "noise": "noised"}


def wrap(method: Method, wrappers: Sequence[tuple[str, Mapping[str, Any]]]) -> Method:
    """Wrap a method by names and checked settings, the first innermost. Raises MethodError if one does not fit."""
    for name, settings in wrappers:
        method = WRAPPERS[name][1](method, **settings)
    return method
