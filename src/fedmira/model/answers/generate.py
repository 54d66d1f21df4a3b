"""Greedy answers of many clients at once, each with its own adapter, with keys and values cached between tokens.

A pass takes *lanes* of prompts, each of one client. What all prompts of a client begin with (a task's instruction) is
computed and cached once per lane (prefill.py), and every prompt gives its answer's first token. Answers that go on
become rows, w per lane (some blank), so that the low-rank part stays one `bmm` over the clients; every row writes one
token per step, and when enough rows have ended the others are drawn together.

Any decoder can do this whose layers ask transformers' attention interface and take `position_ids`. Whether one does is
measured on random tokens when it first answers; the others (recurrent layers, ALiBi, ...) are left to transformers'
`generate`, with prompts padded on the left.

Greedy means: the largest logit, the lowest id among equals; no penalties, no forced or forbidden tokens. An answer
ends after any of the base's end-of-text ids, or after `max_new_tokens`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig

from fedmira.adapters import Adapters
from fedmira.model.answers.cache import CachedAttention, CachePart, Sees, positions_of
from fedmira.model.answers.lanes import ANSWER_ROWS, Lane, Text, deal_rows, mark_filler, plan_passes, suffix_limit
from fedmira.model.answers.prefill import Prefilled, prefill, states_after, suffixes_of
from fedmira.model.base.load import Base, quiet
from fedmira.model.base.source import first_line
from fedmira.model.packed.virtual import find_virtual, virtual_ids

__all__ = ["ANSWER_ROWS", "answers", "padded_answers"]

log = logging.getLogger(__name__)

COMPACT_SHARE = 0.75  # the rows are drawn together when so few of them are still writing
LOGIT_BYTES = 64 * 2**20  # float32 logits held at once
GROW_TOKENS = 16  # tokens that room is made for at once: attention over a length not seen before is set up anew
CHECK_EVERY = 8  # tokens between two looks at which rows have ended, where looking makes the host wait


def answers(
    base: Base, adapters: Adapters, prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int
) -> list[list[str]]:
    """Return the greedy answer to every prompt; prompts[k] are the token ids of client k's, at least one token each.

    A client's virtual tokens stand before each. All of it and the answer must fit in the base's positions: the data
    layer cuts prompts for that, and counts.
    """
    first = virtual_ids(adapters.layout.virtual_tokens)
    prompts = [[(*first, *ids) for ids in own] for own in prompts]
    facts = _find_cache_facts(base)
    found = [[""] * len(own) for own in prompts]
    token_bytes = None if facts is None else facts.token_bytes
    for lanes in plan_passes(prompts, max_new_tokens=max_new_tokens, token_bytes=token_bytes):
        own = adapters.take(torch.tensor([lane.client for lane in lanes]))
        if facts is None:
            texts = padded_answers(base, own, [lane.prompts for lane in lanes], max_new_tokens=max_new_tokens)
        else:
            written = _write(base, facts, own, lanes, max_new_tokens=max_new_tokens)
            texts = [base.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in written]
        for lane, said in zip(lanes, texts, strict=True):
            for place, text in zip(lane.numbers, said, strict=True):
                found[lane.client][place] = text
    return found


def padded_answers(
    base: Base, adapters: Adapters, prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int
) -> list[list[str]]:
    """Return the same by transformers' `generate`, in one batch with prompts padded on the left; at least one."""
    width = max(len(own) for own in prompts)
    filler = [base.pad_id]
    flat = [list(ids) for own in prompts for ids in [*own, *[filler] * (width - len(own))]]
    longest = max(len(ids) for ids in flat)
    tokens = torch.full((len(flat), longest), base.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(flat):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    greedy = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=base.pad_id)
    with base.stack.filled(adapters, dtype=base.dtype, device=base.device), torch.no_grad(), quiet():
        given = base.inputs(tokens.to(base.device), find_virtual(tokens))
        out = base.model.generate(**given, attention_mask=mask.to(base.device), generation_config=greedy)
    stops = set(_stops(base))
    new = out[:, longest:] if "input_ids" in given else out  # after embeddings only what is new comes back
    written = [_until(row, stops) for row in new.tolist()]
    texts = base.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [texts[k * width : k * width + len(own)] for k, own in enumerate(prompts)]


