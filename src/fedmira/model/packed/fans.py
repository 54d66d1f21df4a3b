"""Attention on a CPU of examples that share their start, many in one batched product.

    o_i = softmax_j(s_ij) v_j        j: all of the shared start, and the example's own tokens up to i

The start's keys are copied to every example that has it, which is less work than scores between examples that see
nothing of each other. What comes back to the start's keys and values is summed over its examples, in float32 at least.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from itertools import groupby

import torch
from torch import Tensor

STEP = 16  # queries and keys of a fan are multiples of it: products of a new size have to be set up first
FILL = 0.75  # a fan takes examples with at least this share of its largest one's tokens
SCORES = 2**18  # of one head, in one fan


Sums = dict[int, Tensor]


@dataclass(frozen=True)
class Suffix:
    """Tokens first..stop of a sequence that come after its tokens begin..begin + shared, which others have too.

    asked: the first of them whose answer is wanted.
    """

    first: int
    stop: int
    prefix_start: int
    prefix_length: int
    needed: int


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Tokens [n, L] of a sequence, blanks among them; real [m]: which of n * L are none, and tokens [m] they stand."""

    index: Tensor
    real: Tensor
    tokens: Tensor
    number_memo: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def take(self, states: Tensor) -> Tensor:
        """Pick these tokens from states [H, N, D], as [n, H, L, D]."""
        rows, steps = _as_vectors(states)
        if steps not in self.number_memo:
            self.number_memo[steps] = _vector_numbers(self.index, steps)
        return _pick_vectors(rows, self.number_memo[steps])

    def put(self, values: Tensor, *, into: Tensor) -> None:
        """Write values [n, H, L, D] that are no blanks to their places in [H, N, D]."""
        heads, width = values.shape[1], values.shape[3]
        rows = values.transpose(1, 2).reshape(-1, heads, width).index_select(0, self.real)
        into.transpose(0, 1).index_copy_(0, self.tokens, rows)

    def clear(self, values: Tensor) -> Tensor:
        """Set blanks of values [n, H, L, D] to 0."""
        blank = torch.ones(self.index.numel(), dtype=torch.bool)
        blank[self.real] = False
        return values.masked_fill_(blank.view(len(values), 1, -1, 1), 0)


def pick(states: Tensor, index: Tensor) -> Tensor:
    """Return states [H, N, D] of tokens [n, L], as [n, H, L, D]."""
    rows, steps = _as_vectors(states)
    return _pick_vectors(rows, _vector_numbers(index, steps))


