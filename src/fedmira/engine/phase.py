"""The local phase of a cohort: all sampled clients take their local steps together, in one pass per step.

Clients are ordered by their number of steps, so that those still at work are a prefix: a client that has finished keeps
its row and its moments untouched, because it is not in any later batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import ClientData, Encoded, collate, local_batches
from fedmira.data.partition import client_key
from fedmira.engine.tools import Moments, Toolbox, Training
from fedmira.errors import MethodError
from fedmira.methods.base import Clock, Memory, Message, Method
from fedmira.model.base.load import Base
from fedmira.privacy.uploads import Hidden


@dataclass(frozen=True, eq=False)
class PhaseResult:
    """What a phase gives, in the order of the clients it was given.

    rows [S, P]: each client's own, as its last step left it; returned: what it sends, whole rows. memory: of the
    method; moments: of the optimizer. losses [S]: mean over each client's own steps. scored: tokens of validation that
    the method asked losses of. hidden: by the noise on what is sent, of each pass.
    """

    rows: Tensor
    returned: Message
    memory: Memory
    moments: Moments
    losses: Tensor
    steps: Tensor
    tokens: int
    scored: int = 0
    hidden: Sequence[Hidden] = ()


def plan_steps(client: ClientData, training: Training, round_number: int) -> list[np.ndarray]:
    """Return the training examples of each optimizer step of one client in one round, from its own stream."""
    return local_batches(
        len(client.train),
        seed=training.seed,
        round=round_number,
        key=client_key(client.id),
        batch_size=training.examples_per_step,
        steps=training.local_steps,
        epochs=training.local_epochs,
    )


def local_phase(
    base: Base,
    method: Method,
    clients: Sequence[ClientData],
    start: Adapters,
    given: Message,
    memory: Memory,
    moments: Moments | None = None,
    *,
    training: Training,
    clock: Clock,
    cohort: int,
    plans: Sequence[Sequence[np.ndarray]] | None = None,
    reports: bool = True,
) -> PhaseResult:
    """Train `clients` from what they were sent, at most `cohort` of them in one pass.

    start: the ranks and scales of these clients; its rows are not read. given: whole rows, what was sent laid over each
    client's own. given, memory and moments are only read. plans: the training examples of each step of each client;
    None: as plan_steps draws them. reports: may losses leave the clients?

    Raises ShapeError if rows and clients disagree.
    """
    if plans is None:
        plans = [plan_steps(client, training, clock.round) for client in clients]
    inputs = Inputs(start, given, memory, moments or {})
    passes = cut_into_passes(plans, cohort)
    pieces = [
        _train_together(
            base,
            method,
            [clients[position] for position in chosen],
            [plans[position] for position in chosen],
            inputs.take(chosen),
            training=training,
            clock=clock,
            reports=reports,
        )
        for chosen in passes
    ]
    return join_pieces(pieces, passes)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What clients begin a phase with: arguments of local_phase."""

    start: Adapters
    given: Message
    memory: Memory
    moments: Moments

    def take(self, chosen: Sequence[int]) -> "Inputs":
        """Return those of some clients, by position; their rows are what was sent, a view where they are in line.

        Memory and moments are copies.
        """
        index, in_line = torch.tensor(chosen), list(chosen) == list(range(chosen[0], chosen[0] + len(chosen)))
        given = self.given.take(slice(chosen[0], chosen[-1] + 1) if in_line else index)
        return Inputs(
            self.start.take(index, rows=given.rows),
            given,
            {name: value[index] for name, value in self.memory.items()},
            {of: {name: value[index] for name, value in some.items()} for of, some in self.moments.items()},
        )


def cut_into_passes(plans: Sequence[Sequence[np.ndarray]], cohort: int) -> list[list[int]]:
    """Return the positions of the clients that train in one pass, at most `cohort`, in the order of their steps."""
    order = sorted(range(len(plans)), key=lambda position: -len(plans[position]))
    return [order[first : first + cohort] for first in range(0, len(order), cohort)]


