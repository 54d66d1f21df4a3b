"""Score every client with the adapter it would use: token cross-entropy and greedy answers, many clients per pass."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import ClientData, Encoded, collate
from fedmira.evaluation.rouge import score_answer
from fedmira.model.load import Base
from fedmira.model.passes import answers, losses

Serve = Callable[[Tensor], Adapters]  # client positions [n] -> their adapters, in that order

PASS_TOKENS = 8192  # padded tokens of one evaluation pass
ANSWER_ROWS = 64  # prompts decoded in one pass


def measure_loss(
    base: Base, serve: Serve, clients: Sequence[ClientData], ids: Sequence[int], *, split: str, cohort: int
) -> list[float | None]:
    """Return, for each client of `ids`, its mean cross-entropy in nats per labelled token of `split`.

    loss_k = (sum of nats over all labelled tokens) / (number of labelled tokens); None without examples, infinite
    where it has diverged. Clients of similar length share a pass; the result does not depend on who does.
    """
    found: dict[int, float | None] = dict.fromkeys(ids)
    for chunk in _chunks(clients, ids, split=split, cohort=cohort):
        adapters = serve(torch.tensor(chunk))
        queues = [sorted(_examples(clients[k], split), key=lambda one: -len(one.ids)) for k in chunk]
        nats = torch.zeros(len(chunk), dtype=torch.float64)
        tokens = torch.zeros(len(chunk), dtype=torch.int64)
        done = 0
        while any(len(queue) > done for queue in queues):
            longest = max(len(example.ids) for queue in queues for example in queue[done : done + 1])
            width = max(1, PASS_TOKENS // (longest * len(chunk)))
            batch = collate([queue[done : done + width] for queue in queues], pad_id=base.pad_id)
            sums, counts = losses(base, adapters, batch)
            nats += sums.double().cpu()
            tokens += counts.cpu()
            done += width
        for k, total, count in zip(chunk, nats.tolist(), tokens.tolist(), strict=True):
            if count:  # a loss that is no number has diverged; as n/a it would make its method look better
                found[k] = total / count if math.isfinite(total) else math.inf
    return [found[k] for k in ids]


def measure_answers(
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
    written: Callable[[int, int, str], None] = lambda k, place, text: None,
) -> list[dict[str, float | None]]:
    """Return, for each client of `ids`, the mean of each metric over its greedy answers; None without examples.

    metrics: of rouge_l, exact_match, word_accuracy, each in [0, 1]. progress: called with the clients done so far.
    written: called with each answer, its client and the example's place in the split.
    """
    found: dict[int, dict[str, float | None]] = {k: dict.fromkeys(metrics) for k in ids}
    finished = len([k for k in ids if not _examples(clients[k], split)])
    for chunk in _chunks(clients, ids, split=split, cohort=min(cohort, ANSWER_ROWS)):
        adapters = serve(torch.tensor(chunk))
        queues = [
            sorted(enumerate(_examples(clients[k], split)[:max_examples]), key=lambda one: -len(one[1].question))
            for k in chunk
        ]
        totals = [dict.fromkeys(metrics, 0.0) for _ in chunk]
        width = max(1, ANSWER_ROWS // len(chunk))
        for done in range(0, max(len(queue) for queue in queues), width):
            parts = [queue[done : done + width] for queue in queues]
            active = [row for row, part in enumerate(parts) if part]
            prompts = [[one.question for _, one in parts[row]] for row in active]
            texts = answers(base, adapters.take(torch.tensor(active)), prompts, max_new_tokens=max_new_tokens)
            for row, own in zip(active, texts, strict=True):
                for (place, example), text in zip(parts[row], own, strict=True):
                    written(chunk[row], place, text)
                    scores = score_answer(text, example.answers)
                    for metric in metrics:
                        totals[row][metric] += scores[metric]
        for k, queue, total in zip(chunk, queues, totals, strict=True):
            found[k] = {metric: value / len(queue) for metric, value in total.items()}
        finished += len(chunk)
        progress(finished)
    return [found[k] for k in ids]


def _examples(client: ClientData, split: str) -> Sequence[Encoded]:
    return {"train": client.train, "validation": client.validation, "test": client.test}[split]


def _chunks(clients: Sequence[ClientData], ids: Sequence[int], *, split: str, cohort: int) -> list[list[int]]:
    """Deal clients that have examples into chunks of similar length, so that little is padded."""
    having = [k for k in ids if _examples(clients[k], split)]
    having.sort(key=lambda k: sum(len(one.ids) for one in _examples(clients[k], split)))
    return [having[start : start + cohort] for start in range(0, len(having), cohort)]
