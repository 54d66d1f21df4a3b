"""What the frozen base makes of each client's prompts, as one vector per client."""

from collections.abc import Sequence

import numpy as np

from fedmira.data.batches import ClientData, Encoded, asking, collate
from fedmira.evaluation.measure import PASS_TOKENS
from fedmira.model.base.load import Base
from fedmira.model.passes import plan_pass, running

PROMPTS = 16  # of each client, spread over its training examples


def embed_prompts(base: Base, clients: Sequence[ClientData]) -> np.ndarray:
    """Return [K, d]: each client's mean, over some of its training prompts, of the last hidden state at the last token.

    No adapter is used and no answer is seen: a site can work its own out and send nothing else.
    """
    found = np.zeros((len(clients), base.head.weight.shape[1]))
    waiting: list[tuple[int, Encoded]] = []
    for k, client in enumerate(clients):
        step = -(-len(client.train) // PROMPTS)
        for one in client.train[::step]:
            waiting.append((k, asking(one.question, base.pad_id)))
    waiting.sort(key=lambda item: len(item[1].ids))  # in a pass every prompt stands as a client of its own
    start = 0
    while start < len(waiting):
        stop = start + 1
        while stop < len(waiting) and (stop + 1 - start) * len(waiting[stop][1].ids) <= PASS_TOKENS:
            stop += 1
        some = waiting[start:stop]
        plan = plan_pass(base, collate([[one] for _, one in some], pad_id=base.pad_id))
        with running(base, plan, None) as hidden:
            states = hidden.double().cpu().numpy()
        for place, state in zip(plan.owner.tolist(), states, strict=True):
            found[some[place][0]] += state
        start = stop
    counts = np.bincount([k for k, _ in waiting], minlength=len(clients))
    return found / np.maximum(counts, 1)[:, None]
