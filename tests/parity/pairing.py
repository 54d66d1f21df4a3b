"""One tiny base twice, for FedMira and for PEFT, with the same clients' adapters and texts."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tests import tiny
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import Batch, Encoded, collate
from fedmira.model.base.load import Base
from fedmira.model.packed.attention import PackedAttention
from fedmira.model.packed.packing import pack
from fedmira.model.passes import gradients
from fedmira.model.seam import attending

RANKS = (1, 4, 2)  # mixed, in one stack of rank 4; alpha = 6 is none of them
EXAMPLES = (2, 1, 3)  # per client
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}
# float64, but transformers takes RMS norms in float32 whatever the model's dtype is
NORM32 = {"rtol": 1e-5, "atol": 5e-6}
FLOAT32 = {"rtol": 1e-4, "atol": 2e-5}
CAPPED = {"rtol": 1e-4, "atol": 5e-5}  # Gemma 2 in float32: its scores and logits pass through tanh


@dataclass(frozen=True, eq=False)
class Pairing:
    """One tiny base twice: with stacked layers, and plain for PEFT; with three clients' adapters and texts."""

    base: Base
    plain: Any
    stack: Adapters
    texts: list[list[Encoded]]
    tolerance: dict[str, float]
    made: dict[int, Any] = field(default_factory=dict)  # PEFT's models by client

    @property
    def modules(self) -> list[str]:
        return [name for name, _, _ in self.base.shapes]

    @property
    def batch(self) -> Batch:
        return collate(self.texts, pad_id=self.base.pad_id)

    def peft(self, k: int) -> Any:
        """Client k as PEFT has it, without gradients; made once, so that a test that trains it has a pairing alone."""
        if k not in self.made:
            self.made[k] = tiny.peft_client(self.plain, self.stack, k, modules=self.modules)
        self.made[k].zero_grad()
        return self.made[k]

    @cached_property
    def own(self) -> tuple[Tensor, Tensor]:
        """Losses and gradients of the pairing's own stack and batch, for tests that only read them."""
        return self.gradients()

    def gradients(self, stack: Adapters | None = None, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Losses [S] and gradient rows [S, P], into a buffer that held something else before."""
        stack = stack or self.stack
        into = torch.full_like(stack.rows, 7.0)
        found, _ = gradients(self.base, stack, batch or self.batch, into=into)
        return found, torch.where(real_numbers(stack), into, 0.0)


def real_numbers(stack: Adapters) -> Tensor:
    """Where a row holds a factor at all, padded ranks included: [S, P]."""
    return stack.layout.rank_mask(torch.full_like(stack.ranks, stack.layout.parts[0].rank))


def pair(family: str, targets: str | list[str], dtype: torch.dtype = torch.float64, *, packs: bool = True) -> Pairing:
    base = tiny.base(family, targets=targets, dtype=dtype)
    assert base.packs == (family not in tiny.PADDED)
    base = replace(base, packs=packs)
    stack = tiny.adapters(tiny.layout(base, max(RANKS)), RANKS, dtype=dtype)
    stream = np.random.default_rng(5)
    texts = [[tiny.example(stream, int(stream.integers(3, 12)), answer=2) for _ in range(count)] for count in EXAMPLES]
    tolerance = FLOAT32 if dtype != torch.float64 else FLOAT64 if family == "gpt2" else NORM32
    if family == "gemma2":
        tolerance = CAPPED
    return Pairing(base, tiny.model(family, dtype=dtype), stack, texts, tolerance)


def stacked_logits(base: Base, stack: Adapters, batch: Batch) -> Tensor:
    """Logits [S, B, T, V] of a whole batch through the stacked layers and our own head; 0 where nothing is computed."""
    clients, size, length = batch.ids.shape
    if not base.packs:
        with base.stack.filled(stack, dtype=base.dtype, device=base.device), torch.no_grad():
            hidden = base.decoder(input_ids=batch.ids.view(clients * size, length), use_cache=False).last_hidden_state
        return base.head.logits(hidden).view(clients, size, length, -1)
    plan = pack(batch, pad_id=base.pad_id)
    assert plan.attention is not None
    own = stack.take(plan.order)
    with (
        base.stack.filled(own, dtype=base.dtype, device=base.device, segments=plan.segments),
        attending(base.model, PackedAttention(plan.attention)),
        torch.no_grad(),
    ):
        hidden = base.decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state[0]
    logits = torch.zeros(clients, size, length, len(base.head.weight), dtype=hidden.dtype)
    for segment in plan.segments:
        for client, states in zip(plan.order[segment.first : segment.stop].tolist(), segment.view(hidden), strict=True):
            begin = 0
            for place, count in enumerate(batch.lengths[client].tolist()):
                logits[client, place, :count] = base.head.logits(states[begin : begin + count])
                begin += count
    return logits
