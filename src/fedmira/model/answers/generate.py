"""Greedy answers of many clients at once, each with its own adapter, with a cache of keys and values.

A pass takes *lanes* of prompts, each of one client. The prefix of a client's prompts (a task's instruction) is computed
and cached once per lane (prefill.py), and every prompt gives its answer's first token. Answers that continue become
*rows*, w per lane (some of them filler), so that the low-rank part stays one `bmm` over the clients. Every row writes
one token per step, and when enough rows have ended the others are laid out anew.

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
from fedmira.model.agreement import agree, difference
from fedmira.model.answers.cache import CachedAttention, CachePart, Rules, positions_of
from fedmira.model.answers.lanes import ANSWER_ROWS, Lane, Text, deal_rows, mark_filler, plan_passes, suffix_limit
from fedmira.model.answers.prefill import Prefilled, prefill, states_after, suffixes_of
from fedmira.model.base.load import Base, quiet
from fedmira.model.base.source import first_line
from fedmira.model.packed.virtual import find_virtual, virtual_ids
from fedmira.model.seam import attending

__all__ = ["ANSWER_ROWS", "answers", "padded_answers"]

log = logging.getLogger(__name__)

COMPACT_SHARE = 0.75  # rows are laid out anew when at most this share of them still writes
LOGIT_BYTES = 64 * 2**20  # float32 logits in memory at once
GROW_TOKENS = 16  # tokens that a cache grows by: attention over a length that is new has to be set up first
CHECK_EVERY = 8  # tokens between two checks of which rows have ended, where a check makes the host wait


def answers(
    base: Base, adapters: Adapters, prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int
) -> list[list[str]]:
    """Return the greedy answer to every prompt; prompts[k] are the token ids of client k's, at least one token each.

    A client's virtual tokens come before each. All of it and the answer must fit in the base's positions: the data
    layer cuts prompts for that, and counts.
    """
    virtual = virtual_ids(adapters.layout.virtual_tokens)
    prompts = [[(*virtual, *ids) for ids in client_prompts] for client_prompts in prompts]
    facts = _find_cache_facts(base)
    texts = [[""] * len(client_prompts) for client_prompts in prompts]
    token_bytes = None if facts is None else facts.token_bytes
    for lanes in plan_passes(prompts, max_new_tokens=max_new_tokens, token_bytes=token_bytes):
        chosen = adapters.take(torch.tensor([lane.client for lane in lanes]))
        if facts is None:
            lane_texts = padded_answers(base, chosen, [lane.prompts for lane in lanes], max_new_tokens=max_new_tokens)
        else:
            written = _write(base, facts, chosen, lanes, max_new_tokens=max_new_tokens)
            lane_texts = [base.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in written]
        for lane, answered in zip(lanes, lane_texts, strict=True):
            for number, text in zip(lane.numbers, answered, strict=True):
                texts[lane.client][number] = text
    return texts


def padded_answers(
    base: Base, adapters: Adapters, prompts: Sequence[Sequence[Sequence[int]]], *, max_new_tokens: int
) -> list[list[str]]:
    """Return the same by transformers' `generate`, in one batch with prompts padded on the left; at least one."""
    width = max(len(client_prompts) for client_prompts in prompts)
    filler = [base.pad_id]
    rows = [
        list(ids) for client_prompts in prompts for ids in [*client_prompts, *[filler] * (width - len(client_prompts))]
    ]
    longest = max(len(ids) for ids in rows)
    tokens = torch.full((len(rows), longest), base.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(rows):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    unread = list(range(base.vocabulary, len(base.head.weight)))  # the next step could not read them
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=base.pad_id,
        suppress_tokens=unread or None,
    )
    with base.stack.filled(adapters, dtype=base.dtype, device=base.device), torch.no_grad(), quiet():
        inputs = base.inputs(tokens.to(base.device), find_virtual(tokens))
        out = base.model.generate(**inputs, attention_mask=mask.to(base.device), generation_config=greedy)
    stops = set(_stops(base))
    new = out[:, longest:] if "input_ids" in inputs else out  # after embeddings only new tokens come back
    written = [_until(row, stops) for row in new.tolist()]
    texts = base.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [texts[k * width : k * width + len(client_prompts)] for k, client_prompts in enumerate(prompts)]


