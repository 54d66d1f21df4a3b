"""Attention within the examples of a packed sequence, by two roads: spans on a CPU, buckets where attention is fused.

    s_ij = scale q_i k_j  (c tanh(s / c) with a cap c);   o_i = sum_j softmax_j(s_i + bias_i)_j v_j

over the j that i may see: all before it in its own example, or what the mask of a sliding window or a chunk allows.

*Spans*, for CPUs: the sequence is cut at examples into stretches, short examples together, and each is a few batched
products over heads that read queries, keys and values where they lie; a long one is taken a block of queries at a time,
so that what causality forbids is mostly not computed. On two cores with bfloat16 products this takes less than half of
the time of torch's fused CPU kernel, whose products are not made by the matrix units.

*Buckets*, for accelerators: examples are gathered by length into [examples, T] and handed to fused attention.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "fedmira_packed"
BUCKET_FILL = 0.75  # a bucket takes examples with at least this share of its longest one's tokens
SPAN = 128  # tokens up to which short examples share a span
BLOCK = 128  # queries taken together in spans of more than twice as many
STEP = 32  # sizes are multiples of it where they can be: products of a new size have to be set up first
KEPT = 512  # tokens of a span up to which its probabilities are kept for the backward pass; beyond, made again


# What layers hand to every attention function and causal attention does not need. The window among it is for attention
# functions that are given no mask; as in transformers' own sdpa and eager attention the mask has it.
HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "sliding_window"}
)


class Unfit(Exception):
    """Layers attend in a way that a pass of ours cannot follow; whoever tries them out takes another road."""


def check_call(others: Mapping[str, object]) -> None:
    """Raise Unfit if a layer hands its attention anything that would have to be taken into account."""
    given = {name for name, value in others.items() if name not in HARMLESS and value is not None}
    if given:
        raise Unfit(f"attention with {sorted(given)}")


@dataclass(frozen=True, eq=False)
class Rule:
    """Which tokens the layers of one kind may see, as transformers defines it; stands where a mask would stand.

    sees(batch, head, queries, keys) -> bool, by places in the packed sequence; reach: the length up to which an example
    is plainly causal (a window, a chunk), None for any length.
    """

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    reach: int | None

    def mask(self, places: Tensor) -> Tensor:
        """Return which of these places [T] see which [T, T]."""
        none = places.new_zeros(())
        return self.sees(none, none, places[:, None], places[None, :])


@dataclass(frozen=True, eq=False)
class Block:
    """Queries start..stop of the sequence against keys first..stop; bias [stop - start, stop - first]: 0 or -inf.

    The first `blank` queries belong to the stretch before: they make the number of rows a multiple of STEP, see nothing
    and give 0, and what is written in their place is written again when that stretch has its turn, which comes later.
    """

    first: int
    start: int
    stop: int
    blank: int
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Spans:
    """The sequence in stretches of whole examples. bounds: their ends; example [N]: the example of each token.

    group [N]: examples of one group see its tokens that are `shared` [N] besides their own.
    asked: for each stretch, the first token with a label and the end of the last one; equal where none has.
    """

    bounds: tuple[int, ...]
    example: Tensor
    group: Tensor
    shared: Tensor
    longest: int  # tokens of the longest example
    asked: tuple[tuple[int, int], ...]
    made: dict[object, tuple[tuple[Block, ...], ...]] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Spans":
        return (
            self
            if device.type == "cpu"
            else replace(
                self,
                example=self.example.to(device),
                group=self.group.to(device),
                shared=self.shared.to(device),
                made={},
            )
        )

    def blocks(self, rule: Rule, dtype: torch.dtype, *, labelled: bool = False) -> tuple[tuple[Block, ...], ...]:
        """Return the blocks of every span for layers of this rule; worked out once for a pass.

        labelled: only queries from a span's first label to its last.
        """
        plain = rule.reach is None or self.longest <= rule.reach
        key = (None if plain else rule, dtype, labelled)
        if key not in self.made:
            spans = list(zip((0, *self.bounds[:-1]), self.bounds, strict=True))
            wanted = self.asked if labelled else spans
            self.made[key] = tuple(
                self._cut(*span, *some, None if plain else rule, dtype)
                for span, some in reversed(list(zip(spans, wanted, strict=True)))
                if some[1] > some[0]
            )
        return self.made[key]

    def _cut(
        self, first: int, stop: int, begin: int, end: int, rule: Rule | None, dtype: torch.dtype
    ) -> tuple[Block, ...]:
        """Cut queries begin..end of the span first..stop into blocks, the last one first."""
        places = torch.arange(first, stop, device=self.example.device)
        own, group, shared = (part[first:stop] for part in (self.example, self.group, self.shared))
        sees = (own[:, None] == own[None, :]) | ((group[:, None] == group[None, :]) & shared[None, :])
        sees &= places[:, None] >= places[None, :]
        if rule is not None:
            sees &= rule.mask(places)
        step = end - begin if end - begin <= 2 * BLOCK else BLOCK
        blocks = []
        for start in range(begin, end, step):
            until = min(start + step, end)
            seen = sees[start - first : until - first, : until - first]
            left = first + int(seen.any(0).int().argmax())  # the first key that any of them sees
            rows = start - (start - until) % STEP
            keys = min(left - (left - until) % STEP, rows)
            if keys < 0:  # nothing before it to fill up with
                rows, keys = start, left
            hidden = torch.ones(until - rows, until - keys, dtype=torch.bool, device=seen.device)
            inside = max(keys, first)
            hidden[start - rows :, inside - keys :] = ~seen[:, inside - first :]
            hidden[: start - rows] = False  # any number will do there that is one
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            blocks.append(Block(keys, rows, until, start - rows, bias))
        return tuple(reversed(blocks))


@dataclass(frozen=True, eq=False)
class Buckets:
    """How attention finds its examples. All buckets together have R rows, padding included.

    shapes: (examples, T) each; index [R]: the token of each row (0 where blank); back [N]: each token's row; blanks:
    rows without token; trivial: one bucket in sequence order, nothing to gather.
    """

    shapes: tuple[tuple[int, int], ...]
    index: Tensor
    back: Tensor
    blanks: Tensor
    trivial: bool
    masks: dict[tuple[Rule, int], Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Buckets":
        if device.type == "cpu":
            return self
        index, back, blanks = (part.to(device) for part in (self.index, self.back, self.blanks))
        return replace(self, index=index, back=back, blanks=blanks, masks={})

    def mask(self, rule: Rule, bucket: int) -> Tensor | None:
        """Return the mask [T, T] of a bucket's examples, None where it is plainly causal."""
        length = self.shapes[bucket][1]
        if rule.reach is None or length <= rule.reach:
            return None
        if (rule, bucket) not in self.masks:
            first = sum(examples * size for examples, size in self.shapes[:bucket])
            places = self.index[first : first + length]  # a bucket's first example is its longest: no row is blank
            self.masks[rule, bucket] = rule.mask(places)
        return self.masks[rule, bucket]


