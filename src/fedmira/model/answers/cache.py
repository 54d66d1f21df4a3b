"""Keys and values kept between the passes of a text, by an attention function of our own.

    o = softmax(scale q k^T + mask) v          over all parts that a row sees, taken jointly

They lie in *parts* [n, H', L, D] per layer. One row of a part may serve several rows of a pass: what the prompts of a
client have in common is kept once. For one new token, and for texts of some hundred, products in batches take a tenth
to a half of the time of torch's fused attention on a CPU.

Layers reach this through transformers' attention interface. Their masks are worked out here from positions, for any
part of a text that is at hand; transformers hands over the rule (a window, a chunk) instead of a mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fedmira.model.packed.attention import UnsupportedAttention, check_call

NAME = "fedmira_kept"
NOWHERE = 2**30  # the position of a blank: beyond every token's sight
SCORES = 2**24  # scores worked out at once

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, positions of queries, of keys) -> bool
Rules = tuple[Sees | None, ...] | None  # of every layer; None while they are found out


def positions_of(length: int, begins: Tensor, sizes: Tensor) -> Tensor:
    """Positions [R, length] of tokens that begin at positions [R]; NOWHERE from sizes [R] on."""
    steps = torch.arange(length)
    return torch.where(steps < sizes[:, None], begins[:, None] + steps, NOWHERE)


@dataclass(eq=False)
class CachePart:
    """Keys and values [n, H', L, D] of every layer, n = count, L = length; anything where masks hide it.

    A layer's are allocated when it first brings some. rows [R]: which of the n each row of a pass sees; None: R / n
    rows in turn see the same.
    """

    count: int
    length: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rows: Tensor | None = None

    def store(self, layer: int, rows: Tensor | slice, places: slice, key: Tensor, value: Tensor) -> None:
        """Store key and value [n, H', T, D] of some rows at some places."""
        for kept, new in ((self.keys, key), (self.values, value)):
            if new.shape[2] == self.length and isinstance(rows, slice):
                kept.append(new)  # all of the part: taken as it is
                continue
            if len(kept) == layer:
                kept.append(new.new_zeros(self.count, new.shape[1], self.length, new.shape[3]))
            kept[layer][rows, :, places] = new

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.keys, self.values, strict=True))

    def grow(self, length: int) -> None:
        """Add empty places until there are `length`; nothing is done where there are as many."""
        more = length - self.length
        if more <= 0:
            return
        for kept in (self.keys, self.values):
            kept[:] = [functional.pad(states, (0, 0, 0, more)) for states in kept]
        self.length = length

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values."""
        key, value = self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
        if self.rows is not None:
            key, value = key.index_select(0, self.rows), value.index_select(0, self.rows)
        return key, value

    def copy(self, other: "CachePart", rows: Tensor, here: slice, there: slice) -> None:
        """Store what these of another part's n have at some places."""
        for kept, others in ((self.keys, other.keys), (self.values, other.values)):
            for states, new in zip(kept, others, strict=True):
                states[:, :, here] = new[:, :, there].index_select(0, rows)

    def seen_by(self, rows: Tensor, length: int) -> "CachePart":
        """Return this part, cut to a length, as a pass sees it whose rows belong to these of the n."""
        return CachePart(self.count, length, self.keys, self.values, rows)


class Enough(Exception):
    """Raised when a pass has brought the keys and values it was made for; no error."""


