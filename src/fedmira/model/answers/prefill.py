"""Compute the prompts of a pass: the keys and values that answers continue from, and the states that they start with.

In one of two ways. *Packed*, on a CPU for bases that can: prompts end to end as in training, a client's prefix computed
once, no padding, the last layer at the last tokens only. *Padded*: first the prefix of each lane, then the suffixes in
batches of similar length.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import asking, collate
from fedmira.model.answers.cache import CachedAttention, CachePart, Enough, Rules, positions_of
from fedmira.model.answers.lanes import Lane, Text, deal_batches, segments_of
from fedmira.model.base.load import Base
from fedmira.model.packed.fans import pick
from fedmira.model.packed.packing import Segment
from fedmira.model.packed.spans import Spans
from fedmira.model.packed.virtual import VirtualIndex, find_virtual
from fedmira.model.passes import plan_pass, running
from fedmira.model.seam import attending

PACKED_TOKENS = 8192  # of one packed pass

Prompt = tuple[int, ...]  # its token ids


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Prompts computed. states [n, d]: of the last token of every prompt, lane by lane.

    layers: keys and values [H', N, D] of all tokens, in every layer; prefixes, suffixes: which of the N are the prefix
    of each lane, and the suffix of each prompt.
    """

    states: Tensor
    layers: list[tuple[Tensor, Tensor]]
    prefixes: list[Tensor]
    suffixes: list[Tensor]

    def part(self, rows: Sequence[Tensor], length: int, *, padding: Sequence[Tensor]) -> CachePart:
        """Return keys and values of these tokens, one row each; padding [n]: the token that fills each row up.

        No token sees it, but what is not finite would be seen: it has to be of the row's client.
        """
        index = torch.zeros(0, length, dtype=torch.int64)
        if rows:
            index = torch.stack(list(padding))[:, None].repeat(1, length)
        for row, tokens in zip(index, rows, strict=True):
            row[: len(tokens)] = tokens
        index = index.to(self.states.device)
        keys, values = ([pick(states, index) for states in layers] for layers in zip(*self.layers, strict=True))
        return CachePart(len(rows), length, keys, values)


def suffixes_of(lanes: Sequence[Lane]) -> list[Text]:
    """Return the suffix of each prompt, lane by lane."""
    prompts = [(k, lane.prefix_length, ids) for k, lane in enumerate(lanes) for ids in lane.prompts]
    return [Text(k, number, ids[prefix:], prefix) for number, (k, prefix, ids) in enumerate(prompts)]


def prefill(base: Base, rules: Rules, adapters: Adapters | None, lanes: Sequence[Lane]) -> Prefilled:
    """Compute all prompts of these lanes. adapters [S] of the lanes; None: the base alone."""
    if base.packs and base.device.type == "cpu":
        return _packed(base, adapters, lanes)
    return _padded(base, rules, adapters, lanes)


def states_after(base: Base, attention: CachedAttention, ids: Tensor, virtual: VirtualIndex | None = None) -> Tensor:
    """Return hidden states [R, T, d] of tokens [R, T] that see a cache. virtual: where virtual tokens are."""
    with attending(base.model, attention):
        inputs = base.inputs(ids, virtual)
        states: Tensor = base.decoder(**inputs, position_ids=attention.queries, use_cache=False).last_hidden_state
    return states


def _packed(base: Base, adapters: Adapters | None, lanes: Sequence[Lane]) -> Prefilled:
    states, layers = [], []
    prefixes: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(lanes)
    suffixes: list[Tensor] = []
    start = 0  # of a pass among all tokens
    for dealt in _deal_prompts(lanes):
        examples = [[asking(ids, base.pad_id) for ids in prompts] for _, prompts in dealt]
        plan = plan_pass(base, collate(examples, pad_id=base.pad_id))
        assert isinstance(plan.attention, Spans)
        keys_values: list[tuple[Tensor, Tensor]] = []
        chosen = torch.tensor([lane for lane, _ in dealt])
        with running(base, plan, adapters, clients=chosen, keys_values=keys_values) as last_states:
            order = torch.argsort(plan.owner, stable=True)  # from the order of the pass to that of the lanes
            states.append(last_states[order])
        layers.append([(key[0], value[0]) for key, value in keys_values])
        ends = iter(plan.labelled[order].tolist())
        by_end = {suffix.stop - 2: suffix for suffix in plan.attention.suffixes}  # a token to predict follows a prompt
        for lane, prompts in dealt:
            prefix_length = lanes[lane].prefix_length
            for ids in prompts:
                end = next(ends)
                index = torch.arange(end + 1 - len(ids), end + 1)
                if end in by_end:
                    suffix = by_end[end]
                    index[: suffix.prefix_length] = suffix.prefix_start + torch.arange(suffix.prefix_length)
                prefixes[lane] = start + index[:prefix_length]
                suffixes.append(start + index[prefix_length:])
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