Attention = Spans | Buckets


def make_spans(stretches: Sequence[tuple[int, ...]], where: Tensor, *, longest: int) -> Spans:
    """Cut a sequence into spans.

    stretches: (tokens shared, rest of each example that shares them), in order; where [n]: tokens that predict a label,
    ascending; longest: tokens of the longest example, its shared ones included.
    """
    bounds: list[int] = []
    first = end = 0
    for stretch in stretches:
        size = sum(stretch)
        if end > first and end + size - first > SPAN:
            bounds.append(end)
            first = end
        end += size
    bounds.append(end)
    ends = torch.searchsorted(where, torch.tensor([0, *bounds])).tolist()
    asked = tuple((int(where[a]), int(where[b - 1]) + 1) if b > a else (0, 0) for a, b in pairwise(ends))
    parts = torch.tensor([part for stretch in stretches for part in stretch])
    group = torch.tensor([number for number, stretch in enumerate(stretches) for _ in stretch])
    shared = torch.tensor([place == 0 for stretch in stretches for place in range(len(stretch))])
    example = torch.arange(len(parts))
    return Spans(
        bounds=tuple(bounds),
        example=torch.repeat_interleave(example, parts),
        group=torch.repeat_interleave(group, parts),
        shared=torch.repeat_interleave(shared, parts),
        longest=longest,
        asked=asked,
    )


def make_buckets(sizes: Tensor, starts: Tensor) -> Buckets:
    """Deal examples of the sequence (their sizes and starts) into buckets of similar length."""
    order = torch.argsort(sizes, descending=True, stable=True).tolist()
    lengths = sizes.tolist()
    shapes: list[tuple[int, int]] = []
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
        shapes.append((stop - first, longest))
        first = stop
    rows, is_real = torch.cat(index), torch.cat(real)
    back = torch.empty(int(sizes.sum()), dtype=torch.int64)
    back[rows[is_real]] = torch.nonzero(is_real).squeeze(1)
    trivial = len(shapes) == 1 and torch.equal(rows, torch.arange(len(back)))
    return Buckets(tuple(shapes), rows, back, torch.nonzero(~is_real).squeeze(1), trivial)


