"""Attention on a CPU of suffixes, the examples that follow a prefix they share: many in one batched product.

    o_i = softmax_j(s_ij) v_j        j: all of the prefix, and the suffix's own tokens up to i

The keys of a prefix are copied to each of its suffixes, which is less work than scores between examples that see
nothing of each other. The gradients of the prefix's keys and values are summed over its suffixes, in float32 or wider.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from itertools import groupby

import torch
from torch import Tensor

STEP = 16  # queries and keys of a fan are multiples of it: products of a new size have to be set up first
FILL = 0.75  # a fan takes suffixes with at least this share of its largest one's tokens
SCORES = 2**18  # of one head, in one fan


Sums = dict[int, Tensor]  # first token of a prefix -> a gradient [H', its tokens, D]


@dataclass(frozen=True)
class Suffix:
    """Tokens first..stop of a sequence that follow its tokens prefix_start..prefix_start + prefix_length.

    needed: the first of them whose attention is needed.
    """

    first: int
    stop: int
    prefix_start: int
    prefix_length: int
    needed: int


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Tokens of a sequence in an array, padding included.

    index [n, L]: where each is in the sequence; real [m]: which of the n * L are not padding; tokens [m]: where those
    are in the sequence.
    """

    index: Tensor
    real: Tensor
    tokens: Tensor
    number_memo: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def take(self, states: Tensor) -> Tensor:
        """Pick these tokens from states [H, N, D], as [n, H, L, D]."""
        vectors, strides = _as_vectors(states)
        if strides not in self.number_memo:
            self.number_memo[strides] = _vector_numbers(self.index, strides)
        return _pick_vectors(vectors, self.number_memo[strides])

    def put(self, values: Tensor, *, into: Tensor) -> None:
        """Write values [n, H, L, D], padding left out, to their tokens in [H, N, D]."""
        heads, width = values.shape[1], values.shape[3]
        vectors = values.transpose(1, 2).reshape(-1, heads, width).index_select(0, self.real)
        into.transpose(0, 1).index_copy_(0, self.tokens, vectors)

    def clear(self, values: Tensor) -> Tensor:
        """Set the padding of values [n, H, L, D] to 0."""
        padding = torch.ones(self.index.numel(), dtype=torch.bool)
        padding[self.real] = False
        return values.masked_fill_(padding.view(len(values), 1, -1, 1), 0)


def pick(states: Tensor, index: Tensor) -> Tensor:
    """Return states [H, N, D] of tokens [n, L], as [n, H, L, D]."""
    vectors, strides = _as_vectors(states)
    return _pick_vectors(vectors, _vector_numbers(index, strides))


