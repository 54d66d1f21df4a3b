"""Attention on a CPU: the packed sequence in spans, each a few batched products over heads.

The sequence is cut at examples into groups, short examples together; products read queries, keys and values where
they lie. A long span is taken a block of queries at a time, so that what causality forbids is mostly not computed.
Examples that share their start come in fans instead (fans.py); the start itself is an example here.

On two cores with bfloat16 products this takes less than half of the time of torch's fused CPU kernel, whose products
are not made by the matrix units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmira.model.packed.fans import Fan, Suffix, Sums, attend, make_fans, push_back
from fedmira.model.seam import Rule

SPAN = 128  # tokens up to which short examples share a span
BLOCK = 128  # queries taken together in spans of more than twice as many
STEP = 32  # sizes are multiples of it where they can be: products of a new size have to be set up first
SAVED_KEYS = (
    512  # keys of a block or fan up to which its probabilities are kept for the backward pass; beyond, made again
)


@dataclass(frozen=True, eq=False)
class Block:
    """Queries start..stop of the sequence against keys first..stop; bias [stop - start, stop - first]: 0 or -inf.

    The first `padding` queries belong to the span before: they make the number of rows a multiple of STEP, see nothing
    and give 0, and what is written in their place is written again when that span has its turn, which comes later.
    """

    first: int
    start: int
    stop: int
    padding: int
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Spans:
    """The sequence in groups of whole examples, and those that share a start. example [N]: that of each token.

    bounds: the tokens of every span; asked: of these, from the first with a label to the last, none where none has
    one. suffixes: examples that share a start; labelled: those of them with a label, from the first to the last.
    """

    bounds: tuple[tuple[int, int], ...]
    example: Tensor
    longest: int  # tokens of the longest example
    needed: tuple[tuple[int, int], ...]
    suffixes: tuple[Suffix, ...] = ()
    labelled_suffixes: tuple[Suffix, ...] = ()
    block_memo: dict[object, tuple[tuple[Block, ...], ...]] = field(default_factory=dict)
    fan_memo: dict[bool, tuple[Fan, ...]] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Spans":
        return (
            self if device.type == "cpu" else replace(self, example=self.example.to(device), block_memo={}, fan_memo={})
        )

    def fans(self, *, labelled: bool = False) -> tuple[Fan, ...]:
        """Return the examples that share a start, of them those with a label, in fans; dealt once for a pass."""
        if labelled not in self.fan_memo:
            self.fan_memo[labelled] = make_fans(self.labelled_suffixes if labelled else self.suffixes)
        return self.fan_memo[labelled]

    def blocks(self, rule: Rule, dtype: torch.dtype, *, labelled: bool = False) -> tuple[tuple[Block, ...], ...]:
        """Return the blocks of every span for layers of this rule; worked out once for a pass.

        labelled: only queries from a span's first label to its last.
        """
        plain = rule.reach is None or self.longest <= rule.reach
        key = (None if plain else rule, dtype, labelled)
        if key not in self.block_memo:
            wanted = self.needed if labelled else self.bounds
            self.block_memo[key] = tuple(
                self._cut(*span, *some, None if plain else rule, dtype)
                for span, some in reversed(list(zip(self.bounds, wanted, strict=True)))
                if some[1] > some[0]
            )
        return self.block_memo[key]

    def _cut(
        self, first: int, stop: int, begin: int, end: int, rule: Rule | None, dtype: torch.dtype
    ) -> tuple[Block, ...]:
        """Cut queries begin..end of the span first..stop into blocks, the last one first."""
        places = torch.arange(first, stop, device=self.example.device)
        own = self.example[first:stop]
        sees = (own[:, None] == own[None, :]) & (places[:, None] >= places[None, :])
        if rule is not None:
            sees &= rule.mask(places, places)
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
            masked = torch.ones(until - rows, until - keys, dtype=torch.bool, device=seen.device)
            inside = max(keys, first)
            masked[start - rows :, inside - keys :] = ~seen[:, inside - first :]
            masked[: start - rows] = False  # any number will do there that is one
            bias = torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf)
            blocks.append(Block(keys, rows, until, start - rows, bias))
        return tuple(reversed(blocks))


def make_spans(groups: Sequence[tuple[int, ...]], labelled: Tensor, *, longest: int) -> Spans:
    """Cut a sequence into spans.

    groups: (tokens shared, rest of each example that shares them), in order; labelled [n]: tokens that predict a label,
    ascending; longest: tokens of the longest example, its shared ones included.
    """
    bounds: list[tuple[int, int]] = []
    suffixes: list[Suffix] = []
    place = 0
    for shared, *suffix_sizes in groups:
        begin = place
        for size in (shared,) if shared else suffix_sizes:
            if bounds and bounds[-1][1] == place and place + size - bounds[-1][0] <= SPAN:
                bounds[-1] = (bounds[-1][0], place + size)
            else:
                bounds.append((place, place + size))
            place += size
        for size in suffix_sizes if shared else ():
            suffixes.append(Suffix(place, place + size, begin, shared, place))
            place += size
    sizes = torch.tensor([size for group in groups for size in group])
    labels = _labelled_bounds([(one.first, one.stop) for one in suffixes], labelled)
    return Spans(
        bounds=tuple(bounds),
        example=torch.repeat_interleave(torch.arange(len(sizes)), sizes),
        longest=longest,
        needed=tuple(_labelled_bounds(bounds, labelled)),
        suffixes=tuple(suffixes),
        labelled_suffixes=tuple(
            replace(one, needed=a, stop=b) for one, (a, b) in zip(suffixes, labels, strict=True) if b > a
        ),
    )


def _labelled_bounds(bounds: Sequence[tuple[int, int]], labelled: Tensor) -> list[tuple[int, int]]:
    """Return the first token with a label and the end of the last one within each of these bounds."""
    ends = torch.searchsorted(labelled, torch.tensor(bounds, dtype=torch.int64).view(-1, 2)).tolist()
    return [(int(labelled[a]), int(labelled[b - 1]) + 1) if b > a else (0, 0) for a, b in ends]


def attend_in_spans(
    plan: Spans,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    *,
    labelled: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attend span by span. query [1, H, N, D], key and value [1, H', N, D]; returns [1, N, H, D].

    labelled: only for queries from a span's first label to its last; the others' answers are 0.
    """
    spans, fans = plan.blocks(rule, query.dtype, labelled=labelled), plan.fans(labelled=labelled)
    answer: Tensor = _SpanAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, spans, fans, labelled, scale, softcap
    )
    return answer


