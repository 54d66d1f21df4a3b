"""How wide a study's training passes are, and whether they compute decoder blocks again: by measured memory."""

from collections.abc import Sequence

from fedmira.adapters import Layout
from fedmira.config.sections import Config, TrainingConfig
from fedmira.disk.run_facts import RunFacts
from fedmira.engine.cost import CohortPlan, plan_cohort
from fedmira.engine.workplace import Workplace


def shape_of_passes(
    config: Config,
    workplace: Workplace,
    passes: Sequence[tuple[Layout, TrainingConfig]],
    sampled: int,
    saved: RunFacts | None,
) -> tuple[int, bool]:
    """Return how many clients train in one pass, and whether `gradient_checkpointing: auto` recomputes.

    As saved, as the config says, or as many as fit; with a number that is given, it is recomputed where that many do
    not fit otherwise.
    """
    if saved is not None:
        return saved.cohort, saved.recompute
    given = None if config.federation.cohort == "auto" else config.federation.cohort
    auto = any(section.gradient_checkpointing == "auto" for _, section in passes)
    if given is not None and not auto:
        return given, False
    plans = plan_passes(workplace, passes, sampled if given is None else given)
    return given or min(plan.cohort for plan in plans), any(plan.recompute for plan in plans)


def plan_passes(
    workplace: Workplace, passes: Sequence[tuple[Layout, TrainingConfig]], sampled: int
) -> list[CohortPlan]:
    """Measure every kind of training pass. One that is accumulated has a second gradient for each client."""
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
            workplace.base, layout, workplace.clients, batch_size=batch, sampled=sampled, rows=rows, recompute=recompute
        )
        for layout, batch, rows, recompute in kinds
    ]