def _deal_prompts(lanes: Sequence[Lane]) -> Iterator[list[tuple[int, list[Prompt]]]]:
    """Deal prompts in turn, with their lanes, into passes of PACKED_TOKENS or of a single prompt."""
    dealt: list[tuple[int, list[Prompt]]] = []
    used = 0
    for k, lane in enumerate(lanes):
        for ids in lane.prompts:
            size = len(ids) - (lane.prefix_length if dealt and dealt[-1][0] == k else 0)
            if dealt and used + size > PACKED_TOKENS:
                yield dealt
                dealt, used, size = [], 0, len(ids)
            if not dealt or dealt[-1][0] != k:
                dealt.append((k, []))
            dealt[-1][1].append(ids)
            used += size
    yield dealt


def _padded(base: Base, rules: Rules, adapters: Adapters | None, lanes: Sequence[Lane]) -> Prefilled:
    prefix_part = CachePart(len(lanes), max(lane.prefix_length for lane in lanes))
    prefixes = [
        Text(k, k, lane.prompts[0][: lane.prefix_length], 0) for k, lane in enumerate(lanes) if lane.prefix_length
    ]
    for batch in deal_batches(prefixes):
        rows = [text.number for text in batch]
        _prefill_batch(base, rules, adapters, batch, into=prefix_part, rows=rows, enough=True)
    texts = suffixes_of(lanes)
    states: dict[int, Tensor] = {}
    suffixes: dict[int, Tensor] = {}
    parts = [prefix_part] if prefixes else []
    start = len(lanes) * prefix_part.length  # of a batch among all tokens
    for batch in deal_batches(texts):
        part = CachePart(len(batch), max(len(text.tokens) for text in batch))
        last_states = _prefill_batch(base, rules, adapters, batch, into=part, after=prefix_part)
        for row, text in enumerate(batch):
            states[text.number] = last_states[row]
            suffixes[text.number] = start + row * part.length + torch.arange(len(text.tokens))
        parts.append(part)
        start += part.count * part.length
    return Prefilled(
        states=torch.stack([states[text.number] for text in texts]),
        layers=_join([[(_flatten(key), _flatten(value)) for key, value in part.layers] for part in parts]),
        prefixes=[k * prefix_part.length + torch.arange(lane.prefix_length) for k, lane in enumerate(lanes)],
        suffixes=[suffixes[text.number] for text in texts],
    )


def _flatten(states: Tensor) -> Tensor:
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
    """Compute one batch of texts, padded on the right: no token of theirs sees what comes after it.

    Returns the last hidden states [n, d]; none if keys and values are `enough`. rows: of `into`, None for all in turn.
    """
    device = base.device
    sizes = torch.tensor([len(text.tokens) for text in texts])
    starts = torch.tensor([text.position for text in texts])
    longest, before = int(sizes.max()), int(starts.max())
    ids = torch.full((len(texts), longest), base.pad_id)
    for row, text in enumerate(texts):
        ids[row, : len(text.tokens)] = torch.tensor(text.tokens)
    # No position beyond a text's last: the base may have no more.
    queries = starts[:, None] + torch.minimum(torch.arange(longest), sizes[:, None] - 1)
    keys = positions_of(longest, starts, sizes)
    earlier = []
    if after is not None and before:
        keys = torch.cat([positions_of(before, torch.zeros_like(starts), starts), keys], dim=1)
        earlier.append(after.seen_by(torch.tensor([text.lane for text in texts], device=device), before))
    attention = CachedAttention(
        into=into,
        rows=slice(None) if rows is None else torch.tensor(rows, device=device),
        column=0,
        earlier=earlier,
        queries=queries.to(device),
        keys=keys.to(device),
        rules=rules,
        enough_at=len(rules) - 1 if enough else None,
    )
    lanes = list(dict.fromkeys(text.lane for text in texts))
    with _filled(base, adapters, lanes, segments_of(texts, longest)), suppress(Enough):
        states = states_after(base, attention, ids.to(device), find_virtual(ids))
        return states[torch.arange(len(texts), device=device), (sizes - 1).to(device)]
    return torch.empty(0, device=device)


def _filled(
    base: Base, adapters: Adapters | None, lanes: Sequence[int], segments: tuple[Segment, ...]
) -> AbstractContextManager[None]:
    """Point the base's layers at the adapters of these lanes; None: at nothing."""
    if adapters is None:
        return nullcontext()
    chosen = adapters.take(torch.tensor(lanes))
    return base.stack.filled(chosen, dtype=base.dtype, device=base.device, segments=segments)
