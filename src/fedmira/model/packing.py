"""Packing: the examples of all clients laid end to end, so that no layer ever works on padding.

A pass sees one sequence of N tokens. Clients lie one after another, those with about as many tokens as a *segment*
that a batched product can view as [clients, tokens, width]; what fills a client up to its segment's size stands as an
example of its own, without label. Only attention needs to know where examples begin: it gathers them by length into
*buckets* [examples, T], runs causal attention there and puts the answers back. Positions restart at every example.

What a layer may see is what its attention mask says: all before it, a sliding window, a chunk. In a packed pass
transformers hands over the rule of that mask instead of the mask (see `Rule`), so a window longer than any text that a
base was tried on is kept too.

A base whose architecture cannot do this (no attention interface, ALiBi, ...) is found by measurement when it is loaded
and gets padded batches instead; see probe.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fedmira.data.batches import Batch

NAME = "fedmira_packed"
SEGMENT_FILL = 0.92  # a segment takes clients with at least this share of its largest one's tokens
BUCKET_FILL = 0.75  # likewise for examples in an attention bucket


@dataclass(frozen=True)
class Segment:
    """Clients first..stop of the pass, each with `tokens` tokens, at start of the sequence.

    real: for each client, which of its tokens are its own and not there to fill the segment.
    """

    first: int
    stop: int
    start: int
    tokens: int
    real: tuple[Tensor | slice, ...]

    def view(self, flat: Tensor) -> Tensor:
        """View this segment's part of [N, width] as [clients, tokens, width]."""
        count = self.stop - self.first
        return flat[self.start : self.start + count * self.tokens].view(count, self.tokens, flat.shape[-1])


