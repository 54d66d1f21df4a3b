"""Scores under a gate: each question is answered with a mix of the client's adapters that depends on the question.

    c_i = mean_j cos(h(x_i), h(x_j))      h: last hidden state at the last token of a prompt; j: training prompts of k

Every example is then scored as a client of its own would be, with its own row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.parts import Gate
from fedmira.data.batches import ClientData, Encoded
from fedmira.evaluation.embed import last_states, spread
from fedmira.evaluation.measure import Serve, examples_in, measure_answers, measure_loss
from fedmira.model.base.load import Base

ROW_BYTES = 64 << 20  # of the rows in one pass, one for each example


def similarities(
    base: Base, gate: Gate, adapters: Adapters, clients: Sequence[ClientData], examples: Sequence[Sequence[Encoded]]
) -> list[Tensor]:
    """Return, for each client [S], the similarity of each of its examples to its training prompts, float64 [n]."""
    prompts: list[Sequence[int]] = []
    owners: list[int] = []
    for k, (client, own) in enumerate(zip(clients, examples, strict=True)):
        asked = [*spread(client, gate.prompts), *own]
        prompts += [example.question for example in asked]
        owners += [k] * len(asked)
    states = last_states(base, prompts, gate.look(adapters), owners)
    found, start = [], 0
    for client, own in zip(clients, examples, strict=True):
        middle = start + len(spread(client, gate.prompts))
        stop = middle + len(own)
        found.append(cosines(states[middle:stop], states[start:middle]))
        start = stop
    return found


def cosines(states: np.ndarray, others: np.ndarray) -> Tensor:
    """Return the mean cosine of each state [n, d] with the others [m, d], float64 [n]."""
    units = [
        some / np.maximum(np.linalg.norm(some, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        for some in (states, others)
    ]
    return torch.from_numpy((units[0] @ units[1].T).mean(axis=1))


def references(base: Base, gate: Gate, adapters: Adapters, client: ClientData) -> Tensor:
    """Return the states [m, d] of the training prompts that one client's questions are compared with."""
    prompts = [example.question for example in spread(client, gate.prompts)]
    return torch.from_numpy(last_states(base, prompts, gate.look(adapters), [0] * len(prompts)))


def at_mean(base: Base, gate: Gate, adapters: Adapters, clients: Sequence[ClientData]) -> Adapters:
    """Return the adapters [S] at the mean similarity of each client's validation questions: one mix for all of them.

    Without a validation split its training prompts are taken.
    """
    examples = [client.validation or client.train for client in clients]
    means = torch.stack([some.mean() for some in similarities(base, gate, adapters, clients, examples)])
    return gate.mix(adapters, means)


def gated_loss(
    gate: Gate, base: Base, serve: Serve, clients: Sequence[ClientData], ids: Sequence[int], *, split: str, cohort: int
) -> list[float | None]:
    """As measure_loss, each example with its own mix."""
    losses: dict[int, float | None] = dict.fromkeys(ids)
    for chunk, examples, alone, mixed, width in _chunks(base, gate, serve, clients, ids, split=split, cohort=cohort):
        values = iter(measure_loss(base, mixed, alone, range(len(alone)), split=split, cohort=width))
        for k, own in zip(chunk, examples, strict=True):
            pairs = [(next(values), example.labels) for example in own]
            nats = sum(count * (0.0 if loss is None else loss) for loss, count in pairs)
            total = sum(count for loss, count in pairs if loss is not None)
            losses[k] = nats / total if total else None
    return [losses[k] for k in ids]


def gated_answers(
    gate: Gate,
    base: Base,
    serve: Serve,
    clients: Sequence[ClientData],
    ids: Sequence[int],
    *,
    split: str,
    cohort: int,
    metrics: Sequence[str],
    max_new_tokens: int,
    max_examples: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    written: Callable[[int, int, str], None] = lambda k, index, text: None,
) -> list[dict[str, float | None]]:
    """As measure_answers, each example with its own mix."""
    means: dict[int, dict[str, float | None]] = {k: dict.fromkeys(metrics) for k in ids}
    done = 0
    for chunk, examples, alone, mixed, width in _chunks(
        base, gate, serve, clients, ids, split=split, cohort=cohort, most=max_examples
    ):
        places = [(k, place) for k, own in zip(chunk, examples, strict=True) for place in range(len(own))]

        def tell(one: int, _: int, text: str, places: Sequence[tuple[int, int]] = places) -> None:
            written(*places[one], text)

        found = iter(
            measure_answers(
                base,
                mixed,
                alone,
                range(len(alone)),
                split=split,
                cohort=width,
                metrics=metrics,
                max_new_tokens=max_new_tokens,
                written=tell,
            )
        )
        for k, own in zip(chunk, examples, strict=True):
            scores = [next(found) for _ in own]
            if own:
                means[k] = {metric: sum(one[metric] or 0.0 for one in scores) / len(own) for metric in metrics}
        done += len(chunk)
        progress(done)
    return [means[k] for k in ids]


def _chunks(
    base: Base,
    gate: Gate,
    serve: Serve,
    clients: Sequence[ClientData],
    ids: Sequence[int],
    *,
    split: str,
    cohort: int,
    most: int | None = None,
) -> Iterator[tuple[Sequence[int], list[Sequence[Encoded]], list[ClientData], Serve, int]]:
    """Deal clients into chunks; of each: the clients, their examples, a client for each example, its row, a width."""
    for start in range(0, len(ids), cohort):
        chunk = ids[start : start + cohort]
        adapters = serve(torch.tensor(chunk))
        own = [clients[k] for k in chunk]
        examples = [examples_in(client, split)[:most] for client in own]
        similar = torch.cat(similarities(base, gate, adapters, own, examples))
        owner = torch.tensor([n for n, some in enumerate(examples) for _ in some], dtype=torch.int64)
        alone = [
            replace(client, train=(), validation=(example,), test=(example,))
            for client, some in zip(own, examples, strict=True)
            for example in some
        ]

        def mixed(
            asked: Tensor, adapters: Adapters = adapters, owner: Tensor = owner, similar: Tensor = similar
        ) -> Adapters:
            return gate.mix(adapters.take(owner[asked]), similar[asked])

        width = max(1, ROW_BYTES // (4 * adapters.layout.size))
        yield chunk, examples, alone, mixed, width
