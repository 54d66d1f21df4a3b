"""Accumulated passes are one batch: n passes of b examples make the optimizer step of n x b."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.engine.house import house
from tests.engine.house import run as play
from torch import Tensor

from fedmira.adapters import Adapters, prompt_layout, start_adapters
from fedmira.adapters.optim import adamw
from fedmira.data.batches import Batch, Encoded, collate
from fedmira.engine import tools as tools_of_clients
from fedmira.engine.cost import count_run, plan_cohort
from fedmira.engine.phase import PhaseResult, local_phase, plan_steps
from fedmira.engine.tools import Training
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, Tools
from fedmira.model.base.load import Base
from fedmira.model.packed.lora import Dropout
from fedmira.model.passes import count_labelled, gradients

TRAIN = (3, 13, 6)  # in steps of 3 x 2: one short pass of a third, two whole steps and a rest, one whole step
COHORT = Cohort(("c0", "c1", "c2"), TRAIN, ({}, {}, {}), (), 0)
LOCAL = build("local", {}, COHORT)
BASES = {
    "packed": tiny.base("llama", targets=["q_proj", "v_proj"]),
    "padded": replace(tiny.base("llama", targets=["q_proj", "v_proj"]), packs=False),
    "float32": tiny.base("llama", targets=["q_proj", "v_proj"], dtype=torch.float32),
}
WHOLE = Training(adamw(weight_decay=0.1), 0.02, 6, None, 1, 1.0, True, 0.0, seed=3)
PARTS = replace(WHOLE, batch_size=2, accumulation=3)
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def phase(training: Training, *, base: Base = BASES["packed"], method: Method = LOCAL, number: int = 1) -> PhaseResult:
    dtype = base.dtype
    start = tiny.adapters(tiny.layout(base, 2), (2, 1, 2), dtype=dtype)
    clients = [tiny.client(f"c{k}", train=count) for k, count in enumerate(TRAIN)]
    memory = method.client.start(start)
    given, clock = Message(start.rows), Clock(number)
    return local_phase(base, method, clients, start, given, memory, training=training, clock=clock, cohort=8)


@pytest.mark.parametrize("length", [{"local_epochs": 2}, {"local_steps": 4, "local_epochs": None}], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_parts_of_a_step_are_the_step_of_one_larger_batch(kind: str, length: dict[str, Any]) -> None:
    parts, whole = (phase(replace(one, **length), base=BASES[kind]) for one in (PARTS, WHOLE))
    # AdamW divides by the root of squares: rounding of small gradients in float32 is seen in the rows
    close = {"rtol": 1e-3, "atol": 1e-4} if kind == "float32" else CLOSE
    torch.testing.assert_close(parts.rows, whole.rows, **close)
    torch.testing.assert_close(parts.losses, whole.losses, **close)
    assert parts.steps.tolist() == whole.steps.tolist()
    assert parts.tokens == whole.tokens


@pytest.mark.parametrize("virtual", [0, 3])
def test_a_step_counts_its_labels_as_its_passes_do(virtual: int) -> None:
    """Of an example that is all labels the first has no token before it, unless virtual tokens are there."""
    base = BASES["packed"]
    lora = tiny.adapters(tiny.layout(base, 2), (2, 1))
    prompt = start_adapters(prompt_layout(base.width, 3, 4), torch.zeros(2).long(), 1.0, torch.Generator())
    adapters = lora if not virtual else prompt.with_rows(prompt.rows.double())
    whole, part = Encoded((5, 6, 7, 1), 2, (), earlier=((0, 2),)), Encoded((5, 6, 1), 2, ())
    batch = collate([[whole, part], [part]], pad_id=0)
    _, counts = gradients(base, adapters, batch, into=torch.zeros_like(adapters.rows))
    assert counts.tolist() == count_labelled(batch, virtual).tolist() == [5 if virtual else 4, 1]


def test_the_gradient_is_not_the_mean_of_the_passes_own_means() -> None:
    """Passes have different numbers of labelled tokens; a mean of means would weigh those of short ones more."""
    found: list[Tensor] = []

    def ask(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        found.append(tools.grad(adapters)[1].clone())
        return adapters, memory

    method = replace(LOCAL, client=replace(LOCAL.client, step=ask))
    phase(replace(PARTS, local_epochs=None, local_steps=1), method=method)
    phase(replace(PARTS, local_epochs=None, local_steps=3, accumulation=1), method=method)
    means = torch.stack(found[1:]).mean(dim=0)
    assert not torch.allclose(found[0][0], means[0], rtol=1e-2)


def test_curvature_and_loss_on_the_batch_are_of_the_whole_step() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def ask(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        tokens, drawn = tools.curvature(adapters)
        seen.append((tokens.clone(), drawn.clone(), tools.loss(adapters, on="batch")))
        losses, _ = tools.grad(adapters)
        torch.testing.assert_close(seen[-1][2], losses)
        return adapters, memory

    method = replace(LOCAL, client=replace(LOCAL.client, step=ask))
    for training in (PARTS, WHOLE):
        phase(training, method=method)
    for parts, whole in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        for one, other in zip(parts, whole, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_fedsophia_estimates_on_the_whole_step() -> None:
    method = build("fedsophia", {"tau": 2}, COHORT)
    parts, whole = (phase(training, method=method) for training in (PARTS, WHOLE))
    for name in ("sophia_m", "sophia_v", "sophia_count"):
        torch.testing.assert_close(parts.memory[name], whole.memory[name], **CLOSE)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, Dropout | None]]:
    """What each call of `gradients` is given."""
    seen: list[tuple[Batch, Dropout | None]] = []

    def watched(
        base: Base, adapters: Adapters, batch: Batch, *, dropout: Dropout | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        seen.append((batch, dropout))
        return gradients(base, adapters, batch, dropout=dropout, **options)

    monkeypatch.setattr(tools_of_clients, "gradients", watched)
    return seen


def test_one_pass_has_at_most_batch_size_examples_of_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    phase(PARTS)
    examples = [(batch.lengths > 0).sum(dim=1).tolist() for batch, _ in seen]
    # by step and pass, clients in the order of their steps: c1 (3 steps), c0 and c2 (1 each)
    assert examples == [[2, 2, 2], [2, 1, 2], [2, 0, 2], [2], [2], [2], [1]]


def test_every_pass_of_a_step_has_its_own_dropout_and_the_first_that_of_a_step_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = watch(monkeypatch)
    first = phase(replace(PARTS, dropout=0.3))
    masks = [dropout for _, dropout in seen[:3]]
    assert len({tuple(one.seeds) for one in masks if one is not None}) == 3
    seen.clear()
    phase(replace(WHOLE, dropout=0.3))
    assert seen[0][1] == masks[0]
    assert torch.equal(phase(replace(PARTS, dropout=0.3)).rows, first.rows)


@pytest.mark.parametrize("steps", [None, 2])
def test_a_pool_takes_as_many_steps_of_as_many_examples_as_one_with_larger_batches(
    steps: int | None, tmp_path: Path
) -> None:
    def pooled(name: str, **settings: Any) -> Tensor:
        of = house(count=1, **settings)
        return play(of, build("pooled", {"steps": steps}, of.cohort()), tmp_path / name, schedule=[(0, 1, 2)]).rows

    parts = pooled("parts", batch_size=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(parts, pooled("whole", batch_size=4), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [{"local_epochs": 2}, {"local_steps": 4, "local_epochs": None}], ids=str)
def test_the_cost_counts_the_examples_of_a_step(length: Mapping[str, Any]) -> None:
    training = replace(PARTS, **length)
    clients = [tiny.client(f"c{k}", train=count) for k, count in enumerate(TRAIN)]
    tokens = sum(
        sum(map(len, plan_steps(client, training, 1))) * client.tokens / len(client.train) for client in clients
    )
    schedule: Sequence[Any] = [np.arange(3)]
    work = count_run(clients, schedule, method=LOCAL, training=training, every=1, writes=False, max_examples=None)
    assert work.trained == pytest.approx(tokens)


def test_memory_is_planned_for_one_pass_and_a_second_gradient() -> None:
    base = BASES["packed"]
    clients = [tiny.client("c0", train=9)]
    layout = tiny.layout(base, 2)
    plain, parts = (
        plan_cohort(base, layout, clients, batch_size=2, sampled=1, rows=rows).bytes_each for rows in (5, 6)
    )
    assert parts - plain == 4 * layout.size
