"""A client's rounds are one training of transformers' Trainer: schedule, warm-up, accumulation, clipping and decay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.parity.pairing import pair
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from fedmira.adapters.optim import adamw
from fedmira.data.batches import Encoded, collate
from fedmira.engine.phase import local_phase, plan_steps
from fedmira.engine.rates import Schedule
from fedmira.engine.tools import Training
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message

BATCH, PARTS, ROUNDS, STEPS = 2, 3, 2, 2
RATE, DECAY, CLIP = 0.05, 0.1, 0.5


class InOrder(Trainer):  # type: ignore[misc]
    """Takes the examples in the order in which they are given."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def as_batch(examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    batch = collate([list(examples)], pad_id=0)
    places = torch.arange(batch.ids.shape[-1])
    mask = (places < batch.lengths[0][:, None]).long()
    return {"input_ids": batch.ids[0], "labels": batch.labels[0], "attention_mask": mask}


@pytest.mark.parametrize("kind", ["linear", "cosine_with_min_lr"])
def test_two_rounds_of_a_client_are_one_training_of_the_trainer(kind: str, tmp_path: Path) -> None:
    """Moments are kept, the schedule is over the run: nothing distinguishes rounds from one long training."""
    limits = {"min_lr": 0.01} if kind == "cosine_with_min_lr" else {}
    pairing = pair("llama", "all-linear", torch.float32)
    client = tiny.client("c0", train=BATCH * PARTS * STEPS, longest=12)
    schedule = Schedule(kind, rounds=ROUNDS, warmup=1, **limits)  # type: ignore[arg-type]
    training = Training(adamw(weight_decay=DECAY), RATE, BATCH, STEPS, None, CLIP, True, 0.0, 3, PARTS, schedule)
    method = build("local", {}, Cohort(("c0",), (len(client.train),), ({},), (), 3))
    start = pairing.stack.take(torch.tensor([1]))
    rows, moments, order = start.rows, None, []
    for number in range(1, ROUNDS + 1):
        found = local_phase(
            pairing.base,
            method,
            [client],
            start,
            Message(rows),
            {},
            moments,
            training=training,
            clock=Clock(number),
            cohort=1,
        )
        rows, moments = found.returned.rows, found.moments
        order += [client.train[i] for step in plan_steps(client, training, number) for i in step]

    made = pairing.peft(1)
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=PARTS,
        max_steps=ROUNDS * STEPS,
        optim="adamw_torch",
        learning_rate=RATE,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=limits,
        warmup_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    InOrder(model=made, args=settings, train_dataset=order, data_collator=as_batch).train()
    expected = tiny.peft_row(made, start.layout, gradient=False)
    torch.testing.assert_close(rows[0], expected, rtol=1e-3, atol=1e-4)
    assert float((expected - start.rows[0]).abs().max()) > 0.02
