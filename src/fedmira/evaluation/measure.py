"""Score every client with the adapter it would use: token cross-entropy and greedy answers, many clients per pass."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import ClientData, Encoded, collate
from fedmira.evaluation.rouge import score_answer
from fedmira.model.answers.generate import ANSWER_ROWS, answers
from fedmira.model.base.load import Base
from fedmira.model.passes import example_losses, losses

__all__ = ["ANSWER_ROWS", "chunks", "measure_answers", "measure_examples", "measure_loss"]

Serve = Callable[[Tensor], Adapters]  # client positions [n] -> their adapters, in that order

PASS_TOKENS = 8192  # tokens of one pass for losses; padding included where the base needs it


def measure_loss(
    base: Base, serve: Serve, clients: Sequence[ClientData], ids: Sequence[int], *, split: str, cohort: int
) -> list[float | None]:
    """Return, for each client of `ids`, its mean cross-entropy in nats per labelled token of `split`.

    loss_k = (sum of nats over all labelled tokens) / (number of labelled tokens); None without examples, infinite
    where it has diverged. Clients of similar length share a pass; the result does not depend on the grouping.
    """
    scores: dict[int, float | None] = dict.fromkeys(ids)
    for chunk in chunks(clients, ids, split=split, cohort=cohort):
        adapters = serve(torch.tensor(chunk))
        queues = [sorted(examples_in(clients[k], split), key=lambda example: -len(example.ids)) for k in chunk]
        nats = torch.zeros(len(chunk), dtype=torch.float64)
        tokens = torch.zeros(len(chunk), dtype=torch.int64)
        for parts in _deal(queues, padded=not base.packs, ahead=adapters.layout.virtual_tokens):
            sums, counts = losses(base, adapters, collate(parts, pad_id=base.pad_id))
            nats += sums.double().cpu()
            tokens += counts.cpu()
        for k, total, count in zip(chunk, nats.tolist(), tokens.tolist(), strict=True):
            if count:  # a loss that is not finite has diverged; n/a would make its method look better
                scores[k] = total / count if math.isfinite(total) else math.inf
    return [scores[k] for k in ids]


def measure_examples(
    base: Base, adapters: Adapters, clients: Sequence[ClientData], *, split: str
) -> tuple[Tensor, Tensor]:
    """Return, for each example of `split` of clients [S], its sum of nats [S, N] and labelled tokens [S, N], float64.

    N: of the client with the most; 0 beyond those of another. adapters [S]: of each client. Infinite nats: diverged.
    """
    examples = [examples_in(client, split) for client in clients]
    order = [sorted(range(len(some)), key=lambda place: -len(some[place].ids)) for some in examples]
    queues = [[some[place] for place in places] for some, places in zip(examples, order, strict=True)]
    nats, tokens = torch.zeros(2, len(clients), max(map(len, examples), default=0), dtype=torch.float64)
    done = [0] * len(clients)
    for parts in _deal(queues, padded=not base.packs, ahead=adapters.layout.virtual_tokens):
        sums, counts = example_losses(base, adapters, collate(parts, pad_id=base.pad_id))
        for k, part in enumerate(parts):
            places = order[k][done[k] : done[k] + len(part)]
            nats[k, places], tokens[k, places] = sums[k, : len(part)].cpu(), counts[k, : len(part)].double().cpu()
            done[k] += len(part)
    return nats.nan_to_num(nan=math.inf), tokens


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
    written: Callable[[int, int, str], None] = lambda k, index, text: None,
) -> list[dict[str, float | None]]:
    """Return, for each client of `ids`, the mean of each metric over its greedy answers; None without examples.

    metrics: of rouge_l, rouge_l_paper, exact_match, word_accuracy, each in [0, 1]. progress: called with the number of
    clients done. written: called with each answer, its client and the example's place in the split.
    """
    means: dict[int, dict[str, float | None]] = {k: dict.fromkeys(metrics) for k in ids}
    finished = len([k for k in ids if not examples_in(clients[k], split)])
    for chunk in chunks(clients, ids, split=split, cohort=min(cohort, ANSWER_ROWS)):
        queries = [examples_in(clients[k], split)[:max_examples] for k in chunk]
        texts = answers(
            base,
            serve(torch.tensor(chunk)),
            [[example.question for example in own_examples] for own_examples in queries],
            max_new_tokens=max_new_tokens,
        )
        for k, own_examples, own_texts in zip(chunk, queries, texts, strict=True):
            total = dict.fromkeys(metrics, 0.0)
            for index, (example, text) in enumerate(zip(own_examples, own_texts, strict=True)):
                written(k, index, text)
                scores = score_answer(plain_answer(text, example), example.answers, metrics)
                for metric in metrics:
                    total[metric] += scores[metric]
            means[k] = {metric: value / len(own_examples) for metric, value in total.items()}
        finished += len(chunk)
        progress(finished)
    return [means[k] for k in ids]


def plain_answer(text: str, example: Encoded) -> str:
    """Return what a model wrote without what the template writes around an answer.

    A text equal to the trained one is the reference, whatever the tokenizer made of that on the way.
    """
    text = text.strip()
    if example.written and text == example.written.strip():
        return example.answers[0]
    before, after = (piece.strip() for piece in example.around)
    if example.closing and example.closing in text:  # what was reasoned before is not a part of the answer
        return text.rpartition(example.closing)[2].removesuffix(after)
    return text.removeprefix(before).removesuffix(after)


def examples_in(client: ClientData, split: str) -> Sequence[Encoded]:
    return {"train": client.train, "validation": client.validation, "test": client.test}[split]


def _deal(queues: Sequence[Sequence[Encoded]], *, padded: bool, ahead: int) -> Iterator[list[Sequence[Encoded]]]:
    """Deal clients' examples, the longest first, into passes of PASS_TOKENS, or of one example of each client.

    padded: every example counts as the longest of its pass. ahead: virtual tokens before each.
    """
    places = [0] * len(queues)
    while active := [k for k, queue in enumerate(queues) if places[k] < len(queue)]:
        longest = max(len(queues[k][places[k]].ids) for k in active)
        room = PASS_TOKENS // len(active)
        parts: list[Sequence[Encoded]] = [()] * len(queues)
        for k in active:
            start, used = places[k], 0
            for example in queues[k][start:]:
                used += ahead + (longest if padded else len(example.ids))
                if used > room and places[k] > start:
                    break
                places[k] += 1
            parts[k] = queues[k][start : places[k]]
        yield parts


def chunks(clients: Sequence[ClientData], ids: Sequence[int], *, split: str, cohort: int) -> list[list[int]]:
    """Deal clients that have examples into chunks of similar length, so that padding is small."""
    having = [k for k in ids if examples_in(clients[k], split)]
    having.sort(key=lambda k: sum(len(example.ids) for example in examples_in(clients[k], split)))
    return [having[start : start + cohort] for start in range(0, len(having), cohort)]