@dataclass(frozen=True, eq=False)
class Attention:
    """How attention finds its examples. All buckets together have R rows, padding included.

    buckets: (examples, T) each; index [R]: the token of each row (0 where blank); back [N]: each token's row; blanks:
    rows without token; trivial: one bucket in sequence order, nothing to gather.
    """

    buckets: tuple[tuple[int, int], ...]
    index: Tensor
    back: Tensor
    blanks: Tensor
    trivial: bool


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass through the base. order [S']: the batch's clients that have tokens, in the order of the sequence.

    ids and positions are [1, N] when packed; padded: ids [S*B, T], positions None. where [n]: rows of the flattened
    hidden states that predict targets [n]; owner [n]: their client in the batch; counts [S].
    """

    ids: Tensor
    positions: Tensor | None
    order: Tensor
    segments: tuple[Segment, ...]
    attention: Attention | None
    where: Tensor
    targets: Tensor
    owner: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> "Pass":
        """Move everything but `order` (which indexes rows on the host) to a device."""
        if device.type == "cpu":
            return self
        attention = self.attention
        if attention is not None:
            attention = replace(
                attention,
                index=attention.index.to(device),
                back=attention.back.to(device),
                blanks=attention.blanks.to(device),
            )
        return replace(
            self,
            ids=self.ids.to(device),
            positions=None if self.positions is None else self.positions.to(device),
            attention=attention,
            where=self.where.to(device),
            targets=self.targets.to(device),
            owner=self.owner.to(device),
            counts=self.counts.to(device),
        )


def pack(batch: Batch, *, pad_id: int) -> Pass:
    """Lay a batch end to end."""
    lengths = batch.lengths
    totals = lengths.sum(dim=1)
    longest = int(lengths.max())
    order = torch.argsort(totals, descending=True, stable=True)
    order = order[totals[order] > 0]
    segments = _segments(totals[order].tolist())
    ids: list[Tensor] = []
    predicted: list[Tensor] = []  # per token of the sequence, the label of the next one
    owner: list[Tensor] = []
    spans: list[int] = []  # lengths of the examples in sequence order, fillers included
    for segment in segments:
        for place in range(segment.first, segment.stop):
            client = int(order[place])
            for example, length in enumerate(lengths[client].tolist()):
                if length:
                    ids.append(batch.ids[client, example, :length])
                    predicted.append(batch.labels[client, example, 1:length])
                    predicted.append(torch.full((1,), -100))
                    spans.append(length)
            filler = segment.tokens - int(totals[client])
            if filler:
                ids.append(torch.full((filler,), pad_id))
                predicted.append(torch.full((filler,), -100))
                # In pieces no longer than a real example: for these the base has positions.
                spans += [longest] * (filler // longest) + [filler % longest] * (filler % longest > 0)
            owner.append(torch.full((segment.tokens,), client))
    labels = torch.cat(predicted)
    where = torch.nonzero(labels != -100).squeeze(1)
    owners = torch.cat(owner)[where]
    sizes = torch.tensor(spans)
    starts = torch.cumsum(sizes, 0) - sizes
    positions = torch.arange(len(labels)) - torch.repeat_interleave(starts, sizes)
    return Pass(
        ids=torch.cat(ids)[None],
        positions=positions[None],
        order=order,
        segments=tuple(segments),
        attention=_attention(sizes, starts),
        where=where,
        targets=labels[where],
        owner=owners,
        counts=torch.bincount(owners, minlength=len(totals)),
    )


def pad(batch: Batch) -> Pass:
    """Take a batch as it is, padding included, for bases that cannot be packed."""
    clients, size, length = batch.ids.shape
    labels = torch.full((clients * size, length), -100)
    labels[:, :-1] = batch.labels.view(clients * size, length)[:, 1:]
    labels = labels.flatten()
    where = torch.nonzero(labels != -100).squeeze(1)
    owners = where // (size * length)
    inside = torch.arange(length) < batch.lengths[:, :, None]
    real = tuple(torch.nonzero(own.flatten()).squeeze(1) for own in inside)
    return Pass(
        ids=batch.ids.view(clients * size, length),
        positions=None,
        order=torch.arange(clients),
        segments=(Segment(0, clients, 0, size * length, real),),
        attention=None,
        where=where,
        targets=labels[where],
        owner=owners,
        counts=torch.bincount(owners, minlength=clients),
    )


@contextmanager
def packed_attention(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Let a model's layers attend within the examples of a packed sequence."""
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


_current: Attention | None = None


@dataclass(frozen=True, eq=False)
class Rule:
    """Which tokens the layers of one kind may see, as transformers defines it; stands where a mask would stand.

    sees(batch, head, queries, keys) -> bool, by places in the packed sequence; reach: the length up to which an example
    is plainly causal (a window, a chunk), None for any length; seen: what was worked out before, by bucket.
    """

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    reach: int | None
    seen: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, plan: Attention, bucket: int) -> Tensor | None:
        """Return the mask [T, T] of a bucket's examples, None where it is plainly causal."""
        length = plan.buckets[bucket][1]
        if self.reach is None or length <= self.reach:
            return None
        if bucket not in self.seen:
            first = sum(examples * size for examples, size in plan.buckets[:bucket])
            places = plan.index[first : first + length]  # a bucket's first example is its longest: no row is blank
            none = places.new_zeros(())
            self.seen[bucket] = self.sees(none, none, places[:, None], places[None, :])
        return self.seen[bucket]


