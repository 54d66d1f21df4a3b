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


def gradients(
    base: Base, adapters: Adapters, batch: Batch, *, into: Tensor, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """Return each client's loss [S] and labelled tokens [S]; write d loss_k / d row_k to `into` [S, P].

    loss_k = mean over the labelled tokens of client k's own batch, in nats; one client never weighs on another.
    """
    ids, targets, places, owner, counts = _labelled(base, batch)
    base.stack.fill(adapters, dtype=base.dtype, gradient=into, dropout=dropout)
    try:
        with torch.enable_grad():
            hidden = _hidden(base, ids)[places]
            weights = 1.0 / counts.clamp(min=1).to(_wide(base.dtype))
            total, losses = weighted_loss(hidden, targets, weights[owner], base.head)
            torch.autograd.backward(total)
    finally:
        base.stack.clear()
    sums = torch.zeros(len(adapters), dtype=losses.dtype, device=losses.device).index_add_(0, owner, losses)
    return sums * weights, counts


def losses(base: Base, adapters: Adapters, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the sum of token cross-entropies in nats [S] and the number of labelled tokens [S]; no gradient."""
    ids, targets, places, owner, counts = _labelled(base, batch)
    base.stack.fill(adapters, dtype=base.dtype)
    try:
        with torch.no_grad():
            each = token_losses(_hidden(base, ids)[places], targets, base.head)
    finally:
        base.stack.clear()
    return torch.zeros(len(adapters), dtype=each.dtype, device=each.device).index_add_(0, owner, each), counts


def answers(
    base: Base, adapters: Adapters, prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int
) -> list[list[str]]:
    """Decode greedily for every client and prompt; prompts[k][i] are token ids, left-padded here with a mask.

    Prompts are cut at their start if prompt + answer would pass the base's positions.
    """
    room = None if base.max_positions is None else max(1, base.max_positions - max_new_tokens)
    width = max(len(own) for own in prompts)
    filler = [base.pad_id]
    flat = [
        list(ids)[-room:] if room else list(ids) for own in prompts for ids in [*own, *[filler] * (width - len(own))]
    ]
    longest = max(len(ids) for ids in flat)
    tokens = torch.full((len(flat), longest), base.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(flat):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    greedy = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=base.pad_id)
    base.stack.fill(adapters, dtype=base.dtype)
    try:
        with torch.no_grad(), quiet():
            out = base.model.generate(
                tokens.to(base.device), attention_mask=mask.to(base.device), generation_config=greedy
            )
    finally:
        base.stack.clear()
    texts = base.tokenizer.batch_decode(out[:, longest:].cpu(), skip_special_tokens=True)
    return [texts[k * width : k * width + len(own)] for k, own in enumerate(prompts)]


def _hidden(base: Base, ids: Tensor) -> Tensor:
    """Hidden states [S*B, T, d]. No attention mask: padding is on the right of a causal decoder."""
    return base.decoder(input_ids=ids, use_cache=False).last_hidden_state


def _labelled(base: Base, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Flatten a batch: ids [S*B, T], targets [n], (row, column) that predict them, owner [n], counts [S]."""
    clients, size, length = batch.ids.shape
    labels = batch.labels.view(clients * size, length)[:, 1:]
    rows, columns = torch.nonzero(labels != -100, as_tuple=True)
    owner = rows // size
    counts = torch.bincount(owner, minlength=clients)
    ids = batch.ids.view(clients * size, length)
    targets = labels[rows, columns]
    to = base.device
    return ids.to(to), targets.to(to), (rows.to(to), columns.to(to)), owner.to(to), counts.to(to)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
