"""A cache of keys and values between the passes of a text, and the attention over it.

    o = softmax(scale q k^T + mask) v          over all parts that a row sees, taken jointly

The cache is made of *parts* [n, H', L, D] per layer. One row of a part may serve several rows of a pass: the prefix of
a client's prompts is cached once. For one new token, and for texts of some hundred, batched products take a tenth to
a half of the time of torch's fused attention on a CPU.

Masks are computed here from positions, for any part of a text that is cached, by the rule of each layer (seam.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmira.model.seam import Rule

NOWHERE = 2**30  # the position of padding: no token sees it
SCORES = 2**24  # scores computed at once

Rules = tuple[Rule | None, ...]  # of every layer; None: it sees all tokens before it


def positions_of(length: int, starts: Tensor, sizes: Tensor) -> Tensor:
    """Positions [R, length] of `sizes` [R] tokens that start at positions [R]; NOWHERE behind them."""
    steps = torch.arange(length)
    return torch.where(steps < sizes[:, None], starts[:, None] + steps, NOWHERE)


@dataclass(eq=False)
class CachePart:
    """Keys and values [n, H', L, D] of every layer, n = count, L = length; undefined where masks hide them.

    A layer's are allocated when it first stores some. rows [R]: which of the n each row of a pass sees; None: R / n
    rows in turn see the same.
    """

    count: int
    length: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rows: Tensor | None = None

    def store(self, layer: int, rows: Tensor | slice, columns: slice, key: Tensor, value: Tensor) -> None:
        """Store key and value [n, H', T, D] of these rows in these columns of the L."""
        for layers, states in ((self.keys, key), (self.values, value)):
            if states.shape[2] == self.length and isinstance(rows, slice):
                layers.append(states)  # all of the part: taken without a copy
                continue
            if len(layers) == layer:
                layers.append(states.new_zeros(self.count, states.shape[1], self.length, states.shape[3]))
            layers[layer][rows, :, columns] = states

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.keys, self.values, strict=True))

    def grow(self, length: int) -> None:
        """Add empty columns until there are `length`; a part that is as long stays as it is."""
        missing = length - self.length
        if missing <= 0:
            return
        for layers in (self.keys, self.values):
            layers[:] = [functional.pad(states, (0, 0, 0, missing)) for states in layers]
        self.length = length

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values."""
        key, value = self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
        if self.rows is not None:
            key, value = key.index_select(0, self.rows), value.index_select(0, self.rows)
        return key, value

    def copy(self, source: "CachePart", rows: Tensor, columns: slice, source_columns: slice) -> None:
        """Store what these rows of another part have in some columns."""
        for layers, source_layers in ((self.keys, source.keys), (self.values, source.values)):
            for states, source_states in zip(layers, source_layers, strict=True):
                states[:, :, columns] = source_states[:, :, source_columns].index_select(0, rows)

    def seen_by(self, rows: Tensor, length: int) -> "CachePart":
        """Return this part, cut to a length, as a pass sees it whose rows belong to these of the n."""
        return CachePart(self.count, length, self.keys, self.values, rows)


class Enough(Exception):
    """Raised when a pass has stored the keys and values it was run for; not an error."""


@dataclass(eq=False)
class CachedAttention:
    """The attention of one pass over a cache: where its new keys and values go, and what its tokens see.

    They see the `earlier` parts and then their own: those of the pass alone, or, where `written`, all that the part
    `into` has. rows, column: where in `into` the new ones are stored. queries [R, T] and keys [R, L]: positions of the
    new tokens and of all that may be seen; NOWHERE for padding. rules: None while they are measured, and all is causal.
    enough_at: the layer with whose keys and values the pass may end, None if its states are needed.
    """

    into: CachePart
    rows: Tensor | slice
    column: int
    earlier: list[CachePart]
    queries: Tensor
    keys: Tensor
    rules: Rules | None
    written: bool = False
    enough_at: int | None = None
    layers: int = 0  # that have attended
    mask_memo: dict[Rule | None, Tensor] = field(default_factory=dict)

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rule: Rule,
        *,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Store a layer's keys and values and return its attention [R, T, H, D]; raise Enough if that was all.

        `rules` count and not the layer's rule: transformers makes that for the tokens of this pass alone.
        """
        number = self.layers
        self.layers += 1
        self.into.store(number, self.rows, slice(self.column, self.column + key.shape[2]), key, value)
        if number == self.enough_at:
            raise Enough
        seen = [part.read(number) for part in self.earlier]
        seen.append(self.into.read(number) if self.written else (key, value))
        mask = self.mask(None if self.rules is None else self.rules[number], query.dtype)
        states = _attention(query, seen, scale=scale, softcap=softcap, mask=mask)
        return states.transpose(1, 2).contiguous()

    def mask(self, rule: Rule | None, dtype: torch.dtype) -> Tensor:
        """Return [R, 1, T, L]: 0 where a token is seen, minus infinity where it is masked."""
        if rule not in self.mask_memo:
            masked = self.keys[:, None, :] > self.queries[:, :, None]
            if rule is not None:
                masked |= ~rule.mask(self.queries, self.keys)
            mask = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
            self.mask_memo[rule] = mask.masked_fill_(masked, float("-inf"))[:, None]
        return self.mask_memo[rule]


def _attention(
    query: Tensor, seen: Sequence[tuple[Tensor, Tensor]], *, scale: float, softcap: float | None, mask: Tensor
) -> Tensor:
    """Attention [R, H, T, D] over all parts together; query [R, H, T, D], each part [n, H', L, D], mask [R, 1, T, L].

    R / n rows in turn share a row of a part, H / H' heads in turn a head. Scores are capped to c tanh(s / c).
    """
    lengths = [key.shape[2] for key, _ in seen]
    size = max(1, SCORES // (query.shape[0] * query.shape[1] * sum(lengths)))
    if size < query.shape[2]:
        pieces = [
            _attention(queries, seen, scale=scale, softcap=softcap, mask=masks)
            for queries, masks in zip(torch.split(query, size, dim=2), torch.split(mask, size, dim=2), strict=True)
        ]
        return torch.cat(pieces, dim=2)
    query = query * scale
    scores = torch.cat([_product(query, key.mT) for key, _ in seen], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores += mask
    probabilities = torch.softmax(scores, dim=-1)  # in bfloat16 it sums in float32
    shares = zip(torch.split(probabilities, lengths, dim=-1), seen, strict=True)
    states, *others = [_product(share, value) for share, (_, value) in shares]
    for other in others:
        states += other
    return states


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [R, H, T, x] times right [n, H', x, y], whose rows and heads several of the left share: [R, H, T, y]."""
    rows, heads, tokens, inner = left.shape
    count, groups, _, width = right.shape
    if count == rows:
        return (left.reshape(rows, groups, -1, inner) @ right).view(rows, heads, tokens, width)
    folded = left.reshape(count, rows // count, groups, -1, inner).transpose(1, 2)
    product = folded.reshape(count, groups, -1, inner) @ right
    return product.view(count, groups, rows // count, -1, width).transpose(1, 2).reshape(rows, heads, tokens, width)