def _until(ids: Sequence[int], stops: set[int]) -> list[int]:
    """Cut after the first end of text."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[: end + 1])


def _stops(base: Base) -> list[int]:
    """The ids that end a text: those of the checkpoint and the tokenizer's, as loaded (see load.wrap)."""
    assert base.model.generation_config is not None
    found = base.model.generation_config.eos_token_id
    return [found] if isinstance(found, int) else list(found or [])


@dataclass(frozen=True)
class CacheFacts:
    """What is known of a base whose keys and values can be cached (cache.py).

    token_bytes: keys and values of one token, all layers; rules: what each layer's tokens may see.
    """

    token_bytes: int
    rules: tuple[Sees | None, ...]


@dataclass(eq=False)
class _AnswerRows:
    """Answers that go on, in lanes of equal width w: R rows, blank ones included.

    lanes: the text of each row; a lane's first fills it up. prefixes: keys and values of what a lane's prompts begin
    with; texts: of the rest of each row's, and from `place` on of what it wrote, `new` tokens in all. keys [R, L]:
    positions of all these tokens, NOWHERE for blanks; begins [R]: the position of the first token written. asked [R]:
    each row's prompt, -1 for a blank row; chosen [R]: the last token; ended [R]: whether it needs no further one.
    """

    prompts: Prefilled
    lanes: list[list[Text]]
    prefixes: CachePart
    texts: CachePart
    place: int
    new: int
    keys: Tensor
    begins: Tensor
    numbers: list[int]
    chosen: Tensor
    ended: Tensor

    def compact(self) -> list[list[int]] | None:
        """Return the rows to go on with, as new lanes; None if all may stay."""
        going = (~self.ended).tolist()
        if sum(going) > COMPACT_SHARE * len(going):
            return None
        width = len(self.lanes[0])
        starts = range(0, len(going), width)
        own = [[row for row in range(start, start + width) if going[row]] for start in starts]
        lanes = deal_rows([rows for rows in own if rows], shared=self.prefixes.length, each=self.place + self.new)
        return lanes if sum(len(rows) for rows in lanes) <= COMPACT_SHARE * len(going) else None

    def take(self, lanes: list[list[int]], *, written: int) -> "_AnswerRows":
        """Return what is left when only these rows go on, as `compact` names them, after so many tokens."""
        rows = [text for lane in self.lanes for text in lane]
        index = torch.tensor([row for lane in lanes for row in lane], dtype=torch.int64, device=self.chosen.device)
        chosen = self.chosen.index_select(0, index)
        left = _lay_out(
            self.prompts, [[rows[row] for row in lane] for lane in lanes], chosen, new=self.new, room=written
        )
        here, there = (slice(place, place + written) for place in (left.place, self.place))
        left.texts.copy(self.texts, index, here, there)
        return left


def _write(
    base: Base, facts: CacheFacts, adapters: Adapters, lanes: Sequence[Lane], *, max_new_tokens: int
) -> list[list[list[int]]]:
    """Return the tokens written to each prompt of each lane, the end of text among them; adapters [S] of the lanes."""
    with torch.no_grad(), quiet():
        found, rows = _start_rows(base, facts.rules, adapters, lanes, ends=_stops(base), new=max_new_tokens)
        step = 0
        while rows.lanes:
            own = adapters.take(torch.tensor([lane[0].lane for lane in rows.lanes]))
            with base.stack.filled(own, dtype=base.dtype, device=base.device):
                told, drawn = _write_steps(base, facts, rows, range(step, max_new_tokens - 1))
            step += len(told)
            _append(told, rows, into=found)
            rows = rows.take(drawn, written=step)
    ends = set(_stops(base))
    texts = iter([_until(ids, ends) for ids in found])
    return [[next(texts) for _ in lane.numbers] for lane in lanes]


