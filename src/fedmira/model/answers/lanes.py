"""Deal the prompts of many clients into passes of bounded size, and those of a pass into batches and rows.

A lane holds prompts of one client, and knows their prefix. Prompts are computed in batches of similar length; the rows
that answers are written in are dealt to lanes of equal width.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TypeVar

from fedmira.model.packed.packing import Segment

ANSWER_ROWS = 256  # prompts answered in one pass
PADDED_ROWS = 64  # likewise where transformers' own generation is used
CACHE_BYTES = 2**30  # keys and values of one pass
PREFILL_TOKENS = 2048  # prompt tokens computed at once
PREFILL_SHARE = 0.8  # a prompt of at least this share of the longest one's tokens joins its batch
PREFIX_TOKENS = 8  # a prefix shorter than this is not worth a part of the cache


@dataclass(frozen=True)
class Lane:
    """Prompts of one client in one pass, the longest first; numbers: which of the client's prompts they are.

    prefix_length: tokens that they all begin with, cached once. Every prompt is longer.
    """

    client: int
    numbers: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    prefix_length: int

    @property
    def longest_suffix(self) -> int:
        """Tokens of the longest prompt behind the prefix."""
        return len(self.prompts[0]) - self.prefix_length


def plan_passes(
    prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int, token_bytes: int | None
) -> Iterator[list[Lane]]:
    """Deal all prompts into passes of at most ANSWER_ROWS; a client with many prompts has several lanes.

    token_bytes: keys and values of one token; the cache of a pass stays below CACHE_BYTES unless a single prompt takes
    more. None: nothing is cached, and a pass has at most PADDED_ROWS, those included that pad every lane to the widest
    (which is at most twice as wide).
    """
    limit = PADDED_ROWS if token_bytes is None else ANSWER_ROWS
    most = max(1, limit // max(1, sum(1 for client_prompts in prompts if client_prompts)))
    lanes = [
        lane
        for client, client_prompts in enumerate(prompts)
        for lane in _lanes(client, client_prompts, most=most, new=max_new_tokens, token_bytes=token_bytes)
    ]
    lanes.sort(key=lambda lane: (-len(lane.numbers), -lane.longest_suffix))

    def fits(chosen: Sequence[Lane]) -> bool:
        counts = [len(lane.numbers) for lane in chosen]
        if token_bytes is None:
            return len(counts) * counts[0] <= limit and 2 * counts[-1] >= counts[0]
        return sum(counts) <= limit and count_tokens(chosen, max_new_tokens) * token_bytes <= CACHE_BYTES

    while lanes:
        count = 1
        while count < len(lanes) and fits(lanes[: count + 1]):
            count += 1
        yield lanes[:count]
        lanes = lanes[count:]


def count_tokens(lanes: Sequence[Lane], max_new_tokens: int) -> int:
    """Count the tokens whose keys and values a pass of these lanes caches if no answer ends early.

    Those of the prompts, and those of the rows that answers are written in, filler rows included.
    """
    row = max(lane.longest_suffix for lane in lanes) + max_new_tokens
    prefix = max(lane.prefix_length for lane in lanes)
    prompts = sum(lane.prefix_length + sum(len(ids) - lane.prefix_length for ids in lane.prompts) for lane in lanes)
    return prompts + _best_width([len(lane.numbers) for lane in lanes], prefix=prefix, each=row)[0]


def _lanes(
    client: int, prompts: Sequence[Sequence[int]], *, most: int, new: int, token_bytes: int | None
) -> list[Lane]:
    """Deal one client's prompts into lanes of at most `most`, and of no more than may be cached."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    if not order:
        return []
    prefix_length = 0
    if token_bytes is not None:
        prefix_length = _count_prefix(prompts)
        longest = len(prompts[order[0]]) - prefix_length
        most = max(1, min(most, (CACHE_BYTES // token_bytes - 2 * prefix_length) // (2 * longest + new)))
    lanes = []
    for start in range(0, len(order), most):
        numbers = tuple(order[start : start + most])
        lanes.append(Lane(client, numbers, tuple(tuple(prompts[number]) for number in numbers), prefix_length))
    return lanes


def _count_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all prompts begin with, at least one of each left over; 0 where that does not pay."""
    if len(prompts) < 2:
        return 0
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))
    common = min(same, min(len(ids) for ids in prompts) - 1)
    return common if common >= PREFIX_TOKENS else 0


@dataclass(frozen=True)
class Text:
    """Tokens to compute: the suffix of a prompt, or a prefix.

    lane: the one they belong to; number: theirs among all texts; position: that of their first token, which is the
    number of prefix tokens before them.
    """

    lane: int
    number: int
    tokens: tuple[int, ...]
    position: int


def deal_batches(texts: Sequence[Text]) -> list[list[Text]]:
    """Deal texts into batches of similar length, those behind equally long prefixes together; in each by lane."""
    left = sorted(texts, key=lambda text: -len(text.tokens))
    batches = []
    while left:
        longest = len(left[0].tokens)
        similar = [text for text in left if len(text.tokens) >= PREFILL_SHARE * longest]
        left = left[len(similar) :]
        similar.sort(key=lambda text: -text.position)
        size = max(1, PREFILL_TOKENS // longest)
        batches += [_by_lane(similar[start : start + size]) for start in range(0, len(similar), size)]
    return batches


def _by_lane(texts: Sequence[Text]) -> list[Text]:
    """Order texts by lane, lanes with equally many together."""
    lanes: dict[int, list[Text]] = {}
    for text in texts:
        lanes.setdefault(text.lane, []).append(text)
    return [text for lane_texts in sorted(lanes.values(), key=len) for text in lane_texts]


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


def deal_rows(clients: Sequence[list[AnyRow]], *, prefix: int, each: int) -> list[list[AnyRow]]:
    """Deal the rows of each client to lanes of equal width; a lane's first row is repeated to fill it up.

    The width is the one with which fewest tokens are cached: `prefix` tokens a lane, `each` a row.
    """
    if not clients:
        return []
    _, width = _best_width([len(rows) for rows in clients], prefix=prefix, each=each)
    lanes = [rows[start : start + width] for rows in clients for start in range(0, len(rows), width)]
    return [rows + rows[:1] * (width - len(rows)) for rows in lanes]


def _best_width(counts: Sequence[int], *, prefix: int, each: int) -> tuple[int, int]:
    """Return the fewest tokens that clients with these counts of rows can be cached in, and the width of lanes then."""
    widths = range(1, max(counts) + 1)
    sizes = {width: sum(-(-count // width) for count in counts) * (prefix + width * each) for width in widths}
    best = min(sizes, key=lambda width: (sizes[width], -width))
    return sizes[best], best


def suffix_limit(lanes: Sequence[Sequence[Text]]) -> int:
    """Return how many tokens of a suffix to cache in its row at most: rows are as long as the longest.

    The other tokens of a longer one are cached behind the prefix of its lane, as far as there is room: the prefixes of
    all lanes take as much as the longest, too.
    """
    longest_prefix = max((lane[0].position for lane in lanes), default=0)
    rooms = [(longest_prefix - lane[0].position, [len(text.tokens) for text in dict.fromkeys(lane)]) for lane in lanes]
    longest = max((max(sizes) for _, sizes in rooms), default=0)

    def fits(limit: int) -> bool:
        return all(sum(max(0, size - limit) for size in sizes) <= room for room, sizes in rooms)

    return bisect_left(range(longest), True, key=fits)


def mark_filler(rows: Sequence[int]) -> list[bool]:
    """Return which of these rows only fill up a lane: those that came before."""
    return [row in rows[:column] for column, row in enumerate(rows)]
