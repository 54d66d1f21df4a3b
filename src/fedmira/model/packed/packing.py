"""Packing: the examples of all clients laid end to end, so that no layer ever computes padding.

A pass is one sequence of N tokens. Clients come one after another, those with about as many tokens as a *segment* that
a batched product can view as [clients, tokens, width]; the filler that rounds a client up to its segment's size is a
separate example without label. Only attention needs to know where examples begin (attention.py). Positions restart at
every example.

Examples of a client often begin with the same prefix, the task's instruction. It is computed once: no later token
changes it, and the gradients that come back to it from several examples add up. Losses and gradients stay the same.

Which tokens a layer may see is what its attention mask says: all before it, a sliding window, a chunk. In a packed pass
transformers passes the rule of that mask instead of the mask (see `seam.Rule`), so a window longer than any text of the
trials is obeyed too.

A base whose architecture cannot do this (no attention interface, ALiBi, ...) is found by measurement when it is loaded
and gets padded batches instead; see trial.py.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmira.data.batches import NO_LOSS, Batch
from fedmira.model.packed.buckets import Buckets, make_buckets
from fedmira.model.packed.spans import Spans, make_spans
from fedmira.model.packed.virtual import VirtualIndex, find_virtual

PREFIX_TOKENS = 8  # a shorter prefix of a client's examples is not shared
LONG_SUFFIX = 256  # an example with a longer suffix shares nothing
SEGMENT_FILL = 0.92  # a segment takes clients with at least this share of its largest one's tokens


@dataclass(frozen=True)
class Segment:
    """Clients first..stop of the pass, each with `tokens` tokens, the first of them at `start` of the sequence.

    real: for each client, which of its tokens are not filler.
    """

    first: int
    stop: int
    start: int
    tokens: int
    real: tuple[Tensor | slice, ...]

    def view(self, flat: Tensor) -> Tensor:
        """View this segment's part of [N, width] as [clients, tokens, width]."""
        count = self.stop - self.first
        return flat[self.start : self.start + count * self.tokens].view(count, self.tokens, flat.shape[-1])


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass through the base. order [S']: the batch's clients that have tokens, in the order of the sequence.

    ids and positions are [1, N] when packed; padded: ids [S*B, T], positions None. labelled [n]: the tokens, counted
    along the flattened hidden states, that predict targets [n]; owner [n]: their client in the batch, example [n]:
    their example of that client; counts [S].
    labelled_segments: the clients' segments of those n tokens alone (packed). virtual: where virtual tokens are.
    """

    ids: Tensor
    positions: Tensor | None
    order: Tensor
    segments: tuple[Segment, ...]
    attention: Spans | Buckets | None
    labelled: Tensor
    targets: Tensor
    owner: Tensor
    example: Tensor
    counts: Tensor
    labelled_segments: tuple[Segment, ...] = ()
    virtual: VirtualIndex | None = None

    def to(self, device: torch.device) -> "Pass":
        """Move everything but `order` (which indexes clients on the host) to a device."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            ids=self.ids.to(device),
            positions=None if self.positions is None else self.positions.to(device),
            attention=None if self.attention is None else self.attention.to(device),
            labelled=self.labelled.to(device),
            targets=self.targets.to(device),
            owner=self.owner.to(device),
            example=self.example.to(device),
            counts=self.counts.to(device),
        )


@dataclass(frozen=True)
class Group:
    """Examples of one client that share a prefix of `prefix_length` tokens, which is in the sequence once."""

    client: int
    examples: tuple[int, ...]
    prefix_length: int


