"""Facts about a method, from the messages that it sends: for `fedmira methods` and the pages of docs/methods."""

import re

import numpy as np
import torch

from fedmira.adapters import lora_layout
from fedmira.cli.method_list import MethodFacts
from fedmira.engine.federation import Federation
from fedmira.engine.idle import Idle
from fedmira.engine.ledger import Ledger
from fedmira.engine.round import play
from fedmira.methods import MethodModule
from fedmira.methods.base import Clock, Cohort, Message, Method

PARTS = {"lora": "the LoRA factors", "prompt": "the prompt encoder"}
CLIENTS, RANK = 4, 2  # of a small federation
INPUTS, OUTPUTS = 16, 48  # of its layer; factors differ in size, and each is a multiple of 16


def method_facts(module: MethodModule, method: Method | None = None) -> MethodFacts:
    """Describe a method; method: None = built with its default settings."""
    method = build_default(module) if method is None else method
    text = (module.__doc__ or "").strip()
    sources = re.split(r"^Sources?:", text, flags=re.MULTILINE)[1:]
    down, up, sends = exchange(method)
    return MethodFacts(
        about=text.splitlines()[0],
        papers=re.findall(r"arXiv:\d{4}\.\d{4,5}", " ".join(sources)),
        view="personal" if method.personal else "global",
        needs="nothing" if method.sends_nothing else method.facts.needs,
        weighs=method.facts.weighs,
        sends="nothing" if method.sends_nothing else sends,
        bytes_up="" if method.sends_nothing else up,
        bytes_down="" if method.sends_nothing else down,
        starts=_starts(method),
    )


def _starts(method: Method) -> str:
    """Say what a client begins with that is given an adapter of its own."""
    layout, regime = lora_layout([("layer", INPUTS, OUTPUTS)], RANK), method.regime
    if method.layout is not None and not method.layout(layout, INPUTS).low_rank:
        return "refused: it has no LoRA"
    if regime.trainees == "nobody":
        return "nothing: it uses no adapter"
    if regime.starts != "any":
        alike = "it has one A for all clients: one adapter for all is taken, several are refused"
        return alike if regime.starts == "alike" else "refused: its factors begin anew in every round"
    layout = layout if method.layout is None else method.layout(layout, INPUTS)
    leaves = [leaf for pair in layout.parts[0].pairs() for leaf in pair]  # of the part that an adapter is laid into
    given = torch.cat([torch.arange(leaf.start, leaf.stop) for leaf in leaves])
    travels = (method.travels(layout, Clock(1)) | method.travels(layout, Clock(2)))[given]
    if method.has_row_of_each or (regime.trainees == "sampled" and not bool(travels.any())):
        return "its own" if len(layout.parts) == 1 else "its own; the part that all share is drawn"
    mean = "the mean of its group's" if isinstance(method.rows_of, torch.Tensor) else "the mean of all clients'"
    return mean if regime.trainees == "pool" or bool(travels.all()) else f"{mean} in what travels, its own in the rest"


def build_default(module: MethodModule) -> Method:
    """Build a method with its default settings for a few clients."""
    ids = tuple(f"client-{k}" for k in range(CLIENTS))
    cohort = Cohort(ids, (1,) * CLIENTS, ({},) * CLIENTS, (np.arange(CLIENTS),), seed=0)
    return module.build(module.Config(), cohort)


def exchange(method: Method) -> tuple[str, str, str]:
    """Play two rounds; return the bytes down and up of the second as formulas, and what a row consists of.

    In the first nobody has sent anything that could be handed on, and nothing has been added to the base.
    """
    layout = lora_layout([("layer", INPUTS, OUTPUTS)], RANK)
    names = tuple(f"client-{k}" for k in range(CLIENTS))
    lora = Federation(names, layout, torch.full((CLIENTS,), RANK), 2.0)
    federation = lora.under(method, INPUTS)
    ledger = Ledger(federation, federation.first_state(0, method), torch.zeros(CLIENTS))
    clients = Idle(federation, method)
    everyone = torch.arange(CLIENTS)
    first = play(method, ledger, clients, everyone, Clock(1, learning_rate=0.1))
    ledger.received(first.reply.ids)
    ledger.apply(first.change)
    played = play(method, ledger, clients, everyone, Clock(2, learning_rate=0.1))
    assert clients.given is not None
    assert clients.returned is not None
    size = int(federation.layout.sizes(federation.ranks[:1])[0])
    one_part = federation.layout == layout
    down = _formula(clients.given, played.bytes_down, size, factors=one_part)
    up = _formula(clients.returned, played.bytes_up, size, factors=one_part)
    return down, up, " and ".join(dict.fromkeys(PARTS[part.kind] for part in federation.layout.parts))


def _formula(message: Message, total: int, size: int, *, factors: bool) -> str:
    """Write the bytes of all clients' messages as a formula; size: numbers in a whole row; factors: it is A and B.

    S: clients. E: rows that some clients are sent and others not, as they are handed on. Q: numbers added to the base.
    """
    handed = {name: int((~gone).sum()) for name, gone in message.absent.items()}
    fixed = sum(name not in handed for name in ("rows", *message.more))
    always = 8 * sum(name not in handed for name in message.scalars)
    told = 8 * sum(count for name, count in handed.items() if name in message.scalars)
    added = 0 if message.base is None else sum(message.base.bytes_missing)
    rows = fixed * CLIENTS + sum(handed.values())
    numbers = (total - CLIENTS * always - told - added) / (4 * rows) if rows else 0.0  # of a row
    letter, share = "P", numbers / size
    if factors and numbers in (RANK * INPUTS, RANK * OUTPUTS):
        letter, share = "A" if numbers == RANK * INPUTS else "B", 1.0
    terms = [
        (bool(fixed), f"S x {_times(fixed * share)}{letter} x 4"),
        (any(handed.values()), f"E x {_times(share)}{letter} x 4"),
        (bool(always), f"S x {always}"),
        (bool(told), "E x 8"),
        (bool(added), "Q x 4"),
    ]
    return " + ".join(term for present, term in terms if present)


def _times(factor: float) -> str:
    return "" if factor == 1 else f"{factor:g} x "
