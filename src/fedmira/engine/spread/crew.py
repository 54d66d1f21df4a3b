"""Actors that carry out orders: each gets the next one when it is free; what a lost one had is given to another.

Ray places them, restarts those that end, and moves what travels. An actor that is back is asked for its base before it
gets an order.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedmira.data.batches import ClientData
from fedmira.engine.spread.actor import Blocks, Failed, Ready, ScoreOrder, Trainer, TrainOrder
from fedmira.errors import ConfigError, FedMiraError, ModelError, Stopped
from fedmira.model.base.load import Base

log = logging.getLogger(__name__)

PATIENCE_S = 600  # without an actor that is up
TRIES = 12  # of one order whose actors end, at most; a lost node may have had several that were idle
BLOCK_TOKENS = 1 << 18  # of clients' data that travel together
REMEMBERED = 8  # values in the store that orders share

Load = Callable[[], Base]


@dataclass(frozen=True)
class Post:
    """What one actor has to itself. workers: how many there are."""

    workers: int
    threads: int
    gpus: int = 0

    @property
    def cpus(self) -> int:
        """CPUs that Ray counts for an actor; one with a GPU waits for it most of the time."""
        return 1 if self.gpus else self.threads

    def __str__(self) -> str:
        each = f"{self.cpus} CPU{'s' * (self.cpus > 1)}{f' and {self.gpus} GPU' if self.gpus else ''}"
        return f"{self.workers} actor{'s' * (self.workers > 1)} of {each} each"


@dataclass(frozen=True, eq=False)
class Task:
    """One pass. weight: tokens, by which the longest are begun first; build: makes the order when an actor is free."""

    weight: int
    what: Literal["train", "score"]
    build: Callable[[], TrainOrder | ScoreOrder]


class Crew:
    """The actors of a study. Raises ModelError if one has another base than this process (fingerprint)."""

    def __init__(self, post: Post, load: Load, clients: Sequence[ClientData], *, fingerprint: str) -> None:
        import ray

        self.ray, self.post, self.fingerprint = ray, post, fingerprint
        share_tensors(ray)
        self._shared: list[tuple[Any, Any]] = []  # a value, and its reference
        kind = ray.remote(Trainer).options(num_cpus=post.cpus, num_gpus=post.gpus, max_restarts=-1)
        self._blocks = blocks_of(clients, ray.put)  # held here: else they end with an actor, which comes back
        self.actors = [kind.remote(load, self._blocks, threads=post.threads) for _ in range(post.workers)]
        self.free: list[Any] = []
        self.coming = {self._ask(actor): actor for actor in self.actors}  # ready() -> whose
        self.started = False  # has one been up?
        self.lost = 0  # orders whose actor ended
        self.versions: set[tuple[tuple[str, str], ...]] = set()

    def _ask(self, actor: Any) -> Any:
        """Ask an actor whether it is ready; it answers when it is up, however often it is restarted until then."""
        return actor.ready.options(max_task_retries=-1).remote()

    def await_first(self) -> None:
        """Wait until an actor is up. Raises its error, or ConfigError if none comes."""
        while not self.free:
            done, _ = self.ray.wait(list(self.coming), num_returns=1, timeout=PATIENCE_S)
            if not done:
                raise ConfigError(
                    [
                        f"federation.workers: {self.post} are wanted, and none has started in {PATIENCE_S} s; Ray has "
                        f"{shown(self.ray.cluster_resources())}"
                    ]
                )
            self._welcome(done[0])
        self.started = True

    def _welcome(self, reference: Any) -> None:
        """Take up an actor that says that it is ready. One that cannot be is left out once others are, or were, up."""
        actor = self.coming.pop(reference)
        try:
            found = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            found = Failed.of(ModelError(f"an actor could not start ({type(error).__name__})"))
        if isinstance(found, Ready) and found.fingerprint != self.fingerprint:
            found = Failed.of(
                ModelError(
                    f"model.base_model: the base on '{found.node}' is not the one here (sha256 "
                    f"{found.fingerprint[:12]}, here {self.fingerprint[:12]}): put the same one on every node"
                )
            )
        if isinstance(found, Failed):
            self.actors.remove(actor)
            self.ray.kill(actor)
            if not self.started:
                raise found.error()
            if not self.actors:
                raise Stopped(f"no actor is left: {found.error()}; finished rounds are saved")
            log.warning("an actor is left out: %s; %d go on", found.error(), len(self.actors))
            return
        self.versions.add(tuple(sorted(found.versions.items())))
        if len(self.versions) > 1:
            log.warning("nodes have other versions (%s): the same bits are not promised", self.versions)
            self.versions = {min(self.versions)}
        self.free.append(actor)

    def put(self, value: Any, make: Callable[[], Any]) -> Any:
        """Return a reference to what `make` returns; for the same value, that of an earlier call."""
        for known, reference in self._shared:
            if known is value:
                return reference
        self._shared = [*self._shared[1 - REMEMBERED :], (value, self.ray.put(make()))]
        return self._shared[-1][1]

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Yield the number and the answer of each task, in the order in which they are done.

        Raises what an actor raises, or Stopped where the same task has ended several actors, or none is left.
        """
        waiting = sorted(range(len(tasks)), key=lambda n: -tasks[n].weight)
        running: dict[Any, tuple[int, Any]] = {}  # reference -> task, actor
        tries, most = [0] * len(tasks), min(self.post.workers + 2, TRIES)
        while waiting or running:
            while waiting and self.free:
                number, actor = waiting.pop(0), self.free.pop()
                order = tasks[number].build()
                running[getattr(actor, tasks[number].what).remote(order)] = number, actor
                del order
            reference = self._next(running)
            if reference in self.coming:
                self._welcome(reference)
                continue
            number, actor = running.pop(reference)
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(error, self.ray.exceptions.RayTaskError) and isinstance(cause, Exception):
                    raise cause from None  # of what Ray does with an order or an answer
                tries[number] += 1
                self.lost += 1
                log.warning("an actor was lost (%s); its clients are given to another", type(error).__name__)
                if tries[number] == most:
                    raise Stopped(
                        f"a pass has ended {most} actors ({type(error).__name__}); finished rounds are saved; where "
                        "memory was short, resume with federation.cohort=N, fewer clients in a pass"
                    ) from None
                waiting.insert(0, number)
                self.coming[self._ask(actor)] = actor
                continue
            self.free.append(actor)
            if isinstance(answer, Failed):
                failure = answer.error()
                if not isinstance(failure, FedMiraError | MemoryError | torch.OutOfMemoryError):
                    log.error("an error in an actor, at\n%s", answer.frames)
                raise failure
            yield number, answer

    def _next(self, running: dict[Any, tuple[int, Any]]) -> Any:
        """Return the reference that is done next."""
        patience = None if running else PATIENCE_S
        done, _ = self.ray.wait([*running, *self.coming], num_returns=1, timeout=patience)
        if not done:
            raise Stopped(f"no actor is up since {PATIENCE_S} s; finished rounds are saved")
        return done[0]

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors, self.free, self.coming = [], [], {}


