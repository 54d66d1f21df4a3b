"""Clients that play a round without data: what a method's messages consist of, by the method itself."""

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters.columns import lay_over, pack
from fedmira.engine.clients import Reply, Send
from fedmira.engine.federation import Federation
from fedmira.engine.gate import Header
from fedmira.methods.base import Clock, Message, Method, Tools


class Idle:
    """Clients that play a round of one local step with zero gradients."""

    def __init__(self, federation: Federation, method: Method) -> None:
        self.federation, self.method = federation, method
        self.given: Message | None = None
        self.returned: Message | None = None

    def train(self, ids: Tensor, send: Send) -> Reply:
        given, clock = send(ids), send.clock
        layout, half = self.federation.layout, self.method.client
        travels = self.method.travels(layout, clock)
        nothing = torch.zeros(()).expand(len(ids), layout.size)  # takes no memory
        whole = given.map(lambda rows: lay_over(nothing, travels, rows))
        adapters = self.federation.adapters(ids, whole.rows.clone())
        tools = Tools(
            clock=Clock(clock.round, steps=torch.ones(len(ids), dtype=torch.int64), learning_rate=0.1),
            grad=lambda adapters: (torch.zeros(len(adapters)), torch.zeros_like(adapters.rows)),
            update=lambda adapters, gradient, *, of="main", who=None: adapters,
            rng=lambda name: [np.random.default_rng(k) for k in ids.tolist()],
            curvature=lambda adapters: (torch.ones(len(adapters)), torch.zeros_like(adapters.rows)),
            loss=lambda adapters, *, on="validation": torch.zeros(len(adapters), dtype=torch.float64),
            each=lambda adapters: (torch.zeros(len(adapters), 1), torch.ones(len(adapters), 1)),
            noise=lambda updates, deviations, streams: torch.zeros_like(updates),
        )
        adapters, memory = half.begin(adapters, half.start(adapters), whole, tools)
        adapters, memory = half.step(adapters, memory, whole, tools)
        message = half.finish(adapters, memory, whole, tools)[0]
        sent = travels & self.method.trained(layout, clock)
        self.given, self.returned = given, message.map(lambda rows: pack(rows, sent))
        names = [self.federation.names[k] for k in ids.tolist()]
        headers = [
            Header("", clock.round, name, name, "", self.federation.layout_hash, self.method.name, 1.0)
            for name in names
        ]
        ones = torch.ones(len(ids))
        return Reply(ids, self.returned, tuple(headers), ones, ones.long(), [None] * len(ids))
