"""What a method is: a record of functions over rows with a leading client axis, the same in simulation and at a site.

Letters: K clients, S sampled clients, P adapter parameters per client. A method file holds both halves of one paper, a
small `Settings` and `build(settings, cohort) -> Method`; nothing is inherited and nothing is registered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

from fedmira.adapters import Adapters, Layout
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.config.strict import Strict
from fedmira.errors import MethodError
from fedmira.graphs.graph import Graph

Memory = dict[str, Tensor]  # what a client keeps and never sends; every tensor has a leading client axis


class Settings(Strict):
    """Base of every method's own settings: strict, frozen, YAML names by alias."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @property
    def tokens_ahead(self) -> int:
        """Virtual tokens that the method puts before every text; they take positions of the base."""
        return 0


@dataclass(frozen=True)
class Clock:
    """Where a run is: round (1-based; 0 = the start), local step (0-based), learning rate of the clients.

    steps [S]: how many local steps each client takes in this round; None outside a local phase.
    """

    round: int
    step: int = 0
    steps: Tensor | None = None
    learning_rate: float = 0.0


@dataclass(frozen=True, eq=False)
class Cohort:
    """What is known of the federation before it starts. schedule: sampled client positions per round.

    columns: per client, the data columns with one value (for graphs by group). profile(None): the mean embedding of
    each client's prompts by the frozen base [K, d]; profile(column): how often each value of a data column stands in
    its training examples [K, values]. Neither is worked out unless it is asked for. ranks, scale: of each client's
    adapter, as in Adapters, [K] or [K, modules]; None: everyone has those of the common start.
    """

    ids: tuple[str, ...]
    examples: tuple[int, ...]
    columns: tuple[Mapping[str, str], ...]
    schedule: tuple[np.ndarray, ...]
    seed: int
    profile: Callable[[str | None], np.ndarray] = lambda column: _no_profile(column)
    ranks: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


def _no_profile(column: str | None) -> np.ndarray:
    raise MethodError("profiles of the clients' data are not known here")


@dataclass(frozen=True, eq=False)
class Message:
    """What crosses the wire for S clients: rows [S, P] of the parts that travel, and declared scalars [S]."""

    rows: Tensor
    scalars: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bytes_each(self) -> int:
        """Payload of a client's message in bytes, rows whole as they stand here; headers are not counted."""
        return self.rows.shape[1] * self.rows.element_size() + 8 * len(self.scalars)


@dataclass(frozen=True, eq=False)
class State:
    """What the server keeps between rounds. adapters: [K, P] where the method is personal, else [1, P].

    shared: whatever is common to all, written whole in every checkpoint. tables: [K, ...] each, something about every
    client; of these a round changes, and a checkpoint holds, the rows of its own clients.
    """

    adapters: Adapters
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Change:
    """What a merge decided. rows [n, P] replace the rows `ids` [n] of State.adapters; shared replaces State.shared.

    tables: name -> [n, ...], which replace the rows `ids` of State.tables. notes: numbers for the round's record. Only
    the engine applies a Change.
    """

    ids: Tensor
    rows: Tensor
    shared: Mapping[str, Tensor] | None = None
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)