class _SpanAttention(torch.autograd.Function):
    """Attention span by span, block by block; probabilities of short spans are kept, of long ones made again."""

    @staticmethod
    def forward(
        ctx: object,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: tuple[tuple[Block, ...], ...],
        fans: tuple[Fan, ...],
        some: bool,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        q, k, v = query[0], key[0], value[0]
        out = _new_states(q.shape[0], v, some)  # of tokens that nobody asks for, answers and gradients are 0
        kept: list[Tensor] = []
        keep = any(ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        for block in (block for blocks in spans for block in blocks):
            probabilities = _probabilities(q, k, block, scale, cap)
            _product(probabilities, v[:, block.first : block.stop], into=out[:, block.start : block.stop])
            if keep and _is_saved(block, cap):
                kept.append(probabilities)
        for fan in fans:  # after the spans, whose blanks may lie here
            probabilities = attend(fan, (q, k, v), into=out, scale=scale, cap=cap)
            if keep and fan.keys.index.shape[1] <= SAVED_KEYS:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)  # type: ignore[attr-defined]
        ctx.spans, ctx.fans, ctx.some = spans, fans, some  # type: ignore[attr-defined]
        ctx.scale, ctx.cap = scale, cap  # type: ignore[attr-defined]
        return out.transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        scale, cap = ctx.scale, ctx.cap  # type: ignore[attr-defined]
        q, k, v, push = query[0], key[0], value[0], grads[0][0].transpose(0, 1)
        dq, dk, dv = (_new_states(len(states), states, ctx.some) for states in (q, k, v))  # type: ignore[attr-defined]
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
                probabilities = next(stored) if _is_saved(block, cap) else _probabilities(q, k, block, scale, cap)
                asked = _fold(push[:, block.start : block.stop], len(k))
                back = torch._softmax_backward_data(
                    torch.bmm(asked, v[:, keys].mT), probabilities, -1, probabilities.dtype
                )
                if cap is not None:
                    back *= 1 - torch.tanh(_scores(q, k, block, scale) / cap).square()
                queries = _fold(q[:, block.start : block.stop], len(k))
                _product(back, k[:, keys], into=dq[:, block.start : block.stop])
                if sums is None:
                    torch.bmm(back.mT, queries, out=dk[:, keys])
                    torch.bmm(probabilities.mT, asked, out=dv[:, keys])
                else:
                    there = slice(block.first - first, block.stop - first)
                    sums[0][:, there] += torch.bmm(back.mT, queries)
                    sums[1][:, there] += torch.bmm(probabilities.mT, asked)
            if sums is not None:
                dk[:, first:stop], dv[:, first:stop] = sums
        prefix_sums: tuple[Sums, Sums] = ({}, {})
        for fan in ctx.fans:  # type: ignore[attr-defined]
            probabilities = next(stored) if fan.keys.index.shape[1] <= SAVED_KEYS else None
            push_back(
                fan, (q, k, v), push, probabilities, into=(dq, dk, dv), prefix_sums=prefix_sums, scale=scale, cap=cap
            )
        for gradient, totals in zip((dk, dv), prefix_sums, strict=True):
            for begin, total in totals.items():
                gradient[:, begin : begin + total.shape[1]] += total
        return dq.mul_(scale)[None], dk.mul_(scale)[None], dv[None], None, None, None, None, None


def _is_saved(block: Block, cap: float | None) -> bool:
    return cap is None and block.stop - block.first <= SAVED_KEYS


def _scores(q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    """Return scale q k^T of a block [H', G * queries, keys]: G query heads share a key head."""
    queries = _fold(q[:, block.start : block.stop], len(k))
    return torch.bmm(queries, k[:, block.first : block.stop].mT).mul_(scale)


def _probabilities(q: Tensor, k: Tensor, block: Block, scale: float, cap: float | None) -> Tensor:
    """Return the softmax of a block's scores [H', G * queries, keys], 0 for blank queries."""
    groups = len(q) // len(k)
    bias = block.bias if groups == 1 else block.bias.repeat(groups, 1)
    if cap is None:
        queries = _fold(q[:, block.start : block.stop], len(k))
        scores = torch.baddbmm(bias, queries, k[:, block.first : block.stop].mT, alpha=scale)
    else:
        scores = torch.tanh(_scores(q, k, block, scale).div_(cap)).mul_(cap).add_(bias)
    probabilities = torch.softmax(scores, -1)
    if block.padding:
        probabilities.view(len(k), groups, len(block.bias), -1)[:, :, : block.padding] = 0
    return probabilities


def _fold(states: Tensor, heads: int) -> Tensor:
    """View [H, T, D] as [H', G * T, D], the query heads of one key head one after another."""
    return states if len(states) == heads else states.reshape(heads, -1, states.shape[-1])


def _product(probabilities: Tensor, states: Tensor, *, into: Tensor) -> None:
    """Write probabilities [H', G * T, keys] x states [H', keys, D] to [H, T, D]."""
    if len(probabilities) == len(into):
        torch.bmm(probabilities, states, out=into)
    else:
        into.copy_(torch.bmm(probabilities, states).view(into.shape))


def _new_states(heads: int, like: Tensor, blank: bool) -> Tensor:
    """Return new states [heads, N, D], their memory as [N, heads, D] like that of the layers around; 0 if `blank`."""
    shape = (like.shape[1], heads, like.shape[2])
    return (like.new_zeros(shape) if blank else like.new_empty(shape)).transpose(0, 1)
