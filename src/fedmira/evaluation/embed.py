"""One vector per client: the frozen base's hidden states of its prompts, averaged."""

from collections.abc import Sequence

import numpy as np

from fedmira.data.batches import ClientData, Encoded, asking, collate
from fedmira.evaluation.measure import PASS_TOKENS
from fedmira.model.base.load import Base
from fedmira.model.passes import plan_pass, running

PROMPTS = 16  # per client, spread over its training examples


def embed_prompts(base: Base, clients: Sequence[ClientData]) -> np.ndarray:
    """Return [K, d]: each client's mean last hidden state at the last token of up to PROMPTS training prompts.

    No adapter and no answer is used: a site can compute its own vector and send nothing else.
    """
    sums = np.zeros((len(clients), base.head.weight.shape[1]))
    waiting: list[tuple[int, Encoded]] = []
    for k, client in enumerate(clients):
        step = -(-len(client.train) // PROMPTS)
        for example in client.train[::step]:
            waiting.append((k, asking(example.question, base.pad_id)))
    waiting.sort(key=lambda item: len(item[1].ids))  # in a pass every prompt is a separate client
    start = 0
    while start < len(waiting):
        stop = start + 1
        while stop < len(waiting) and (stop + 1 - start) * len(waiting[stop][1].ids) <= PASS_TOKENS:
            stop += 1
        in_pass = waiting[start:stop]
        plan = plan_pass(base, collate([[prompt] for _, prompt in in_pass], pad_id=base.pad_id))
        with running(base, plan, None) as hidden:
            states = hidden.double().cpu().numpy()
        for index, state in zip(plan.owner.tolist(), states, strict=True):
            sums[in_pass[index][0]] += state
        start = stop
    counts = np.bincount([k for k, _ in waiting], minlength=len(clients))
    return sums / np.maximum(counts, 1)[:, None]
