"""Where clients work: the base model, their data, and how they are trained and scored. A study has one."""

import functools
from dataclasses import dataclass, replace

from fedmira.data.batches import ClientData, Truncation
from fedmira.engine.executor import IN_PROCESS, Executor
from fedmira.model.base.load import Base

POOL = "*"  # names all clients' data together; no client is called so


@dataclass(frozen=True)
class Evaluation:
    """What is measured. metrics: of written answers, loss aside; None = all examples; examples: keep some texts."""

    metrics: tuple[str, ...] = ()
    max_new_tokens: int = 64
    max_examples: int | None = None
    examples: bool = False


@dataclass(frozen=True, eq=False)
class Workplace:
    """What simulated clients share. clients [K]: their data; cohort: clients trained in one pass.

    reports: may clients' losses leave them within a method's messages? recompute: decoder blocks in backward, where a
    training does not say so itself. at_once: examples of a client in one pass, where a whole batch does not fit.
    executor: computes the passes.
    """

    base: Base
    clients: tuple[ClientData, ...]
    cohort: int
    evaluation: Evaluation = Evaluation()
    reports: bool = True
    recompute: bool = False
    at_once: int | None = None
    executor: Executor = IN_PROCESS

    def __len__(self) -> int:
        return len(self.clients)

    @functools.cached_property
    def pool(self) -> "Workplace":
        """All clients' training data as one client's, for methods that train on the pool; nothing to score it on.

        One client after all has one pass at a time, which is computed here.
        """
        everything = tuple(example for client in self.clients for example in client.train)
        alone = (ClientData(POOL, POOL, None, {}, everything, (), (), Truncation()),)
        return replace(self, clients=alone, cohort=1, executor=IN_PROCESS)
