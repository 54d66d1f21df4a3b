"""Deal the prompts of many clients into passes of bounded size, and those of a pass into batches and rows.

A lane holds prompts of one client, and what these begin with in common is known. Texts are computed in batches of
similar length; the rows that answers are written in stand in lanes of equal width.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TypeVar

from fedmira.model.packed.packing import Segment

ANSWER_ROWS = 256  # prompts answered in one pass
PADDED_ROWS = 64  # likewise where transformers' own generation serves
CACHE_BYTES = 2**30  # keys and values of one pass
PREFILL_TOKENS = 2048  # prompt tokens computed at once
PREFILL_SHARE = 0.8  # a prompt of at least this share of the longest one's tokens joins its batch
PREFIX_TOKENS = 8  # a common beginning shorter than this is not worth keeping apart


@dataclass(frozen=True)
class Lane:
    """Prompts of one client in one pass, the longest first; numbers: where they are among its prompts.

    prefix_length: how many tokens they all begin with, kept once. Every prompt is longer.
    """

    client: int
    numbers: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    prefix_length: int

    @property
    def longest_suffix(self) -> int:
        """Tokens of the longest prompt beyond what is shared."""
        return len(self.prompts[0]) - self.prefix_length


def plan_passes(
    prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int, token_bytes: int | None
) -> Iterator[list[Lane]]:
    """Deal all prompts into passes of at most ANSWER_ROWS; a client with many prompts has several lanes.

    token_bytes: keys and values of one token; what a pass keeps stays below CACHE_BYTES unless a single prompt takes
    more. None: nothing is shared, and a pass has at most PADDED_ROWS, those included that pad every lane to the widest
    (which is at most twice as wide).
    """
    limit = PADDED_ROWS if token_bytes is None else ANSWER_ROWS
    most = max(1, limit // max(1, sum(1 for own in prompts if own)))
    lanes = [
        lane
        for client, own in enumerate(prompts)
        for lane in _lanes(client, own, most=most, new=max_new_tokens, token_bytes=token_bytes)
    ]
    lanes.sort(key=lambda lane: (-len(lane.numbers), -lane.longest_suffix))

    def fits(some: Sequence[Lane]) -> bool:
        counts = [len(lane.numbers) for lane in some]
        if token_bytes is None:
            return len(counts) * counts[0] <= limit and 2 * counts[-1] >= counts[0]
        return sum(counts) <= limit and count_tokens(some, max_new_tokens) * token_bytes <= CACHE_BYTES

    while lanes:
        count = 1
        while count < len(lanes) and fits(lanes[: count + 1]):
            count += 1
        yield lanes[:count]
        lanes = lanes[count:]


def count_tokens(lanes: Sequence[Lane], max_new_tokens: int) -> int:
    """Tokens that a pass of these lanes keeps keys and values of if every answer goes on.

    Those of the prompts, and those of the rows that answers are written in, blanks included.
    """
    own = max(lane.longest_suffix for lane in lanes) + max_new_tokens
    shared = max(lane.prefix_length for lane in lanes)
    prompts = sum(lane.prefix_length + sum(len(ids) - lane.prefix_length for ids in lane.prompts) for lane in lanes)
    return prompts + _best_width([len(lane.numbers) for lane in lanes], shared=shared, each=own)[0]


def _lanes(
    client: int, prompts: Sequence[Sequence[int]], *, most: int, new: int, token_bytes: int | None
) -> list[Lane]:
    """Deal one client's prompts into lanes of at most `most`, and of no more than may be kept."""
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    if not order:
        return []
    shared = 0
    if token_bytes is not None:
        shared = _count_prefix(prompts)
        longest = len(prompts[order[0]]) - shared
        most = max(1, min(most, (CACHE_BYTES // token_bytes - 2 * shared) // (2 * longest + new)))
    lanes = []
    for start in range(0, len(order), most):
        places = tuple(order[start : start + most])
        lanes.append(Lane(client, places, tuple(tuple(prompts[place]) for place in places), shared))
    return lanes


def _count_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, at least one of each left over; 0 where that does not pay."""
    if len(prompts) < 2:
        return 0
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))
    common = min(same, min(len(ids) for ids in prompts) - 1)
    return common if common >= PREFIX_TOKENS else 0


@dataclass(frozen=True)
class Text:
    """Tokens to compute: the lane they belong to, their place among all texts, and how many shared ones go before."""

    lane: int
    number: int
    tokens: tuple[int, ...]
    position: int


def deal_batches(texts: Sequence[Text]) -> list[list[Text]]:
    """Deal texts into batches of similar length, those after as many shared tokens together; in each by lane."""
    left = sorted(texts, key=lambda text: -len(text.tokens))
    batches = []
    while left:
        longest = len(left[0].tokens)
        alike = [text for text in left if len(text.tokens) >= PREFILL_SHARE * longest]
        left = left[len(alike) :]
        alike.sort(key=lambda text: -text.position)
        size = max(1, PREFILL_TOKENS // longest)
        batches += [_by_lane(alike[start : start + size]) for start in range(0, len(alike), size)]
    return batches


def _by_lane(texts: Sequence[Text]) -> list[Text]:
    """Order texts by lane, lanes with equally many together."""
    owned: dict[int, list[Text]] = {}
    for text in texts:
        owned.setdefault(text.lane, []).append(text)
    return [text for own in sorted(owned.values(), key=len) for text in own]


def segments_of(texts: Sequence[Text], length: int) -> tuple[Segment, ...]:
    """Return the segments of texts in the order of `_by_lane`, each padded to a length."""
    counts = [len(list(group)) for _, group in groupby(texts, key=lambda text: text.lane)]
    segments = []
    first = start = 0
    for count, group in groupby(counts):
        stop = first + len(list(group))
        tokens = count * length
        segments.append(Segment(first, stop, start, tokens, (slice(0, tokens),) * (stop - first)))
        start += (stop - first) * tokens
        first = stop
    return tuple(segments)


AnyRow = TypeVar("AnyRow")


def deal_rows(own: Sequence[list[AnyRow]], *, shared: int, each: int) -> list[list[AnyRow]]:
    """Deal rows, given by client, to lanes of equal width, which the first of a lane's rows fill up.

    The width is the one with which least is kept: `shared` tokens a lane, `each` a row.
    """
    if not own:
        return []
    _, width = _best_width([len(rows) for rows in own], shared=shared, each=each)
    lanes = [rows[start : start + width] for rows in own for start in range(0, len(rows), width)]
    return [rows + rows[:1] * (width - len(rows)) for rows in lanes]


def _best_width(counts: Sequence[int], *, shared: int, each: int) -> tuple[int, int]:
    """Return the fewest tokens that clients with so many rows can be kept in, and the width of their lanes then."""
    widths = range(1, max(counts) + 1)
    sizes = {width: sum(-(-count // width) for count in counts) * (shared + width * each) for width in widths}
    best = min(sizes, key=lambda width: (sizes[width], -width))
    return sizes[best], best


def suffix_limit(lanes: Sequence[Sequence[Text]]) -> int:
    """Return how many tokens of its own to keep in a text's row at most: rows are as long as the longest.

    What a longer one has beyond stands beside what its lane shares, as far as there is room: lanes are as long as the
    longest, too.
    """
    room = max((lane[0].position for lane in lanes), default=0)
    sizes = [(room - lane[0].position, [len(text.tokens) for text in dict.fromkeys(lane)]) for lane in lanes]
    longest = max((max(own) for _, own in sizes), default=0)

    def fits(limit: int) -> bool:
        return all(sum(max(0, size - limit) for size in own) <= left for left, own in sizes)

    return bisect_left(range(longest), True, key=fits)


def mark_filler(rows: Sequence[int]) -> list[bool]:
    """Tell which of these rows only fill up a lane: they were there before."""
    return [row in rows[:place] for place, row in enumerate(rows)]
