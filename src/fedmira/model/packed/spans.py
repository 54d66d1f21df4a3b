"""Attention on a CPU: the packed sequence in spans, each a few batched products over heads.

The sequence is cut at examples into spans, short examples together; products read queries, keys and values where they
are. A long span is taken one block of queries at a time, so that most of what causality forbids is not computed.
Suffixes come in fans instead (fans.py); their prefix is an example here.

On two cores with bfloat16 products this takes less than half of the time of torch's fused CPU kernel, whose products
do not use the matrix units.
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
SAVED_KEYS = 512  # blocks and fans with more keys recompute their probabilities in the backward pass

Bounds = tuple[int, int]  # first token, and the one behind the last


@dataclass(frozen=True, eq=False)
class Block:
    """Queries start..stop of the sequence against keys first..stop; bias [stop - start, stop - first]: 0 or -inf.

    The first `padding` queries belong to the span before: they make the number of queries a multiple of STEP, see
    nothing and give 0. What they write is overwritten when that span is computed, which comes later.
    """

    first: int
    start: int
    stop: int
    padding: int
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Spans:
    """The sequence in spans of whole examples, and the suffixes of its prefixes. example [N]: that of each token.

    bounds: the tokens of every span; needed: of these, from the first labelled one to the last, (0, 0) where there is
    none. labelled_suffixes: the suffixes with a labelled token, from its first to its last.
    """

    bounds: tuple[Bounds, ...]
    example: Tensor
    longest: int  # tokens of the longest example
    needed: tuple[Bounds, ...]
    suffixes: tuple[Suffix, ...] = ()
    labelled_suffixes: tuple[Suffix, ...] = ()
    block_memo: dict[object, tuple[tuple[Block, ...], ...]] = field(default_factory=dict)
    fan_memo: dict[bool, tuple[Fan, ...]] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Spans":
        if device.type == "cpu":
            return self
        return replace(self, example=self.example.to(device), block_memo={}, fan_memo={})

    def fans(self, *, labelled: bool = False) -> tuple[Fan, ...]:
        """Return the suffixes, or those with a labelled token, in fans; computed once for a pass."""
        if labelled not in self.fan_memo:
            self.fan_memo[labelled] = make_fans(self.labelled_suffixes if labelled else self.suffixes)
        return self.fan_memo[labelled]

    def blocks(self, rule: Rule, dtype: torch.dtype, *, labelled: bool = False) -> tuple[tuple[Block, ...], ...]:
        """Return the blocks of every span, the last span first, for layers of this rule; computed once for a pass.

        labelled: only queries from a span's first labelled token to its last.
        """
        causal = rule.reach is None or self.longest <= rule.reach
        key = (None if causal else rule, dtype, labelled)
        if key not in self.block_memo:
            spans = zip(self.bounds, self.needed if labelled else self.bounds, strict=True)
            self.block_memo[key] = tuple(
                self._cut(*span, *queries, None if causal else rule, dtype)
                for span, queries in reversed(list(spans))
                if queries[1] > queries[0]
            )
        return self.block_memo[key]

    def _cut(
        self, first: int, stop: int, begin: int, end: int, rule: Rule | None, dtype: torch.dtype
    ) -> tuple[Block, ...]:
        """Cut queries begin..end of the span first..stop into blocks, the last one first."""
        index = torch.arange(first, stop, device=self.example.device)
        examples = self.example[first:stop]
        sees = (examples[:, None] == examples[None, :]) & (index[:, None] >= index[None, :])
        if rule is not None:
            sees &= rule.mask(index, index)
        step = end - begin if end - begin <= 2 * BLOCK else BLOCK
        blocks = []
        for start in range(begin, end, step):
            until = min(start + step, end)
            seen = sees[start - first : until - first, : until - first]
            first_seen = first + int(seen.any(0).int().argmax())
            first_query = start - (start - until) % STEP
            first_key = min(first_seen - (first_seen - until) % STEP, first_query)
            if first_key < 0:  # nothing before it to pad with
                first_query, first_key = start, first_seen
            masked = torch.ones(until - first_query, until - first_key, dtype=torch.bool, device=seen.device)
            inside = max(first_key, first)
            masked[start - first_query :, inside - first_key :] = ~seen[:, inside - first :]
            masked[: start - first_query] = False  # a softmax needs a key to see; the result is set to 0
            bias = torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf)
            blocks.append(Block(first_key, first_query, until, start - first_query, bias))
        return tuple(reversed(blocks))


def make_spans(groups: Sequence[tuple[int, ...]], labelled: Tensor, *, longest: int) -> Spans:
    """Cut a sequence into spans.

    groups: (tokens of the prefix, of each suffix), in order, the prefix 0 for an example alone; labelled [n]: tokens
    that predict a label, ascending; longest: tokens of the longest example, its prefix included.
    """
    bounds: list[Bounds] = []
    suffixes: list[Suffix] = []
    token = 0
    for prefix, *suffix_sizes in groups:
        prefix_start = token
        for size in (prefix,) if prefix else suffix_sizes:
            if bounds and bounds[-1][1] == token and token + size - bounds[-1][0] <= SPAN:
                bounds[-1] = (bounds[-1][0], token + size)
            else:
                bounds.append((token, token + size))
            token += size
        for size in suffix_sizes if prefix else ():
            suffixes.append(Suffix(token, token + size, prefix_start, prefix, token))
            token += size
    sizes = torch.tensor([size for group in groups for size in group])
    needed = _labelled_bounds([(suffix.first, suffix.stop) for suffix in suffixes], labelled)
    return Spans(
        bounds=tuple(bounds),
        example=torch.repeat_interleave(torch.arange(len(sizes)), sizes),
        longest=longest,
        needed=tuple(_labelled_bounds(bounds, labelled)),
        suffixes=tuple(suffixes),
        labelled_suffixes=tuple(
            replace(suffix, needed=first, stop=stop)
            for suffix, (first, stop) in zip(suffixes, needed, strict=True)
            if stop > first
        ),
    )


def _labelled_bounds(bounds: Sequence[Bounds], labelled: Tensor) -> list[Bounds]:
    """Return the first labelled token and the one behind the last within each of these bounds; (0, 0) without any."""
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

    labelled: only for queries from a span's first labelled token to its last; the results of others are 0.
    """
    spans, fans = plan.blocks(rule, query.dtype, labelled=labelled), plan.fans(labelled=labelled)
    states: Tensor = _SpanAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, spans, fans, labelled, scale, softcap
    )
    return states


