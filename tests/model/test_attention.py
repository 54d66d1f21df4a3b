"""Both roads of packed attention give what a plain softmax over the tokens that are seen gives, and its gradient."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fedmira.model import seam
from fedmira.model.packed.attention import PackedAttention
from fedmira.model.packed.buckets import Buckets, make_buckets
from fedmira.model.packed.fans import STEP, pick
from fedmira.model.packed.spans import BLOCK, SAVED_KEYS, SPAN, Spans, make_spans
from fedmira.model.seam import Rule, attending

HEADS, KEYS, WIDTH = 4, 2, 6
PLAIN = Rule(lambda batch, head, queries, keys: keys <= queries, None)
WINDOW = Rule(lambda batch, head, queries, keys: (keys <= queries) & (keys > queries - 20), 20)
SHORT = [5, 1, 40, 3, 60, 30, 2]
LONG = [SAVED_KEYS + 90, 7, 2 * BLOCK + 30, 2 * BLOCK]


class Config:
    _attn_implementation = "eager"


class Model:
    config = Config()


def states(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    stream = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, heads, tokens, WIDTH, generator=stream, dtype=dtype).requires_grad_()
        for heads in (HEADS, KEYS, KEYS)
    ]


def run(
    plan: Spans | Buckets, given: list[Tensor], rule: Rule, cap: float | None, *, last: nn.Module | None = None
) -> Tensor:
    module = nn.Identity() if last is None else last
    with attending(Model(), PackedAttention(plan, last)):  # type: ignore[arg-type]
        out, _ = seam._attend(module, *given, attention_mask=rule, scaling=0.7, softcap=cap)
    return out


def reference(sizes: list[int], given: list[Tensor], rule: Rule, cap: float | None) -> Tensor:
    """Every example alone, one softmax over what its tokens see."""
    parts = []
    for query, key, value in zip(*(torch.split(one[0], sizes, dim=1) for one in given), strict=True):
        key, value = (one.repeat_interleave(HEADS // KEYS, dim=0) for one in (key, value))
        scores = 0.7 * query @ key.mT
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        places = torch.arange(query.shape[1])
        scores = scores.masked_fill(~rule.mask(places, places), -torch.inf)
        parts.append((torch.softmax(scores, -1) @ value).transpose(0, 1))
    return torch.cat(parts)[None]


def spans_of(sizes: list[int], where: Tensor) -> Spans:
    """Spans of examples that share nothing."""
    return make_spans([(0, size) for size in sizes], where, longest=max(sizes))


def plans(sizes: list[int]) -> dict[str, Spans | Buckets]:
    lengths = torch.tensor(sizes)
    where = torch.arange(sum(sizes))
    return {
        "spans": spans_of(sizes, where),
        "buckets": make_buckets(lengths, torch.cumsum(lengths, 0) - lengths),
    }


# Each stretch: tokens shared by the rests that follow; (0, n) stands alone. Starts and rests of many sizes, two of the
# starts of similar length, so that a fan holds examples of both; and one with more keys than are kept.
STRETCHES = {
    "few": [(2, 1, 2), (0, 1)],
    "many": [(0, 9), (30, *range(1, 41)), (0, SPAN + 3), (28, 5, 200, 3, 17), (5, 40, 40), (0, 4)],
    "large": [(SAVED_KEYS + 10, 20, 30, 256), (0, 3)],
}


def rests_of(stretches: list[tuple[int, ...]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The places of every rest's start, and its own; a start comes first, as a rest of none."""
    place = 0
    for shared, *rests in stretches:
        start = torch.arange(place, place + shared)
        place += shared
        yield start[:0], start
        for size in rests:
            yield start, torch.arange(place, place + size)
            place += size


def alone(stretches: list[tuple[int, ...]], given: list[Tensor], cap: float | None) -> Tensor:
    """Every example with its start before it, one plain softmax each; of the start, its own answers."""
    answers = []
    for start, own in rests_of(stretches):
        whole = torch.cat([start, own])
        found = reference([len(whole)], [one[:, :, whole] for one in given], PLAIN, cap)
        answers.append(found[:, len(start) :])
    return torch.cat(answers, dim=1)