def join_pieces(pieces: Sequence[PhaseResult], passes: Sequence[Sequence[int]]) -> PhaseResult:
    """Return what the passes gave as one, in the order of the clients. passes: as cut_into_passes gives them."""
    order = [position for chosen in passes for position in chosen]
    back = torch.argsort(torch.tensor(order))
    in_order = len(pieces) == 1 and order == sorted(order)

    def join(parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if in_order else torch.cat(list(parts))[back]

    def join_named(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: join([part[name] for part in parts]) for name in parts[0]}

    returned = Message(
        join([piece.returned.rows for piece in pieces]),
        join_named([piece.returned.scalars for piece in pieces]),
        join_named([piece.returned.more for piece in pieces]),
    )
    return PhaseResult(
        rows=join([piece.rows for piece in pieces]),
        returned=returned,
        memory=join_named([piece.memory for piece in pieces]),
        moments={of: join_named([piece.moments[of] for piece in pieces]) for of in pieces[0].moments},
        losses=join([piece.losses for piece in pieces]),
        steps=join([piece.steps for piece in pieces]),
        tokens=sum(piece.tokens for piece in pieces),
        scored=sum(piece.scored for piece in pieces),
        hidden=[one for piece in pieces for one in piece.hidden],
    )


def _train_together(
    base: Base,
    method: Method,
    clients: Sequence[ClientData],
    plans: Sequence[Sequence[np.ndarray]],
    inputs: Inputs,
    *,
    training: Training,
    clock: Clock,
    reports: bool,
) -> PhaseResult:
    """One pass per step for clients in descending order of their number of steps."""
    device, given = base.device, inputs.given
    adapters = inputs.start.with_rows(given.rows.to(device, copy=True)).mask_()
    given = _at_own_ranks(given, adapters)
    memory = {name: value.to(device) for name, value in inputs.memory.items()}
    moments = {of: {name: value.to(device) for name, value in some.items()} for of, some in inputs.moments.items()}
    moments.setdefault("main", training.optimizer.start(adapters.rows))
    steps = torch.tensor([len(plan) for plan in plans])
    trained = method.trained(adapters.layout, clock).to(device)
    at = replace(clock, learning_rate=training.learning_rate)
    box = Toolbox(base, clients, training, at, adapters.rows, trained, moments, reports)
    half, everyone = method.client, len(clients)
    adapters, memory = half.begin(adapters, memory, given, box.tools(0, [0] * everyone, steps=steps))
    frozen = adapters.rows[:, ~trained].clone() if box.partly else None
    tokens = 0
    for step in range(int(steps.max())):
        count = int((steps > step).sum())
        examples = [
            [client.train[i] for i in plan[step]] for client, plan in zip(clients[:count], plans[:count], strict=True)
        ]
        batches = [collate(part, pad_id=base.pad_id) for part in _parts(examples, training.examples_per_pass)]
        tokens += sum(int(batch.lengths.sum()) for batch in batches)
        view = adapters.head(count)
        before = {name: value[:count] for name, value in memory.items()}
        tools = box.tools(step, [1 + step] * count, batches, steps=steps)
        after, kept = half.step(view, dict(before), given.take(slice(count)), tools)
        _write_back(view.rows, after.rows)
        if frozen is not None:
            view.rows[:, ~trained] = frozen[:count]
        memory = _remember(memory, kept, working=count, count=everyone, method=method.name)
    tools = box.tools(int(steps.max()), (1 + steps).tolist(), steps=steps)
    message, memory = half.finish(adapters, memory, given, tools)
    return PhaseResult(
        rows=adapters.rows.cpu(),
        returned=Message(
            message.rows.cpu(),
            {name: value.cpu() for name, value in message.scalars.items()},
            {name: value.cpu() for name, value in message.more.items()},
        ),
        memory={name: value.cpu() for name, value in memory.items()},
        moments={of: {name: value.cpu() for name, value in some.items()} for of, some in moments.items()},
        losses=box.losses.cpu() / steps,
        steps=steps,
        tokens=tokens,
        scored=box.scored,
        hidden=box.hidden,
    )


def _parts(examples: Sequence[Sequence[Encoded]], size: int) -> list[list[Sequence[Encoded]]]:
    """Cut each client's examples of a step into passes of at most `size`; a client with fewer has none in the last.

    A sample that is drawn may be empty: there is one pass at least.
    """
    longest = max(1, *map(len, examples))
    return [[client[first : first + size] for client in examples] for first in range(0, longest, size)]


def _at_own_ranks(given: Message, adapters: Adapters) -> Message:
    """Return what was sent as these clients see it: on their device, within their ranks."""
    if not adapters.is_padded and not adapters.layout.gaps:
        moved = given.map(lambda rows: rows.to(adapters.rows.device))
    else:
        moved = given.map(lambda rows: adapters.with_rows(rows.to(adapters.rows.device, copy=True)).mask_().rows)
    return replace(moved, scalars={name: value.to(adapters.rows.device) for name, value in moved.scalars.items()})


def _write_back(target: Tensor, value: Tensor) -> None:
    """Keep what a step returned; a step that worked in place returns the target itself."""
    if value.data_ptr() != target.data_ptr():
        target.copy_(value)


def _remember(memory: Memory, after: Memory, *, working: int, count: int, method: str) -> Memory:
    """Return the memory of `count` clients where a step of the first `working` returned `after`.

    A name that the step adds is zero for clients that have finished; a name that it drops stays as it was. Raises
    MethodError if a name changes its shape or type.
    """
    for name, value in after.items():
        if name not in memory:
            memory = {**memory, name: torch.zeros(count, *value.shape[1:], dtype=value.dtype, device=value.device)}
        target = memory[name][:working]
        if target.shape != value.shape or target.dtype != value.dtype:
            raise MethodError(
                f"method '{method}': memory '{name}' was {target.dtype} {tuple(target.shape)}, and a step returned "
                f"{value.dtype} {tuple(value.shape)}: a tensor keeps its type and shape"
            )
        _write_back(target, value)
    return memory
