"""Virtual tokens: what a client's prompt encoder puts before each of its texts.

    E_k = W2 relu(W1 relu(W0 V_k + b0) + b1) + b2           [n, d], a separate encoder for every client k

In ids, -1 ... -n are a client's virtual tokens 1 ... n. They take positions as other tokens do, and are computed once
for texts that share their prefix. Everything else in a pass is the frozen base's.

Source: Liu et al. 2021 (arXiv:2103.10385), as PEFT's PromptEncoder has it with an MLP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fedmira.adapters import Adapters, Part
from fedmira.data.batches import NO_LOSS, Batch


def virtual_ids(count: int) -> tuple[int, ...]:
    """Return the ids of `count` virtual tokens: -1, -2, ..."""
    return tuple(range(-1, -count - 1, -1))


def prepend_virtual(batch: Batch, count: int) -> Batch:
    """Put `count` virtual tokens before every example that has tokens; no loss is taken on them."""
    if not count:
        return batch
    clients, size, _ = batch.ids.shape
    virtual = torch.tensor(virtual_ids(count)).expand(clients, size, -1)
    return replace(
        batch,
        ids=torch.cat([virtual, batch.ids], dim=2),
        labels=torch.cat([torch.full_like(virtual, NO_LOSS), batch.labels], dim=2),
        lengths=batch.lengths + count * (batch.lengths > 0),
    )


def embeddings(adapters: Adapters) -> Tensor:
    """Return the embeddings of every client's virtual tokens by its encoder: [K, n, d], in the rows' type."""
    encoder = next(part for part in adapters.layout.parts if part.kind == "prompt")
    return encode([adapters.leaf(leaf) for leaf in encoder.leaves])


def encode(leaves: Sequence[Tensor]) -> Tensor:
    """E [K, n, d] of an embedding V [K, n, d] and, of each layer, weight [K, out, in] and bias [K, out] in turn.

    Relus are between the layers; without layers V is E.
    """
    states, *layers = leaves
    for number in range(0, len(layers), 2):
        states = states if number == 0 else functional.relu(states)
        states = torch.baddbmm(layers[number + 1][:, None], states, layers[number].mT)
    return states


@dataclass(frozen=True, eq=False)
class VirtualIndex:
    """Where virtual tokens are among the ids of a pass, laid end to end: index [m], and numbers [m] from 0 on.

    Both are on the host, so that no pass waits for an accelerator to find them.
    """

    index: Tensor
    numbers: Tensor


def find_virtual(ids: Tensor) -> VirtualIndex | None:
    """Find the virtual tokens in ids on the host; None where there are none."""
    flat = ids.flatten()
    index = torch.nonzero(flat < 0).squeeze(1)
    return VirtualIndex(index, -1 - flat[index]) if len(index) else None


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """The virtual tokens of a stack of clients in a pass. embedded [S, n, d]; leaves: what they were computed from."""

    embedded: Tensor
    leaves: tuple[Tensor, ...]

    def put(self, plain: Tensor, virtual: VirtualIndex, owner: Tensor) -> Tensor:
        """Put virtual tokens into embeddings [..., T, d]. owner: the client of every token, on the host."""
        count, width = self.embedded.shape[1:]
        numbers = (owner[virtual.index] * count + virtual.numbers).to(plain.device)
        vectors = self.embedded.to(plain.dtype).view(-1, width).index_select(0, numbers)
        return plain.view(-1, width).index_copy(0, virtual.index.to(plain.device), vectors).view(plain.shape)

    def write(self, encoder: Part, into: Adapters) -> None:
        """Write the gradients that backward left at the leaves."""
        for leaf, value in zip(encoder.leaves, self.leaves, strict=True):
            assert value.grad is not None, "a pass without virtual tokens"
            into.leaf(leaf).copy_(value.grad)


def make_virtual_tokens(
    encoder: Part, adapters: Adapters, *, dtype: torch.dtype, device: torch.device, differentiable: bool
) -> VirtualTokens:
    """Run the encoders of all clients, in float32, or in float64 under a base in that.

    differentiable: backward then leaves the gradients at the leaves.
    """
    wide = torch.promote_types(dtype, torch.float32)
    leaves = tuple(adapters.leaf(leaf).to(device=device, dtype=wide).detach() for leaf in encoder.leaves)
    with torch.set_grad_enabled(differentiable):
        leaves = tuple(leaf.requires_grad_(differentiable) for leaf in leaves)
        return VirtualTokens(encode(leaves), leaves)