def blocks_of(clients: Sequence[ClientData], put: Callable[[Any], Any]) -> Blocks:
    """Put clients' data into the store, those of some clients together."""
    refs, first, tokens = [], [], []
    block: list[ClientData] = []
    count = 0
    for k, client in enumerate(clients):
        block.append(client)
        count += sum(len(one.ids) for some in (client.train, client.validation, client.test) for one in some)
        if count >= BLOCK_TOKENS or k == len(clients) - 1:
            refs.append(put(tuple(block)))
            first.append(k + 1 - len(block))
            tokens.append(count)
            block, count = [], 0
    return Blocks(refs, first, tokens)


def share_tensors(ray: Any) -> None:
    """Let tensors travel as their own numbers: torch would send the storage behind a view, in an archive."""
    ray.util.register_serializer(Tensor, serializer=_taken_apart, deserializer=_put_together)


def _taken_apart(value: Tensor) -> tuple[Any, torch.dtype, Sequence[int]]:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy(), value.dtype, tuple(value.shape)


def _put_together(parts: tuple[Any, torch.dtype, Sequence[int]]) -> Tensor:
    """Copy: what is in the store cannot be written."""
    numbers, dtype, shape = parts
    return (torch.from_numpy(numbers.copy()).view(dtype) if len(numbers) else torch.empty(0, dtype=dtype)).reshape(
        shape
    )


def shown(resources: Any) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
