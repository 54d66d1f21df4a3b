"""Virtual tokens: what a client's prompt encoder puts before every one of its texts.

    E_k = W2 relu(W1 relu(W0 V_k + b0) + b1) + b2           [n, d], every client k with an encoder of its own

In ids, -1 ... -n stand for a client's virtual tokens 1 ... n. They take positions as other tokens do, and are computed
once for texts that share their beginning. Everything else in a pass is the frozen base's.

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
    """Return the ids of so many virtual tokens: -1, -2, ..."""
    return tuple(range(-1, -count - 1, -1))


def prepend_virtual(batch: Batch, count: int) -> Batch:
    """Put so many virtual tokens before every example that has tokens; no loss is taken on them."""
    if not count:
        return batch
    clients, size, _ = batch.ids.shape
    first = torch.tensor(virtual_ids(count)).expand(clients, size, -1)
    return replace(
        batch,
        ids=torch.cat([first, batch.ids], dim=2),
        labels=torch.cat([torch.full_like(first, NO_LOSS), batch.labels], dim=2),
        lengths=batch.lengths + count * (batch.lengths > 0),
    )


def embeddings(adapters: Adapters) -> Tensor:
    """Return what every client's encoder makes of its virtual tokens: [K, n, d], in the rows' type."""
    part = next(part for part in adapters.layout.parts if part.kind == "prompt")
    return encode([adapters.leaf(leaf) for leaf in part.leaves])


def encode(leaves: Sequence[Tensor]) -> Tensor:
    """E [K, n, d] of an embedding V [K, n, d] and, of each layer, weight [K, out, in] and bias [K, out] in turn.

    Relus stand between the layers; without layers V is E.
    """
    states, *layers = leaves
    for place in range(0, len(layers), 2):
        states = states if place == 0 else functional.relu(states)
        states = torch.baddbmm(layers[place + 1][:, None], states, layers[place].mT)
    return states


@dataclass(frozen=True, eq=False)
class VirtualIndex:
    """Where virtual tokens stand among the ids of a pass, laid end to end: index [m], and numbers [m] from 0 on.

    Both lie on the host, so that no pass waits for an accelerator to find them.
    """

    index: Tensor
    numbers: Tensor


def find_virtual(ids: Tensor) -> VirtualIndex | None:
    """Find the virtual tokens in ids on the host; None where there are none."""
    flat = ids.flatten()
    places = torch.nonzero(flat < 0).squeeze(1)
    return VirtualIndex(places, -1 - flat[places]) if len(places) else None


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """The virtual tokens of a stack of clients in a pass. embedded [S, n, d]; leaves: what they were computed from."""

    embedded: Tensor
    leaves: tuple[Tensor, ...]

    def put(self, plain: Tensor, found: VirtualIndex, owner: Tensor) -> Tensor:
        """Put virtual tokens into embeddings [..., T, d]. owner: the client of every token, on the host."""
        count, width = self.embedded.shape[1:]
        which = (owner[found.index] * count + found.numbers).to(plain.device)
        own = self.embedded.to(plain.dtype).view(-1, width).index_select(0, which)
        return plain.view(-1, width).index_copy(0, found.index.to(plain.device), own).view(plain.shape)

    def write(self, part: Part, into: Adapters) -> None:
        """Keep the gradients that backward left at the leaves."""
        for leaf, used in zip(part.leaves, self.leaves, strict=True):
            assert used.grad is not None, "a pass without virtual tokens"
            into.leaf(leaf).copy_(used.grad)


def make_virtual_tokens(
    part: Part, adapters: Adapters, *, dtype: torch.dtype, device: torch.device, differentiable: bool
) -> VirtualTokens:
    """Run the encoders of all clients, in float32, or in float64 under a base in that.

    differentiable: backward then leaves the gradients at the leaves.
    """
    wide = torch.promote_types(dtype, torch.float32)
    leaves = tuple(adapters.leaf(leaf).to(device=device, dtype=wide).detach() for leaf in part.leaves)
    with torch.set_grad_enabled(differentiable):
        leaves = tuple(leaf.requires_grad_(differentiable) for leaf in leaves)
        return VirtualTokens(encode(leaves), leaves)