def _write_steps(
    base: Base, facts: CacheFacts, rows: _AnswerRows, steps: range
) -> tuple[list[Tensor], list[list[int]]]:
    """Write a token per step until the rows are better drawn together; return the tokens [R], and the rows to keep."""
    stops = torch.tensor(_stops(base), device=base.device)
    check = 1 if base.device.type == "cpu" else CHECK_EVERY
    told: list[Tensor] = []
    for step in steps:
        if step % check == 0:
            drawn = rows.compact()
            if drawn is not None:
                return told, drawn
        rows.chosen = _choose(base, _step(base, facts.rules, rows, step))
        rows.ended |= (rows.chosen[:, None] == stops).any(dim=1)
        told.append(rows.chosen)
    return told, []


def _append(told: list[Tensor], rows: _AnswerRows, *, into: list[list[int]]) -> None:
    """Append the tokens chosen since the last time, each [R]."""
    if told:
        for place, ids in zip(rows.numbers, torch.stack(told, dim=1).tolist(), strict=True):
            if place >= 0:
                into[place] += ids


def _start_rows(
    base: Base,
    rules: tuple[Sees | None, ...],
    adapters: Adapters | None,
    lanes: Sequence[Lane],
    *,
    ends: Sequence[int],
    new: int,
) -> tuple[list[list[int]], _AnswerRows]:
    """Compute all prompts; return the first token of each and the rows that go on. adapters None: the base alone."""
    prompts = prefill(base, rules, adapters, lanes)
    found = [[token] for token in _choose(base, prompts.states).tolist()]
    going = [text for text in suffixes_of(lanes) if new > 1 and found[text.number][0] not in ends]
    own = [list(group) for _, group in groupby(going, key=lambda text: text.lane)]
    shared = max((text.position for text in going), default=0)
    dealt = deal_rows(own, shared=shared, each=max((len(text.tokens) for text in going), default=0) + new)
    chosen = torch.tensor([found[text.number][0] for lane in dealt for text in lane], dtype=torch.int64)
    return found, _lay_out(prompts, dealt, chosen.to(base.device), new=new - 1)


def _lay_out(prompts: Prefilled, lanes: list[list[Text]], chosen: Tensor, *, new: int, room: int = 0) -> _AnswerRows:
    """Lay texts out as rows, with room for so many tokens and a few more.

    The beginnings of long ones stand with what their lane shares.
    """
    limit = suffix_limit(lanes)
    prefixes: list[Tensor] = []
    ahead: dict[int, tuple[int, int]] = {}  # of a text: where in its lane its beginning stands, and how long that is
    for lane in lanes:
        tokens = [prompts.prefixes[lane[0].lane]]
        start = lane[0].position
        for text in dict.fromkeys(lane):
            size = max(0, len(text.tokens) - limit)
            tokens.append(prompts.suffixes[text.number][:size])
            ahead[text.number] = start, size
            start += size
        prefixes.append(torch.cat(tokens))
    rows = [text for lane in lanes for text in lane]
    sizes = [(text.position, ahead[text.number][1], len(text.tokens)) for text in rows]
    after, begun, size = torch.tensor(sizes, dtype=torch.int64).view(-1, 3).T
    common = max(map(len, prefixes), default=0)
    shared = positions_of(common, torch.zeros_like(after), after)
    for row, text in enumerate(rows):
        start, count = ahead[text.number]
        shared[row, start : start + count] = text.position + torch.arange(count)
    own = positions_of(limit, after + begun, size - begun)
    written = positions_of(new, after + size, torch.full_like(size, new))
    blank = mark_filler([text.number for text in rows])
    rests = [prompts.suffixes[text.number][ahead[text.number][1] :] for text in rows]
    device = chosen.device
    return _AnswerRows(
        prompts=prompts,
        lanes=lanes,
        prefixes=prompts.part(prefixes, common, padding=[prompts.suffixes[lane[0].number][0] for lane in lanes]),
        texts=prompts.part(
            rests, limit + min(room + GROW_TOKENS, new), padding=[prompts.suffixes[text.number][0] for text in rows]
        ),
        place=limit,
        new=new,
        keys=torch.cat([shared, own, written], dim=1).to(device),
        begins=(after + size).to(device),
        numbers=[-1 if again else text.number for text, again in zip(rows, blank, strict=True)],
        chosen=chosen,
        ended=torch.tensor(blank, dtype=torch.bool, device=device),
    )


