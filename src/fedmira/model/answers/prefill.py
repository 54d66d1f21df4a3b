"""Compute the prompts of a pass: the keys and values that answers go on from, and the states that begin them.

Two roads. *Packed*, on a CPU for bases that can: prompts end to end as in training, what a client's begin with computed
once, no padding, the last layer at the last tokens only. *Padded*: first what the prompts of each lane begin with, then
the rest of them in batches of similar length.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import asking, collate
from fedmira.model.answers.cache import CachedAttention, CachePart, Enough, Rules, attending, positions_of
from fedmira.model.answers.lanes import Lane, Text, deal_batches, segments_of
from fedmira.model.base.load import Base
from fedmira.model.packed.fans import pick
from fedmira.model.packed.packing import Segment
from fedmira.model.packed.spans import Spans
from fedmira.model.packed.virtual import VirtualIndex, find_virtual
from fedmira.model.passes import plan_pass, states_of

PACKED_TOKENS = 8192  # of one packed pass


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Texts computed, each what its prompt has beyond what its lane shares. states [n, d]: of every text's last token.

    layers: keys and values [H', N, D] of all tokens, in every layer; prefixes, suffixes: which of the N are the prefix
    of each lane, and the suffix of each prompt.
    """

    states: Tensor
    layers: list[tuple[Tensor, Tensor]]
    prefixes: list[Tensor]
    suffixes: list[Tensor]

    def part(self, rows: Sequence[Tensor], length: int, *, padding: Sequence[Tensor]) -> CachePart:
        """Return keys and values of these tokens, a row each; blanks [n]: what stands in a row's places beyond its own.

        Nobody sees it, but what is not finite would be seen: it has to be of the row's own client.
        """
        index = (
            torch.stack(list(padding))[:, None].repeat(1, length) if rows else torch.zeros(0, length, dtype=torch.int64)
        )
        for row, own in zip(index, rows, strict=True):
            row[: len(own)] = own
        index = index.to(self.states.device)
        keys, values = ([pick(states, index) for states in kept] for kept in zip(*self.layers, strict=True))
        return CachePart(len(rows), length, keys, values)


def suffixes_of(lanes: Sequence[Lane]) -> list[Text]:
    """Return what each prompt has of its own, lane by lane."""
    asked = [(k, lane, ids) for k, lane in enumerate(lanes) for ids in lane.prompts]
    return [Text(k, place, ids[lane.prefix_length :], lane.prefix_length) for place, (k, lane, ids) in enumerate(asked)]


def prefill(base: Base, rules: Rules, adapters: Adapters | None, lanes: Sequence[Lane]) -> Prefilled:
    """Compute all prompts of these lanes. adapters [S] of the lanes; None: the base alone."""
    if base.packs and base.device.type == "cpu":
        return _packed(base, adapters, lanes)
    return _padded(base, rules, adapters, lanes)


def states_after(base: Base, attention: CachedAttention, ids: Tensor, virtual: VirtualIndex | None = None) -> Tensor:
    """Hidden states [R, T, d] of tokens [R, T] that see what is kept. virtual: where virtual tokens stand."""
    with attending(base.model, attention):
        given = base.inputs(ids, virtual)
        states: Tensor = base.decoder(**given, position_ids=attention.queries, use_cache=False).last_hidden_state
    return states


def _filled(
    base: Base, adapters: Adapters | None, lanes: Sequence[int], segments: tuple[Segment, ...]
) -> AbstractContextManager[None]:
    """Point the layers at the adapters of these lanes; None: at nothing."""
    if adapters is None:
        return nullcontext()
    own = adapters.take(torch.tensor(lanes))
    return base.stack.filled(own, dtype=base.dtype, device=base.device, segments=segments)


def _packed(base: Base, adapters: Adapters | None, lanes: Sequence[Lane]) -> Prefilled:
    states, layers = [], []
    prefixes: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(lanes)
    suffixes: list[Tensor] = []
    start = 0  # of a pass among all tokens
    for some in _deal_prompts(lanes):
        parts = [[asking(ids, base.pad_id) for ids in prompts] for _, prompts in some]
        plan = plan_pass(base, collate(parts, pad_id=base.pad_id))
        assert isinstance(plan.attention, Spans)
        keys_values: list[tuple[Tensor, Tensor]] = []
        chosen = [some[place][0] for place in plan.order.tolist()]
        with _filled(base, adapters, chosen, plan.segments):
            found = states_of(base, plan, keys_values=keys_values)
        # Rows stand as the pass has its clients; ours as the lanes.
        order = torch.argsort(plan.owner, stable=True)
        states.append(found[order])
        layers.append([(key[0], value[0]) for key, value in keys_values])
        sharing = {one.stop - 2: one for one in plan.attention.suffixes}  # behind a prompt stands a token to predict
        ends = iter(plan.labelled[order].tolist())
        for k, prompts in some:
            for ids in prompts:
                end = next(ends)
                places = torch.arange(end + 1 - len(ids), end + 1)
                if end in sharing:
                    begin, common = sharing[end].prefix_start, sharing[end].prefix_length
                    places[:common] = torch.arange(begin, begin + common)
                prefixes[k] = start + places[: lanes[k].prefix_length]
                suffixes.append(start + places[lanes[k].prefix_length :])
        start += plan.ids.shape[1]
    return Prefilled(torch.cat(states), _join(layers), prefixes, suffixes)


