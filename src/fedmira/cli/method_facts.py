"""What a method is, read off the messages it sends: for `fedmira methods` and the pages of docs/methods."""

import re

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout, scales, start_adapters
from fedmira.cli.method_list import MethodFacts
from fedmira.methods import MethodModule
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, Tools

PARTS = {"lora": "the LoRA factors", "prompt": "the prompt encoder"}
CLIENTS, RANK, WIDTH = 4, 2, 4  # of the federation whose messages are looked at


def method_facts(module: MethodModule, method: Method | None = None) -> MethodFacts:
    """Describe a method; `method`: as built otherwise than by its default settings."""
    method = build_default(module) if method is None else method
    text = (module.__doc__ or "").strip()
    sources = re.split(r"^Sources?:", text, flags=re.MULTILINE)[1:]
    down, up, size, sends = exchange(method)
    return MethodFacts(
        about=text.splitlines()[0],
        papers=re.findall(r"arXiv:\d{4}\.\d{4,5}", " ".join(sources)),
        view="personal" if method.personal or method.tune is not None else "global",
        needs=method.needs if method.exchanges else "nothing",
        weighs=method.uses_weights,
        sends=sends if method.exchanges else "nothing",
        bytes_up=_formula(up, size) if method.exchanges else "",
        bytes_down=_formula(down, size) if method.exchanges else "",
    )


def build_default(module: MethodModule) -> Method:
    """Build a method with its default settings for a few clients."""
    ids = tuple(f"client-{k}" for k in range(CLIENTS))
    cohort = Cohort(ids, (1,) * CLIENTS, ({},) * CLIENTS, (np.arange(CLIENTS),), seed=0)
    return module.build(module.Config(), cohort)


def exchange(method: Method) -> tuple[Message, Message, int, str]:
    """Return what is sent and what comes back in a first round of one local step, gradients all zero.

    And P, how many numbers a client's row has, and what they are.
    """
    layout = lora_layout([("layer", WIDTH, WIDTH)], RANK)
    if method.layout is not None:
        layout = method.layout(layout, WIDTH)
    ids, ranks = torch.arange(CLIENTS), torch.full((CLIENTS,), RANK if layout.low_rank else 0)
    start = start_adapters(layout, ranks if method.personal else ranks[:1], 2.0, torch.Generator().manual_seed(0))
    given = method.send(method.init(start, Clock(0)), ids, Clock(1))
    adapters = Adapters(layout, given.rows[:, : layout.size].clone(), ranks, scales(ranks, 2.0))

    def grad(current: Adapters) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(current)), torch.zeros_like(current.rows)

    def update(current: Adapters, gradient: Tensor, memory: Memory) -> tuple[Adapters, Memory]:
        return current, memory

    def rng(purpose: str) -> list[np.random.Generator]:
        return [np.random.default_rng(k) for k in range(CLIENTS)]

    clock = Clock(1, steps=torch.ones(CLIENTS, dtype=torch.int64), learning_rate=0.1)
    tools = Tools(clock, grad, update, rng, grad)
    adapters, memory = method.begin(adapters, method.private(adapters), given, tools)
    adapters, memory = method.step(adapters, memory, given, tools)
    returned = method.finish(adapters, memory, given, tools)[0]
    return given, returned, layout.size, " and ".join(PARTS[part.kind] for part in layout.parts if part.travels)


def _formula(message: Message, size: int) -> str:
    """Write the bytes of S clients' messages, of rows that have `size` numbers when whole."""
    share = message.rows.shape[1] / size
    row = f"S x {'' if share == 1 else f'{share:g} x '}P x 4"
    return f"{row} + S x {8 * len(message.scalars)}" if message.scalars else row