def _until(ids: Sequence[int], stops: set[int]) -> list[int]:
    """Cut after the first end of text."""
    end = next((step for step, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[: end + 1])


def _stops(base: Base) -> list[int]:
    """The ids that end a text: those of the checkpoint and the tokenizer's, as loaded (see load.wrap)."""
    assert base.model.generation_config is not None
    stops = base.model.generation_config.eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or [])


@dataclass(frozen=True)
class CacheFacts:
    """What is known of a base whose keys and values can be cached (cache.py).

    token_bytes: keys and values of one token, all layers; rules: what each layer's tokens may see.
    """

    token_bytes: int
    rules: Rules


@dataclass(eq=False)
class _AnswerRows:
    """Answers that continue, in lanes of equal width w: R rows, filler rows included.

    lanes: the text of each row; a lane's first row is repeated to fill it up. prefixes: keys and values of each lane's
    prefix; texts: those of each row's suffix, and from column `limit` on of what it wrote, `new` tokens in all.
    keys [R, L]: positions of all these tokens, NOWHERE for padding; starts [R]: the position of the first token
    written. numbers [R]: each row's prompt, -1 for a filler row; chosen [R]: the last token; ended [R]: whether it
    needs no further one.
    """

    prompts: Prefilled
    lanes: list[list[Text]]
    prefixes: CachePart
    texts: CachePart
    limit: int
    new: int
    keys: Tensor
    starts: Tensor
    numbers: list[int]
    chosen: Tensor
    ended: Tensor

    def compact(self) -> list[list[int]] | None:
        """Return the rows to continue with, as new lanes; None if all may stay."""
        writing = (~self.ended).tolist()
        if sum(writing) > COMPACT_SHARE * len(writing):
            return None
        width = len(self.lanes[0])
        by_lane = [
            [row for row in range(start, start + width) if writing[row]] for start in range(0, len(writing), width)
        ]
        lanes = deal_rows([rows for rows in by_lane if rows], prefix=self.prefixes.length, each=self.limit + self.new)
        return lanes if sum(len(rows) for rows in lanes) <= COMPACT_SHARE * len(writing) else None

    def take(self, lanes: list[list[int]], *, written: int) -> "_AnswerRows":
        """Return the rows that continue, as `compact` names them, after `written` tokens."""
        texts = [text for lane in self.lanes for text in lane]
        index = torch.tensor([row for lane in lanes for row in lane], dtype=torch.int64, device=self.chosen.device)
        chosen = self.chosen.index_select(0, index)
        rows = _lay_out(
            self.prompts, [[texts[row] for row in lane] for lane in lanes], chosen, new=self.new, room=written
        )
        columns, source_columns = (slice(limit, limit + written) for limit in (rows.limit, self.limit))
        rows.texts.copy(self.texts, index, columns, source_columns)
        return rows


def _write(
    base: Base, facts: CacheFacts, adapters: Adapters, lanes: Sequence[Lane], *, max_new_tokens: int
) -> list[list[list[int]]]:
    """Return the tokens written to each prompt of each lane, the end of text among them; adapters [S] of the lanes."""
    with torch.no_grad(), quiet():
        written, rows = _start_rows(base, facts.rules, adapters, lanes, stops=_stops(base), new=max_new_tokens)
        step = 0
        while rows.lanes:
            chosen = adapters.take(torch.tensor([lane[0].lane for lane in rows.lanes]))
            with base.stack.filled(chosen, dtype=base.dtype, device=base.device):
                tokens, left = _write_steps(base, facts, rows, range(step, max_new_tokens - 1))
            step += len(tokens)
            _append(tokens, rows, into=written)
            rows = rows.take(left, written=step)
    stops = set(_stops(base))
    texts = iter([_until(ids, stops) for ids in written])
    return [[next(texts) for _ in lane.numbers] for lane in lanes]