def _join(passes: Sequence[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Put the tokens of all passes, keys and values [H', N, D] of every layer, one after another."""
    if len(passes) == 1:
        return passes[0]
    joined = []
    for layers in zip(*passes, strict=True):
        keys, values = zip(*layers, strict=True)
        joined.append((torch.cat(keys, dim=1), torch.cat(values, dim=1)))
    return joined


def _deal_prompts(lanes: Sequence[Lane]) -> Iterator[list[tuple[int, list[tuple[int, ...]]]]]:
    """Deal prompts in turn, with their lanes, into passes of PACKED_TOKENS or of a single prompt."""
    some: list[tuple[int, list[tuple[int, ...]]]] = []
    used = 0
    for k, lane in enumerate(lanes):
        for ids in lane.prompts:
            size = len(ids) - (lane.prefix_length if some and some[-1][0] == k else 0)
            if some and used + size > PACKED_TOKENS:
                yield some
                some, used, size = [], 0, len(ids)
            if not some or some[-1][0] != k:
                some.append((k, []))
            some[-1][1].append(ids)
            used += size
    yield some


def _padded(base: Base, rules: Rules, adapters: Adapters | None, lanes: Sequence[Lane]) -> Prefilled:
    first = CachePart(len(lanes), max(lane.prefix_length for lane in lanes))
    prefix_texts = [
        Text(k, k, lane.prompts[0][: lane.prefix_length], 0) for k, lane in enumerate(lanes) if lane.prefix_length
    ]
    for batch in deal_batches(prefix_texts):
        _prefill_batch(base, rules, adapters, batch, into=first, rows=[text.number for text in batch], enough=True)
    texts = suffixes_of(lanes)
    states: dict[int, Tensor] = {}
    suffixes: dict[int, Tensor] = {}
    parts = [first] if prefix_texts else []
    start = len(lanes) * first.length  # of a batch among all tokens
    for batch in deal_batches(texts):
        part = CachePart(len(batch), max(len(text.tokens) for text in batch))
        found = _prefill_batch(base, rules, adapters, batch, into=part, after=first)
        for row, text in enumerate(batch):
            states[text.number] = found[row]
            suffixes[text.number] = start + row * part.length + torch.arange(len(text.tokens))
        parts.append(part)
        start += part.count * part.length
    return Prefilled(
        states=torch.stack([states[text.number] for text in texts]),
        layers=_join([[(_in_turn(key), _in_turn(value)) for key, value in part.layers] for part in parts]),
        prefixes=[k * first.length + torch.arange(lane.prefix_length) for k, lane in enumerate(lanes)],
        suffixes=[suffixes[text.number] for text in texts],
    )


def _in_turn(states: Tensor) -> Tensor:
    """View or copy states [n, H, T, D] as [H, n T, D]."""
    return states.transpose(0, 1).flatten(1, 2)


def _prefill_batch(
    base: Base,
    rules: Rules,
    adapters: Adapters | None,
    texts: Sequence[Text],
    *,
    into: CachePart,
    after: CachePart | None = None,
    rows: list[int] | None = None,
    enough: bool = False,
) -> Tensor:
    """Compute one batch of texts, padded on the right: nothing real sees what comes after it.

    Returns the last hidden states [n, d]; none if keys and values are `enough`. rows: of `into`, None for all in turn.
    """
    device = base.device
    sizes = torch.tensor([len(text.tokens) for text in texts])
    begins = torch.tensor([text.position for text in texts])
    longest, before = int(sizes.max()), int(begins.max())
    ids = torch.full((len(texts), longest), base.pad_id)
    for row, text in enumerate(texts):
        ids[row, : len(text.tokens)] = torch.tensor(text.tokens)
    # No position beyond a text's own: the base may have no more.
    queries = begins[:, None] + torch.minimum(torch.arange(longest), sizes[:, None] - 1)
    keys = positions_of(longest, begins, sizes)
    earlier = []
    if after is not None and before:
        keys = torch.cat([positions_of(before, torch.zeros_like(begins), begins), keys], dim=1)
        earlier.append(after.seen_by(torch.tensor([text.lane for text in texts], device=device), before))
    attention = CachedAttention(
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
        states = states_after(base, attention, ids.to(device), find_virtual(ids))
        return states[torch.arange(len(texts), device=device), (sizes - 1).to(device)]
    return torch.empty(0, device=device)