def pack(batch: Batch, *, pad_id: int, fused: bool = False, share: bool = False) -> Pass:
    """Lay a batch end to end.

    fused: for a device whose attention is (see buckets.py). share: compute the prefix of a client's examples once for
    several of them; for plainly causal attention in spans only.
    """
    lengths = batch.lengths
    client_groups = _groups(batch) if share and not fused else _ungrouped(lengths)
    totals = torch.tensor([sum(_count_tokens(group, lengths) for group in groups) for groups in client_groups])
    longest = int(lengths.max())
    order = torch.argsort(totals, descending=True, stable=True)
    order = order[totals[order] > 0]
    segments = _segments(totals[order].tolist())
    ids: list[Tensor] = []
    predicted: list[Tensor] = []  # per token of the sequence, the label of the next one
    owners: list[Tensor] = []
    members: list[Tensor] = []  # per token of the sequence, its example; 0 where there is no label
    group_lengths: list[tuple[int, ...]] = []  # tokens of the prefix, of each suffix; fillers included
    for segment in segments:
        for client in order[segment.first : segment.stop].tolist():
            for group in client_groups[client]:
                prefix = group.prefix_length
                if prefix:
                    ids.append(batch.ids[client, group.examples[0], :prefix])
                    predicted.append(torch.full((prefix,), NO_LOSS))
                    members.append(torch.zeros(prefix, dtype=torch.int64))
                suffix_lengths = []
                for example in group.examples:
                    length = int(lengths[client, example])
                    ids.append(batch.ids[client, example, prefix:length])
                    predicted.append(batch.labels[client, example, prefix + 1 : length])
                    predicted.append(torch.full((1,), NO_LOSS))
                    members.append(torch.full((length - prefix,), example))
                    suffix_lengths.append(length - prefix)
                group_lengths.append((prefix, *suffix_lengths))
            filler = segment.tokens - int(totals[client])
            if filler:
                ids.append(torch.full((filler,), pad_id))
                predicted.append(torch.full((filler,), NO_LOSS))
                members.append(torch.zeros(filler, dtype=torch.int64))
                # In pieces no longer than a real example: for these the base has positions.
                group_lengths += [(0, longest)] * (filler // longest) + [(0, filler % longest)] * (filler % longest > 0)
            owners.append(torch.full((segment.tokens,), client))
    labels = torch.cat(predicted)
    labelled = torch.nonzero(labels != NO_LOSS).squeeze(1)
    owner = torch.cat(owners)[labelled]
    counts = torch.bincount(owner, minlength=len(totals))
    flat = torch.cat(ids)
    return Pass(
        ids=flat[None],
        positions=_positions(group_lengths)[None],
        order=order,
        segments=tuple(segments),
        attention=_attention(group_lengths, labelled, longest=longest, fused=fused),
        labelled=labelled,
        targets=labels[labelled],
        owner=owner,
        example=torch.cat(members)[labelled],
        counts=counts,
        labelled_segments=_labelled_segments(counts[order].tolist()),
        virtual=find_virtual(flat),
    )


def _count_tokens(group: Group, lengths: Tensor) -> int:
    """Count the tokens that a group takes in the sequence."""
    total = int(lengths[group.client, list(group.examples)].sum())
    return total - (len(group.examples) - 1) * group.prefix_length


def _positions(group_lengths: list[tuple[int, ...]]) -> Tensor:
    """Return the position of every token: suffixes continue from their prefix."""
    pieces: list[Tensor] = []
    for prefix, *suffixes in group_lengths:
        pieces += [torch.arange(prefix), *(torch.arange(prefix, prefix + suffix) for suffix in suffixes)]
    return torch.cat(pieces)


def _attention(group_lengths: list[tuple[int, ...]], labelled: Tensor, *, longest: int, fused: bool) -> Spans | Buckets:
    if not fused:
        return make_spans(group_lengths, labelled, longest=longest)
    sizes = torch.tensor([size for _, size in group_lengths])
    return make_buckets(sizes, torch.cumsum(sizes, 0) - sizes)


def _ungrouped(lengths: Tensor) -> list[list[Group]]:
    return [
        [Group(client, (example,), 0) for example, length in enumerate(example_lengths) if length]
        for client, example_lengths in enumerate(lengths.tolist())
    ]


def _groups(batch: Batch) -> list[list[Group]]:
    """Put examples of a client that share a prefix into groups: those in turn whose suffixes are not long.

    A prefix ends before the token that predicts an example's first label: that one belongs to its example.
    """
    ids, lengths = batch.ids, batch.lengths
    absent = lengths == 0
    same = ((ids == ids[:, :1]) | absent[..., None]).all(1).int().cumprod(1).sum(1)  # [S]
    labelled = batch.labels != NO_LOSS
    first_label = torch.where(labelled.any(2), labelled.int().argmax(2), lengths)  # [S, B]
    room = torch.where(absent, ids.shape[2], torch.minimum(first_label, lengths) - 1).amin(1)
    common = torch.minimum(same, room).tolist()
    client_groups: list[list[Group]] = []
    for client, example_lengths in enumerate(lengths.tolist()):
        prefix = common[client] if common[client] >= PREFIX_TOKENS else 0
        shares = [prefix > 0 and length - prefix <= LONG_SUFFIX for length in example_lengths]
        groups: list[Group] = []
        for example, length in enumerate(example_lengths):
            if not length:
                continue
            if shares[example] and groups and shares[groups[-1].examples[-1]]:
                groups[-1] = Group(client, (*groups[-1].examples, example), prefix)
            else:
                groups.append(Group(client, (example,), 0))
        client_groups.append(groups)
    return client_groups


def pad(batch: Batch) -> Pass:
    """Take a batch as it is, padding included, for bases that cannot be packed."""
    clients, size, length = batch.ids.shape
    labels = torch.full((clients * size, length), NO_LOSS)
    labels[:, :-1] = batch.labels.view(clients * size, length)[:, 1:]
    labels = labels.flatten()
    labelled = torch.nonzero(labels != NO_LOSS).squeeze(1)
    owner = labelled // (size * length)
    inside = torch.arange(length) < batch.lengths[:, :, None]
    real = tuple(torch.nonzero(client.flatten()).squeeze(1) for client in inside)
    return Pass(
        ids=batch.ids.view(clients * size, length),
        positions=None,
        order=torch.arange(clients),
        segments=(Segment(0, clients, 0, size * length, real),),
        attention=None,
        labelled=labelled,
        targets=labels[labelled],
        owner=owner,
        example=labelled // length % size,
        counts=torch.bincount(owner, minlength=clients),
        virtual=find_virtual(batch.ids),
    )


def _segments(totals: list[int]) -> list[Segment]:
    """Put clients, in descending order of their tokens, into segments with little filler."""
    segments: list[Segment] = []
    first = start = 0
    while first < len(totals):
        tokens = _round_up(totals[first])
        stop = first + 1
        while stop < len(totals) and totals[stop] >= SEGMENT_FILL * tokens:
            stop += 1
        real = tuple(slice(0, total) for total in totals[first:stop])
        segments.append(Segment(first, stop, start, tokens, real))
        start += (stop - first) * tokens
        first = stop
    return segments


def _round_up(tokens: int) -> int:
    """Round up by at most 3 %: a size that occurred before needs no product to be set up."""
    step = 1 << max(int(0.03 * tokens).bit_length() - 1, 0)
    return -(-tokens // step) * step


def _labelled_segments(counts: list[int]) -> tuple[Segment, ...]:
    """Return segments of labelled tokens: neighbours in the order of the sequence with equally many share one."""
    segments = []
    first = start = 0
    while first < len(counts):
        count, stop = counts[first], first + 1
        while stop < len(counts) and counts[stop] == count:
            stop += 1
        if count:
            segments.append(Segment(first, stop, start, count, (slice(0, count),) * (stop - first)))
        start += (stop - first) * count
        first = stop
    return tuple(segments)
