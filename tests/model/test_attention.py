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


def spans_of(sizes: list[int], labelled: Tensor) -> Spans:
    """Spans of examples without a shared prefix."""
    return make_spans([(0, size) for size in sizes], labelled, longest=max(sizes))


def plans(sizes: list[int]) -> dict[str, Spans | Buckets]:
    lengths = torch.tensor(sizes)
    labelled = torch.arange(sum(sizes))
    return {
        "spans": spans_of(sizes, labelled),
        "buckets": make_buckets(lengths, torch.cumsum(lengths, 0) - lengths),
    }


# Each group: tokens of the prefix and of each suffix; (0, n) is an example alone. Prefixes and suffixes of many sizes,
# two of the prefixes of similar length, so that a fan has suffixes of both; and one with more keys than are saved.
GROUPS = {
    "few": [(2, 1, 2), (0, 1)],
    "many": [(0, 9), (30, *range(1, 41)), (0, SPAN + 3), (28, 5, 200, 3, 17), (5, 40, 40), (0, 4)],
    "large": [(SAVED_KEYS + 10, 20, 30, 256), (0, 3)],
}


def suffixes_of(groups: list[tuple[int, ...]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The index of every suffix's prefix, and its own; a prefix comes first, as a suffix of nothing."""
    place = 0
    for prefix, *suffixes in groups:
        start = torch.arange(place, place + prefix)
        place += prefix
        yield start[:0], start
        for size in suffixes:
            yield start, torch.arange(place, place + size)
            place += size


def alone(groups: list[tuple[int, ...]], given: list[Tensor], cap: float | None) -> Tensor:
    """Every suffix with its prefix before it, one plain softmax each; of the prefix, its own attention."""
    answers = []
    for start, own in suffixes_of(groups):
        whole = torch.cat([start, own])
        result = reference([len(whole)], [one[:, :, whole] for one in given], PLAIN, cap)
        answers.append(result[:, len(start) :])
    return torch.cat(answers, dim=1)


def fanned(groups: list[tuple[int, ...]], labelled: Tensor) -> Spans:
    longest = max(prefix + max(suffixes) for prefix, *suffixes in groups)
    return make_spans(groups, labelled, longest=longest)


def check(result: Tensor, expected: Tensor, given: list[Tensor], labelled: Tensor | None = None) -> None:
    """The same answers, at these places alone or everywhere, and the same gradients of what comes from there."""
    labelled = torch.arange(expected.shape[1]) if labelled is None else labelled
    torch.testing.assert_close(result[:, labelled], expected[:, labelled], rtol=1e-10, atol=1e-12)
    push = torch.zeros_like(expected)
    stream = torch.Generator().manual_seed(0)
    push[:, labelled] = torch.randn(1, len(labelled), HEADS, WIDTH, dtype=torch.float64, generator=stream)
    both = zip(torch.autograd.grad(result, given, push), torch.autograd.grad(expected, given, push), strict=True)
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


def test_short_examples_share_a_span_and_long_ones_have_separate_ones() -> None:
    spans = spans_of([SPAN // 2, SPAN // 2, 1, SPAN + 5, 3], torch.tensor([0]))
    assert spans.bounds == ((0, SPAN), (SPAN, SPAN + 1), (SPAN + 1, 2 * SPAN + 6), (2 * SPAN + 6, 2 * SPAN + 9))


@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
def test_the_last_layer_attends_from_the_first_labelled_token_of_a_span_to_its_last(sizes: list[int]) -> None:
    """Labels in the second and in the last example only; a gradient that comes from them is the whole one."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    labelled = torch.tensor([starts[1], *range(starts[-1] + 1, starts[-1] + sizes[-1])])
    plan = spans_of(sizes, labelled)
    given, last = states(sum(sizes)), nn.Identity()
    expected, result = reference(sizes, given, PLAIN, None), run(plan, given, PLAIN, None, last=last)
    check(result, expected, given, labelled)
    assert bool((result == 0).all(-1).all(-1).any()), "tokens that are not needed are left out"


def test_the_last_layer_attends_nowhere_in_a_pass_without_labels() -> None:
    plan = spans_of(SHORT, torch.zeros(0, dtype=torch.int64))
    result = run(plan, states(sum(SHORT)), PLAIN, None, last=nn.Identity())
    assert not result.any()


@pytest.mark.parametrize(
    "groups",
    [[(0, size) for size in SHORT], [(0, size) for size in LONG], GROUPS["many"], [(40, *[7] * 64)]],
    ids=["short", "long", "starts", "one start"],
)
def test_attention_in_bfloat16_is_exact_up_to_rounding(groups: list[tuple[int, ...]]) -> None:
    """Against float64 on the same numbers: below 1 % of the answers and 2 % of the gradients."""
    exact = states(sum(map(sum, groups)))
    given = [one.detach().bfloat16().requires_grad_() for one in exact]
    exact = [one.detach().double().requires_grad_() for one in given]
    plan = fanned(groups, torch.arange(exact[0].shape[2]))
    result, expected = run(plan, given, PLAIN, None), alone(groups, exact, None)
    push = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    pairs = [(result, expected, 0.01)]
    pairs += [
        (one, other, 0.02)
        for one, other in zip(
            torch.autograd.grad(result, given, push), torch.autograd.grad(expected, exact, push.double()), strict=True
        )
    ]
    for one, other, bound in pairs:
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < bound


def test_a_long_text_is_cut_into_blocks_without_the_keys_that_no_query_sees() -> None:
    plan = spans_of([300, 7], torch.zeros(1, dtype=torch.int64))
    assert plan.bounds == ((0, 300), (300, 307))
    short, long = plan.blocks(Rule(lambda batch, head, queries, keys: keys > queries - 100, 100), torch.float32)
    places = [(one.first, one.start, one.stop, one.padding) for one in long]
    assert places == [(140, 236, 300, 20), (0, 128, 256, 0), (0, 0, 128, 0)]
    assert [(one.first, one.start, one.stop, one.padding) for one in short] == [(275, 275, 307, 25)]


def test_blocks_are_padded_with_the_tokens_before_them() -> None:
    """The second text's 40 queries become 64: 24 more that see nothing and come to 0; the first has nothing before."""
    plan = spans_of([133, 40], torch.zeros(1, dtype=torch.int64))
    ((second,), (first,)) = plan.blocks(PLAIN, torch.float32)
    assert (first.first, first.start, first.stop, first.padding) == (0, 0, 133, 0)
    assert (second.first, second.start, second.stop, second.padding) == (109, 109, 173, 24)
    assert not (second.bias[24:, :24] == 0).any(), "no token sees what is before its span"
    assert torch.equal(second.bias[24:, 24:] == 0, torch.ones(40, 40, dtype=torch.bool).tril())


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "slices", "columns"])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", GROUPS)
def test_suffixes_see_their_prefix_and_nothing_of_each_other(name: str, cap: float | None, layout: str) -> None:
    """Answers and gradients are those of every example alone, in any memory layout of queries, keys and values."""
    groups = GROUPS[name]
    tokens = sum(map(sum, groups))
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
    check(run(fanned(groups, torch.arange(tokens)), given, PLAIN, cap), alone(groups, given, cap), given)


@pytest.mark.parametrize("name", GROUPS)
def test_the_last_layer_attends_at_the_labelled_tokens_of_suffixes(name: str) -> None:
    """Labels at the last two tokens of every other example; a gradient that comes from them is the whole one."""
    groups = GROUPS[name]
    suffixes = [own for start, own in suffixes_of(groups) if len(start)]
    labelled = torch.cat([own[-2:] for own in suffixes[::2]])
    given, last = states(sum(map(sum, groups))), nn.Identity()
    result = run(fanned(groups, labelled), given, PLAIN, None, last=last)
    check(result, alone(groups, given, None), given, labelled)
    others = torch.cat(suffixes[1::2])
    assert not result[:, others].any(), "suffixes without labels are left out"


def test_fans_have_suffixes_of_similar_size_and_little_padding() -> None:
    groups = GROUPS["many"]
    plan = fanned(groups, torch.tensor([0]))
    fans = plan.fans()
    assert sum(len(fan.queries.tokens) for fan in fans) == sum(sum(suffixes) for prefix, *suffixes in groups if prefix)
    assert sum(stop - first for fan in fans for first, stop, _, _ in fan.prefixes) == len(plan.suffixes) == 46
    assert len(fans) < 20
    places = torch.cat([fan.queries.tokens for fan in fans])
    assert len(places.unique()) == len(places), "every token is a query once"
    assert all(fan.queries.index.shape[1] % STEP == fan.keys.index.shape[1] % STEP == 0 for fan in fans)
    assert plan.fans() is fans, "computed once for a pass"


def test_tokens_are_picked_on_the_device_of_their_states() -> None:
    """Answers on CUDA pick too: a device without numbers replaces it here, which cannot be mixed with the CPU."""
    states = torch.empty(3, 40, 8, device="meta")
    assert pick(states, torch.zeros(5, 7, dtype=torch.int64, device="meta")).shape == (5, 3, 7, 8)
