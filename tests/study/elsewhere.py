"""Clients that live in other processes: each knows its own data and memory, and nothing of the server or the others.

What crosses a pipe is what would cross a wire: messages as they travel, a clock, headers, figures; at the end of a
study its adapter, because the study's user exports it here.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.config.sections import Config
from fedmira.data.batches import ClientData
from fedmira.engine.clients import Asked, Reply, Scores, Send, Tuned, everybody
from fedmira.engine.federation import Federation
from fedmira.engine.trainees import make_clients
from fedmira.engine.workplace import Workplace
from fedmira.methods import recipe_of
from fedmira.methods.base import Clock, Cohort, Message
from fedmira.model.base.load import Base
from fedmira.study.assemble import Built, Prepared, evaluation_of
from fedmira.study.training import training_of

ME = torch.zeros(1, dtype=torch.int64)


def site(pipe: Connection, config: Config, base: Base, client: ClientData, federation: Federation) -> None:
    """One client's process. Its method is built for a federation of one: it uses the client's half alone.

    base: forked with the process, which from then on changes its own copy alone.
    """
    torch.set_num_threads(1)
    (seed,) = config.seeds
    workplace = Workplace(base, (client,), 1, evaluation_of(config))
    (entry,) = config.methods
    method = recipe_of(entry).build(Cohort((client.id,), (len(client.train),), (client.columns,), (), seed))
    clients = make_clients(workplace, federation, method, training_of(config, seed))
    while True:
        order, *sent = pipe.recv()
        if order == "train":
            pipe.send(clients.train(ME, Fixed(*sent)))
        elif order == "keep":
            clients.keep(ME).apply()
        elif order == "set aside":
            clients.set_aside(ME, Fixed(*sent))
        elif order == "take up":
            clients.take_up()
        elif order == "end":
            return
        else:
            send = Fixed(*sent)
            answers: dict[str, Callable[[], Any]] = {
                "losses": lambda send=send: clients.losses(ME, send),
                "test": lambda send=send: clients.test([0], send, lambda done: None),
                "tune": lambda send=send: clients.tune(send, lambda done: None),
                "adapters": lambda send=send: clients.adapters(ME, send),
            }
            pipe.send(answers[order]())


class Fixed:
    """One message, whoever it is for."""

    def __init__(self, message: Message, clock: Clock) -> None:
        self.message, self.clock = message, clock

    def __call__(self, ids: Tensor) -> Message:
        return self.message


class Elsewhere:
    """The clients of one run, each behind a pipe."""

    def __init__(self, config: Config, prepared: Prepared, federation: Federation) -> None:
        self.federation = federation
        self.pipes, self.processes = [], []
        context = multiprocessing.get_context("fork")  # what is imported already need not be imported again
        base = prepared.workplace.base
        for k, client in enumerate(prepared.workplace.clients):
            here, there = context.Pipe()
            alone = replace(federation, names=(client.id,), ranks=federation.ranks[k : k + 1])
            process = context.Process(target=site, args=(there, config, base, client, alone), daemon=True)
            process.start()
            there.close()  # so that a process that dies is an end of file here, and not a wait
            self.pipes.append(here)
            self.processes.append(process)

    def order(self, what: str, ids: Sequence[int], send: Send) -> list[Any]:
        for k in ids:
            self.pipes[k].send((what, send(torch.tensor([k])).map(torch.clone), send.clock))
        return [self.pipes[k].recv() for k in ids]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(("end",))
            process.join(10)

    def ask(self, sampled: Tensor) -> Asked:
        return everybody(sampled)

    def train(self, ids: Tensor, send: Send) -> Reply:
        replies: list[Reply] = self.order("train", ids.tolist(), send)
        first = replies[0].message
        return Reply(
            ids=ids,
            message=Message(
                torch.cat([reply.message.rows for reply in replies]),
                {name: torch.cat([reply.message.scalars[name] for reply in replies]) for name in first.scalars},
                {name: torch.cat([reply.message.more[name] for reply in replies]) for name in first.more},
            ),
            headers=tuple(reply.headers[0] for reply in replies),
            losses=torch.cat([reply.losses for reply in replies]),
            steps=torch.cat([reply.steps for reply in replies]),
            validation=[reply.validation[0] for reply in replies],
            tokens=sum(reply.tokens for reply in replies),
        )

    def losses(self, ids: Tensor, send: Send) -> list[float | None]:
        return [values[0] for values in self.order("losses", ids.tolist(), send)]

    def test(self, ids: Sequence[int], send: Send, progress: Callable[[int], None]) -> Scores:
        found: list[Scores] = self.order("test", ids, send)
        metrics = found[0].test if found else {}
        return Scores([None] * len(ids), {metric: [scores.test[metric][0] for scores in found] for metric in metrics})

    def tune(self, send: Send, progress: Callable[[int], None]) -> Tuned:
        found: list[Tuned] = self.order("tune", range(len(self.pipes)), send)
        assert not any(tuned.refused for tuned in found)
        return Tuned(sum(tuned.tokens for tuned in found), {})

    def adapters(self, ids: Tensor, send: Send) -> Adapters:
        found: list[Adapters] = self.order("adapters", ids.tolist(), send)
        rows = torch.cat([adapters.rows for adapters in found])
        return replace(self.federation.adapters(ids, rows), added=found[0].added)

    def set_aside(self, ids: Tensor, send: Send) -> None:
        for k in ids.tolist():
            self.pipes[k].send(("set aside", send(torch.tensor([k])).map(torch.clone), send.clock))

    def stops(self, sampled: Tensor) -> str | None:
        return None

    def take_up(self) -> None:
        for pipe in self.pipes:
            pipe.send(("take up",))

    def keep(self, ids: Tensor) -> None:
        for k in ids.tolist():
            self.pipes[k].send(("keep",))

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Memory is with the clients."""


def elsewhere(prepared: Prepared, built: Built, seed: int, federation: Federation, folder: Path) -> Elsewhere:
    """Where a study's clients are, as fedmira.study.run takes it."""
    config = prepared.config.model_copy(update={"methods": [built.recipe.entry], "seeds": [seed]})
    return Elsewhere(config, prepared, federation)
