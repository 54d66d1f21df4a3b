"""What a method is: a record of functions over rows with a leading client axis, the same in simulation and at a site.

Letters: K clients, S sampled clients, n of these that answered, P numbers of a row. A method file holds both halves of
one paper, a small `Settings` and `build(settings, cohort) -> Method`; nothing is inherited and nothing is registered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from pydantic import ConfigDict

from fedmira.adapters import Adapters, Layout, Pairs, Stored, lora_layout
from fedmira.adapters.added import BaseVersions
from fedmira.adapters.columns import every_column
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.adapters.parts import Gate
from fedmira.config.strict import Strict
from fedmira.errors import MethodError
from fedmira.graphs.graph import Graph
from fedmira.names import ONLY_IDS, ClientNames

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

    steps [S]: how many local steps each client takes in this round; None outside a local phase. learning_rate: of this
    step; in `begin` of the first, in `finish` the mean over a client's steps of the round, so that steps x
    learning_rate is their sum; elsewhere of the round. A number, or [S, 1] where clients of a pass have different ones.
    """

    round: int
    step: int = 0
    steps: Tensor | None = None
    learning_rate: float | Tensor = 0.0


@dataclass(frozen=True, eq=False)
class Cohort:
    """What is known of the federation before it starts. schedule: sampled client positions per round.

    columns: per client, the data columns with one value (for graphs by group). profile(None): the mean embedding of
    each client's prompts by the frozen base [K, d]; profile(column): the share of each value of a data column in its
    training examples [K, values]. Neither is computed unless it is called. ranks, scale: of each client's adapter, as
    in Adapters, [K] or [K, modules]; None: everyone has those of the common start. names: how people call the clients.
    validation: examples of each in its validation split; empty: not known.
    """

    ids: tuple[str, ...]
    examples: tuple[int, ...]
    columns: tuple[Mapping[str, str], ...]
    schedule: tuple[np.ndarray, ...]
    seed: int
    profile: Callable[[str | None], np.ndarray] = lambda column: _no_profile(column)
    ranks: Tensor | None = None
    scale: Tensor | None = None
    names: ClientNames = ONLY_IDS
    validation: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def _no_profile(column: str | None) -> np.ndarray:
    raise MethodError("profiles of the clients' data are not known here")


