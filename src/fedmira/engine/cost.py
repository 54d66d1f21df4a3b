"""What a study will cost before it starts: clients per pass, memory, disk, bytes that travel, and time.

Nothing is guessed: a pass is measured for its memory, a short probe for its speed (probe.py), and the work is counted
from the data and the schedule.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch

from fedmira.adapters import Layout, start_adapters
from fedmira.data.batches import ClientData, Encoded, collate, count_examples
from fedmira.engine.tools import Training
from fedmira.errors import ModelError
from fedmira.methods.base import Method
from fedmira.model.base.load import Base
from fedmira.model.packed.loss import CHUNK_BYTES
from fedmira.model.packed.recompute import counting
from fedmira.model.passes import gradients

log = logging.getLogger(__name__)

LONG_S = 3.0  # a pass that would take longer is not made to measure memory or speed
PROBE = 64  # tokens of the pass that says what to expect of longer ones
SHARE = 0.6  # of the memory that is free now; the rest is for evaluation, the allocator and other programs


@dataclass(frozen=True)
class CohortPlan:
    """Clients per pass and why. bytes_each: activations and rows of one client at the longest batch of the data.

    recompute: are decoder blocks computed again in backward? examples: of a client in one pass, where its whole batch
    does not fit; None: all of a batch.
    """

    cohort: int
    bytes_each: int
    bytes_free: int
    recompute: bool = False
    examples: int | None = None


def plan_cohort(
    base: Base,
    layout: Layout,
    clients: Sequence[ClientData],
    *,
    batch_size: int,
    sampled: int,
    rows: int = 5,
    recompute: bool | None = None,
    actors: int = 0,
) -> CohortPlan:
    """Measure one client's training pass on the longest examples and return how many clients fit in one pass.

    The bytes that autograd keeps for the backward pass are counted exactly by hooks, of a large base in two short
    passes, from which those of a longer one follow; rows, gradient and moments are `rows` x P x 4 bytes. sampled:
    clients of a round, the most a cohort can use. recompute: of decoder blocks; None = where not all clients fit
    without, and more do with it. A batch that does not fit by itself is cut into passes. actors: with a base each,
    among which this memory is divided; 0 = passes are computed here, with the base that is loaded.

    No pass is made that would not fit: one over the beginning of one example says what to expect of longer ones.
    Raises ModelError if the longest example does not fit, with the tokens that would.
    """
    longest = sorted((example for client in clients for example in client.train), key=lambda one: -len(one.ids))
    batch = longest[:batch_size]
    adapters = start_adapters(layout, torch.tensor([layout.parts[0].rank]), 1.0, torch.Generator().manual_seed(0))
    adapters = adapters.with_rows(adapters.rows.to(base.device))
    own = rows * layout.size * 4
    free = _free_bytes(base.device)
    if actors:
        weights = sum(value.numel() * value.element_size() for value in base.model.parameters())
        free = max(0, free // actors - weights)
    room = int(SHARE * (free - 2 * CHUNK_BYTES))

    def needed(examples: Sequence[Encoded]) -> dict[bool, int]:
        """Bytes of one client whose pass holds these examples, without and with recomputation."""
        with counting(base.blocks, list(base.model.parameters())) as kept:
            gradients(base, adapters, collate([examples], pad_id=base.pad_id), into=torch.zeros_like(adapters.rows))
        return {False: kept.plain + own, True: kept.recomputed + own}

    tokens = list(itertools.accumulate(len(example.ids) for example in batch))
    probe, began = beginning(batch[0], PROBE), time.monotonic()
    first = needed([probe])
    per_token = {again: (size - own) / len(probe.ids) for again, size in first.items()}
    seconds = (time.monotonic() - began) / len(probe.ids)
    least = recompute is not False  # which of the two fits at all
    if own + per_token[least] * tokens[0] > room:
        needs, fits = own + per_token[least] * tokens[0], max(0, int((room - own) / per_token[least]))
        raise ModelError(
            f"an example of {tokens[0]:,} tokens needs {needs / 1e9:.1f} GB to train on; "
            f"{room / 1e9:.1f} GB are left for it: about {fits:,} tokens would fit (data.max_length={fits})"
            + ("" if least else "; training.gradient_checkpointing: true needs less")
        )
    whole = sum(own + per_token[False] * count <= room for count in tokens)  # examples of a pass that keeps everything
    if whole and (seconds * tokens[whole - 1] < LONG_S or tokens[0] < 2 * PROBE):
        per_token = {again: (size - own) / tokens[whole - 1] for again, size in needed(batch[:whole]).items()}
    elif whole:  # a large base: what each token more keeps, from two short passes
        second = needed([beginning(batch[0], 2 * PROBE)])
        more = tokens[whole - 1] / PROBE - 1
        grown = {again: size + more * (second[again] - size) for again, size in first.items()}
        per_token = {again: (size - own) / tokens[whole - 1] for again, size in grown.items()}
    count = max(1, sum(own + per_token[least] * some <= room for some in tokens))
    each = {again: own + int(size * tokens[count - 1]) for again, size in per_token.items()}
    fit = {again: min(sampled, room // size) for again, size in each.items()}
    if recompute is None:
        recompute = fit[True] > fit[False]
    log.info(
        "cohort %d of %d sampled: %.1f MB a client, %.1f MB with its blocks recomputed, %.1f GB free",
        max(1, fit[recompute]),
        sampled,
        each[False] / 1e6,
        each[True] / 1e6,
        room / SHARE / 1e9,
    )
    cut = count if count < len(batch) else None
    return CohortPlan(max(1, fit[recompute]), each[recompute], int(room / SHARE), recompute, cut)


def beginning(example: Encoded, tokens: int) -> Encoded:
    """Return the first tokens of an example as one, at least the last of them labelled."""
    ids = example.ids[:tokens]
    return replace(example, ids=ids, prompt_length=min(example.prompt_length, len(ids) - 1), earlier=())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


@dataclass(frozen=True)
class Work:
    """What a run passes through the base: tokens of training and of scoring by loss, and written answers."""

    trained: float  # tokens, expected: which examples a partly used epoch holds is left to chance
    scored: float  # tokens
    answers: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.trained + other.trained, self.scored + other.scored, self.answers + other.answers)

    def times(self, count: int) -> "Work":
        """Return the work of `count` repetitions."""
        return Work(self.trained * count, self.scored * count, self.answers * count)


@dataclass(frozen=True)
class Speeds:
    """What a probe measured on this machine, in seconds. None = there was nothing to measure on.

    cpu: CPU seconds of this process in each of these seconds; below the number of threads where others compute too.
    """

    trained: float  # per token
    scored: float | None  # per token
    answer: float | None  # per written answer, many in one pass
    cpu: float = 1.0

    def seconds(self, work: Work) -> float:
        """Time that some work will take."""
        return work.trained * self.trained + work.scored * (self.scored or 0) + work.answers * (self.answer or 0)


def count_start(clients: Sequence[ClientData], *, writes: bool, max_examples: int | None) -> Work:
    """Count the scoring of the untouched base, once a study. writes: some metric needs written answers."""
    scored = sum(_tokens(client.validation) + _tokens(client.test) for client in clients)
    return Work(0, scored, _answers(clients, range(len(clients)), max_examples) if writes else 0)


def count_run(
    clients: Sequence[ClientData],
    schedule: Sequence[np.ndarray],
    *,
    method: Method,
    training: Training,
    every: int,
    writes: bool,
    max_examples: int | None,
    ends: int = 1,
) -> Work:
    """Count one run: the local phases of a schedule, the sampled clients' losses before and after each merge, what is
    due for the curve, what clients fine-tune at the end, and the test of everyone who was ever sampled (of all, where
    one model is shared or all fine-tune). Where nobody trains, the scores are those of the start.

    ends: adapters with which each client is tested at the end: 2, at most, where the best are kept beside the last.
    """
    regime = method.regime
    if regime.trainees == "nobody":
        return Work(0.0, 0.0, 0)
    batch_size, steps, epochs = training.examples_per_step, training.local_steps, training.local_epochs
    examples = [
        count_examples(len(client.train), batch_size=batch_size, steps=steps, epochs=epochs) for client in clients
    ]
    means = [client.tokens / len(client.train) for client in clients]
    pooled = regime.trainees == "pool"
    pool = sum(len(client.train) for client in clients)
    mean = sum(client.tokens for client in clients) / pool
    validation = [_tokens(client.validation) for client in clients]
    everyone = sum(validation)
    trained, scored = 0.0, 0.0
    for number, ids in enumerate(schedule, 1):
        if not pooled:
            trained += sum(examples[k] * means[k] for k in ids)
        elif regime.pool_steps is None:
            trained += sum(examples[k] for k in ids) * mean
        else:
            trained += regime.pool_steps * min(batch_size, pool) * mean
        sampled = sum(validation[k] for k in ids)
        due = number % every == 0 or number == len(schedule)
        scored += regime.scorings * sampled
        scored += (0 if pooled else sampled) + (everyone if due and not method.has_row_of_each else sampled)
    tested: Sequence[int] = range(len(clients))
    if regime.tune is not None:
        kind, length = regime.tune
        steps, epochs = (length, None) if kind == "steps" else (None, length)
        scored += ends * regime.scorings * everyone
        trained += ends * sum(
            count_examples(len(client.train), batch_size=batch_size, steps=steps, epochs=epochs) * tokens
            for client, tokens in zip(clients, means, strict=True)
        )
    elif method.has_row_of_each:
        tested = sorted({int(k) for ids in schedule for k in ids})
    scored += ends * sum(_tokens(clients[k].test) for k in tested)
    return Work(trained, scored, ends * _answers(clients, tested, max_examples) if writes else 0)


def _tokens(examples: Sequence[Encoded]) -> int:
    return sum(len(example.ids) for example in examples)


def _answers(clients: Sequence[ClientData], ids: Sequence[int], max_examples: int | None) -> int:
    return sum(len(clients[k].test[:max_examples]) for k in ids)


@dataclass(frozen=True)
class Plan:
    """A study before it starts. Bytes and seconds; `free` is what this machine has now."""

    clients: int
    sampled: int  # clients of a round
    rounds: int
    cohort: int  # clients trained in one pass
    examples: int  # to train on
    tokens: int  # of all training examples
    trained_tokens: int  # of these, loss is taken on
    truncation: dict[str, int]
    by_client: dict[str, dict[str, int]]  # id -> examples of train, validation, test; trained_tokens
    names: dict[str, str]  # id -> the client's name in the data
    parameters: int  # of one adapter; the largest where methods have different ones
    memory: dict[str, int]  # base | rows (at most, of clients that train) | cohort | free
    disk: dict[str, int]  # adapters | rows (memory-mapped while a run lasts) | checkpoints (at most) | free
    bytes_per_round: dict[str, int]  # method -> up and down together
    speeds: Speeds
    prepare_seconds: float  # reading the data, loading and checking the base: as long as it took just now
    start_seconds: float  # scoring the untouched base, once
    work: dict[str, Work]  # label -> what one run passes through the base
    run_seconds: dict[str, float]  # label -> one run
    runs: int  # methods x seeds
    total_seconds: float  # if the machine stays as busy as it was while the speeds were measured
    cpu_seconds: float  # of these, in which this process computes, all threads together
    workers: int | None = None  # actors of Ray; seconds are of one of them, as measured here. None = this process
    client_privacy: dict[str, str] = field(default_factory=dict)  # label -> what noise on uploads promises; if any
    training: dict[str, dict[str, Any]] = field(default_factory=dict)  # label -> keys that differ from the study's