def _as_vectors(states: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """View states [H, N, D], in whatever order of memory, as vectors [., D].

    Returns them, H, and how many vectors it is from one head and from one token to the next. Copied only where D
    numbers are not contiguous, or heads and tokens no multiple of D apart.
    """
    heads, tokens, width = states.shape
    if states.stride(2) != 1 or states.stride(0) % width or states.stride(1) % width:
        states = states.contiguous()
    head, token = states.stride(0) // width, states.stride(1) // width
    vectors = states.as_strided(((heads - 1) * head + (tokens - 1) * token + 1, width), (width, 1))
    return vectors, (heads, head, token)


def _vector_numbers(index: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """Return the numbers [n, H, L] of the vectors of tokens [n, L]."""
    heads, head, token = strides
    return torch.arange(heads, device=index.device)[:, None] * head + index[:, None, :] * token


def _pick_vectors(vectors: Tensor, numbers: Tensor) -> Tensor:
    """Return vectors [n, H, L] as [n, H, L, D]."""
    return vectors.index_select(0, numbers.flatten()).view(*numbers.shape, vectors.shape[1])


@dataclass(frozen=True, eq=False)
class Fan:
    """Suffixes of similar size: n of T queries and P + L keys each, of the prefix (padding here) and of the suffix.

    masked [n, 1, T, P + L]: keys that a query does not see. prefixes: (first, stop, start, length), the prefix of
    suffixes first..stop and its tokens start..start + length.
    """

    queries: TokenGrid
    keys: TokenGrid
    masked: Tensor
    prefixes: tuple[tuple[int, int, int, int], ...]
    bias_memo: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores [n, 1, T, P + L]: 0 or minus infinity."""
        if dtype not in self.bias_memo:
            zeros = torch.zeros(self.masked.shape, dtype=dtype)
            self.bias_memo[dtype] = zeros.masked_fill_(self.masked, -torch.inf)
        return self.bias_memo[dtype]


def make_fans(suffixes: Sequence[Suffix]) -> tuple[Fan, ...]:
    """Deal suffixes into fans, in which their prefixes are of similar length and they themselves too."""
    fans: list[Fan] = []
    left = sorted(suffixes, key=lambda suffix: -suffix.prefix_length)
    while left:
        similar = [suffix for suffix in left if suffix.prefix_length >= FILL * left[0].prefix_length]
        left = left[len(similar) :]
        similar.sort(key=lambda suffix: suffix.first - suffix.stop)
        while similar:
            longest = similar[0].stop - similar[0].first
            longest_prefix = max(suffix.prefix_length for suffix in similar)
            most = max(1, SCORES // (longest * (longest + longest_prefix)))
            count = sum(1 for suffix in similar[:most] if suffix.stop - suffix.first >= FILL * longest)
            fans.append(_make_fan(sorted(similar[:count], key=lambda suffix: suffix.first)))
            similar = similar[count:]
    return tuple(fans)


def _make_fan(suffixes: Sequence[Suffix]) -> Fan:
    prefixes = []
    for start, group in groupby(enumerate(suffixes), key=lambda item: item[1].prefix_start):
        (number, suffix), *others = group
        prefixes.append((number, number + 1 + len(others), start, suffix.prefix_length))
    count = _round_count(len(suffixes))
    padded = [*suffixes, *[suffixes[-1]] * (count - len(suffixes))]
    first, stop, prefix_start, prefix_length, needed = torch.tensor([astuple(suffix) for suffix in padded]).T[..., None]
    real = (torch.arange(count) < len(suffixes))[:, None]
    query_steps, prefix_steps, suffix_steps = (
        torch.arange(_round_up(int(size.max()))) for size in (stop - needed, prefix_length, stop - first)
    )
    queries = torch.minimum(needed + query_steps, stop - 1)
    prefix_keys = torch.minimum(prefix_start + prefix_steps, prefix_start + prefix_length - 1)
    keys = torch.cat([prefix_keys, first + suffix_steps], dim=1)
    outside = prefix_steps >= prefix_length
    later = first[..., None] + suffix_steps > queries[..., None]
    real_keys = torch.cat([torch.zeros_like(outside), (first + suffix_steps < stop) & real], dim=1)
    return Fan(
        queries=_make_grid(queries, (needed + query_steps < stop) & real),
        keys=_make_grid(torch.minimum(keys, stop - 1), real_keys),
        masked=torch.cat([outside[:, None, :].expand(-1, len(query_steps), -1), later], dim=2)[:, None],
        prefixes=tuple(prefixes),
    )


def _make_grid(index: Tensor, real: Tensor) -> TokenGrid:
    numbers = torch.nonzero(real.flatten()).squeeze(1)
    return TokenGrid(index, numbers, index.flatten()[numbers])


def _round_up(size: int) -> int:
    return -(-size // STEP) * STEP


def _round_count(count: int) -> int:
    """Round up by at most a sixteenth: a product of as many suffixes as before needs no setting up."""
    step = max(1, (1 << count.bit_length()) // 16)
    return -(-count // step) * step


def attend(fan: Fan, states: tuple[Tensor, Tensor, Tensor], *, into: Tensor, scale: float, cap: float | None) -> Tensor:
    """Write the attention of a fan's queries to [H, N, D]; return its probabilities [n * H', G * T, P + L].

    states: q [H, N, D], k and v [H', N, D]; G = H / H' query heads share a key head.
    """
    query, key, value = _take(fan, states)
    probabilities = _probabilities(fan, query, key, scale=scale, cap=cap)
    results = torch.bmm(probabilities, value.flatten(0, 1))
    fan.queries.put(results.view(*query.shape[:3], -1), into=into)
    return probabilities


def _take(fan: Fan, states: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return fan.queries.take(states[0]), fan.keys.take(states[1]), fan.keys.take(states[2])


def _probabilities(fan: Fan, query: Tensor, key: Tensor, *, scale: float, cap: float | None) -> Tensor:
    scores, bias = _scores(query, key, scale=scale, cap=cap), fan.bias(query.dtype)
    scores.view(len(bias), -1, *bias.shape[2:]).add_(bias)
    return torch.softmax(scores, -1)


def _scores(query: Tensor, key: Tensor, *, scale: float, cap: float | None) -> Tensor:
    """Return the scores [n * H', G * T, P + L] of query [n, H, T, D] and key [n, H', P + L, D], masked ones too."""
    keys = key.flatten(0, 1)
    scores = torch.bmm(query.view(len(keys), -1, query.shape[3]), keys.mT).mul_(scale)
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def push_back(
    fan: Fan,
    states: tuple[Tensor, Tensor, Tensor],
    push: Tensor,
    probabilities: Tensor | None,
    *,
    into: tuple[Tensor, Tensor, Tensor],
    prefix_sums: tuple[Sums, Sums],
    scale: float,
    cap: float | None,
) -> None:
    """Write the gradients of a fan's suffixes to dq, dk, dv [H, N, D], and add up those of its prefixes' k and v.

    dq and dk lack the factor `scale`. push [H, N, D]: the gradient of the results; probabilities: from `attend`, None
    to recompute them; prefix_sums: of k and of v.
    """
    query, key, value = _take(fan, states)
    probabilities = _probabilities(fan, query, key, scale=scale, cap=cap) if probabilities is None else probabilities
    pushed = fan.queries.clear(fan.queries.take(push)).view(len(probabilities), -1, push.shape[2])
    back = torch.bmm(pushed, value.flatten(0, 1).mT)
    back = torch._softmax_backward_data(back, probabilities, -1, probabilities.dtype)
    if cap is not None:
        back *= 1 - (_scores(query, key, scale=scale, cap=cap) / cap).square()
    fan.queries.put(torch.bmm(back, key.flatten(0, 1)).view(query.shape), into=into[0])
    queries = query.view(len(probabilities), -1, query.shape[3])
    factors = ((back, queries), (probabilities, pushed))
    for (left, right), gradient, sums in zip(factors, into[1:], prefix_sums, strict=True):
        key_gradient = torch.bmm(left.mT, right).view(*key.shape[:3], -1)
        fan.keys.put(key_gradient, into=gradient)
        wide = torch.promote_types(key_gradient.dtype, torch.float32)
        for first, stop, start, length in fan.prefixes:
            total = key_gradient[first:stop, :, :length].sum(0, dtype=wide)
            sums[start] = sums[start] + total if start in sums else total
