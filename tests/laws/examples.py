"""Small methods that use what the tree's methods do not: columns, further rows, a second trained row, own losses."""

import torch
from tests.laws.fedex import fedex

from fedmira.adapters import Adapters
from fedmira.methods.base import Client, Facts, Memory, Message, Method, Tools
from fedmira.methods.means import merge_mean


def ditto(penalty: float = 0.1) -> Method:
    """Ditto (arXiv:2012.04221): beside the shared row each client trains its own v by g(v) + penalty (v - w_sent)."""

    def start(adapters: Adapters) -> Memory:
        return {"own": adapters.rows.clone()}

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        own = adapters.with_rows(memory["own"])
        _, gradient = tools.grad(own)
        gradient = gradient + penalty * (own.rows - given.rows)
        own = tools.update(own, gradient, of="own")
        _, gradient = tools.grad(adapters)
        return tools.update(adapters, gradient), {**memory, "own": own.rows}

    def use(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters:
        return adapters.with_rows(memory["own"].clone())

    client = Client(start=start, step=step, use=use)
    return Method("ditto", merge_mean("examples"), client=client, facts=Facts(weighs=True))


def careful() -> Method:
    """Each client begins from what was sent, or from its last own row, whichever its validation loss prefers."""

    def start(adapters: Adapters) -> Memory:
        return {"last": adapters.rows.clone()}

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return use(adapters, memory, given, tools), memory

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        return Message(adapters.rows), {"last": adapters.rows.clone()}

    def use(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters:
        last = adapters.with_rows(memory["last"].clone())
        better = tools.loss(last) < tools.loss(adapters)
        return adapters.with_rows(torch.where(better[:, None], last.rows, adapters.rows))

    client = Client(start=start, begin=begin, finish=finish, use=use)
    return Method("careful", merge_mean("examples"), client=client, facts=Facts(weighs=True))


EXAMPLES = {make.__name__: make for make in (ditto, careful, fedex)}
