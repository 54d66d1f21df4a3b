"""Compute the prompts of a pass: the keys and values that answers go on from, and the states that begin them.

Two roads. *Packed*, on a CPU for bases that can: prompts end to end as in training, what a client's begin with computed
once, no padding, the last layer at the last tokens only. *Padded*: first what the prompts of each lane begin with, then
the rest of them in batches of similar length.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import asking, collate
from fedmira.model.fans import pick
from fedmira.model.kept import Enough, Part, Rules, Turn, attending, places_of
from fedmira.model.lanes import Lane, Text, deal_batches, segments_of
from fedmira.model.load import Base
from fedmira.model.packing import Segment
from fedmira.model.passes import plan_pass, states_of
from fedmira.model.spans import Spans
from fedmira.model.virtual import Places, find_places

PACKED_TOKENS = 8192  # of one packed pass


class Prompts(Protocol):
    """Texts computed, each what its prompt has beyond what its lane shares. states [n, d]: of every text's last token.

    openings and rests give the keys and values of lanes, and of texts by place, as parts of `length` tokens; beyond a
    text's own tokens they hold anything.
    """

    @property
    def states(self) -> Tensor: ...

    def openings(self, lanes: Sequence[int], length: int) -> Part: ...

    def rests(self, places: Sequence[int], length: int) -> Part: ...


def texts_of(lanes: Sequence[Lane]) -> list[Text]:
    """Return what each prompt has of its own, lane by lane."""
    asked = [(k, lane, ids) for k, lane in enumerate(lanes) for ids in lane.prompts]
    return [Text(k, place, ids[lane.shared :], lane.shared) for place, (k, lane, ids) in enumerate(asked)]


def compute(base: Base, rules: Rules, adapters: Adapters | None, lanes: Sequence[Lane]) -> Prompts:
    """Compute all prompts of these lanes. adapters [S] of the lanes; None: the base alone."""
    if base.packs and base.device.type == "cpu":
        return _packed(base, adapters, lanes)
    return _padded(base, rules, adapters, lanes)


def states_after(base: Base, turn: Turn, ids: Tensor, virtual: Places | None = None) -> Tensor:
    """Hidden states [R, T, d] of tokens [R, T] that see what is kept. virtual: where virtual tokens stand."""
    with attending(base.model, turn):
        given = base.inputs(ids, virtual)
        states: Tensor = base.decoder(**given, position_ids=turn.queries, use_cache=False).last_hidden_state
    return states


def _filled(
    base: Base, adapters: Adapters | None, lanes: Sequence[int], segments: tuple[Segment, ...]
) -> AbstractContextManager[None]:
    """Point the layers at the adapters of these lanes; None: at nothing."""
    if adapters is None:
        return nullcontext()
    own = adapters.take(torch.tensor(lanes))
    return base.stack.filled(own, dtype=base.dtype, device=base.device, segments=segments)


@dataclass(frozen=True, eq=False)
class _Packed:
    """layers: keys and values [H', N, D] of all passes; opening, rest [n]: the tokens of each lane, each text."""

    states: Tensor
    layers: list[tuple[Tensor, Tensor]]
    opening: list[Tensor]
    rest: list[Tensor]

    def openings(self, lanes: Sequence[int], length: int) -> Part:
        return self._part([self.opening[lane] for lane in lanes], length)

    def rests(self, places: Sequence[int], length: int) -> Part:
        return self._part([self.rest[place] for place in places], length)

    def _part(self, rows: Sequence[Tensor], length: int) -> Part:
        index = torch.zeros(len(rows), length, dtype=torch.int64)
        for row, own in zip(index, rows, strict=True):
            row[: len(own)] = own[:length]
        keys, values = [], []
        for key, value in self.layers:
            keys.append(pick(key, index))
            values.append(pick(value, index))
        return Part(len(rows), length, keys, values)


def _packed(base: Base, adapters: Adapters | None, lanes: Sequence[Lane]) -> _Packed:
    states, layers = [], []
    opening: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(lanes)
    rest: list[Tensor] = []
    start = 0  # of a pass among all tokens
    for some in _deal(lanes):
        parts = [[asking(ids, base.pad_id) for ids in prompts] for _, prompts in some]
        plan = plan_pass(base, collate(parts, pad_id=base.pad_id))
        assert isinstance(plan.attention, Spans)
        kept: list[tuple[Tensor, Tensor]] = []
        chosen = [some[place][0] for place in plan.order.tolist()]
        with _filled(base, adapters, chosen, plan.segments):
            found = states_of(base, plan, kept=kept)
        # Rows stand as the pass has its clients; ours as the lanes.
        order = torch.argsort(plan.owner, stable=True)
        states.append(found[order])
        layers.append([(key[0], value[0]) for key, value in kept])
        sharing = {one.stop - 2: one for one in plan.attention.sharing}  # behind a prompt stands a token to predict
        ends = iter(plan.where[order].tolist())
        for k, prompts in some:
            for ids in prompts:
                end = next(ends)
                places = torch.arange(end + 1 - len(ids), end + 1)
                if end in sharing:
                    begin, common = sharing[end].begin, sharing[end].shared
                    places[:common] = torch.arange(begin, begin + common)
                opening[k] = start + places[: lanes[k].shared]
                rest.append(start + places[lanes[k].shared :])
        start += plan.ids.shape[1]
    joined = layers[0] if len(layers) == 1 else [_join(parts) for parts in zip(*layers, strict=True)]
    return _Packed(torch.cat(states), joined, opening, rest)


def _join(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def _deal(lanes: Sequence[Lane]) -> Iterator[list[tuple[int, list[tuple[int, ...]]]]]:
    """Deal prompts in turn, with their lanes, into passes of PACKED_TOKENS or of a single prompt."""
    some: list[tuple[int, list[tuple[int, ...]]]] = []
    used = 0
    for k, lane in enumerate(lanes):
        for ids in lane.prompts:
            size = len(ids) - (lane.shared if some and some[-1][0] == k else 0)
            if some and used + size > PACKED_TOKENS:
                yield some
                some, used, size = [], 0, len(ids)
            if not some or some[-1][0] != k:
                some.append((k, []))
            some[-1][1].append(ids)
            used += size
    yield some


@dataclass(frozen=True, eq=False)
class _Padded:
    """first: keys and values of every lane's beginning; filled: the part that holds a text's, and its row there."""

    states: Tensor
    first: Part
    filled: dict[int, tuple[Part, int]]

    def openings(self, lanes: Sequence[int], length: int) -> Part:
        return self.first.of(torch.tensor(lanes, dtype=torch.int64, device=self.states.device), length)

    def rests(self, places: Sequence[int], length: int) -> Part:
        found = Part(len(places), length)
        by_part: dict[Part, list[tuple[int, int]]] = {}
        for row, place in enumerate(places):
            part, there = self.filled[place]
            by_part.setdefault(part, []).append((row, there))
        for part, rows in by_part.items():
            here, from_there = (torch.tensor(one, device=self.states.device) for one in zip(*rows, strict=True))
            found.copy(part, here, from_there)
        return found


def _padded(base: Base, rules: Rules, adapters: Adapters | None, lanes: Sequence[Lane]) -> _Padded:
    first = Part(len(lanes), max(lane.shared for lane in lanes))
    openings = [Text(k, k, lane.prompts[0][: lane.shared], 0) for k, lane in enumerate(lanes) if lane.shared]
    for batch in deal_batches(openings):
        _fill(base, rules, adapters, batch, into=first, rows=[text.place for text in batch], enough=True)
    texts = texts_of(lanes)
    states: dict[int, Tensor] = {}
    filled: dict[int, tuple[Part, int]] = {}
    for batch in deal_batches(texts):
        part = Part(len(batch), max(len(text.tokens) for text in batch))
        found = _fill(base, rules, adapters, batch, into=part, after=first)
        for row, text in enumerate(batch):
            states[text.place] = found[row]
            filled[text.place] = (part, row)
    return _Padded(torch.stack([states[text.place] for text in texts]), first, filled)


def _fill(
    base: Base,
    rules: Rules,
    adapters: Adapters | None,
    texts: Sequence[Text],
    *,
    into: Part,
    after: Part | None = None,
    rows: list[int] | None = None,
    enough: bool = False,
) -> Tensor:
    """Compute one batch of texts, padded on the right: nothing real sees what comes after it.

    Returns the last hidden states [n, d]; none if keys and values are `enough`. rows: of `into`, None for all in turn.
    """
    device = base.device
    sizes = torch.tensor([len(text.tokens) for text in texts])
    begins = torch.tensor([text.after for text in texts])
    longest, before = int(sizes.max()), int(begins.max())
    ids = torch.full((len(texts), longest), base.pad_id)
    for row, text in enumerate(texts):
        ids[row, : len(text.tokens)] = torch.tensor(text.tokens)
    # No position beyond a text's own: the base may have no more.
    queries = begins[:, None] + torch.minimum(torch.arange(longest), sizes[:, None] - 1)
    keys = places_of(longest, begins, sizes)
    earlier = []
    if after is not None and before:
        keys = torch.cat([places_of(before, torch.zeros_like(begins), begins), keys], dim=1)
        earlier.append(after.seen_by(torch.tensor([text.lane for text in texts], device=device), before))
    turn = Turn(
        into=into,
        rows=slice(None) if rows is None else torch.tensor(rows, device=device),
        place=0,
        earlier=earlier,
        queries=queries.to(device),
        keys=keys.to(device),
        rules=rules,
        enough_at=len(rules or ()) - 1 if enough else None,
    )
    own = list(dict.fromkeys(text.lane for text in texts))
    with _filled(base, adapters, own, segments_of(texts, longest)), suppress(Enough):
        states = states_after(base, turn, ids.to(device), find_places(ids))
        return states[torch.arange(len(texts), device=device), (sizes - 1).to(device)]
    return torch.empty(0, device=device)