class _SpanAttention(torch.autograd.Function):
    """Attention span by span, block by block; probabilities of short spans are saved, of long ones recomputed."""

    @staticmethod
    def forward(
        ctx: object,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: tuple[tuple[Block, ...], ...],
        fans: tuple[Fan, ...],
        partial: bool,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        """partial: spans and fans leave out tokens, whose results and gradients are 0."""
        q, k, v = query[0], key[0], value[0]
        out = _new_states(q.shape[0], v, zero=partial)
        saved: list[Tensor] = []
        save = any(ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        for block in (block for blocks in spans for block in blocks):
            probabilities = _probabilities(q, k, block, scale, cap)
            _product(probabilities, v[:, block.first : block.stop], into=out[:, block.start : block.stop])
            if save and _is_saved(block, cap):
                saved.append(probabilities)
        for fan in fans:  # after the spans, whose padding may have been written here
            probabilities = attend(fan, (q, k, v), into=out, scale=scale, cap=cap)
            if save and fan.keys.index.shape[1] <= SAVED_KEYS:
                saved.append(probabilities)
        ctx.save_for_backward(query, key, value, *saved)  # type: ignore[attr-defined]
        ctx.spans, ctx.fans, ctx.partial = spans, fans, partial  # type: ignore[attr-defined]
        ctx.scale, ctx.cap = scale, cap  # type: ignore[attr-defined]
        return out.transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
        scale, cap = ctx.scale, ctx.cap  # type: ignore[attr-defined]
        q, k, v, push = query[0], key[0], value[0], grads[0][0].transpose(0, 1)
        dq, dk, dv = (_new_states(len(x), x, zero=ctx.partial) for x in (q, k, v))  # type: ignore[attr-defined]
        saved = iter(tensors)
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
                probabilities = next(saved) if _is_saved(block, cap) else _probabilities(q, k, block, scale, cap)
                pushed = _fold(push[:, block.start : block.stop], len(k))
                back = torch.bmm(pushed, v[:, keys].mT)
                back = torch._softmax_backward_data(back, probabilities, -1, probabilities.dtype)
                if cap is not None:
                    back *= 1 - torch.tanh(_scores(q, k, block, scale) / cap).square()
                queries = _fold(q[:, block.start : block.stop], len(k))
                _product(back, k[:, keys], into=dq[:, block.start : block.stop])
                if sums is None:
                    torch.bmm(back.mT, queries, out=dk[:, keys])
                    torch.bmm(probabilities.mT, pushed, out=dv[:, keys])
                else:
                    inside = slice(block.first - first, block.stop - first)
                    sums[0][:, inside] += torch.bmm(back.mT, queries)
                    sums[1][:, inside] += torch.bmm(probabilities.mT, pushed)
            if sums is not None:
                dk[:, first:stop], dv[:, first:stop] = sums
        prefix_sums: tuple[Sums, Sums] = ({}, {})
        for fan in ctx.fans:  # type: ignore[attr-defined]
            fan_probabilities = next(saved) if fan.keys.index.shape[1] <= SAVED_KEYS else None
            gradients = (dq, dk, dv)
            push_back(
                fan, (q, k, v), push, fan_probabilities, into=gradients, prefix_sums=prefix_sums, scale=scale, cap=cap
            )
        for gradient, totals in zip((dk, dv), prefix_sums, strict=True):
            for start, total in totals.items():
                gradient[:, start : start + total.shape[1]] += total
        return dq.mul_(scale)[None], dk.mul_(scale)[None], dv[None], None, None, None, None, None


def _is_saved(block: Block, cap: float | None) -> bool:
    return cap is None and block.stop - block.first <= SAVED_KEYS


def _scores(q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    """Return scale q k^T of a block [H', G * queries, keys]: G query heads share a key head."""
    queries = _fold(q[:, block.start : block.stop], len(k))
    return torch.bmm(queries, k[:, block.first : block.stop].mT).mul_(scale)


def _probabilities(q: Tensor, k: Tensor, block: Block, scale: float, cap: float | None) -> Tensor:
    """Return the softmax of a block's scores [H', G * queries, keys], 0 for its padding."""
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


def _new_states(heads: int, like: Tensor, *, zero: bool) -> Tensor:
    """Return new states [heads, N, D], in memory [N, heads, D] like those of layers around; undefined unless `zero`."""
    shape = (like.shape[1], heads, like.shape[2])
    return (like.new_zeros(shape) if zero else like.new_empty(shape)).transpose(0, 1)
