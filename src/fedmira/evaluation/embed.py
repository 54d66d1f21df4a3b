"""The state at the last token of a prompt, under the frozen base or with adapters; and one vector per client."""

from collections.abc import Sequence

import numpy as np
import torch

from fedmira.adapters import Adapters
from fedmira.data.batches import ClientData, Encoded, asking, collate
from fedmira.evaluation.measure import PASS_TOKENS
from fedmira.model.base.load import Base
from fedmira.model.passes import plan_pass, running

PROMPTS = 16  # per client, spread over its training examples


def spread(client: ClientData, count: int) -> Sequence[Encoded]:
    """Return up to `count` training examples of a client, at even steps of their order."""
    return client.train[:: -(-len(client.train) // count)]


def embed_prompts(base: Base, clients: Sequence[ClientData]) -> np.ndarray:
    """Return [K, d]: each client's mean last hidden state at the last token of up to PROMPTS training prompts.

    No adapter and no answer is used: a site can compute its own vector and send nothing else.
    """
    chosen = [(k, example) for k, client in enumerate(clients) for example in spread(client, PROMPTS)]
    states = last_states(base, [example.question for _, example in chosen])
    sums = np.zeros((len(clients), states.shape[1]))
    owners = [k for k, _ in chosen]
    np.add.at(sums, owners, states)
    counts = np.bincount(owners, minlength=len(clients))
    return sums / np.maximum(counts, 1)[:, None]


def last_states(
    base: Base, prompts: Sequence[Sequence[int]], adapters: Adapters | None = None, owners: Sequence[int] = ()
) -> np.ndarray:
    """Return [n, d], float64: the last hidden state at the last token of each of n prompts.

    adapters [K], owners [n]: the row of each prompt; without them the base alone.
    """
    found = np.zeros((len(prompts), base.head.weight.shape[1]))
    waiting = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))  # each is a client of its pass
    start = 0
    while start < len(waiting):
        stop = start + 1
        while stop < len(waiting) and (stop + 1 - start) * (len(prompts[waiting[stop]]) + 1) <= PASS_TOKENS:
            stop += 1
        chosen = waiting[start:stop]
        plan = plan_pass(base, collate([[asking(prompts[place], base.pad_id)] for place in chosen], pad_id=base.pad_id))
        rows = None if adapters is None else torch.tensor([owners[place] for place in chosen])
        with running(base, plan, adapters, clients=rows) as hidden:
            states = hidden.double().cpu().numpy()
        for index, state in zip(plan.owner.tolist(), states, strict=True):
            found[chosen[index]] = state
        start = stop
    return found
