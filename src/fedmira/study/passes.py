"""How wide a study's training passes are, and whether they compute decoder blocks again: by measured memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedmira.adapters import Layout
from fedmira.config.sections import Config, TrainingConfig
from fedmira.disk.run_facts import RunFacts
from fedmira.engine.cost import CohortPlan, plan_cohort
from fedmira.engine.workplace import Workplace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassShape:
    """cohort: clients in one pass; recompute: blocks in backward where a training says auto; at_once: examples of each.

    at_once None: whole batches. plans: what was measured to settle it; empty: nothing was.
    """

    cohort: int
    recompute: bool = False
    at_once: int | None = None
    plans: Sequence[CohortPlan] = ()

    @classmethod
    def of(cls, workplace: Workplace) -> "PassShape":
        return cls(workplace.cohort, workplace.recompute, workplace.at_once)

    def laid_on(self, workplace: Workplace) -> Workplace:
        return replace(workplace, cohort=self.cohort, recompute=self.recompute, at_once=self.at_once)


def shape_of_passes(
    config: Config,
    workplace: Workplace,
    passes: Sequence[tuple[Layout, TrainingConfig]],
    sampled: int,
    saved: RunFacts | None,
    *,
    workers: int | None = None,
) -> PassShape:
    """Return the shape of a study's training passes: as saved, as the config says, or what fits.

    workers: actors that compute passes at the same time, None = this process does. Where the config leaves the number
    open, there is a pass for each.

    A number of clients in the config goes before the saved one: it was made smaller after a run was out of memory.

    With a number of clients that is given, blocks are recomputed where that many do not fit otherwise.
    """
    given = None if config.federation.cohort == "auto" else config.federation.cohort
    if saved is not None:
        if given is not None and given < saved.cohort:
            log.warning(
                "passes of %d clients now, and of %d before: results agree up to rounding, and not to the bit",
                given,
                saved.cohort,
            )
        return PassShape(saved.cohort if given is None else min(given, saved.cohort), saved.recompute, saved.at_once)
    most = -(-sampled // (workers or 1))
    plans = plan_passes(workplace, passes, most if given is None else given, workers=workers)
    cohort = given or min(plan.cohort for plan in plans)
    at_once = min((plan.examples for plan in plans if plan.examples is not None), default=None)
    return PassShape(cohort, any(plan.recompute for plan in plans), at_once, plans)


def plan_passes(
    workplace: Workplace, passes: Sequence[tuple[Layout, TrainingConfig]], sampled: int, *, workers: int | None = None
) -> list[CohortPlan]:
    """Measure every kind of training pass. One that is accumulated has a second gradient for each client.

    workers: as of shape_of_passes. They share this machine's memory as if all were here; of GPUs each has its own.
    """
    kinds = dict.fromkeys(
        (
            layout,
            section.batch_size,
            5 + (section.gradient_accumulation_steps > 1),
            None if section.gradient_checkpointing == "auto" else section.gradient_checkpointing,
        )
        for layout, section in passes
    )
    return [
        plan_cohort(
            workplace.base,
            layout,
            workplace.clients,
            batch_size=batch,
            sampled=sampled,
            rows=rows,
            recompute=recompute,
            actors=min(workers or 0, 1) if workplace.base.device.type == "cuda" else workers or 0,
        )
        for layout, batch, rows, recompute in kinds
    ]
