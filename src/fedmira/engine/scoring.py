"""Losses and answers of a run's clients: before training, around every merge, and at the end."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.disk.folders import Result, View
from fedmira.engine.federation import Federation, Observer, common_start
from fedmira.engine.ledger import Ledger
from fedmira.evaluation.measure import PASS_TOKENS, measure_answers, measure_loss
from fedmira.methods.base import Method

EXAMPLES_KEPT = 3  # of each client, with report.examples
START_BYTES = 64 << 20  # of rows in one pass that scores the untouched base


@dataclass(frozen=True)
class Scores:
    """Every client at one moment. validation [K] in nats; test: metric -> [K]. None = the client has no such split."""

    validation: Sequence[float | None]
    test: Mapping[str, Sequence[float | None]]
    texts: Mapping[tuple[int, int], str] = field(default_factory=dict)  # (client, place in its test split) -> answer


def score_start(federation: Federation, observer: Observer) -> Scores:
    """Score the untouched base on every client: B = 0 at the common start, so no method or seed changes it."""
    start = common_start(federation, 0, 1)
    everyone = range(len(federation))

    def serve(ids: Tensor) -> Adapters:
        return start.take(torch.zeros_like(ids))

    # everyone has the same row, so that a pass is limited by its tokens alone
    longest = max((len(one.ids) for client in federation.clients for one in client.validation), default=1)
    cohort = max(federation.cohort, min(PASS_TOKENS // longest, START_BYTES // (4 * federation.layout.size)))
    validation = measure_loss(federation.base, serve, federation.clients, everyone, split="validation", cohort=cohort)
    return replace(_test(federation, serve, everyone, observer), validation=validation)


def losses_of(federation: Federation, uploads: Adapters, ids: Tensor, answered: Tensor) -> list[float | None]:
    """Validation loss of the sampled clients, each with the row it returned; None for a refused upload."""
    where = {int(k): position for position, k in enumerate(answered)}
    values = measure_loss(
        federation.base,
        lambda some: uploads.take(torch.tensor([where[int(k)] for k in some])),
        federation.clients,
        answered.tolist(),
        split="validation",
        cohort=federation.cohort,
    )
    return [values[where[int(k)]] if int(k) in where else None for k in ids]


def validate(
    federation: Federation,
    method: Method,
    ledger: Ledger,
    serve: Callable[[Tensor], Adapters],
    ids: Tensor,
    due: bool,
) -> list[float | None]:
    """Bring ledger.validation up to date; return the sampled clients' losses after the merge.

    Personal methods change the sampled clients only, so the others' losses stand. A shared model changes everybody's,
    and everybody is scored when a validation is due.
    """
    sampled = ids.tolist()
    some = functools.partial(
        measure_loss, federation.base, serve, federation.clients, split="validation", cohort=federation.cohort
    )
    after = some(sampled)  # by themselves, so that their losses are to the bit the same whether all are due or not
    note(ledger, sampled, after)
    if due and not method.personal:
        others = sorted(set(range(len(federation))) - set(sampled))
        note(ledger, others, some(others))
    return after


def known(losses: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in losses.tolist()]


def note(ledger: Ledger, ids: Sequence[int], values: Sequence[float | None]) -> None:
    for k, value in zip(ids, values, strict=True):
        ledger.validation[k] = math.nan if value is None else value


def final_scores(
    federation: Federation,
    method: Method,
    serve: Callable[[Tensor], Adapters],
    ever: Sequence[int],
    start: Scores,
    observer: Observer,
) -> Scores:
    """Test every client with the adapter it would use now; never-sampled ones of a personal method are at the start.

    With LoRA that is the untouched base, whose scores are known.
    """
    if method.trains == "nobody":
        return replace(start, validation=[None] * len(federation))
    starts_elsewhere = federation.layout.virtual_tokens > 0  # a client never sampled is then not at the untouched base
    if not method.personal or method.tune is not None or starts_elsewhere:
        return _test(federation, serve, range(len(federation)), observer)
    scores = _test(federation, serve, ever, observer)
    whole = {metric: list(values) for metric, values in start.test.items()}
    for metric, values in scores.test.items():
        for k, value in zip(ever, values, strict=True):
            whole[metric][k] = value
    return Scores([None] * len(federation), whole, {**start.texts, **scores.texts})


def _test(
    federation: Federation, serve: Callable[[Tensor], Adapters], ids: Sequence[int], observer: Observer
) -> Scores:
    """Every metric of the config on the test split, in the order of `ids`; no validation."""
    config = federation.config.evaluation
    loss = measure_loss(federation.base, serve, federation.clients, ids, split="test", cohort=federation.cohort)
    scores = {"loss": loss}
    texts: dict[tuple[int, int], str] = {}
    keeps = federation.config.report.examples

    def written(k: int, place: int, text: str) -> None:
        if keeps and place < EXAMPLES_KEPT:
            texts[k, place] = text

    metrics = [metric for metric in config.metrics if metric != "loss"]
    if metrics or keeps:
        answers = measure_answers(
            federation.base,
            serve,
            federation.clients,
            ids,
            split="test",
            cohort=federation.cohort,
            metrics=metrics,
            max_new_tokens=config.max_new_tokens,
            max_examples=config.max_examples if metrics else EXAMPLES_KEPT,
            progress=lambda done: observer("scoring", {"done": done, "clients": len(ids)}),
            written=written,
        )
        scores |= {metric: [one[metric] for one in answers] for metric in metrics}
    return Scores([None] * len(ids), scores, texts)


def examples_of(federation: Federation, start: Scores, final: Scores) -> list[dict[str, object]]:
    """Test examples with what the untouched base and the run's adapter write; only where the user asked for them."""
    decode = federation.base.tokenizer.decode
    return [
        {
            "client": federation.clients[k].id,
            "prompt": decode(federation.clients[k].test[place].question, skip_special_tokens=True),
            "references": list(federation.clients[k].test[place].answers),
            "base": start.texts.get((k, place), ""),
            "answer": text,
        }
        for (k, place), text in sorted(final.texts.items())
    ]


def view_of(method: Method) -> View:
    """Whose adapter the numbers are about: each client's own, or the one that all share."""
    return "personal" if method.personal else "global"


def results_of(names: Sequence[str], number: int, view: View, scores: Scores) -> list[Result]:
    rows = [
        Result(name, number, view, "validation", "loss", value)
        for name, value in zip(names, scores.validation, strict=True)
    ]
    for metric, values in scores.test.items():
        rows += [Result(name, number, view, "test", metric, value) for name, value in zip(names, values, strict=True)]
    return rows