def _write_steps(
    base: Base, facts: CacheFacts, rows: _AnswerRows, steps: range
) -> tuple[list[Tensor], list[list[int]]]:
    """Write a token per step until fewer rows will do; return the tokens [R] of each step, and the rows left."""
    stops = torch.tensor(_stops(base), device=base.device)
    check = 1 if base.device.type == "cpu" else CHECK_EVERY
    tokens: list[Tensor] = []
    for step in steps:
        if step % check == 0:
            left = rows.compact()
            if left is not None:
                return tokens, left
        rows.chosen = _choose(base, _step(base, facts.rules, rows, step))
        rows.ended |= (rows.chosen[:, None] == stops).any(dim=1)
        tokens.append(rows.chosen)
    return tokens, []


def _append(tokens: list[Tensor], rows: _AnswerRows, *, into: list[list[int]]) -> None:
    """Append the tokens [R] of several steps to the answers by prompt."""
    if tokens:
        for number, ids in zip(rows.numbers, torch.stack(tokens, dim=1).tolist(), strict=True):
            if number >= 0:
                into[number] += ids


def _start_rows(
    base: Base, rules: Rules, adapters: Adapters | None, lanes: Sequence[Lane], *, stops: Sequence[int], new: int
) -> tuple[list[list[int]], _AnswerRows]:
    """Compute all prompts; return the first token of each and the rows that continue. adapters None: the base alone."""
    prompts = prefill(base, rules, adapters, lanes)
    written = [[token] for token in _choose(base, prompts.states).tolist()]
    texts = [text for text in suffixes_of(lanes) if new > 1 and written[text.number][0] not in stops]
    by_lane = [list(group) for _, group in groupby(texts, key=lambda text: text.lane)]
    prefix = max((text.position for text in texts), default=0)
    dealt = deal_rows(by_lane, prefix=prefix, each=max((len(text.tokens) for text in texts), default=0) + new)
    chosen = torch.tensor([written[text.number][0] for lane in dealt for text in lane], dtype=torch.int64)
    return written, _lay_out(prompts, dealt, chosen.to(base.device), new=new - 1)


def _lay_out(prompts: Prefilled, lanes: list[list[Text]], chosen: Tensor, *, new: int, room: int = 0) -> _AnswerRows:
    """Lay texts out as rows, with room for `room` written tokens and a few more.

    The first tokens of a suffix beyond `suffix_limit` are cached behind the prefix of its lane.
    """
    limit = suffix_limit(lanes)
    prefixes: list[Tensor] = []
    moved: dict[int, tuple[int, int]] = {}  # of a text: where behind its lane's prefix its first tokens are; how many
    for lane in lanes:
        tokens = [prompts.prefixes[lane[0].lane]]
        start = lane[0].position
        for text in dict.fromkeys(lane):
            count = max(0, len(text.tokens) - limit)
            tokens.append(prompts.suffixes[text.number][:count])
            moved[text.number] = start, count
            start += count
        prefixes.append(torch.cat(tokens))
    rows = [text for lane in lanes for text in lane]
    sizes = [(text.position, moved[text.number][1], len(text.tokens)) for text in rows]
    position, moved_count, size = torch.tensor(sizes, dtype=torch.int64).view(-1, 3).T
    longest = max(map(len, prefixes), default=0)
    in_prefix = positions_of(longest, torch.zeros_like(position), position)
    for row, text in enumerate(rows):
        start, count = moved[text.number]
        in_prefix[row, start : start + count] = text.position + torch.arange(count)
    in_suffix = positions_of(limit, position + moved_count, size - moved_count)
    written = positions_of(new, position + size, torch.full_like(size, new))
    filler = mark_filler([text.number for text in rows])
    suffixes = [prompts.suffixes[text.number][moved[text.number][1] :] for text in rows]
    device = chosen.device
    return _AnswerRows(
        prompts=prompts,
        lanes=lanes,
        prefixes=prompts.part(prefixes, longest, padding=[prompts.suffixes[lane[0].number][0] for lane in lanes]),
        texts=prompts.part(
            suffixes,
            limit + min(room + GROW_TOKENS, new),
            padding=[prompts.suffixes[text.number][0] for text in rows],
        ),
        limit=limit,
        new=new,
        keys=torch.cat([in_prefix, in_suffix, written], dim=1).to(device),
        starts=(position + size).to(device),
        numbers=[-1 if is_filler else text.number for text, is_filler in zip(rows, filler, strict=True)],
        chosen=chosen,
        ended=torch.tensor(filler, dtype=torch.bool, device=device),
    )