def _as_vectors(states: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """View states [H, N, D], however their memory is ordered, as rows of D.

    Returns them, H, and how many rows it is from a head and from a token to the next. Copied only where no row of D can
    be told from the next.
    """
    heads, tokens, width = states.shape
    if states.stride(2) != 1 or states.stride(0) % width or states.stride(1) % width:
        states = states.contiguous()
    head, token = states.stride(0) // width, states.stride(1) // width
    rows = states.as_strided(((heads - 1) * head + (tokens - 1) * token + 1, width), (width, 1))
    return rows, (heads, head, token)


def _vector_numbers(index: Tensor, steps: tuple[int, int, int]) -> Tensor:
    """Return which rows hold tokens [n, L]: [n, H, L]."""
    heads, head, token = steps
    return torch.arange(heads, device=index.device)[:, None] * head + index[:, None, :] * token


def _pick_vectors(rows: Tensor, numbers: Tensor) -> Tensor:
    """Return rows [n, H, L] as [n, H, L, D]."""
    return rows.index_select(0, numbers.flatten()).view(*numbers.shape, rows.shape[1])


@dataclass(frozen=True, eq=False)
class Fan:
    """Examples of similar size: n of T queries and P + L keys each, of the start and their own; real are own ones.

    hidden [n, 1, T, P + L]: keys that a query does not see. starts: (first, stop, begin, shared) of examples in turn
    that share a start.
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


def make_fans(examples: Sequence[Suffix]) -> tuple[Fan, ...]:
    """Deal examples into fans: their starts of similar length, and they themselves."""
    fans: list[Fan] = []
    left = sorted(examples, key=lambda one: -one.prefix_length)
    while left:
        alike = [one for one in left if one.prefix_length >= FILL * left[0].prefix_length]
        left = left[len(alike) :]
        alike.sort(key=lambda one: one.first - one.stop)
        while alike:
            longest = alike[0].stop - alike[0].first
            most = max(1, SCORES // (longest * (longest + max(one.prefix_length for one in alike))))
            count = sum(1 for one in alike[:most] if one.stop - one.first >= FILL * longest)
            fans.append(_fan(sorted(alike[:count], key=lambda one: one.first)))
            alike = alike[count:]
    return tuple(fans)


def _fan(examples: Sequence[Suffix]) -> Fan:
    prefixes = []
    for _, group in groupby(enumerate(examples), key=lambda one: one[1].prefix_start):
        (place, one), *others = group
        prefixes.append((place, place + 1 + len(others), one.prefix_start, one.prefix_length))
    count = _round_count(len(examples))
    chosen = [*examples, *[examples[-1]] * (count - len(examples))]
    first, stop, begin, shared, asked = torch.tensor([astuple(one) for one in chosen]).T[..., None]
    real = (torch.arange(count) < len(examples))[:, None]
    steps, before, own = (torch.arange(_round_up(int(size.max()))) for size in (stop - asked, shared, stop - first))
    queries = torch.minimum(asked + steps, stop - 1)
    keys = torch.cat([torch.minimum(begin + before, begin + shared - 1), first + own], dim=1)
    outside = (before >= shared)[:, None, :].expand(-1, len(steps), -1)
    later = first[..., None] + own > queries[..., None]
    ours = torch.cat([torch.zeros_like(before >= shared), (first + own < stop) & real], dim=1)
    return Fan(
        queries=_grid(queries, (asked + steps < stop) & real),
        keys=_grid(torch.minimum(keys, stop - 1), ours),
        masked=torch.cat([outside, later], dim=2)[:, None],
        prefixes=tuple(prefixes),
    )


def _grid(index: Tensor, real: Tensor) -> TokenGrid:
    rows = torch.nonzero(real.flatten()).squeeze(1)
    return TokenGrid(index, rows, index.flatten()[rows])


def _round_up(size: int) -> int:
    return -(-size // STEP) * STEP


def _round_count(count: int) -> int:
    """Round up by at most a sixteenth: a product of as many examples as before needs no setting up."""
    step = max(1, (1 << count.bit_length()) // 16)
    return -(-count // step) * step


def attend(fan: Fan, states: tuple[Tensor, Tensor, Tensor], *, into: Tensor, scale: float, cap: float | None) -> Tensor:
    """Write the answers of a fan's queries to [H, N, D]; return its probabilities [n * H', G * T, P + L].

    states: q [H, N, D], k and v [H', N, D]; G = H / H' query heads share a key head.
    """
    query, key, value = _taken(fan, states)
    probabilities = _probabilities(fan, query, key, scale=scale, cap=cap)
    answers = torch.bmm(probabilities, value.flatten(0, 1))
    fan.queries.put(answers.view(*query.shape[:3], -1), into=into)
    return probabilities


def _taken(fan: Fan, states: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return fan.queries.take(states[0]), fan.keys.take(states[1]), fan.keys.take(states[2])


def _probabilities(fan: Fan, query: Tensor, key: Tensor, *, scale: float, cap: float | None) -> Tensor:
    scores, bias = _scores(query, key, scale=scale, cap=cap), fan.bias(query.dtype)
    scores.view(len(bias), -1, *bias.shape[2:]).add_(bias)
    return torch.softmax(scores, -1)


def _scores(query: Tensor, key: Tensor, *, scale: float, cap: float | None) -> Tensor:
    """Return the scores [n * H', G * T, P + L] of query [n, H, T, D] and key [n, H', P + L, D], hidden ones too."""
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
    """Write the gradients of a fan's own tokens to dq, dk, dv [H, N, D], and add up those of its starts' k and v.

    dq and dk lack the factor `scale`. push [H, N, D]: the gradient of the answers; probabilities: from `attend`,
    None to recompute them; starts: sums [H', shared, D] of k and of v by where a start begins.
    """
    query, key, value = _taken(fan, states)
    probabilities = _probabilities(fan, query, key, scale=scale, cap=cap) if probabilities is None else probabilities
    asked = fan.queries.clear(fan.queries.take(push)).view(len(probabilities), -1, push.shape[2])
    back = torch._softmax_backward_data(
        torch.bmm(asked, value.flatten(0, 1).mT), probabilities, -1, probabilities.dtype
    )
    if cap is not None:
        back *= 1 - (_scores(query, key, scale=scale, cap=cap) / cap).square()
    fan.queries.put(torch.bmm(back, key.flatten(0, 1)).view(query.shape), into=into[0])
    queries = query.view(len(probabilities), -1, query.shape[3])
    for found, other, gradient, sums in zip(
        (back, probabilities), (queries, asked), into[1:], prefix_sums, strict=True
    ):
        both = torch.bmm(found.mT, other).view(*key.shape[:3], -1)
        fan.keys.put(both, into=gradient)
        wide = torch.promote_types(both.dtype, torch.float32)
        for first, stop, begin, shared in fan.prefixes:
            total = both[first:stop, :, :shared].sum(0, dtype=wide)
            sums[begin] = sums[begin] + total if begin in sums else total
