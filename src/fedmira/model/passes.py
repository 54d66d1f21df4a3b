"""Passes of a whole cohort through the one base: losses, gradients and answers, each client with its own adapter."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from fedmira.adapters import Adapters
from fedmira.data.batches import Batch
from fedmira.model.load import Base, quiet
from fedmira.model.lora import Dropout
from fedmira.model.loss import token_losses, weighted_loss
from fedmira.model.packing import Pass, pack, packed_attention, pad


def gradients(
    base: Base, adapters: Adapters, batch: Batch, *, into: Tensor, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """Return each client's loss [S] and labelled tokens [S]; write d loss_k / d row_k to `into` [S, P].

    loss_k = mean over the labelled tokens of client k's own batch, in nats; one client never weighs on another. A
    client without labelled tokens gets loss 0 and gradient 0.
    """
    plan = _plan(base, batch)
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
        hidden = _hidden(base, plan)
        total, losses = weighted_loss(hidden, plan.targets, weights[plan.owner], base.head)
        torch.autograd.backward(total)
    if not whole:
        into.zero_()
        into[plan.order] = gradient
    return _by_client(losses, plan) * weights, plan.counts


def losses(base: Base, adapters: Adapters, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the sum of token cross-entropies in nats [S] and the number of labelled tokens [S]; no gradient."""
    plan = _plan(base, batch)
    with (
        base.stack.filled(adapters.take(plan.order), dtype=base.dtype, device=base.device, segments=plan.segments),
        torch.no_grad(),
    ):
        each = token_losses(_hidden(base, plan), plan.targets, base.head)
    return _by_client(each, plan), plan.counts


def answers(
    base: Base, adapters: Adapters, prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int
) -> list[list[str]]:
    """Decode greedily for every client and prompt; prompts[k][i] are token ids, left-padded here with a mask.

    A prompt and its answer must fit in the base's positions: the data layer cuts prompts for that, and counts.
    """
    width = max(len(own) for own in prompts)
    filler = [base.pad_id]
    flat = [list(ids) for own in prompts for ids in [*own, *[filler] * (width - len(own))]]
    longest = max(len(ids) for ids in flat)
    tokens = torch.full((len(flat), longest), base.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(flat):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    greedy = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=base.pad_id)
    with base.stack.filled(adapters, dtype=base.dtype, device=base.device), torch.no_grad(), quiet():
        out = base.model.generate(tokens.to(base.device), attention_mask=mask.to(base.device), generation_config=greedy)
    texts = base.tokenizer.batch_decode(out[:, longest:].cpu(), skip_special_tokens=True)
    return [texts[k * width : k * width + len(own)] for k, own in enumerate(prompts)]


def _plan(base: Base, batch: Batch) -> Pass:
    """Lay a batch out for this base; everything a pass indexes with lies on its device."""
    plan = pack(batch, pad_id=base.pad_id) if base.packs else pad(batch)
    return plan.to(base.device)


def _hidden(base: Base, plan: Pass) -> Tensor:
    """Hidden states [n, d] at the places that predict a label. No attention mask: nothing is padded on the left."""
    if plan.attention is None:
        states = base.decoder(input_ids=plan.ids, use_cache=False).last_hidden_state
    else:
        with packed_attention(base.model, plan.attention):
            states = base.decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1]).index_select(0, plan.where)


def _by_client(each: Tensor, plan: Pass) -> Tensor:
    """Sum values of labelled tokens [n] by client [S]."""
    return torch.zeros(len(plan.counts), dtype=each.dtype, device=each.device).index_add_(0, plan.owner, each)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