@dataclass(eq=False)
class CachedAttention:
    """One pass through the layers: where its new keys and values go, and what its tokens see.

    They see the `earlier` parts and then their own: of the pass alone, or, where `written`, all that the part `into`
    has. queries [R, T] and keys [R, L]: positions of the new tokens and of all that may be seen; blanks are NOWHERE.
    enough_at: the layer with whose keys and values the pass may end, None if its states are wanted. found: the rules
    that this pass's layers came with.
    """

    into: CachePart
    rows: Tensor | slice
    place: int
    earlier: list[CachePart]
    queries: Tensor
    keys: Tensor
    rules: Rules
    written: bool = False
    enough_at: int | None = None
    layer: int = 0
    found: list[Sees | None] = field(default_factory=list)
    masks: dict[Sees | None, Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Keep a layer's keys and values and return its attention [R, H, T, D]."""
        layer, self.layer = self.layer, self.layer + 1
        self.into.store(layer, self.rows, slice(self.place, self.place + key.shape[2]), key, value)
        if layer == self.enough_at:
            raise Enough
        seen = [part.read(layer) for part in self.earlier]
        seen.append(self.into.read(layer) if self.written else (key, value))
        mask = self.mask(None if self.rules is None else self.rules[layer], query.dtype)
        return _attention(query, seen, scale=scale, softcap=softcap, mask=mask)

    def mask(self, rule: Sees | None, dtype: torch.dtype) -> Tensor:
        """Return [R, 1, T, L]: 0 where a token is seen, minus infinity where it is hidden."""
        if rule not in self.masks:
            queries, keys = self.queries[:, :, None], self.keys[:, None, :]
            hidden = keys > queries
            if rule is not None:
                none = keys.new_zeros(())
                hidden |= ~rule(none, none, queries, keys)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[rule] = mask.masked_fill_(hidden, float("-inf"))[:, None]
        return self.masks[rule]


def _attention(
    query: Tensor, seen: Sequence[tuple[Tensor, Tensor]], *, scale: float, softcap: float | None, mask: Tensor
) -> Tensor:
    """Attention [R, H, T, D] over all parts together; query [R, H, T, D], each part [n, H', L, D], mask [R, 1, T, L].

    R / n rows in turn share a row of a part, H / H' heads in turn a head. Scores are capped to c tanh(s / c).
    """
    lengths = [key.shape[2] for key, _ in seen]
    size = max(1, SCORES // (query.shape[0] * query.shape[1] * sum(lengths)))
    if size < query.shape[2]:
        some = [
            _attention(one, seen, scale=scale, softcap=softcap, mask=own)
            for one, own in zip(torch.split(query, size, dim=2), torch.split(mask, size, dim=2), strict=True)
        ]
        return torch.cat(some, dim=2)
    query = query * scale
    scores = torch.cat([_product(query, key.mT) for key, _ in seen], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores += mask
    weights = torch.softmax(scores, dim=-1)  # in bfloat16 it sums in float32
    shares = zip(torch.split(weights, lengths, dim=-1), seen, strict=True)
    answer, *others = [_product(share, value) for share, (_, value) in shares]
    for other in others:
        answer += other
    return answer


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [R, H, T, x] times right [n, H', x, y], whose rows and heads several of the left share: [R, H, T, y]."""
    rows, heads, tokens, inner = left.shape
    count, groups, _, width = right.shape
    if count == rows:
        return (left.reshape(rows, groups, -1, inner) @ right).view(rows, heads, tokens, width)
    folded = left.reshape(count, rows // count, groups, -1, inner).transpose(1, 2)
    product = folded.reshape(count, groups, -1, inner) @ right
    return product.view(count, groups, rows // count, -1, width).transpose(1, 2).reshape(rows, heads, tokens, width)


_current: CachedAttention | None = None


@contextmanager
def attending(model: PreTrainedModel, attention: CachedAttention) -> Iterator[None]:
    """Let a model's layers keep and see keys and values of ours."""
    global _current
    config = model.config
    before = config._attn_implementation
    _current = attention
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _current = None


@dataclass(frozen=True)
class _Sight:
    """Stands where a mask would stand: the rule of a layer's mask, None if it sees all that came before."""

    rule: Sees | None


def _sight(*, mask_function: Sees, local_size: int | None = None, use_vmap: bool = False, **others: object) -> _Sight:
    """Take what transformers would build a mask from: windows and chunks come with a `local_size`."""
    if use_vmap:  # the model adds a pattern of its own
        raise UnsupportedAttention("attention with a mask of the model's own")
    return _Sight(None if local_size is None else mask_function)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Sight | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention of one layer in a turn. query [R, H, T, D], key and value [R, H', T, D]; returns [R, T, H, D]."""
    assert _current is not None, "kept attention outside of a turn"
    check_call(others)
    if not isinstance(attention_mask, _Sight):
        raise UnsupportedAttention("attention that has its mask from elsewhere")
    _current.found.append(attention_mask.rule)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _current.attend(query, key, value, scale=scale, softcap=softcap).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _sight)