def _rule(
    *,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **others: object,
) -> Rule:
    """Take what transformers would build a mask from: windows and chunks come with a `local_size`."""
    if use_vmap:  # the model adds a pattern of its own
        raise NotImplementedError("attention with a mask of the model's own cannot be packed")
    return Rule(mask_function, local_size)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rule | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention inside every example. query [1, H, N, D], key and value [1, H', N, D]; returns [1, N, H, D]."""
    assert _current is not None, "packed attention outside of a packed pass"
    given = {name for name, value in others.items() if name not in _HARMLESS and value is not None}
    if given:
        raise NotImplementedError(f"attention with {sorted(given)} cannot be packed")
    if not isinstance(attention_mask, Rule):
        raise NotImplementedError("attention that has its mask from elsewhere cannot be packed")
    plan = _current
    tokens, heads, width = query.shape[2], query.shape[1], value.shape[-1]
    rows = [states[0].transpose(0, 1).reshape(tokens, -1) for states in (query, key, value)]
    if not plan.trivial:
        rows = [_Gather.apply(states, plan.index, plan.back, None) for states in rows]  # type: ignore[no-untyped-call]
    sizes = [examples * length for examples, length in plan.buckets]
    answers = []
    for number, parts in enumerate(zip(*(torch.split(states, sizes) for states in rows), strict=True)):
        split = [
            part.view(*plan.buckets[number], states.shape[1], -1).transpose(1, 2)
            for part, states in zip(parts, (query, key, value), strict=True)
        ]
        answers.append(_bucket(*split, scaling=scaling, mask=attention_mask.mask(plan, number), softcap=softcap))
    joined = answers[0] if len(answers) == 1 else torch.cat(answers)
    if not plan.trivial:
        joined = _Gather.apply(joined, plan.back, plan.index, plan.blanks)  # type: ignore[no-untyped-call]
    return joined.view(1, tokens, heads, width), None


# What layers hand to every attention function and causal attention without cache does not need. The window among it
# is for attention functions that are given no mask; as in transformers' own sdpa and eager attention the mask has it.
_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "sliding_window"}
)


def _bucket(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, mask: Tensor | None, softcap: float | None
) -> Tensor:
    """Attention of one bucket, query [E, H, T, D], mask [T, T] or None for causal; returns rows [E * T, H * D]."""
    length = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None:
        answer = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    else:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril() if mask is None else mask
        scores = softcap * torch.tanh(query @ key.mT * scale / softcap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        answer = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype) @ value
    return answer.transpose(1, 2).reshape(query.shape[0] * length, -1)


class _Gather(torch.autograd.Function):
    """Rows x[index]; because every row that matters is taken once, its gradient is a gather too and not a scatter.

    back: for each row of x, where it went; blanks: rows of x that nothing was taken from, whose gradient is 0.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor, index: Tensor, back: Tensor, blanks: Tensor | None) -> Tensor:
        ctx.back, ctx.blanks = back, blanks  # type: ignore[attr-defined]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = grads[0].index_select(0, ctx.back)  # type: ignore[attr-defined]
        if ctx.blanks is not None:  # type: ignore[attr-defined]
            gradient.index_fill_(0, ctx.blanks, 0)  # type: ignore[attr-defined]
        return gradient, None, None, None


def _segments(totals: list[int]) -> list[Segment]:
    """Group clients, in descending order of their tokens, into segments that are filled well."""
    segments: list[Segment] = []
    first = start = 0
    while first < len(totals):
        stop = first + 1
        while stop < len(totals) and totals[stop] >= SEGMENT_FILL * totals[first]:
            stop += 1
        real = tuple(slice(0, total) for total in totals[first:stop])
        segments.append(Segment(first, stop, start, totals[first], real))
        start += (stop - first) * totals[first]
        first = stop
    return segments


def _attention(sizes: Tensor, starts: Tensor) -> Attention:
    """Deal examples of the sequence (their sizes and starts) into buckets of similar length."""
    order = torch.argsort(sizes, descending=True, stable=True).tolist()
    lengths = sizes.tolist()
    buckets: list[tuple[int, int]] = []
    index: list[Tensor] = []
    real: list[Tensor] = []
    first = 0
    while first < len(order):
        longest = lengths[order[first]]
        stop = first + 1
        while stop < len(order) and lengths[order[stop]] >= BUCKET_FILL * longest:
            stop += 1
        chosen = torch.tensor(order[first:stop])
        steps = torch.arange(longest)
        inside = steps[None, :] < sizes[chosen][:, None]
        index.append(((starts[chosen][:, None] + steps) * inside).flatten())
        real.append(inside.flatten())
        buckets.append((stop - first, longest))
        first = stop
    rows, is_real = torch.cat(index), torch.cat(real)
    back = torch.empty(int(sizes.sum()), dtype=torch.int64)
    back[rows[is_real]] = torch.nonzero(is_real).squeeze(1)
    trivial = len(buckets) == 1 and torch.equal(rows, torch.arange(len(back)))
    return Attention(tuple(buckets), rows, back, torch.nonzero(~is_real).squeeze(1), trivial)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _rule)
