"""Passes of a whole cohort through the one base: losses and gradients, each client with its own adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import NO_LOSS, Batch
from fedmira.model.base.load import Base
from fedmira.model.packed.attention import PackedAttention
from fedmira.model.packed.lora import Dropout
from fedmira.model.packed.loss import sampled_loss, token_losses, weighted_loss
from fedmira.model.packed.packing import Pass, pack, pad
from fedmira.model.packed.recompute import recomputing
from fedmira.model.packed.virtual import prepend_virtual
from fedmira.model.seam import attending


def gradients(
    base: Base,
    adapters: Adapters,
    batch: Batch,
    *,
    into: Tensor,
    dropout: Dropout | None = None,
    streams: Sequence[np.random.Generator] | None = None,
    tokens: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return each client's loss [S] and labelled tokens [S]; write d loss_k / d row_k to `into` [S, P].

    loss_k = mean over the labelled tokens of client k's own batch, in nats; no client influences another. A client
    without labelled tokens gets loss 0 and gradient 0. tokens [S]: divide the sum over the batch by these instead,
    where it is a part of a larger one. recompute: keep no activations of decoder blocks; the same bits.

    streams [S]: the labels are drawn from the model, y ~ softmax(f(x)), at the same tokens, each client's from its own
    stream and in the order of its examples. None: the labels of the batch. With B_k drawn labels the mean of
    B_k g_k * g_k over draws is the diagonal of the Gauss-Newton (Fisher) matrix of loss_k.
    Source of the latter: Liu et al. 2023 (arXiv:2305.14342), Algorithm 2.
    """
    batch = prepend_virtual(batch, adapters.layout.virtual_tokens)
    if not adapters.layout.low_rank:
        dropout = None  # it is LoRA's
    plan = plan_pass(base, batch, share=dropout is None)  # masks are drawn for every token of every example
    weights = 1.0 / (plan.counts if tokens is None else tokens).clamp(min=1).to(_wide(base.dtype))
    with running(base, plan, adapters, into=into, dropout=dropout, recompute=recompute) as states:
        if streams is None:
            total, losses = weighted_loss(states, plan.targets, weights[plan.owner], base.head)
        else:
            total, losses = sampled_loss(states, _draw_numbers(plan, streams), weights[plan.owner], base.head)
        torch.autograd.backward(total)
    return _sum_by_client(losses, plan) * weights, plan.counts


