"""Labels drawn from the model: what their gradients are, and that no client's draws depend on the others."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.optim import sgd
from fedmira.data.batches import NO_LOSS, Batch, Encoded, collate
from fedmira.engine import tools as tools_of_clients
from fedmira.engine.phase import PhaseResult, local_phase
from fedmira.engine.tools import Training
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Memory, Message, Tools, descend
from fedmira.model.base.load import Base
from fedmira.model.packed import loss
from fedmira.model.packed.lora import Dropout
from fedmira.model.packed.loss import Head, _draw, sampled_loss, weighted_loss
from fedmira.model.packed.packing import PREFIX_TOKENS, pack
from fedmira.model.passes import gradients

BASE = tiny.base("gpt2", targets=["c_attn"])
PADDED = replace(BASE, packs=False)
V, D, N = 7, 5, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def streams(count: int, *, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, k]) for k in range(count)]


def sampled(
    base: Base, stack: Adapters, batch: Batch, own: list[np.random.Generator], dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """Labelled tokens and gradients with drawn labels."""
    into = torch.zeros_like(stack.rows)
    _, tokens = gradients(base, stack, batch, into=into, dropout=dropout, streams=own)
    return tokens, into


# ---------------------------------------------------------------- drawing a token

HEADS = {
    "plain": {},
    "bias, scale and cap": {"bias": True, "scale": 1.7, "cap": 1.5},
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spelled(*chances: float) -> tuple[Tensor, Head]:
    """Hidden states [1, 1] and a head whose logits are the logarithms of these probabilities."""
    return torch.ones(1, 1, dtype=torch.float64), Head(torch.tensor(chances, dtype=torch.float64).log()[:, None])


def drawn(number: float, *chances: float) -> int:
    """The token that a number draws, identified by its loss."""
    hidden, head = spelled(*chances)
    _, each = sampled_loss(hidden, torch.tensor([number], dtype=torch.float64), torch.ones(1), head)
    return int(np.argmin(np.abs(np.array(chances) - np.exp(-float(each)))))


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 0), (0.199, 0), (0.201, 1), (0.699, 1), (0.701, 2), (np.nextafter(1, 0), 2)]
)
def test_a_number_draws_the_token_whose_interval_contains_it(number: float, token: int) -> None:
    """Chances of 0.2, 0.5 and 0.3 reach from 0 to 0.2, 0.7 and 1."""
    assert drawn(number, 0.2, 0.5, 0.3) == token


def test_zero_does_not_draw_a_token_of_probability_zero() -> None:
    assert drawn(0.0, 0.0, 0.4, 0.6) == 1


def test_probabilities_that_do_not_sum_to_one_keep_their_proportions() -> None:
    found = _draw(torch.tensor([[2.0, 5.0, 3.0]]).expand(2, 3).contiguous(), torch.tensor([[0.19], [0.71]]))
    assert found.tolist() == [[0], [2]]


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS.keys())
def test_value_and_gradient_are_those_of_the_tokens_drawn(
    kind: dict[str, float], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of any size, and with any function of the logits in the head."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * V * rows)
    settings = dict(kind)
    head = Head(draw(V, D, seed=1), draw(V, seed=2) if settings.pop("bias", False) else None, **settings)
    hidden, numbers = draw(N, D, seed=3).requires_grad_(), torch.linspace(0.05, 0.95, N, dtype=torch.float64)
    chances = torch.softmax(head.logits(hidden.detach()), dim=1).numpy()
    targets = torch.tensor(
        [int(np.searchsorted(np.cumsum(row), number)) for row, number in zip(chances, numbers.tolist(), strict=True)]
    )
    assert len(set(targets.tolist())) > 2
    weights = draw(N, seed=4).abs()
    found, each = sampled_loss(hidden, numbers, weights, head)
    expected, of_each = weighted_loss(hidden, targets, weights, head)
    assert torch.equal(each, of_each)
    assert torch.equal(*(torch.autograd.grad(one, hidden)[0] for one in (found, expected)))


def test_the_largest_number_draws_a_token_in_float32_too() -> None:
    """There it is 1, and the chances may add up to less."""
    numbers = torch.full((3,), float(np.nextafter(1, 0)), dtype=torch.float64)
    _, each = sampled_loss(torch.zeros(3, 1), numbers, torch.ones(3), Head(torch.zeros(1000, 1)))
    assert each.tolist() == pytest.approx([np.log(1000)] * 3)


def test_states_that_are_not_finite_give_a_gradient_that_is_not_finite() -> None:
    """Such a client is refused at the gate; the others go on."""
    hidden = torch.tensor([[float("nan")], [1.0]], requires_grad=True)
    total, _ = sampled_loss(hidden, torch.full((2,), 0.5), torch.ones(2), Head(torch.ones(4, 1)))
    (gradient,) = torch.autograd.grad(total, hidden)
    assert gradient.isnan().tolist() == [[True], [False]]


# ---------------------------------------------------------------- the curvature


def exact(base: Base, stack: Adapters, batch: Batch) -> tuple[Tensor, Tensor]:
    """Diagonals of the Gauss-Newton matrices [S, P] of the clients' losses, and their B [S], from every possible label.

    1 / B sum_b sum_y p_b(y) (d -log p_b(y) / d row)^2: each place b alone, with a client for each token y.
    """
    found, counts = torch.zeros_like(stack.rows), torch.zeros(len(stack))
    for k in range(len(stack)):
        places = (batch.labels[k] != NO_LOSS).nonzero().tolist()
        counts[k] = len(places)
        many = torch.full((tiny.VOCABULARY,), k)
        for example, token in places:
            labels = torch.full_like(batch.labels[many], NO_LOSS)
            labels[:, example, token] = torch.arange(tiny.VOCABULARY)
            into = torch.zeros(tiny.VOCABULARY, stack.rows.shape[1], dtype=torch.float64)
            one = Batch(batch.ids[many], labels, batch.lengths[many])
            nats, ones = gradients(base, stack.take(many), one, into=into)
            assert ones.tolist() == [1] * tiny.VOCABULARY
            chances = torch.exp(-nats)
            assert float(chances.sum()) == pytest.approx(1)
            found[k] += chances @ into.square() / len(places)
    return found, counts


def texts(*lengths: list[int], seed: int = 0) -> Batch:
    stream = np.random.default_rng(seed)
    return collate(
        [[tiny.example(stream, length, answer=int(stream.integers(1, length))) for length in own] for own in lengths],
        pad_id=0,
    )


@pytest.mark.parametrize(
    ("base", "passes", "close"),
    [
        pytest.param(BASE, 8, 0.06, id="packed, fewer draws"),
        pytest.param(BASE, 30, 0.03, marks=pytest.mark.slow, id="packed"),
        pytest.param(PADDED, 30, 0.03, marks=pytest.mark.slow, id="padded"),
    ],
)
def test_b_times_the_squared_gradient_is_on_average_the_diagonal_of_the_gauss_newton_matrix(
    base: Base, passes: int, close: float
) -> None:
    """Two clients with unequal B; 200 draws each in a pass, every number within five standard errors.

    close: how far their sum may be from the exact one.
    """
    batch, stack = texts([4, 7], [5]), tiny.adapters(tiny.layout(BASE, 2), (2, 1))
    expected, counts = exact(base, stack, batch)
    assert len(set(counts.tolist())) == 2
    copies = 200
    for k in range(2):
        many = torch.full((copies,), k)
        alike = Batch(batch.ids[many], batch.labels[many], batch.lengths[many])
        estimates = []
        for number in range(passes):
            tokens, found = sampled(base, stack.take(many), alike, streams(copies, seed=number))
            assert tokens.tolist() == [int(counts[k])] * copies
            estimates.append(tokens[:, None] * found.square())
        drawn = torch.cat(estimates)
        error = drawn.std(dim=0) / len(drawn) ** 0.5
        assert bool(((drawn.mean(dim=0) - expected[k]).abs() <= 5 * error + 1e-12).all())
        assert float(drawn.mean(dim=0).sum()) == pytest.approx(float(expected[k].sum()), rel=close)


def alike() -> Batch:
    """Three clients, the shortest first: one example, examples of uneven lengths, examples that begin alike."""
    stream = np.random.default_rng(5)
    head = tuple(stream.integers(2, tiny.VOCABULARY, PREFIX_TOKENS + 3).tolist())
    last = [Encoded((*head, *tail, tiny.END), len(head), ("",)) for tail in ((3, 4), (5,), (6, 7, 8))]
    others = [[tiny.example(stream, size, answer=2) for size in own] for own in ([5], [9, 4, 6])]
    return collate([*others, last], pad_id=0)


def test_the_draws_of_a_client_are_the_same_in_every_layout() -> None:
    """Packed, with a shared start or without, and padded: the same gradients from the same streams."""
    batch, stack = alike(), tiny.adapters(tiny.layout(BASE, 2), (2, 1, 2))
    assert pack(batch, pad_id=0, share=True).ids.shape[1] < pack(batch, pad_id=0).ids.shape[1]
    assert pack(batch, pad_id=0).order.tolist() == [2, 1, 0]
    _, shared = sampled(BASE, stack, batch, streams(3))
    _, padded = sampled(PADDED, stack, batch, streams(3))
    _, plain = sampled(BASE, stack, batch, streams(3), Dropout(1e-300, [0, 1, 2]))  # drops nothing, shares nothing
    torch.testing.assert_close(shared, padded, **CLOSE)
    torch.testing.assert_close(shared, plain, **CLOSE)
    _, other = sampled(BASE, stack, batch, streams(3, seed=1))
    assert not any(torch.allclose(*rows) for rows in zip(shared, other, strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("base", [BASE, PADDED], ids=["packed", "padded"])
def test_a_client_alone_gets_the_same_gradient_as_among_others(base: Base, rate: float) -> None:
    batch, stack = alike(), tiny.adapters(tiny.layout(BASE, 2), (2, 1, 2))
    dropped = Dropout(rate, [7, 8, 9]) if rate else None
    tokens, together = sampled(base, stack, batch, streams(3), dropped)
    for k in range(3):
        one = torch.tensor([k])
        own = Batch(batch.ids[one], batch.labels[one], batch.lengths[one])
        masks = Dropout(rate, [7 + k]) if rate else None
        count, found = sampled(base, stack.take(one), own, [streams(3)[k]], masks)
        assert torch.equal(count, tokens[one])
        torch.testing.assert_close(found[0], together[k], **CLOSE)


def test_one_number_per_label_is_drawn_from_a_stream() -> None:
    used, fresh = streams(3), streams(3)
    tokens, _ = sampled(BASE, tiny.adapters(tiny.layout(BASE, 2), (2, 1, 2)), alike(), used)
    for one, other, count in zip(used, fresh, tokens.tolist(), strict=True):
        other.random(count)
        assert one.random() == other.random()


# ---------------------------------------------------------------- as a tool of a method

LOCAL = build("local", {}, Cohort(("c0", "c1"), (4, 7), ({}, {}), (), 0))
TWO_STEPS = Training(sgd(), 0.1, 2, 2, None, None, False, 0.3, seed=3)

Step = Callable[[Adapters, Memory, Message, Tools], tuple[Adapters, Memory]]


def run(step: Step, *, training: Training = TWO_STEPS, train: tuple[int, ...] = (4, 7), number: int = 1) -> PhaseResult:
    stack = tiny.adapters(tiny.layout(BASE, 2), (2, 1)[: len(train)])
    clients = [tiny.client(f"c{k}", train=count, longest=30, seed=3) for k, count in enumerate(train)]
    method, given = replace(LOCAL, client=replace(LOCAL.client, step=step)), Message(stack.rows)
    return local_phase(BASE, method, clients, stack, given, {}, training=training, clock=Clock(number), cohort=8)


def test_computing_the_curvature_does_not_change_the_gradient_and_loss_of_the_step() -> None:
    def ask(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        _, gradient = tools.grad(adapters)
        before = gradient.clone()
        tokens, drawn = tools.curvature(adapters)
        assert tokens.shape == (2,)
        assert torch.equal(gradient, before)
        assert drawn.shape == gradient.shape
        assert not torch.allclose(drawn, gradient)
        return tools.update(adapters, gradient), memory

    found, expected = run(ask), run(descend)
    assert torch.equal(found.returned.rows, expected.returned.rows)
    assert torch.equal(found.losses, expected.losses)
    assert found.tokens == expected.tokens


def test_labels_differ_between_steps_and_rounds_and_are_the_same_within_a_step() -> None:
    """One client with one example and a row that stays: nothing but the draws can differ."""
    seen: list[Tensor] = []

    def ask(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        tokens, drawn = tools.curvature(adapters)
        assert int(tokens) > 4
        seen.append(drawn[0].clone())
        assert torch.equal(tools.curvature(adapters)[1][0], seen[-1])
        return adapters, memory

    for number in (1, 2):
        run(ask, training=replace(TWO_STEPS, dropout=0.0), train=(1,), number=number)
    assert len(seen) == 4
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(seen, 2))


def test_the_curvature_has_the_dropout_masks_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Dropout | None] = []

    def watched(*arguments: Any, dropout: Dropout | None, **options: Any) -> tuple[Tensor, Tensor]:
        masks.append(dropout)
        return gradients(*arguments, dropout=dropout, **options)

    def ask(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        tools.grad(adapters)
        tools.curvature(adapters)
        return adapters, memory

    monkeypatch.setattr(tools_of_clients, "gradients", watched)
    run(ask)
    first, of_first, second, of_second = masks
    assert first is not None
    assert first == of_first
    assert second == of_second
    assert first != second


def test_there_is_no_curvature_where_there_is_no_batch() -> None:
    def ask(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        tools.curvature(adapters)
        return Message(adapters.rows), memory

    stack = tiny.adapters(tiny.layout(BASE, 2), (2,))
    clients, given = [tiny.client("c0", train=2)], Message(stack.rows)
    method = replace(LOCAL, client=replace(LOCAL.client, finish=ask))
    with pytest.raises(AssertionError, match="begin, finish and use have no batch"):
        local_phase(BASE, method, clients, stack, given, {}, training=TWO_STEPS, clock=Clock(1), cohort=1)