@dataclass(frozen=True, eq=False)
class Message:
    """What the server and S clients send each other: rows [S, P], declared scalars [S], and further rows by name.

    A method reads and writes whole rows. Only the columns that travel cross the wire (`Method.travels`): those of
    `rows` and of every tensor [S, P] of `more`. Each side fills the other columns with what it has itself.
    absent, down only: "rows", or a name of `more`, -> bool [S], True where a client is not sent that row, nor the
    scalar of that name: they are 0, and not counted. Without `rows` a client goes on from the row that it has itself.
    """

    rows: Tensor
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    more: Mapping[str, Tensor] = field(default_factory=dict)
    base: BaseVersions | None = None  # down only: what was added to the base, from the engine
    absent: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, index: Tensor | slice) -> Message:
        """Return the messages of some clients, by position."""
        return Message(
            self.rows[index],
            {name: value[index] for name, value in self.scalars.items()},
            {name: value[index] for name, value in self.more.items()},
            None if self.base is None else self.base.take(index),
            {name: value[index] for name, value in self.absent.items()},
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Message:
        """Return the same message with `change` applied to every tensor of rows."""
        return replace(self, rows=change(self.rows), more={name: change(value) for name, value in self.more.items()})


@dataclass(frozen=True, eq=False)
class State:
    """What the server keeps between rounds. adapters: a row of each client, one row for all, or a row of each group.

    shared: tensors that are common to all, written whole in every checkpoint. tables: [K, ...] each, something about
    every client; a round changes, and a checkpoint holds, the rows of its own clients. base: pairs that were added to
    the base so far, a version each.
    """

    adapters: Stored
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    base: tuple[Pairs, ...] = ()


@dataclass(frozen=True, eq=False)
class Change:
    """What a merge decided. rows [n, P] replace the rows `ids` [n] of State.adapters; shared replaces State.shared.

    tables: name -> [n, ...], which replace the rows `ids` of State.tables. base: low-rank pairs that are added to the
    base of everybody, module -> A [q, in], B [out, q], in the rows' type. notes: numbers for the round's record. Only
    the engine applies a Change, once it is durable.
    """

    ids: Tensor
    rows: Tensor
    shared: Mapping[str, Tensor] | None = None
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    base: Pairs | None = None


class Gradient(Protocol):
    """Losses [S] and gradient rows [S, P] on the step's batch; the gradient is a buffer that the next call overwrites.

    Columns that are not trained have gradient 0.
    """

    def __call__(self, adapters: Adapters) -> tuple[Tensor, Tensor]: ...


class Update(Protocol):
    """One step of the client's optimizer, clipping included, on the trained columns; changes the rows in place.

    of: whose moments are used. A second trained row has moments under a second name. who, bool [S]: only these clients
    take the step; rows and moments of the others stay as they are. None = all.
    """

    def __call__(
        self, adapters: Adapters, gradient: Tensor, *, of: str = "main", who: Tensor | None = None
    ) -> Adapters: ...


class Loss(Protocol):
    """Mean cross-entropy [S] in nats per labelled token, float64; nan where a client has no example in that split."""

    def __call__(self, adapters: Adapters, *, on: Literal["validation", "batch"] = "validation") -> Tensor: ...


class ExampleLoss(Protocol):
    """Of every validation example: sum of nats [S, N] and labelled tokens [S, N], float64; 0 where a client has fewer.

    The loss of a client is the sum of its nats over the sum of its tokens.
    """

    def __call__(self, adapters: Adapters) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Tools:
    """Functions and facts that a client half may use, so that a new method needs no new signature.

    rng(name): a generator per client, from run seed, round and client key, never from a position in the batch.
    curvature: like grad, but labelled tokens [S] and gradient rows [S, P] of the mean cross-entropy with labels
    y ~ softmax(f(x)) at every position that has a label, in a separate buffer. `begin`, `finish` and `use` have no
    batch: there grad, curvature and loss on a batch cannot be called. each: like loss on validation, by example.
    reports: may losses, and what follows from them, leave the client? noise: as wrappers.from_streams; None: no key.
    """

    clock: Clock
    grad: Gradient
    update: Update
    rng: Callable[[str], Sequence[np.random.Generator]]
    curvature: Gradient
    loss: Loss
    each: ExampleLoss
    reports: bool = True
    noise: Callable[[Tensor, Tensor, Sequence[np.random.Generator] | None], Tensor] | None = None


class Phase(Protocol):
    """A part of a client's round. adapters [S, P]: in `begin` what was sent, laid over the client's own row."""

    def __call__(self, adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]: ...


class Finish(Protocol):
    """The end of a client's round: what it returns, and what it keeps."""

    def __call__(self, adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]: ...


class Use(Protocol):
    """The adapters that clients use: what they would be sent now, seen through what they keep. Memory is only read."""

    def __call__(self, adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters: ...


def remember_nothing(adapters: Adapters) -> Memory:
    return {}


def begin_from_what_was_sent(
    adapters: Adapters, memory: Memory, given: Message, tools: Tools
) -> tuple[Adapters, Memory]:
    return adapters, memory


def descend(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
    """One plain local step: the gradient of every client's own loss, then the optimizer."""
    _, gradient = tools.grad(adapters)
    return tools.update(adapters, gradient), memory


def return_the_row(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
    return Message(adapters.rows), memory


def use_what_was_sent(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters:
    return adapters


@dataclass(frozen=True)
class Client:
    """The client's half. Functions see [S, ...] and return new values or their own arguments.

    start: the memory of a client that never trained, from the adapters it is sent. step may change rows and memory in
    place, and sees only the clients that have steps left. gate: mixes the parts of what is used for every question.
    """

    start: Callable[[Adapters], Memory] = remember_nothing
    begin: Phase = begin_from_what_was_sent
    step: Phase = descend
    finish: Finish = return_the_row
    use: Use = use_what_was_sent
    gate: Gate | None = None


class FirstRows(Protocol):
    """Rows [n, P] that clients `ids` [n], who join after some rounds, start from. known [m]: those before them."""

    def __call__(self, state: State, ids: Tensor, known: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Regime:
    """What a method needs of whoever carries out its rounds, beside the rounds themselves.

    trainees: whose data a round trains on: its clients', all clients' together (a pool), or nobody's. pool_steps: of
    the pool in a round; None = as many, and examples, as its clients would take. learning_rate: of its clients; None =
    the config's. tolerance: a client keeps a reply only if its validation loss is not worse by more, in nats; None =
    always. first_rows: of clients that join later, where each has one; None = the common start. tune: what every client
    trains alone after the last round: its half with so many steps, which may be none, or epochs. scorings: of its
    validation split before its local steps, at most. gradients: that one local step asks for, at most; None: it asks
    for more than gradients, of which none can be private. optimizer: that its clients need; sgd: without momentum.
    starts: adapters that its clients may begin with (lora.start): any, one for all (alike), none.
    """

    trainees: Literal["sampled", "pool", "nobody"] = "sampled"
    pool_steps: int | None = None
    learning_rate: float | None = None
    tolerance: float | None = None
    first_rows: FirstRows | None = None
    tune: tuple[Literal["steps", "epochs"], int] | None = None
    scorings: int = 0
    optimizer: Literal["any", "sgd"] = "any"
    gradients: int | None = 1
    starts: Literal["any", "alike", "none"] = "any"


@dataclass(frozen=True, eq=False)
class Facts:
    """What reports and laws ask of a method, and the engine never does.

    needs: must the server see each upload, or would their sum do; relay: it only forwards them. weighs: do example
    counts enter the merge. compare: what "equal" means for this method's adapters. graph: who is pulled to whom;
    learned: that graph of a State, where it is learned in the rounds. pull: ids [S] -> fraction by which a merge moves
    each. figures: scalars of an upload that go into the record of its round, and of what clients do after the last;
    -1 = not told. rows_down: ids [S] -> rows that each is sent in a round, at most [S]; None = one.
    """

    needs: Literal["each", "sum", "relay"] = "sum"
    weighs: bool = False
    compare: Literal["factors", "products"] = "factors"
    graph: Graph | None = None
    learned: Callable[[State], Graph] | None = None
    pull: Callable[[Tensor], Tensor] | None = None
    figures: tuple[str, ...] = ()
    rows_down: Callable[[Tensor], Tensor] | None = None
    uploads: Literal["row", "more"] = "row"  # more: scalars, further rows, or one that began with the client


class Init(Protocol):
    """The server's state before round 1, from the common start."""

    def __call__(self, start: Stored, clock: Clock) -> State: ...


class Send(Protocol):
    """What the server sends the clients `ids` [S]."""

    def __call__(self, state: State, ids: Tensor, clock: Clock) -> Message: ...


class Merge(Protocol):
    """What the server makes of the uploads of the clients `ids` [n] that answered. weights [n]: training examples."""

    def __call__(self, state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change: ...


# (LoRA's layout, width of the base's embeddings) -> the layout of the method's own rows
Layouts = Callable[[Layout, int], Layout]
# (layout, clock) -> bool [P]
Columns = Callable[[Layout, Clock], Tensor]


def all_columns(layout: Layout, clock: Clock) -> Tensor:
    return every_column(layout)


def no_columns(layout: Layout, clock: Clock) -> Tensor:
    return ~every_column(layout)


def start_state(start: Stored, clock: Clock) -> State:
    """Nothing but the common start."""
    return State(start)


@dataclass(frozen=True, eq=False)
class Method:
    """A federated method as a value.

    rows_of: whose rows the server has: `each` client's, `one` for all, or groups: a tensor [K] with the number of the
    row that each client uses. send: by default each client is sent the row that it uses. layout: None = LoRA's.
    travels: columns of a row that cross the wire; the others stay with the client, and begin as the common start.
    trained: columns that local steps move. A client returns the columns that do both.

    Raises MethodError if two fields contradict each other.
    """

    name: str
    merge: Merge
    rows_of: Literal["each", "one"] | Tensor = "one"
    init: Init = start_state
    send: Send | None = None
    client: Client = Client()
    layout: Layouts | None = None
    travels: Columns = all_columns
    trained: Columns = all_columns
    regime: Regime = Regime()
    facts: Facts = Facts()

    def __post_init__(self) -> None:
        regime, facts, each = self.regime, self.facts, isinstance(self.rows_of, str) and self.rows_of == "each"
        one = isinstance(self.rows_of, str) and self.rows_of == "one"
        faults = {
            "a client can refuse a reply (tolerance) only where the server has a row of each client": (
                regime.tolerance is not None and not each
            ),
            "a pool, or nobody, trains one row for all": regime.trainees != "sampled" and not one,
            "where a pool or nobody trains, no client fine-tunes at the end": (
                regime.trainees != "sampled" and regime.tune is not None
            ),
            "pool_steps are of a pool": regime.pool_steps is not None and regime.trainees != "pool",
            "a graph is given or learned, not both": facts.graph is not None and facts.learned is not None,
            "the fraction that a merge pulls (pull) needs a graph that is given": (
                facts.pull is not None and facts.graph is None
            ),
        }
        if wrong := [rule for rule, broken in faults.items() if broken]:
            raise MethodError(f"method '{self.name}': {'; '.join(wrong)}")

    def __reduce__(self) -> tuple[type[Method], tuple[object, ...]]:
        """Travel to another process as the client's half: the rest may hold what is about all clients."""
        from fedmira.methods.means import change_nothing as no_merge

        return Method, (self.name, no_merge, "one", start_state, None, self.client, None, self.travels, self.trained)

    @property
    def personal(self) -> bool:
        """Does each client use a separate adapter in the end?"""
        return (
            self.has_row_of_each
            or self.regime.tune is not None
            or (self.regime.trainees == "sampled" and (self.keeps_columns or self.client.use is not use_what_was_sent))
        )

    @property
    def keeps_columns(self) -> bool:
        """Are there columns that a client trains and never sends? Looked up in a small layout, in two rounds."""
        layout, clocks = self._small_layout(), (Clock(1), Clock(2))
        return any(bool((self.trained(layout, at) & ~self.travels(layout, at)).any()) for at in clocks)

    @property
    def sends_nothing(self) -> bool:
        """Does no column of a row travel?"""
        layout = self._small_layout()
        return not any(bool(self.travels(layout, at).any()) for at in (Clock(1), Clock(2)))

    def _small_layout(self) -> Layout:
        layout = lora_layout([("layer", 1, 1)], 1)
        return layout if self.layout is None else self.layout(layout, 1)

    @property
    def has_row_of_each(self) -> bool:
        """Has the server a row of each client?"""
        return isinstance(self.rows_of, str) and self.rows_of == "each"

    def count_rows(self, clients: int) -> int:
        """Return how many rows the server has."""
        groups = int(self.rows_of.max()) + 1 if isinstance(self.rows_of, Tensor) else 1
        return clients if self.has_row_of_each else groups

    def row_of(self, ids: Tensor) -> Tensor:
        """Return which row each of the clients `ids` [S] uses."""
        numbers = ids if self.has_row_of_each else torch.zeros_like(ids)
        return self.rows_of[ids] if isinstance(self.rows_of, Tensor) else numbers

    def message(self, state: State, ids: Tensor, clock: Clock) -> Message:
        """Return what the server sends the clients `ids` [S], whole rows."""
        if self.send is not None:
            return self.send(state, ids, clock)
        if isinstance(self.rows_of, str) and self.rows_of == "one":
            return Message(state.adapters.rows[torch.zeros(1, dtype=torch.int64)].expand(len(ids), -1))
        return Message(state.adapters.rows[self.row_of(ids)])