def losses(base: Base, adapters: Adapters, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the sum of token cross-entropies in nats [S] and the number of labelled tokens [S]; no gradient."""
    plan = plan_pass(base, prepend_virtual(batch, adapters.layout.virtual_tokens))
    with running(base, plan, adapters) as states:
        nats = token_losses(states, plan.targets, base.head)
    return _sum_by_client(nats, plan), plan.counts


def example_losses(base: Base, adapters: Adapters, batch: Batch) -> tuple[Tensor, Tensor]:
    """As `losses`, by example: sums of nats [S, B] in float64 and labelled tokens [S, B]; 0 where there is none."""
    plan = plan_pass(base, prepend_virtual(batch, adapters.layout.virtual_tokens))
    with running(base, plan, adapters) as states:
        nats = token_losses(states, plan.targets, base.head)
    clients, size = batch.lengths.shape
    where = plan.owner * size + plan.example
    sums = torch.zeros(clients * size, dtype=torch.float64, device=nats.device).index_add_(0, where, nats.double())
    return sums.view(clients, size), torch.bincount(where, minlength=clients * size).view(clients, size)


def count_labelled(batch: Batch, virtual_tokens: int = 0) -> Tensor:
    """Return how many tokens of each client [S] a pass takes its loss on: with a label, and a token before them."""
    labels = prepend_virtual(batch, virtual_tokens).labels
    return (labels[:, :, 1:] != NO_LOSS).sum(dim=(1, 2))


def plan_pass(base: Base, batch: Batch, *, share: bool = True) -> Pass:
    """Lay a batch out for this base; every index that the pass computes with is on the base's device.

    share: compute the prefix of a client's examples once, where the base allows it.
    """
    if not base.packs:
        return pad(batch).to(base.device)
    share = share and (base.reach is None or int(batch.lengths.max()) <= base.reach)
    return pack(batch, pad_id=base.pad_id, fused=base.device.type != "cpu", share=share).to(base.device)


@contextmanager
def running(
    base: Base,
    plan: Pass,
    adapters: Adapters | None,
    *,
    clients: Tensor | None = None,
    into: Tensor | None = None,
    dropout: Dropout | None = None,
    keys_values: list[tuple[Tensor, Tensor]] | None = None,
    recompute: bool = False,
) -> Iterator[Tensor]:
    """Run the base over a pass; yield the hidden states [n, d] of its labelled tokens.

    adapters [K]: those of the pass, None for the base alone. clients [S]: the row of `adapters` of each client of the
    batch, None for row s of client s. into [K, P]: takes the gradients of what is differentiated inside the block, 0
    for clients without tokens; only then the states are differentiable. keys_values: takes the keys and values
    [1, H', N, D] of every layer in turn, where the pass is packed. recompute: blocks are computed again in
    backward, and factors copied again at each use.
    """
    if adapters is None:
        with torch.no_grad(), _open(base, plan, keys_values):
            yield _states(base, plan)
        return
    rows = plan.order if clients is None else clients[plan.order]
    in_place = len(rows) == len(adapters) and torch.equal(rows, torch.arange(len(adapters)))
    gradient = into
    if into is not None and not in_place:
        gradient = torch.zeros(len(rows), into.shape[1], dtype=into.dtype, device=into.device)
    if dropout is not None:
        dropout = Dropout(dropout.rate, [dropout.seeds[k] for k in plan.order.tolist()])
    filled = base.stack.filled(
        adapters if in_place else adapters.take(rows),
        dtype=base.dtype,
        device=base.device,
        segments=plan.segments,
        gradient=gradient,
        dropout=dropout,
        frugal=recompute,
    )
    again = recomputing(base.blocks) if recompute and into is not None else nullcontext()
    with filled, _open(base, plan, keys_values), again, torch.set_grad_enabled(into is not None):
        yield _states(base, plan)
    if into is not None and gradient is not None and not in_place:
        into.zero_()
        into[rows] = gradient


@contextmanager
def _open(base: Base, plan: Pass, keys_values: list[tuple[Tensor, Tensor]] | None) -> Iterator[None]:
    """Let the base's layers attend, and its tail be cut, as this pass asks for; until backward is done."""
    if plan.attention is None:
        yield
        return
    tail = nullcontext() if base.tail is None else base.tail.cut(plan)
    with tail as last, attending(base.model, PackedAttention(plan.attention, last, keys_values)):
        yield


def _states(base: Base, plan: Pass) -> Tensor:
    """Return the hidden states [n, d] of labelled tokens. No attention mask: nothing is padded on the left."""
    inputs = base.inputs(plan.ids, plan.virtual)
    where = {} if plan.attention is None else {"position_ids": plan.positions}
    states = base.decoder(**inputs, **where, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1]).index_select(0, plan.labelled)


def _draw_numbers(plan: Pass, streams: Sequence[np.random.Generator]) -> Tensor:
    """Draw a number in [0, 1) for every label [n], by client: a client's are the same whoever shares the pass."""
    drawn = [stream.random(count) for stream, count in zip(streams, plan.counts.tolist(), strict=True)]
    numbers = torch.empty(len(plan.owner), dtype=torch.float64)
    numbers[torch.argsort(plan.owner, stable=True).cpu()] = torch.from_numpy(np.concatenate(drawn))
    return numbers.to(plan.owner.device)


def _sum_by_client(values: Tensor, plan: Pass) -> Tensor:
    """Sum values of labelled tokens [n] by client [S]."""
    return torch.zeros(len(plan.counts), dtype=values.dtype, device=values.device).index_add_(0, plan.owner, values)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
