"""Measure in seconds what a study will spend minutes on: one local step, one pass of scoring, one pass of answers."""

import time
from dataclasses import replace

import torch

from fedmira.adapters import Adapters, scales
from fedmira.engine.cost import Speeds
from fedmira.engine.federation import Federation, common_start, make_training
from fedmira.engine.phase import local_phase
from fedmira.evaluation.measure import measure_answers, measure_loss
from fedmira.methods.base import Clock, Message, Method

ANSWERS = 64  # written by all clients together to see how long one takes
LONG_S = 3.0  # a first step that took longer is measurement enough, warm or not


def measure_speeds(federation: Federation, method: Method, ids: torch.Tensor, *, seed: int) -> Speeds:
    """Return seconds per token of training and scoring and per answer, on the first clients of a round.

    ids [S]: the clients of the first round; as many as one pass holds are used. Nothing is kept.
    """
    ids = ids[: federation.cohort]
    config = federation.config
    ranks = federation.ranks[ids]
    row = common_start(federation, seed, 1).rows
    start = Adapters(federation.layout, row.expand(len(ids), -1), ranks, scales(ranks, config.lora.lora_alpha))
    clients = [federation.clients[int(k)] for k in ids]

    def train(steps: int) -> float:
        training = replace(make_training(config, seed), local_steps=steps, local_epochs=None)
        began = time.monotonic()
        done = local_phase(
            federation.base,
            method,
            clients,
            start,
            Message(start.rows),
            {},
            training=training,
            clock=Clock(1),
            cohort=federation.cohort,
        )
        return (time.monotonic() - began) / max(done.tokens, 1)

    began = time.monotonic()
    trained = train(1)
    if time.monotonic() - began < LONG_S:
        trained = train(3)
    return Speeds(trained, _score(federation, start, ids), _write(federation, start, ids))


def _score(federation: Federation, start: Adapters, ids: torch.Tensor) -> float | None:
    split = "validation" if any(federation.clients[int(k)].validation for k in ids) else "test"
    tokens = sum(len(one.ids) for k in ids for one in getattr(federation.clients[int(k)], split))
    if not tokens:
        return None
    began = time.monotonic()
    measure_loss(
        federation.base,
        lambda some: start.take(torch.zeros_like(some)),
        federation.clients,
        ids.tolist(),
        split=split,
        cohort=federation.cohort,
    )
    return (time.monotonic() - began) / tokens


def _write(federation: Federation, start: Adapters, ids: torch.Tensor) -> float | None:
    config = federation.config.evaluation
    metrics = [metric for metric in config.metrics if metric != "loss"]
    each = min(max(ANSWERS // len(ids), 1), config.max_examples or ANSWERS)
    answers = sum(len(federation.clients[int(k)].test[:each]) for k in ids)
    if not metrics or not answers:
        return None
    began = time.monotonic()
    measure_answers(
        federation.base,
        lambda some: start.take(torch.zeros_like(some)),
        federation.clients,
        ids.tolist(),
        split="test",
        cohort=federation.cohort,
        metrics=metrics,
        max_new_tokens=config.max_new_tokens,
        max_examples=each,
    )
    return (time.monotonic() - began) / answers
