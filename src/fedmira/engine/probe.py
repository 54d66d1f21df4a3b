"""How fast this machine trains, scores and writes with a base: short passes, scaled by counted work.

Where a step of a whole cohort takes seconds at most, it is carried out as it is. Where it would take longer, fewer
clients, fewer examples and at last shorter ones take part, and seconds go by work:

    work of a text of n tokens = n + n^2 / t,   t = W / (L d)

W: weights of the base beside its embeddings, L: layers, d: width; n = t is the length at which causal attention costs
as much as the weights. What is measured on few tokens is a little slow for many: an estimate errs upwards.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import ClientData, Encoded
from fedmira.engine.cost import LONG_S, PROBE, Speeds, beginning
from fedmira.engine.federation import Federation
from fedmira.engine.phase import local_phase
from fedmira.engine.tools import Training
from fedmira.engine.workplace import Workplace
from fedmira.evaluation.measure import measure_answers, measure_loss
from fedmira.methods.base import Clock, Method, State
from fedmira.model.base.load import Base

ANSWERS = 64  # written by all clients together to see how long one takes
FEW_ANSWERS = 8  # of a large base
TRAIN_S, SCORE_S, WRITE_S = 8.0, 4.0, 6.0  # that a measurement with a large base may take
FORWARD = 1 / 3  # work of a pass without gradients, of one with


def measure_speeds(
    workplace: Workplace, federation: Federation, method: Method, training: Training, ids: Tensor
) -> Speeds:
    """Measure in seconds what a study will spend minutes on: a local step, a pass of scoring, a pass of answers.

    ids [S]: the clients of the first round; as many as one pass takes are used. Nothing is kept.
    """
    if training.recompute is None:
        training = replace(training, recompute=workplace.recompute)
    training = replace(training, at_once=workplace.at_once)
    probe = _Probe(workplace, federation, method, training, ids[: workplace.cohort], _Measure.of(workplace.base))
    began, began_cpu = time.monotonic(), time.process_time()
    trained, guess = probe.train()
    scored, answer = probe.score(guess), probe.write(guess)
    cpu = (time.process_time() - began_cpu) / max(time.monotonic() - began, 1e-9)
    return Speeds(trained, scored, answer, cpu)


@dataclass(frozen=True)
class _Measure:
    """Counts work. turn: tokens at which attention costs as much as the weights; infinite where it is not known."""

    turn: float

    @classmethod
    def of(cls, base: Base) -> "_Measure":
        config = base.model.config.get_text_config()
        embeddings = base.model.get_input_embeddings().weight
        weights = sum(_count(weight) for weight in base.model.parameters() if weight is not embeddings)
        layers = getattr(config, "num_hidden_layers", None)
        return cls(weights / (layers * base.width) if layers else float("inf"))

    def work(self, tokens: float) -> float:
        return tokens + tokens**2 / self.turn

    def total(self, examples: Sequence[Encoded]) -> float:
        return sum(self.work(len(example.ids)) for example in examples)

    def tokens(self, work: float) -> int:
        """The longest text of that work."""
        if self.turn == float("inf"):
            return int(work)
        return int((((1 + 4 * work / self.turn) ** 0.5 - 1) * self.turn) / 2)

    def fitting(self, examples: Sequence[Encoded], work: float) -> list[Encoded]:
        """Return as many examples from the first on as have that work, or the beginning of the first."""
        some: list[Encoded] = []
        for example in examples:
            work -= self.work(len(example.ids))
            if work < 0:
                break
            some.append(example)
        short = max(PROBE, self.tokens(work + self.work(len(examples[0].ids)))) if not some else 0
        return some or [beginning(examples[0], short)]


def _count(weight: Tensor) -> int:
    """Count a weight's numbers; of one in 4 bits a tensor has two in each of its own."""
    packed = getattr(weight, "quant_state", None)
    return weight.numel() if packed is None else torch.Size(packed.shape).numel()