def fanned(stretches: list[tuple[int, ...]], where: Tensor) -> Spans:
    longest = max(shared + max(rests) for shared, *rests in stretches)
    return make_spans(stretches, where, longest=longest)


def check(found: Tensor, wanted: Tensor, given: list[Tensor], where: Tensor | None = None) -> None:
    """The same answers, at these places alone or everywhere, and the same gradients of what comes from there."""
    where = torch.arange(wanted.shape[1]) if where is None else where
    torch.testing.assert_close(found[:, where], wanted[:, where], rtol=1e-10, atol=1e-12)
    push = torch.zeros_like(wanted)
    stream = torch.Generator().manual_seed(0)
    push[:, where] = torch.randn(1, len(where), HEADS, WIDTH, dtype=torch.float64, generator=stream)
    both = zip(torch.autograd.grad(found, given, push), torch.autograd.grad(wanted, given, push), strict=True)
    for one, other in both:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("rule", [PLAIN, WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("road", ["spans", "buckets"])
def test_attention_and_its_gradient_are_those_of_every_example_alone(
    road: str, sizes: list[int], rule: Rule, cap: float | None
) -> None:
    given = states(sum(sizes))
    check(run(plans(sizes)[road], given, rule, cap), reference(sizes, given, rule, cap), given)


def test_short_examples_share_a_span_and_long_ones_have_their_own() -> None:
    spans = spans_of([SPAN // 2, SPAN // 2, 1, SPAN + 5, 3], torch.tensor([0]))
    assert spans.bounds == ((0, SPAN), (SPAN, SPAN + 1), (SPAN + 1, 2 * SPAN + 6), (2 * SPAN + 6, 2 * SPAN + 9))


@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
def test_the_last_layer_answers_from_the_first_label_of_a_span_to_its_last(sizes: list[int]) -> None:
    """Labels in the second and in the last example only; a gradient that comes from them is the whole one."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    where = torch.tensor([starts[1], *range(starts[-1] + 1, starts[-1] + sizes[-1])])
    plan = spans_of(sizes, where)
    given, last = states(sum(sizes)), nn.Identity()
    wanted, found = reference(sizes, given, PLAIN, None), run(plan, given, PLAIN, None, last=last)
    check(found, wanted, given, where)
    assert bool((found == 0).all(-1).all(-1).any()), "rows that nobody asks for are left out"


def test_a_pass_without_any_label_leaves_everything_out() -> None:
    plan = spans_of(SHORT, torch.zeros(0, dtype=torch.int64))
    found = run(plan, states(sum(SHORT)), PLAIN, None, last=nn.Identity())
    assert not found.any()


@pytest.mark.parametrize(
    "stretches",
    [[(0, size) for size in SHORT], [(0, size) for size in LONG], STRETCHES["many"], [(40, *[7] * 64)]],
    ids=["short", "long", "starts", "one start"],
)
def test_in_bfloat16_the_error_is_one_of_rounding(stretches: list[tuple[int, ...]]) -> None:
    """Against float64 on the same numbers: below 1 % of the answers and 2 % of the gradients."""
    exact = states(sum(map(sum, stretches)))
    given = [one.detach().bfloat16().requires_grad_() for one in exact]
    exact = [one.detach().double().requires_grad_() for one in given]
    plan = fanned(stretches, torch.arange(exact[0].shape[2]))
    found, wanted = run(plan, given, PLAIN, None), alone(stretches, exact, None)
    push = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    pairs = [(found, wanted, 0.01)]
    pairs += [
        (one, other, 0.02)
        for one, other in zip(
            torch.autograd.grad(found, given, push), torch.autograd.grad(wanted, exact, push.double()), strict=True
        )
    ]
    for one, other, bound in pairs:
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < bound


def test_a_long_text_is_cut_into_blocks_that_leave_out_what_none_of_their_queries_sees() -> None:
    plan = spans_of([300, 7], torch.zeros(1, dtype=torch.int64))
    assert plan.bounds == ((0, 300), (300, 307))
    short, long = plan.blocks(Rule(lambda batch, head, queries, keys: keys > queries - 100, 100), torch.float32)
    places = [(one.first, one.start, one.stop, one.padding) for one in long]
    assert places == [(140, 236, 300, 20), (0, 128, 256, 0), (0, 0, 128, 0)]
    assert [(one.first, one.start, one.stop, one.padding) for one in short] == [(275, 275, 307, 25)]


def test_sizes_are_filled_up_from_what_lies_before() -> None:
    """The second text's 40 queries become 64: 24 more that see nothing and come to 0; the first has nothing before."""
    plan = spans_of([133, 40], torch.zeros(1, dtype=torch.int64))
    ((second,), (first,)) = plan.blocks(PLAIN, torch.float32)
    assert (first.first, first.start, first.stop, first.padding) == (0, 0, 133, 0)
    assert (second.first, second.start, second.stop, second.padding) == (109, 109, 173, 24)
    assert not (second.bias[24:, :24] == 0).any(), "no token sees what lies before its span"
    assert torch.equal(second.bias[24:, 24:] == 0, torch.ones(40, 40, dtype=torch.bool).tril())


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "slices", "columns"])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", STRETCHES)
def test_examples_see_the_start_they_share_and_nothing_of_each_other(name: str, cap: float | None, layout: str) -> None:
    """Answers and gradients are those of every example alone, however queries, keys and values lie in memory."""
    stretches = STRETCHES[name]
    tokens = sum(map(sum, stretches))
    given = states(tokens)
    if layout == "columns":  # rows no multiple of their width apart
        given = [torch.cat([one.detach(), one.detach()[..., :1]], -1)[..., :-1].requires_grad_() for one in given]
    elif layout != "heads first":
        extra = 0 if layout == "tokens first" else 3
        given = [
            torch.cat([one.detach().transpose(1, 2), torch.zeros(1, tokens, extra, WIDTH, dtype=one.dtype)], dim=2)[
                :, :, : one.shape[1]
            ]
            .transpose(1, 2)
            .requires_grad_()
            for one in given
        ]
    check(run(fanned(stretches, torch.arange(tokens)), given, PLAIN, cap), alone(stretches, given, cap), given)


@pytest.mark.parametrize("name", STRETCHES)
def test_the_last_layer_answers_labels_of_examples_that_share_a_start(name: str) -> None:
    """Labels at the last two tokens of every other example; a gradient that comes from them is the whole one."""
    stretches = STRETCHES[name]
    rests = [own for start, own in rests_of(stretches) if len(start)]
    where = torch.cat([own[-2:] for own in rests[::2]])
    given, last = states(sum(map(sum, stretches))), nn.Identity()
    found = run(fanned(stretches, where), given, PLAIN, None, last=last)
    check(found, alone(stretches, given, None), given, where)
    others = torch.cat(rests[1::2])
    assert not found[:, others].any(), "examples that nobody asks for are left out"


def test_fans_hold_examples_of_similar_size_and_few_blanks() -> None:
    stretches = STRETCHES["many"]
    plan = fanned(stretches, torch.tensor([0]))
    fans = plan.fans()
    assert sum(len(fan.queries.tokens) for fan in fans) == sum(sum(rests) for shared, *rests in stretches if shared)
    assert sum(stop - first for fan in fans for first, stop, _, _ in fan.prefixes) == len(plan.suffixes) == 46
    assert len(fans) < 20
    places = torch.cat([fan.queries.tokens for fan in fans])
    assert len(places.unique()) == len(places), "every token is asked once"
    assert all(fan.queries.index.shape[1] % STEP == fan.keys.index.shape[1] % STEP == 0 for fan in fans)
    assert plan.fans() is fans, "dealt once for a pass"


def test_tokens_are_picked_on_the_device_where_they_lie() -> None:
    """Answers on CUDA pick too: a device without numbers stands for it, which refuses to be mixed with the CPU."""
    states = torch.empty(3, 40, 8, device="meta")
    assert pick(states, torch.zeros(5, 7, dtype=torch.int64, device="meta")).shape == (5, 3, 7, 8)
