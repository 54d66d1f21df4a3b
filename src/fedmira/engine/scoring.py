"""Losses and answers of a run's clients: before training, around every merge, and at the end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.parts import Gate
from fedmira.disk.folders import Result, View
from fedmira.engine.clients import Clients, Scores, Send
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger
from fedmira.engine.workplace import Workplace
from fedmira.evaluation.measure import PASS_TOKENS, Serve
from fedmira.methods.base import Method

EXAMPLES_KEPT = 3  # of each client, with report.examples
START_BYTES = 64 << 20  # of rows in one pass that scores the untouched base


def score_start(workplace: Workplace, federation: Federation, progress: Callable[[int], None]) -> Scores:
    """Score the untouched base on every client: B = 0 at the common start, so no method or seed changes it."""
    largest = replace(federation, ranks=federation.largest_ranks, given=None)
    rows, _ = largest.start_rows(0)
    start = largest.adapters(torch.zeros(1, dtype=torch.int64), rows)
    everyone = range(len(federation))

    def serve(ids: Tensor) -> Adapters:
        return start.take(torch.zeros_like(ids))

    # Everyone has the same row, so that a pass is limited by its tokens alone; but with a cohort of one the bits are
    # those of sites, which score alone: a product's last digits depend on how many rows it has, on some CPUs.
    longest = max((len(example.ids) for client in workplace.clients for example in client.validation), default=1)
    most = min(PASS_TOKENS // longest, START_BYTES // (4 * federation.layout.size))
    cohort = 1 if workplace.cohort == 1 else max(workplace.cohort, most)
    validation = score_loss(replace(workplace, cohort=cohort), serve, everyone, None, split="validation")
    return replace(score_test_split(workplace, serve, everyone, progress), validation=validation)


def validate(
    clients: Clients, method: Method, ledger: Ledger, send: Send, ids: Tensor, *, due: bool
) -> list[float | None]:
    """Bring ledger.validation up to date; return the losses of the clients `ids` after the merge.

    Where the server has a row of each client only the sampled ones change, so the others' losses are still true. A
    shared row changes everybody's, and everybody is scored when a validation is due.
    """
    after = clients.losses(
        ids, send
    )  # by themselves, so that their losses have the same bits whether all are due or not
    note(ledger, ids, after)
    if due and not method.has_row_of_each:
        others = torch.tensor(sorted(set(range(len(ledger.federation))) - set(ids.tolist())), dtype=torch.int64)
        note(ledger, others, clients.losses(others, send))
    return after


def known(losses: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in losses.tolist()]


def note(ledger: Ledger, ids: Tensor, values: Sequence[float | None]) -> None:
    """Take down the newest validation losses of the clients `ids`."""
    for k, value in zip(ids.tolist(), values, strict=True):
        ledger.validation[k] = math.nan if value is None else value


def final_scores(
    clients: Clients,
    method: Method,
    ledger: Ledger,
    send: Send,
    ever: Sequence[int],
    start: Scores,
    progress: Callable[[int], None],
) -> Scores:
    """Test every client with the adapter it would use now; where each has a row, those never sampled are at the start.

    With LoRA that is the untouched base, whose scores are known, unless everybody does something after the last round.
    """
    federation = ledger.federation
    if method.regime.trainees == "nobody":
        return replace(start, validation=[None] * len(federation))
    # a client never sampled is then not at the untouched base
    starts_elsewhere = federation.layout.virtual_tokens > 0 or federation.given is not None
    if not method.has_row_of_each or starts_elsewhere or method.regime.tune is not None:
        return clients.test(range(len(federation)), send, progress)
    scores = clients.test(ever, send, progress)
    whole = {metric: list(values) for metric, values in start.test.items()}
    for metric, values in scores.test.items():
        for k, value in zip(ever, values, strict=True):
            whole[metric][k] = value
    return Scores([None] * len(federation), whole, {**start.texts, **scores.texts})


def score_loss(
    workplace: Workplace, serve: Serve, ids: Sequence[int], gate: Gate | None, *, split: str
) -> list[float | None]:
    """Return the loss of the clients `ids` on one of their splits. gate: of the adapters in use, if there is one."""
    return workplace.executor.loss(workplace, serve, ids, gate, split=split)


def score_test_split(
    workplace: Workplace,
    serve: Serve,
    ids: Sequence[int],
    progress: Callable[[int], None],
    *,
    gate: Gate | None = None,
) -> Scores:
    """Return every metric of the evaluation on the test split, in the order of `ids`; no validation.

    gate: of the adapters in use, if there is one.
    """
    evaluation = workplace.evaluation
    loss = score_loss(workplace, serve, ids, gate, split="test")
    scores = {"loss": loss}
    texts: dict[tuple[int, int], str] = {}

    def written(k: int, place: int, text: str) -> None:
        if evaluation.examples and place < EXAMPLES_KEPT:
            texts[k, place] = text

    if evaluation.metrics or evaluation.examples:
        answers = workplace.executor.answers(
            workplace,
            serve,
            ids,
            gate,
            max_examples=evaluation.max_examples if evaluation.metrics else EXAMPLES_KEPT,
            progress=progress,
            written=written,
        )
        scores |= {metric: [scores_of[metric] for scores_of in answers] for metric in evaluation.metrics}
    return Scores([None] * len(ids), scores, texts)


def examples_of(workplace: Workplace, start: Scores, final: Scores) -> list[dict[str, object]]:
    """Test examples with what the untouched base and the run's adapter write; only where the user asked for them."""
    decode, clients = workplace.base.tokenizer.decode, workplace.clients
    return [
        {
            "client": clients[k].id,
            "prompt": decode(clients[k].test[place].question, skip_special_tokens=True),
            "references": list(clients[k].test[place].answers),
            "base": start.texts.get((k, place), ""),
            "answer": text,
        }
        for (k, place), text in sorted(final.texts.items())
    ]


def view_of(method: Method) -> View:
    """Whose adapter the numbers are about: each client's own, or the one that all share."""
    return "personal" if method.has_row_of_each or (method.personal and method.regime.tune is None) else "global"


def results_of(names: Sequence[str], number: int, view: View, scores: Scores) -> list[Result]:
    """Return the results of all clients after one round."""
    rows = [
        Result(name, number, view, "validation", "loss", value)
        for name, value in zip(names, scores.validation, strict=True)
    ]
    return rows + tests_of(names, [number] * len(names), view, scores)


def tests_of(names: Sequence[str], rounds: Sequence[int], view: View, scores: Scores) -> list[Result]:
    """Return the test results of all clients. rounds [K]: after which each had the adapter that was tested."""
    return [
        Result(name, number, view, "test", metric, value)
        for metric, values in scores.test.items()
        for name, number, value in zip(names, rounds, values, strict=True)
    ]
