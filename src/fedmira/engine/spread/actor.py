"""What an actor does: it has one base, and carries out one pass at a time with the clients of an order.

It remembers nothing of a client: what a pass begins with is in the order, and what it ends with in the answer. So an
order can be carried out again by any other, to the same bits.
"""

import bisect
import importlib.metadata
import platform
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedmira.adapters import Adapters, Layout
from fedmira.adapters.parts import Gate
from fedmira.data.batches import ClientData
from fedmira.engine.executor import IN_PROCESS, Plans, Scored
from fedmira.engine.phase import Inputs, PhaseResult
from fedmira.engine.tools import Moments
from fedmira.engine.workplace import Evaluation, Workplace
from fedmira.errors import FedMiraError
from fedmira.methods.base import Clock, Memory, Message
from fedmira.model.base.load import Base

KEPT_TOKENS = 1 << 25  # of clients' data in an actor, about 36 bytes each; what was used longest ago is fetched again

SIMPLE = (
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> a type to compare it as
SHARED = 4  # values that several orders share, in an actor
Fetch = Callable[[Any], Any]  # a reference -> what it refers to


@dataclass(frozen=True, eq=False)
class Rows:
    """Adapters on their way. rows [n, P], or [1, P] where all are equal: then one travels."""

    layout: Layout
    rows: Tensor
    ranks: Tensor
    scale: Tensor
    added: Any  # a reference to what was added to the base; None = nothing was

    @classmethod
    def of(cls, adapters: Adapters, added: Any) -> "Rows":
        return cls(adapters.layout, thin(adapters.rows), adapters.ranks, adapters.scale, added)

    def adapters(self, fetch: Fetch) -> Adapters:
        rows = whole(self.rows, len(self.ranks))
        added = {} if self.added is None else fetch(self.added)
        return Adapters(self.layout, rows, self.ranks, self.scale, added)


def thin(rows: Tensor) -> Tensor:
    """Return rows [n, ...] as they travel: one where all have the same bits, as many methods send one to everybody."""
    bits = rows.contiguous().view(BITS[rows.element_size()])
    return rows[:1] if len(rows) > 1 and bool((bits == bits[:1]).all()) else rows


def whole(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows of what `thin` returned."""
    return rows if len(rows) == count else rows.expand(count, *rows.shape[1:]).contiguous()


@dataclass(frozen=True, eq=False)
class Blocks:
    """Where clients' data are. refs [B]: of clients that follow each other; first [B]: the position of the first."""

    refs: Sequence[Any]
    first: Sequence[int]
    tokens: Sequence[int]

    def find(self, k: int) -> tuple[int, int]:
        """Return the block of a client, and its place there."""
        block = bisect.bisect_right(self.first, k) - 1
        return block, k - self.first[block]


@dataclass(frozen=True, eq=False)
class TrainOrder:
    """One pass of training, arguments as of local_phase. clients: positions; method, training: references."""

    method: Any
    training: Any
    clients: Sequence[int]
    start: Rows
    given: Message  # its rows are those of `start`
    memory: Memory
    moments: Moments
    clock: Clock
    plans: Plans | None
    reports: bool

    @classmethod
    def of(cls, inputs: Inputs, start: Rows, **rest: Any) -> "TrainOrder":
        given = replace(inputs.given.map(thin), rows=start.rows, base=None)  # the base's pairs are in `start`
        return cls(start=start, given=given, memory=inputs.memory, moments=inputs.moments, **rest)

    def inputs(self, fetch: Fetch) -> Inputs:
        start, count = self.start.adapters(fetch), len(self.clients)
        given = self.given.map(lambda rows: whole(rows, count))
        return Inputs(start, replace(given, rows=start.rows), self.memory, self.moments)


@dataclass(frozen=True, eq=False)
class ScoreOrder:
    """Scores of a few clients that share a pass. evaluation: of written answers; None = the loss on `split`."""

    clients: Sequence[int]
    rows: Rows
    gate: Gate | None
    split: str
    evaluation: Evaluation | None = None
    max_examples: int | None = None


@dataclass(frozen=True, eq=False)
class Answered:
    """Metrics of each client, and texts where they are kept: (place in the order, place in its split, text)."""

    scores: Sequence[Scored]
    texts: Sequence[tuple[int, int, str]]


@dataclass(frozen=True)
class Failed:
    """What went wrong in an actor: an error, taken apart, and where. Ray would lose its kind, or its words."""

    kind: type[Exception]
    arguments: Sequence[str | int | None]
    facts: Mapping[str, Any]
    frames: str

    @classmethod
    def of(cls, error: Exception) -> "Failed":
        frames = "".join(traceback.format_tb(error.__traceback__))
        if isinstance(error, FedMiraError):
            return cls(type(error), [str(error)], vars(error), frames)
        plain = all(isinstance(argument, str | int | None) for argument in error.args)
        if isinstance(error, SIMPLE) and plain:
            return cls(type(error), error.args, {}, frames)
        return cls(RuntimeError, [type(error).__name__], {}, frames)

    def error(self) -> Exception:
        """Return the error, put together again."""
        error = self.kind.__new__(self.kind, *self.arguments)  # __init__ of ours takes other arguments
        vars(error).update(self.facts)
        return error


@dataclass(frozen=True)
class Ready:
    """An actor says with what it computes."""

    fingerprint: str
    versions: Mapping[str, str]
    node: str


def from_store(reference: Any) -> Any:
    """Return what a reference of Ray refers to."""
    import ray

    return ray.get(reference)


class Trainer:
    """Carries out orders. load: reads the base, once. fetch: gets what a reference refers to."""

    def __init__(self, load: Callable[[], Base], blocks: Blocks, *, threads: int, fetch: Fetch = from_store) -> None:
        self.load, self.blocks, self.threads, self._fetch = load, blocks, threads, fetch
        self.base: Base | None = None
        self.data: OrderedDict[int, Sequence[ClientData]] = OrderedDict()
        self.shared: OrderedDict[Any, Any] = OrderedDict()

    def ready(self) -> Ready | Failed:
        """Load the base, unless it is there."""
        return failing(self._ready)

    def train(self, order: TrainOrder) -> PhaseResult | Failed:
        return failing(lambda: self._train(order))

    def score(self, order: ScoreOrder) -> Sequence[float | None] | Answered | Failed:
        return failing(lambda: self._score(order))

    def _ready(self) -> Ready:
        torch.set_num_threads(self.threads)
        if self.base is None:
            self.base = self.load()
        versions = {name: importlib.metadata.version(name) for name in ("fedmira", "torch")}
        return Ready(self.base.fingerprint, versions, platform.node())

    def _train(self, order: TrainOrder) -> PhaseResult:
        return IN_PROCESS.train(
            replace(self._workplace(order.clients), reports=order.reports),
            self.fetch(order.method),
            torch.arange(len(order.clients)),
            order.inputs(self.fetch),
            training=self.fetch(order.training),
            clock=order.clock,
            plans=order.plans,
        )

    def _score(self, order: ScoreOrder) -> Sequence[float | None] | Answered:
        workplace, everyone = self._workplace(order.clients), range(len(order.clients))
        adapters = order.rows.adapters(self.fetch)
        if order.evaluation is None:
            return IN_PROCESS.loss(workplace, adapters.take, everyone, order.gate, split=order.split)
        texts: list[tuple[int, int, str]] = []

        def written(n: int, place: int, text: str) -> None:
            texts.append((n, place, text))

        scores = IN_PROCESS.answers(
            replace(workplace, evaluation=order.evaluation),
            adapters.take,
            everyone,
            order.gate,
            max_examples=order.max_examples,
            progress=lambda done: None,
            written=written,
        )
        return Answered(scores, texts if order.evaluation.examples else ())

    def _workplace(self, positions: Sequence[int]) -> Workplace:
        """Return these clients and the base, for one pass."""
        assert self.base is not None, "an order before ready()"
        return Workplace(self.base, tuple(self._client(k) for k in positions), max(1, len(positions)))

    def _client(self, k: int) -> ClientData:
        block, place = self.blocks.find(k)
        if block not in self.data:
            self.data[block] = self._fetch(self.blocks.refs[block])
            while len(self.data) > 1 and sum(self.blocks.tokens[one] for one in self.data) > KEPT_TOKENS:
                self.data.popitem(last=False)
        self.data.move_to_end(block)
        return self.data[block][place]

    def fetch(self, reference: Any) -> Any:
        """Return what several orders share: a method, a training, what was added to the base."""
        if reference not in self.shared:
            self.shared[reference] = self._fetch(reference)
            if len(self.shared) > SHARED:
                self.shared.popitem(last=False)
        return self.shared[reference]


def failing(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or Failed."""
    try:
        return work()
    except Exception as error:
        return Failed.of(error)
