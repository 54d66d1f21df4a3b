"""A small method that uses what the tree's methods do not: its own losses."""

import torch

from fedmira.adapters import Adapters
from fedmira.methods.base import Client, Facts, Memory, Message, Method, Tools
from fedmira.methods.means import merge_mean


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


EXAMPLES = {make.__name__: make for make in (careful,)}
