"""Passes in actors: clients are cut into passes as in one process, and each pass is an order."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.parts import Gate
from fedmira.engine.executor import Plans, Scored
from fedmira.engine.phase import Inputs, PhaseResult, cut_into_passes, join_pieces, plan_steps
from fedmira.engine.spread.actor import Answered, Rows, ScoreOrder, TrainOrder
from fedmira.engine.spread.crew import Crew, Task
from fedmira.engine.tools import Training
from fedmira.engine.workplace import Evaluation, Workplace
from fedmira.evaluation.measure import ANSWER_ROWS, Serve, chunks, examples_in
from fedmira.methods.base import Clock, Method


class Spread:
    """An Executor whose passes are computed by the actors of a crew."""

    def __init__(self, crew: Crew) -> None:
        self.crew, self.width = crew, crew.post.workers

    def train(
        self,
        workplace: Workplace,
        method: Method,
        ids: Tensor,
        inputs: Inputs,
        *,
        training: Training,
        clock: Clock,
        plans: Plans | None,
    ) -> PhaseResult:
        clients = [workplace.clients[k] for k in ids.tolist()]
        drawn = [plan_steps(client, training, clock.round) for client in clients] if plans is None else plans
        passes = cut_into_passes(drawn, workplace.cohort)
        half = self.crew.put(method, lambda: method)
        how = self.crew.put(training, lambda: training)

        def order(chosen: Sequence[int]) -> TrainOrder:
            some = inputs.take(chosen)
            return TrainOrder.of(
                some,
                self._rows(some.start),
                method=half,
                training=how,
                clients=ids[torch.tensor(chosen)].tolist(),
                clock=clock,
                plans=None if plans is None else [plans[n] for n in chosen],
                reports=workplace.reports,
            )

        def tokens(chosen: Sequence[int]) -> int:
            return sum(len(clients[n].train[i].ids) for n in chosen for step in drawn[n] for i in step)

        tasks = [Task(tokens(chosen), "train", lambda chosen=chosen: order(chosen)) for chosen in passes]  # type: ignore[misc]
        pieces: dict[int, PhaseResult] = dict(self.crew.carry_out(tasks))
        return join_pieces([pieces[n] for n in range(len(tasks))], passes)

    def loss(
        self, workplace: Workplace, serve: Serve, ids: Sequence[int], gate: Gate | None, *, split: str
    ) -> list[float | None]:
        found: dict[int, float | None] = dict.fromkeys(ids)
        passes = _passes(workplace, ids, gate, split, workplace.cohort)
        tasks = [self._scoring(workplace, chosen, serve, gate, split) for chosen in passes]
        for n, values in self.crew.carry_out(tasks):
            found |= dict(zip(passes[n], values, strict=True))
        return [found[k] for k in ids]

    def answers(
        self,
        workplace: Workplace,
        serve: Serve,
        ids: Sequence[int],
        gate: Gate | None,
        *,
        max_examples: int | None,
        progress: Callable[[int], None],
        written: Callable[[int, int, str], None],
    ) -> list[Scored]:
        found: dict[int, Scored] = {k: dict.fromkeys(workplace.evaluation.metrics) for k in ids}
        cohort = workplace.cohort if gate is not None else min(workplace.cohort, ANSWER_ROWS)
        passes = _passes(workplace, ids, gate, "test", cohort)
        tasks = [
            self._scoring(workplace, chosen, serve, gate, "test", evaluation=workplace.evaluation, most=max_examples)
            for chosen in passes
        ]
        done = len(ids) - sum(map(len, passes))
        answered: Answered
        for n, answered in self.crew.carry_out(tasks):
            found |= dict(zip(passes[n], answered.scores, strict=True))
            for place_of_client, place, text in answered.texts:
                written(passes[n][place_of_client], place, text)
            done += len(passes[n])
            progress(done)
        return [found[k] for k in ids]

    def _scoring(
        self,
        workplace: Workplace,
        chosen: Sequence[int],
        serve: Serve,
        gate: Gate | None,
        split: str,
        *,
        evaluation: Evaluation | None = None,
        most: int | None = None,
    ) -> Task:
        def order() -> ScoreOrder:
            return ScoreOrder(chosen, self._rows(serve(torch.tensor(chosen))), gate, split, evaluation, most)

        examples = (one for k in chosen for one in examples_in(workplace.clients[k], split)[:most])
        return Task(sum(len(one.ids) for one in examples), "score", order)

    def _rows(self, adapters: Adapters) -> Rows:
        added = adapters.added
        return Rows.of(adapters, self.crew.put(added, lambda: added) if added else None)


def _passes(
    workplace: Workplace, ids: Sequence[int], gate: Gate | None, split: str, cohort: int
) -> list[Sequence[int]]:
    """Cut clients into passes of scoring as one process does."""
    if gate is None:
        return [*chunks(workplace.clients, ids, split=split, cohort=cohort)]
    return [list(ids[first : first + cohort]) for first in range(0, len(ids), cohort)]