def _step(base: Base, rules: Rules, rows: _AnswerRows, step: int) -> Tensor:
    """Compute what comes after the last token of every row; return its hidden states [R, d]."""
    column = rows.limit + step
    if column >= rows.texts.length:
        rows.texts.grow(rows.limit + min(step + GROW_TOKENS, rows.new))
    earlier = [rows.prefixes] if rows.prefixes.length else []
    queries = rows.starts[:, None] + step
    keys = rows.keys[:, : rows.prefixes.length + rows.texts.length]
    attention = CachedAttention(rows.texts, slice(None), column, earlier, queries, keys, rules, written=True)
    return states_after(base, attention, rows.chosen[:, None])[:, 0]


def _choose(base: Base, states: Tensor) -> Tensor:
    """The token with the largest logit [R], the lowest among equals; a token that the base cannot read is none."""
    size = max(1, LOGIT_BYTES // (4 * len(base.head.weight)))
    return torch.cat(
        [base.head.logits(chunk)[:, : base.vocabulary].argmax(dim=-1) for chunk in torch.split(states, size)]
    )


_known: WeakKeyDictionary[Base, CacheFacts | None] = WeakKeyDictionary()


def _find_cache_facts(base: Base) -> CacheFacts | None:
    """Return what is known of a base's keys and values, measured the first time; None where they cannot be cached."""
    if base not in _known:
        try:
            _known[base] = _try_cache(base)
        except Exception as error:  # any architecture's own code may fail on it: transformers' generation can do it
            log.info("%s answers by generate: %s: %s", base.name, type(error).__name__, first_line(error))
            _known[base] = None
    return _known[base]


def _try_cache(base: Base) -> CacheFacts | None:
    """Compare hidden states of passes over a cache with those of whole texts, each alone, on random tokens."""
    stream = torch.Generator().manual_seed(4)
    drawn = torch.randint(base.vocabulary, (12,), generator=stream).tolist()
    device = base.device
    # Lanes of two prompts with a prefix of 2 tokens, and of one alone; 2 steps each.
    lanes = [
        Lane(0, (0, 1), ((*drawn[:2], *drawn[3:6]), (*drawn[:2], drawn[7])), 2),
        Lane(1, (0,), (tuple(drawn[8:10]),), 0),
    ]
    with torch.no_grad(), quiet():
        rules = _measure_rules(base, drawn[:4])
        _, rows = _start_rows(base, rules, None, lanes, stops=(), new=3)
        states, written = [], []
        for step in range(2):
            rows.chosen = torch.tensor([drawn[step + row] for row in range(len(rows.numbers))], device=device)
            written.append(rows.chosen.tolist())
            states.append(_step(base, rules, rows, step))
        prompts = [ids for lane in lanes for ids in lane.prompts]
        uncached, cached = [], []
        for row, number in enumerate(rows.numbers):
            if number < 0:
                continue
            whole = torch.tensor([[*prompts[number], *(tokens[row] for tokens in written)]], device=device)
            uncached.append(base.decoder(input_ids=whole, use_cache=False).last_hidden_state[0, -2:])
            cached.append(torch.stack([step_states[row] for step_states in states]))
    layers = [*rows.texts.keys, *rows.texts.values]
    together, alone = torch.cat(cached), torch.cat(uncached)
    if not layers or not agree(together, alone, dtype=base.dtype):
        log.info("%s answers by generate: cached states differ by %.2g", base.name, difference(together, alone))
        return None
    return CacheFacts(sum(layer[0, :, 0].numel() * layer.element_size() for layer in layers), rules)


def _measure_rules(base: Base, ids: Sequence[int]) -> Rules:
    """Return the rules that a base's layers come with in a pass of one short text; they hold at any length."""
    positions = torch.arange(len(ids), device=base.device)[None]
    attention = CachedAttention(CachePart(1, len(ids)), slice(None), 0, [], positions, positions, None)
    with attending(base.model, attention) as calls:
        base.decoder(input_ids=torch.tensor([ids], device=base.device), position_ids=positions, use_cache=False)
    return tuple(None if call.rule.reach is None else call.rule for call in calls)
