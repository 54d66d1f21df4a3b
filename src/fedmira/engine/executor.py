"""Where the passes of a study's clients are computed: in this process, or elsewhere (spread/).

What is computed and what shares a pass does not depend on it, so neither do the results.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from fedmira.adapters.parts import Gate
from fedmira.engine.phase import Inputs, PhaseResult, local_phase
from fedmira.engine.tools import Training
from fedmira.evaluation.gated import gated_answers, gated_loss
from fedmira.evaluation.measure import Serve, measure_answers, measure_loss
from fedmira.methods.base import Clock, Method

if TYPE_CHECKING:
    from fedmira.engine.workplace import Workplace

Plans = Sequence[Sequence[np.ndarray]]  # of each client: the training examples of each step
Scored = dict[str, float | None]  # metric -> mean over a client's answers


class Executor(Protocol):
    """Carries out passes. Clients are positions in the workplace's; gate: of the adapters in use, if there is one.

    width: passes that are computed at the same time.
    """

    width: int

    def train(
        self,
        workplace: "Workplace",
        method: Method,
        ids: Tensor,
        inputs: Inputs,
        *,
        training: Training,
        clock: Clock,
        plans: Plans | None,
    ) -> PhaseResult:
        """Train the clients `ids` [n] in passes of a cohort, as phase.local_phase does."""
        ...

    def loss(
        self, workplace: "Workplace", serve: Serve, ids: Sequence[int], gate: Gate | None, *, split: str
    ) -> list[float | None]:
        """Return the loss of the clients `ids` on one of their splits."""
        ...

    def answers(
        self,
        workplace: "Workplace",
        serve: Serve,
        ids: Sequence[int],
        gate: Gate | None,
        *,
        max_examples: int | None,
        progress: Callable[[int], None],
        written: Callable[[int, int, str], None],
    ) -> list[Scored]:
        """Return the metrics of the evaluation over written answers to the test split, of the clients `ids`.

        progress, written: as of measure_answers.
        """
        ...


class InProcess:
    """Computes in this process, one pass after another."""

    width = 1

    def train(
        self,
        workplace: "Workplace",
        method: Method,
        ids: Tensor,
        inputs: Inputs,
        *,
        training: Training,
        clock: Clock,
        plans: Plans | None,
    ) -> PhaseResult:
        return local_phase(
            workplace.base,
            method,
            [workplace.clients[k] for k in ids.tolist()],
            inputs.start,
            inputs.given,
            inputs.memory,
            inputs.moments,
            training=training,
            clock=clock,
            cohort=workplace.cohort,
            plans=plans,
            reports=workplace.reports,
        )

    def loss(
        self, workplace: "Workplace", serve: Serve, ids: Sequence[int], gate: Gate | None, *, split: str
    ) -> list[float | None]:
        base, clients, cohort = workplace.base, workplace.clients, workplace.cohort
        if gate is not None:
            return gated_loss(gate, base, serve, clients, ids, split=split, cohort=cohort)
        return measure_loss(base, serve, clients, ids, split=split, cohort=cohort)

    def answers(
        self,
        workplace: "Workplace",
        serve: Serve,
        ids: Sequence[int],
        gate: Gate | None,
        *,
        max_examples: int | None,
        progress: Callable[[int], None],
        written: Callable[[int, int, str], None],
    ) -> list[Scored]:
        measured = measure_answers if gate is None else partial(gated_answers, gate)
        return measured(
            workplace.base,
            serve,
            workplace.clients,
            ids,
            split="test",
            cohort=workplace.cohort,
            metrics=workplace.evaluation.metrics,
            max_new_tokens=workplace.evaluation.max_new_tokens,
            max_examples=max_examples,
            progress=progress,
            written=written,
        )


IN_PROCESS = InProcess()
