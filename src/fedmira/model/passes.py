"""Passes of a whole cohort through the one base: losses and gradients, each client with its own adapter."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import Batch
from fedmira.model.base.load import Base
from fedmira.model.packed.attention import packed_attention
from fedmira.model.packed.lora import Dropout
from fedmira.model.packed.loss import sampled_loss, token_losses, weighted_loss
from fedmira.model.packed.packing import Pass, pack, pad
from fedmira.model.packed.virtual import prepend_virtual


def gradients(
    base: Base,
    adapters: Adapters,
    batch: Batch,
    *,
    into: Tensor,
    dropout: Dropout | None = None,
    streams: Sequence[np.random.Generator] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each client's loss [S] and labelled tokens [S]; write d loss_k / d row_k to `into` [S, P].

    loss_k = mean over the labelled tokens of client k's own batch, in nats; one client never weighs on another. A
    client without labelled tokens gets loss 0 and gradient 0.

    streams [S]: the labels are drawn from the model, y ~ softmax(f(x)), at the same places, each client's from its own
    stream and in the order of its examples. None: the batch's own. With B_k drawn labels the mean of B_k g_k * g_k over
    draws is the diagonal of the Gauss-Newton (Fisher) matrix of loss_k.
    Source of the latter: Liu et al. 2023 (arXiv:2305.14342), Algorithm 2.
    """
    batch = prepend_virtual(batch, adapters.layout.virtual_tokens)
    if not adapters.layout.low_rank:
        dropout = None  # it is LoRA's
    plan = plan_pass(base, batch, share=dropout is None)  # masks are drawn for every token of every example
    whole = len(plan.order) == len(adapters) and torch.equal(plan.order, torch.arange(len(adapters)))
    gradient = into if whole else torch.zeros(len(plan.order), into.shape[1], dtype=into.dtype, device=into.device)
    if dropout is not None:
        dropout = Dropout(dropout.rate, [dropout.seeds[k] for k in plan.order.tolist()])
    weights = 1.0 / plan.counts.clamp(min=1).to(_wide(base.dtype))
    with (
        base.stack.filled(
            adapters if whole else adapters.take(plan.order),
            dtype=base.dtype,
            device=base.device,
            segments=plan.segments,
            gradient=gradient,
            dropout=dropout,
        ),
        torch.enable_grad(),
    ):
        hidden = states_of(base, plan)
        if streams is None:
            total, losses = weighted_loss(hidden, plan.targets, weights[plan.owner], base.head)
        else:
            total, losses = sampled_loss(hidden, _draw_numbers(plan, streams), weights[plan.owner], base.head)
        torch.autograd.backward(total)
    if not whole:
        into.zero_()
        into[plan.order] = gradient
    return _sum_by_client(losses, plan) * weights, plan.counts


def losses(base: Base, adapters: Adapters, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the sum of token cross-entropies in nats [S] and the number of labelled tokens [S]; no gradient."""
    plan = plan_pass(base, prepend_virtual(batch, adapters.layout.virtual_tokens))
    with (
        base.stack.filled(adapters.take(plan.order), dtype=base.dtype, device=base.device, segments=plan.segments),
        torch.no_grad(),
    ):
        each = token_losses(states_of(base, plan), plan.targets, base.head)
    return _sum_by_client(each, plan), plan.counts


def plan_pass(base: Base, batch: Batch, *, share: bool = True) -> Pass:
    """Lay a batch out for this base; everything a pass indexes with lies on its device."""
    if not base.packs:
        return pad(batch).to(base.device)
    share = share and (base.reach is None or int(batch.lengths.max()) <= base.reach)
    return pack(batch, pad_id=base.pad_id, fused=base.device.type != "cpu", share=share).to(base.device)


def states_of(base: Base, plan: Pass, *, keys_values: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Hidden states [n, d] at the places that predict a label. No attention mask: nothing is padded on the left.

    keys_values: takes the keys and values [1, H', N, D] of every layer, if the pass is packed.
    """
    if plan.attention is None:
        states = base.decoder(**base.inputs(plan.ids, plan.virtual), use_cache=False).last_hidden_state
    else:
        tail = nullcontext() if base.tail is None else base.tail.cut(plan)
        with tail as last, packed_attention(base.model, plan.attention, last=last, keys_values=keys_values):
            given = base.inputs(plan.ids, plan.virtual)
            states = base.decoder(**given, position_ids=plan.positions, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1]).index_select(0, plan.labelled)


def _draw_numbers(plan: Pass, streams: Sequence[np.random.Generator]) -> Tensor:
    """Draw a number in [0, 1) for every label [n], by client: whoever shares the pass, a client's are the same."""
    drawn = [stream.random(count) for stream, count in zip(streams, plan.counts.tolist(), strict=True)]
    numbers = torch.empty(len(plan.owner), dtype=torch.float64)
    numbers[torch.argsort(plan.owner, stable=True).cpu()] = torch.from_numpy(np.concatenate(drawn))
    return numbers.to(plan.owner.device)


def _sum_by_client(each: Tensor, plan: Pass) -> Tensor:
    """Sum values of labelled tokens [n] by client [S]."""
    return torch.zeros(len(plan.counts), dtype=each.dtype, device=each.device).index_add_(0, plan.owner, each)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
