"""Clients that live in other processes: each knows its own data and memory, and nothing of the server or the others.

What crosses the pipe is what would cross a wire: the message as it travels, a clock, headers and figures.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from tests import tiny
from torch import Tensor

from fedmira.adapters.optim import adamw
from fedmira.engine.clients import Asked, Reply, Scores, Send, everybody
from fedmira.engine.federation import Federation
from fedmira.engine.simulated import Simulated
from fedmira.engine.tools import Training
from fedmira.engine.workplace import Workplace
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message

SIZES = (5, 2, 3)  # training examples; in batches of two 3, 1 and 2 steps
RANKS = (2, 1, 2)
NAMES = tuple(f"c{k}" for k in range(len(SIZES)))


def training() -> Training:
    return Training(adamw(weight_decay=0.1), 0.02, 2, None, 1, 1.0, True, 0.0, seed=3)


def workplace(names: Sequence[str]) -> Workplace:
    """The base, and the data of these clients alone."""
    clients = tuple(tiny.client(name, train=SIZES[NAMES.index(name)]) for name in names)
    return Workplace(tiny.base("gpt2", targets=["c_attn"], dtype=torch.float32), clients, 1)


def federation(names: Sequence[str]) -> Federation:
    layout = tiny.layout(tiny.base("gpt2", targets=["c_attn"], dtype=torch.float32), 2)
    ranks = torch.tensor([RANKS[NAMES.index(name)] for name in names])
    return Federation(tuple(names), layout, ranks, 3.0, run="test", base="tiny")


def site(name: str, pipe: Connection) -> None:
    """One client's process. Its method is built for a federation of one: it uses the client's half alone."""
    torch.set_num_threads(1)
    me, here = torch.zeros(1, dtype=torch.int64), workplace([name])
    while True:
        order, *given = pipe.recv()
        if order == "begin":
            alone = build(*given, Cohort((name,), (1,), ({},), (), 3))
            clients = Simulated(here, federation([name]), alone, training())
        elif order == "train":
            pipe.send(clients.train(me, *given))
        elif order == "losses":
            message, clock = given
            pipe.send(clients.losses(me, Fixed(message, clock)))
        elif order == "keep":
            clients.keep(me).apply()
        else:
            return


class Fixed:
    """One message, whoever it is for."""

    def __init__(self, message: Message, clock: Clock) -> None:
        self.message, self.clock = message, clock

    def __call__(self, ids: Tensor) -> Message:
        return self.message


class Elsewhere:
    """The clients of NAMES, each behind a pipe."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for name in NAMES:
            here, there = context.Pipe()
            process = context.Process(target=site, args=(name, there), daemon=True)
            process.start()
            there.close()  # so that a process that dies is an end of file here, and not a wait
            self.pipes.append(here)
            self.processes.append(process)

    def begin(self, method: str, settings: Mapping[str, Any]) -> None:
        """Let every site begin anew with a method, without memory of an earlier one."""
        for pipe in self.pipes:
            pipe.send(("begin", method, settings))

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(("end",))
            process.join(10)

    def ask(self, sampled: Tensor) -> Asked:
        return everybody(sampled)

    def train(self, ids: Tensor, given: Message, clock: Clock) -> Reply:
        for n, k in enumerate(ids.tolist()):
            self.pipes[k].send(("train", given.take(slice(n, n + 1)).map(torch.clone), clock))
        replies: list[Reply] = [self.pipes[k].recv() for k in ids.tolist()]
        first = replies[0].message
        return Reply(
            ids=ids,
            message=Message(
                torch.cat([reply.message.rows for reply in replies]),
                {name: torch.cat([reply.message.scalars[name] for reply in replies]) for name in first.scalars},
            ),
            headers=tuple(reply.headers[0] for reply in replies),
            losses=torch.cat([reply.losses for reply in replies]),
            steps=torch.cat([reply.steps for reply in replies]),
            validation=[reply.validation[0] for reply in replies],
            tokens=sum(reply.tokens for reply in replies),
        )

    def losses(self, ids: Tensor, send: Send) -> list[float | None]:
        for k in ids.tolist():
            self.pipes[k].send(("losses", send(torch.tensor([k])).map(torch.clone), send.clock))
        return [self.pipes[k].recv()[0] for k in ids.tolist()]

    def test(self, ids: Sequence[int], send: Send, progress: Callable[[int], None]) -> Scores:
        return Scores([None] * len(ids), {})

    def keep(self, ids: Tensor) -> None:
        for k in ids.tolist():
            self.pipes[k].send(("keep",))

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Memory is with the clients."""