def _step(base: Base, rules: tuple[Sees | None, ...], rows: _AnswerRows, step: int) -> Tensor:
    """Compute what comes after the last token of every row; return its hidden states [R, d]."""
    place = rows.place + step
    if place >= rows.texts.length:
        rows.texts.grow(rows.place + min(step + GROW_TOKENS, rows.new))
    earlier = [rows.prefixes] if rows.prefixes.length else []
    queries = rows.begins[:, None] + step
    keys = rows.keys[:, : rows.prefixes.length + rows.texts.length]
    attention = CachedAttention(rows.texts, slice(None), place, earlier, queries, keys, rules, written=True)
    return states_after(base, attention, rows.chosen[:, None])[:, 0]


def _choose(base: Base, states: Tensor) -> Tensor:
    """The token with the largest logit [R], the lowest among equals."""
    size = max(1, LOGIT_BYTES // (4 * len(base.head.weight)))
    return torch.cat([base.head.logits(some).argmax(dim=-1) for some in torch.split(states, size)])


_known: WeakKeyDictionary[Base, CacheFacts | None] = WeakKeyDictionary()


def _find_cache_facts(base: Base) -> CacheFacts | None:
    """Return what is known of a base's keys and values, measured the first time; None where we cannot keep them."""
    if base not in _known:
        try:
            _known[base] = _try_cache(base)
        except Exception as error:  # any architecture's own code may choke on it: transformers' generation can do it
            log.info("%s answers by generate: %s: %s", base.name, type(error).__name__, first_line(error))
            _known[base] = None
    return _known[base]


def _try_cache(base: Base) -> CacheFacts | None:
    """Compare hidden states of cached passes with those of whole texts, each alone, on random tokens."""
    stream = torch.Generator().manual_seed(4)
    drawn = torch.randint(len(base.head.weight), (12,), generator=stream).tolist()
    device = base.device
    # Lanes of two prompts with 2 tokens in common, and of one alone; 2 steps each.
    lanes = [
        Lane(0, (0, 1), ((*drawn[:2], *drawn[3:6]), (*drawn[:2], drawn[7])), 2),
        Lane(1, (0,), (tuple(drawn[8:10]),), 0),
    ]
    with torch.no_grad(), quiet():
        plain = torch.arange(4, device=device)[None]
        attention = CachedAttention(CachePart(1, 4), slice(None), 0, [], plain, plain, None)
        states_after(base, attention, torch.tensor([drawn[:4]], device=device))
        rules = tuple(attention.found)
        _, rows = _start_rows(base, rules, None, lanes, ends=(), new=3)
        said, given = [], []
        for step in range(2):
            rows.chosen = torch.tensor([drawn[step + row] for row in range(len(rows.numbers))], device=device)
            given.append(rows.chosen.tolist())
            said.append(_step(base, rules, rows, step))
        worst = largest = 0.0
        prompts = [ids for lane in lanes for ids in lane.prompts]
        for row, place in enumerate(rows.numbers):
            if place < 0:
                continue
            whole = torch.tensor([[*prompts[place], *(ones[row] for ones in given)]], device=device)
            alone = base.decoder(input_ids=whole, use_cache=False).last_hidden_state[0, -2:].double()
            together = torch.stack([state[row] for state in said]).double()
            worst = max(worst, float((alone - together).abs().max()))
            largest = max(largest, float(alone.abs().max()))
    layers = [*rows.texts.keys, *rows.texts.values]
    tolerance = 5e-2 if base.dtype == torch.bfloat16 else 1e-4
    if not layers or not worst <= tolerance * max(1.0, largest):
        log.info("%s answers by generate: cached states differ by %.2g", base.name, worst)
        return None
    return CacheFacts(sum(states[0, :, 0].numel() * states.element_size() for states in layers), rules)
