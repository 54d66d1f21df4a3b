"""Attention on accelerators: examples gathered by length into buckets [examples, T], each one fused attention call."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedmira.model.seam import Rule

BUCKET_FILL = 0.75  # a bucket takes examples with at least this share of its longest one's tokens


@dataclass(frozen=True, eq=False)
class Buckets:
    """How attention finds its examples. All buckets together have R cells, padding included.

    shapes: (examples, T) each; index [R]: the token of each cell (0 for padding); back [N]: each token's cell; padding:
    the cells without a token; trivial: one bucket in sequence order, nothing to gather.
    """

    shapes: tuple[tuple[int, int], ...]
    index: Tensor
    back: Tensor
    padding: Tensor
    trivial: bool
    mask_memo: dict[tuple[Rule, int], Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Buckets":
        if device.type == "cpu":
            return self
        index, back, padding = (tensor.to(device) for tensor in (self.index, self.back, self.padding))
        return replace(self, index=index, back=back, padding=padding, mask_memo={})

    def mask(self, rule: Rule, bucket: int) -> Tensor | None:
        """Return the mask [T, T] of a bucket's examples, None where it is plainly causal."""
        length = self.shapes[bucket][1]
        if rule.reach is None or length <= rule.reach:
            return None
        if (rule, bucket) not in self.mask_memo:
            first = sum(examples * size for examples, size in self.shapes[:bucket])
            index = self.index[first : first + length]  # a bucket's first example is its longest, without padding
            self.mask_memo[rule, bucket] = rule.mask(index, index)
        return self.mask_memo[rule, bucket]


def make_buckets(sizes: Tensor, starts: Tensor) -> Buckets:
    """Deal examples of the sequence (their sizes and starts) into buckets of similar length."""
    order = torch.argsort(sizes, descending=True, stable=True).tolist()
    lengths = sizes.tolist()
    shapes: list[tuple[int, int]] = []
    indices: list[Tensor] = []
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
        indices.append(((starts[chosen][:, None] + steps) * inside).flatten())
        real.append(inside.flatten())
        shapes.append((stop - first, longest))
        first = stop
    index, is_real = torch.cat(indices), torch.cat(real)
    back = torch.empty(int(sizes.sum()), dtype=torch.int64)
    back[index[is_real]] = torch.nonzero(is_real).squeeze(1)
    trivial = len(shapes) == 1 and torch.equal(index, torch.arange(len(back)))
    return Buckets(tuple(shapes), index, back, torch.nonzero(~is_real).squeeze(1), trivial)


def attend_in_buckets(
    plan: Buckets, query: Tensor, key: Tensor, value: Tensor, rule: Rule, *, scale: float, softcap: float | None
) -> Tensor:
    """Gather, attend in every bucket, put back. Shapes as in attend_in_spans."""
    tokens, heads, width = query.shape[2], query.shape[1], value.shape[-1]
    cells = [states[0].transpose(0, 1).reshape(tokens, -1) for states in (query, key, value)]
    if not plan.trivial:
        cells = [_Gather.apply(states, plan.index, plan.back, None) for states in cells]  # type: ignore[no-untyped-call]
    sizes = [examples * length for examples, length in plan.shapes]
    results = []
    for bucket, bucket_cells in enumerate(zip(*(torch.split(states, sizes) for states in cells), strict=True)):
        by_head = [
            states.view(*plan.shapes[bucket], like.shape[1], -1).transpose(1, 2)
            for states, like in zip(bucket_cells, (query, key, value), strict=True)
        ]
        results.append(_attend(*by_head, scale=scale, mask=plan.mask(rule, bucket), softcap=softcap))
    joined = results[0] if len(results) == 1 else torch.cat(results)
    if not plan.trivial:
        joined = _Gather.apply(joined, plan.back, plan.index, plan.padding)  # type: ignore[no-untyped-call]
    return joined.view(1, tokens, heads, width)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None, softcap: float | None
) -> Tensor:
    """Attention of one bucket, query [E, H, T, D], mask [T, T] or None for causal; returns cells [E * T, H * D]."""
    length = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if softcap is None:
        states = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    else:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril() if mask is None else mask
        scores = softcap * torch.tanh(query @ key.mT * scale / softcap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        states = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype) @ value
    return states.transpose(1, 2).reshape(query.shape[0] * length, -1)


class _Gather(torch.autograd.Function):
    """x[index] of x [n, d]; because every row that matters is taken once, its gradient is a gather and not a scatter.

    back: for each row of x, where it went; padding: rows of x that were not taken, whose gradient is 0.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor, index: Tensor, back: Tensor, padding: Tensor | None) -> Tensor:
        ctx.back, ctx.padding = back, padding  # type: ignore[attr-defined]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = grads[0].index_select(0, ctx.back)  # type: ignore[attr-defined]
        if ctx.padding is not None:  # type: ignore[attr-defined]
            gradient.index_fill_(0, ctx.padding, 0)  # type: ignore[attr-defined]
        return gradient, None, None, None
