"""What a run will cost before it starts: how many clients fit in one pass, measured and not guessed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from fedmira.adapters import Layout, start_adapters
from fedmira.data.batches import ClientData, collate
from fedmira.model.load import Base
from fedmira.model.loss import CHUNK_BYTES
from fedmira.model.passes import gradients

log = logging.getLogger(__name__)

SHARE = 0.6  # of the memory that is free now; the rest is for evaluation, the allocator and other programs


@dataclass(frozen=True)
class CohortPlan:
    """Clients per pass and why. bytes_each: activations and rows of one client at the longest batch of the data."""

    cohort: int
    bytes_each: int
    bytes_free: int


def plan_cohort(
    base: Base, layout: Layout, clients: Sequence[ClientData], *, batch_size: int, sampled: int
) -> CohortPlan:
    """Measure one client's training pass on the longest examples and return how many clients fit in one pass.

    The bytes that autograd keeps for the backward pass are counted exactly by hooks; rows, gradient and moments are
    5 x P x 4 bytes. sampled: clients of a round, the most a cohort can use.
    """
    longest = sorted((one for client in clients for one in client.train), key=lambda one: -len(one.ids))[:batch_size]
    batch = collate([longest], pad_id=base.pad_id)
    adapters = start_adapters(layout, torch.tensor([layout.parts[0].rank]), 1.0, torch.Generator().manual_seed(0))
    adapters = adapters.with_rows(adapters.rows.to(base.device))
    own = {parameter.untyped_storage().data_ptr() for parameter in base.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        gradients(base, adapters, batch, into=torch.zeros_like(adapters.rows))
    each = sum(kept.values()) + 5 * layout.size * 4
    free = _free_bytes(base.device) - 2 * CHUNK_BYTES
    cohort = max(1, min(sampled, int(SHARE * free) // each))
    log.info("cohort %d of %d sampled: %.1f MB a client, %.1f GB free", cohort, sampled, each / 1e6, free / 1e9)
    return CohortPlan(cohort, each, free)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