# The client's optimizer over rows, clipping included: (adapters, gradient, memory), changed in place and returned.
Update = Callable[[Adapters, Tensor, Memory], tuple[Adapters, Memory]]
# Losses [S] and gradient rows [S, P] on the step's batch; the gradient is a buffer that the next call overwrites.
Gradient = Callable[[Adapters], tuple[Tensor, Tensor]]
# Labelled tokens [S] and gradient rows [S, P] of the mean cross-entropy with labels drawn from the model itself.
Curvature = Callable[[Adapters], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Tools:
    """Functions and facts that a client half may use, so that a new method needs no new signature.

    rng(name): a generator per client, from run seed, round and client key, never from a position in the batch.
    curvature: like grad, with labels y ~ softmax(f(x)) at every place that has a label, and in a buffer of its own.
    """

    clock: Clock
    grad: Gradient
    update: Update
    rng: Callable[[str], Sequence[np.random.Generator]]
    curvature: Curvature


@dataclass(frozen=True)
class Method:
    """A federated method as a value. Client functions see [S, ...] and return new values or their own arguments."""

    name: str
    init: Callable[[Adapters, Clock], State]
    send: Callable[[State, Tensor, Clock], Message]
    merge: Callable[[State, Tensor, Message, Tensor, Clock], Change]
    serve: Callable[[State, Memory, Tensor], Adapters]
    personal: bool  # every client has its own row on the server
    uses_weights: bool  # example counts enter the merge
    begin: Callable[[Adapters, Memory, Message, Tools], tuple[Adapters, Memory]] = (
        lambda adapters, memory, given, tools: (
            adapters,
            memory,
        )
    )
    step: Callable[[Adapters, Memory, Message, Tools], tuple[Adapters, Memory]] = (
        lambda adapters, memory, given, tools: descend(adapters, memory, given, tools)
    )
    finish: Callable[[Adapters, Memory, Message, Tools], tuple[Message, Memory]] = (
        lambda adapters, memory, given, tools: (
            Message(adapters.rows),
            memory,
        )
    )
    layout: Callable[[Layout, int], Layout] | None = (
        None  # (LoRA's, width of the base's embeddings) -> own; None: LoRA's
    )
    learning_rate: float | None = None  # of its clients; None: the config's
    private: Callable[[Adapters], Memory] = lambda adapters: {}  # what a client keeps of its own before it ever trained
    accept: float | None = None  # a client keeps a reply only if its validation loss is not worse by more, in nats
    needs: Literal["each", "sum"] = "sum"  # must the server see each upload, or would their sum do
    compare: Literal["factors", "products"] = "factors"  # what "equal" means for this method's adapters
    graph: Graph | None = None  # who is pulled to whom, for reports
    learned: Callable[[State], Graph] | None = None  # the graph as it is now, where it is learned on the way
    exchanges: bool = True  # do adapters travel; False where clients train alone, in one place or not at all
    pull: Callable[[Tensor], Tensor] | None = None  # ids [S] -> fraction by which a merge moves each, for reports
    trains: Literal["sampled", "pool", "nobody"] = "sampled"  # whose data a round trains on: its clients', all together
    pool_steps: int | None = None  # of the pool in a round; None = as many, and examples, as its clients would take
    tune: tuple[Literal["steps", "epochs"], int] | None = None  # what every client trains alone after the last round


def descend(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
    """One plain local step: the gradient of every client's own loss, then the optimizer."""
    _, gradient = tools.grad(adapters)
    return tools.update(adapters, gradient, memory)


def shares_of(weights: Tensor, by: Literal["examples", "uniform"]) -> Tensor:
    """Shares p_k [S] of a mean over clients: w_k / sum_j w_j, or 1 / S where `by` is uniform.

    weights [S]: examples per client, any positive scale. Raises MethodError if they sum to zero.
    """
    counts = weights if by == "examples" else torch.ones_like(weights)
    total = counts.sum()
    if not bool(total > 0):
        raise MethodError(f"weights of {len(counts)} clients sum to {float(total):g}: need a positive sum")
    return counts / total


def mean_row(rows: Tensor, shares: Tensor) -> Tensor:
    """Average rows [S, P] into one [1, P]: sum_k p_k x_k; shares [S], of sum 1."""
    return shares.to(rows.dtype)[None, :] @ rows


def merge_mean(by: Literal["examples", "uniform"]) -> Callable[[State, Tensor, Message, Tensor, Clock], Change]:
    """Return a merge that puts the mean of the uploads, number by number, in the place of the one shared row."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        return Change(torch.zeros(1, dtype=torch.int64), mean_row(returned.rows, shares_of(weights, by)))

    return merge


def own_rows(state: State, ids: Tensor, clock: Clock) -> Message:
    """Send every client its own stored row."""
    return Message(state.adapters.rows[ids])


def one_row(state: State, ids: Tensor, clock: Clock) -> Message:
    """Send every client the one shared row."""
    return Message(state.adapters.rows.expand(len(ids), -1))


def serve_own(state: State, memory: Memory, ids: Tensor) -> Adapters:
    """Each client uses its own stored row."""
    return state.adapters.take(ids)


def serve_one(state: State, memory: Memory, ids: Tensor) -> Adapters:
    """Each client uses the one shared row."""
    return state.adapters.take(torch.zeros_like(ids))


def start_state(adapters: Adapters, clock: Clock) -> State:
    """Nothing but the common start."""
    return State(adapters)