@dataclass(eq=False)
class Turn:
    """One packed pass. last: the module whose queries are only asked for at labels.

    callers: modules that attended; reaches: of the windows and chunks that they came with. kept: where the keys and
    values of every layer [1, H', N, D] are wanted, in turn.
    """

    attention: Attention
    last: nn.Module | None
    kept: list[tuple[Tensor, Tensor]] | None = None
    callers: list[nn.Module] = field(default_factory=list)
    reaches: set[int] = field(default_factory=set)


@contextmanager
def packed_attention(
    model: PreTrainedModel,
    attention: Attention,
    *,
    last: nn.Module | None = None,
    kept: list[tuple[Tensor, Tensor]] | None = None,
) -> Iterator[Turn]:
    """Let a model's layers attend within the examples of a packed sequence; `last` computes what labels need alone."""
    global _current
    config = model.config
    before = config._attn_implementation
    _current = Turn(attention, last, kept)
    config._attn_implementation = NAME
    try:
        yield _current
    finally:
        config._attn_implementation = before
        _current = None


_current: Turn | None = None


def _rule(
    *,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **others: object,
) -> Rule:
    """Take what transformers would build a mask from: windows and chunks come with a `local_size`."""
    if use_vmap:  # the model adds a pattern of its own
        raise Unfit("attention with a mask of the model's own")
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
    check_call(others)
    if not isinstance(attention_mask, Rule):
        raise Unfit("attention that has its mask from elsewhere")
    _current.callers.append(module)
    if attention_mask.reach is not None:
        _current.reaches.add(attention_mask.reach)
    if _current.kept is not None:
        _current.kept.append((key, value))
    plan = _current.attention
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(plan, Buckets):
        return _in_buckets(plan, query, key, value, attention_mask, scale=scale, softcap=softcap), None
    labelled = module is _current.last
    spans = plan.blocks(attention_mask, query.dtype, labelled=labelled)
    return _Spans.apply(query, key, value, spans, labelled, scale, softcap), None  # type: ignore[no-untyped-call]