@dataclass(frozen=True, eq=False)
class _Probe:
    """One kind of training pass. ids [S]: the clients of one pass."""

    workplace: Workplace
    federation: Federation
    method: Method
    training: Training
    ids: Tensor
    measure: _Measure

    def train(self) -> tuple[float, float]:
        """Return seconds of a token that is trained on, and of a unit of work in a pass that trains."""
        clients = [self.workplace.clients[int(k)] for k in self.ids]
        steps = [client.train[: self.training.examples_per_step] for client in clients]
        whole = sum(map(self.measure.total, steps))
        short = beginning(steps[0][0], PROBE)
        unit = self._seconds([replace(clients[0], train=(short,))], self.training)[0] / self.measure.total([short])
        if unit * whole < LONG_S:
            seconds, tokens = self._seconds(clients, self.training)
            if seconds < LONG_S:
                seconds, tokens = self._seconds(clients, self.training, steps=3)
            return seconds / max(tokens, 1), seconds / max(tokens, 1)
        room = TRAIN_S / unit
        count = max(1, min(len(clients), int(room / self.measure.total(steps[0][:1]))))
        some = [self.measure.fitting(step, room / count) for step in steps[:count]]
        each = min(map(len, some))
        fewer = [replace(client, train=tuple(one[:each])) for client, one in zip(clients, some, strict=False)]
        seconds, _ = self._seconds(fewer, replace(self.training, batch_size=each, accumulation=1))
        unit = seconds / sum(self.measure.total(client.train) for client in fewer)
        return unit * self._per_token([example for client in self.workplace.clients for example in client.train]), unit

    def _per_token(self, examples: Sequence[Encoded]) -> float:
        """Return the mean work of a token of these examples."""
        return self.measure.total(examples) / sum(len(example.ids) for example in examples)

    def _seconds(self, clients: Sequence[ClientData], training: Training, *, steps: int = 1) -> tuple[float, int]:
        """Return the seconds of local steps of some of the clients, and the tokens trained on."""
        ids, clock = self.ids[: len(clients)], Clock(1, learning_rate=training.learning_rate)
        given = self.method.message(self._state, ids, clock)
        start = self.federation.adapters(ids, given.rows)
        memory = self.method.client.start(start)
        short = replace(training, local_steps=steps, local_epochs=None)
        began = time.monotonic()
        done = local_phase(
            self.workplace.base,
            self.method,
            list(clients),
            start,
            given,
            memory,
            training=short,
            clock=clock,
            cohort=self.workplace.cohort,
        )
        return time.monotonic() - began, done.tokens

    def score(self, guess: float) -> float | None:
        """Return seconds of a token that is scored; None where no client has anything to score. guess: as of train."""
        clients = [self.workplace.clients[int(k)] for k in self.ids]
        split = "validation" if any(client.validation for client in clients) else "test"
        examples = [example for client in clients for example in getattr(client, split)]
        if not examples:
            return None
        if guess * FORWARD * self.measure.total(examples) < LONG_S:
            began = time.monotonic()
            measure_loss(
                self.workplace.base,
                self._start,
                self.workplace.clients,
                self.ids.tolist(),
                split=split,
                cohort=self.workplace.cohort,
            )
            return (time.monotonic() - began) / sum(len(example.ids) for example in examples)
        some = self.measure.fitting(examples, SCORE_S / (guess * FORWARD))
        one = [replace(clients[0], validation=tuple(some))]
        began = time.monotonic()
        measure_loss(self.workplace.base, self._start, one, [0], split="validation", cohort=1)
        return (time.monotonic() - began) / self.measure.total(some) * self._per_token(examples)

    def write(self, guess: float) -> float | None:
        """Return seconds of a written answer; None where none is written. guess: as of train."""
        evaluation, clients = self.workplace.evaluation, self.workplace.clients
        each = min(max(ANSWERS // len(self.ids), 1), evaluation.max_examples or ANSWERS)
        asked = [example for k in self.ids.tolist() for example in clients[k].test[:each]]
        if not evaluation.metrics or not asked:
            return None
        questions = sum(self.measure.work(len(example.question)) for example in asked)
        length = evaluation.max_new_tokens
        if guess * FORWARD * (questions + length * len(asked)) < LONG_S:
            return self._write(clients, self.ids.tolist(), each, length) / len(asked)
        one = [replace(clients[int(self.ids[0])], test=tuple(asked[:FEW_ANSWERS]))]
        tokens = max(2, min(length, int(WRITE_S / (2 * FEW_ANSWERS * guess * FORWARD))))
        first = self._write(one, [0], FEW_ANSWERS, 1)
        more = (self._write(one, [0], FEW_ANSWERS, tokens) - first) / (tokens - 1)
        return (first + max(more, 0.0) * (length - 1)) / len(one[0].test)

    def _write(self, clients: Sequence[ClientData], ids: Sequence[int], each: int, length: int) -> float:
        """Return the seconds of writing answers of at most `length` tokens."""
        began = time.monotonic()
        measure_answers(
            self.workplace.base,
            self._start,
            clients,
            ids,
            split="test",
            cohort=self.workplace.cohort,
            metrics=self.workplace.evaluation.metrics,
            max_new_tokens=length,
            max_examples=each,
        )
        return time.monotonic() - began

    @cached_property
    def _state(self) -> State:
        return self.federation.first_state(self.training.seed, self.method)

    def _start(self, ids: Tensor) -> Adapters:
        """The start of the first client, for any clients."""
        given = self.method.message(self._state, self.ids[:1], Clock(1))
        return self.federation.adapters(self.ids[:1], given.rows).take(torch.zeros_like(ids))