class _Spans(torch.autograd.Function):
    """Attention span by span, block by block; probabilities of short spans are kept, of long ones made again."""

    @staticmethod
    def forward(
        ctx: object,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: tuple[tuple[Block, ...], ...],
        some: bool,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        q, k, v = query[0], key[0], value[0]
        out = _states(q.shape[0], v, some)  # of tokens that nobody asks for, answers and gradients are 0
        kept: list[Tensor] = []
        keep = any(ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        for block in (block for blocks in spans for block in blocks):
            chances = _chances(q, k, block, scale, cap)
            _product(chances, v[:, block.first : block.stop], into=out[:, block.start : block.stop])
            if keep and _is_kept(block, cap):
                kept.append(chances)
        ctx.save_for_backward(query, key, value, *kept)  # type: ignore[attr-defined]
        ctx.spans, ctx.scale, ctx.cap, ctx.some = spans, scale, cap, some  # type: ignore[attr-defined]
        return out.transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        scale, cap = ctx.scale, ctx.cap  # type: ignore[attr-defined]
        q, k, v, push = query[0], key[0], value[0], grads[0][0].transpose(0, 1)
        dq, dk, dv = (_states(len(states), states, ctx.some) for states in (q, k, v))  # type: ignore[attr-defined]
        stored = iter(kept)
        for blocks in ctx.spans:  # type: ignore[attr-defined]
            first, stop = min(block.first for block in blocks), blocks[0].stop
            wide = torch.promote_types(k.dtype, torch.float32)  # several blocks add up to the gradient of one key
            sums = (
                None
                if len(blocks) == 1
                else [x.new_zeros(len(x), stop - first, x.shape[2], dtype=wide) for x in (k, v)]
            )
            for block in blocks:
                keys = slice(block.first, block.stop)
                chances = next(stored) if _is_kept(block, cap) else _chances(q, k, block, scale, cap)
                asked = _fold(push[:, block.start : block.stop], len(k))
                back = torch._softmax_backward_data(torch.bmm(asked, v[:, keys].mT), chances, -1, chances.dtype)
                if cap is not None:
                    back *= 1 - torch.tanh(_scores(q, k, block, scale) / cap).square()
                queries = _fold(q[:, block.start : block.stop], len(k))
                _product(back, k[:, keys], into=dq[:, block.start : block.stop])
                if sums is None:
                    torch.bmm(back.mT, queries, out=dk[:, keys])
                    torch.bmm(chances.mT, asked, out=dv[:, keys])
                else:
                    there = slice(block.first - first, block.stop - first)
                    sums[0][:, there] += torch.bmm(back.mT, queries)
                    sums[1][:, there] += torch.bmm(chances.mT, asked)
            if sums is not None:
                dk[:, first:stop], dv[:, first:stop] = sums
        return dq.mul_(scale)[None], dk.mul_(scale)[None], dv[None], None, None, None, None


def _is_kept(block: Block, cap: float | None) -> bool:
    return cap is None and block.stop - block.first <= KEPT


def _scores(q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    """Return scale q k^T of a block [H', G * queries, keys]: G query heads share a key head."""
    queries = _fold(q[:, block.start : block.stop], len(k))
    return torch.bmm(queries, k[:, block.first : block.stop].mT).mul_(scale)


def _chances(q: Tensor, k: Tensor, block: Block, scale: float, cap: float | None) -> Tensor:
    """Return the softmax of a block's scores [H', G * queries, keys], 0 for blank queries."""
    groups = len(q) // len(k)
    bias = block.bias if groups == 1 else block.bias.repeat(groups, 1)
    if cap is None:
        queries = _fold(q[:, block.start : block.stop], len(k))
        scores = torch.baddbmm(bias, queries, k[:, block.first : block.stop].mT, alpha=scale)
    else:
        scores = torch.tanh(_scores(q, k, block, scale).div_(cap)).mul_(cap).add_(bias)
    chances = torch.softmax(scores, -1)
    if block.blank:
        chances.view(len(k), groups, len(block.bias), -1)[:, :, : block.blank] = 0
    return chances


def _fold(states: Tensor, heads: int) -> Tensor:
    """View [H, T, D] as [H', G * T, D], the query heads of one key head one after another."""
    return states if len(states) == heads else states.reshape(heads, -1, states.shape[-1])


def _product(chances: Tensor, states: Tensor, *, into: Tensor) -> None:
    """Write chances [H', G * T, keys] x states [H', keys, D] to [H, T, D]."""
    if len(chances) == len(into):
        torch.bmm(chances, states, out=into)
    else:
        into.copy_(torch.bmm(chances, states).view(into.shape))


def _states(heads: int, like: Tensor, blank: bool) -> Tensor:
    """Return new states [heads, N, D], their memory as [N, heads, D] like that of the layers around; 0 if `blank`."""
    shape = (like.shape[1], heads, like.shape[2])
    return (like.new_zeros(shape) if blank else like.new_empty(shape)).transpose(0, 1)


def _in_buckets(
    plan: Buckets, query: Tensor, key: Tensor, value: Tensor, rule: Rule, *, scale: float, softcap: float | None
) -> Tensor:
    """Gather, attend in every bucket, put back. Shapes as in _attend."""
    tokens, heads, width = query.shape[2], query.shape[1], value.shape[-1]
    rows = [states[0].transpose(0, 1).reshape(tokens, -1) for states in (query, key, value)]
    if not plan.trivial:
        rows = [_Gather.apply(states, plan.index, plan.back, None) for states in rows]  # type: ignore[no-untyped-call]
    sizes = [examples * length for examples, length in plan.shapes]
    answers = []
    for number, parts in enumerate(zip(*(torch.split(states, sizes) for states in rows), strict=True)):
        split = [
            part.view(*plan.shapes[number], states.shape[1], -1).transpose(1, 2)
            for part, states in zip(parts, (query, key, value), strict=True)
        ]
        answers.append(_bucket(*split, scale=scale, mask=plan.mask(rule, number), softcap=softcap))
    joined = answers[0] if len(answers) == 1 else torch.cat(answers)
    if not plan.trivial:
        joined = _Gather.apply(joined, plan.back, plan.index, plan.blanks)  # type: ignore[no-untyped-call]
    return joined.view(1, tokens, heads, width)


def _bucket(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None, softcap: float | None
) -> Tensor:
    """Attention of one bucket, query [E, H, T, D], mask [T, T] or None for causal; returns rows [E * T, H * D]."""
    length = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
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


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _rule)
