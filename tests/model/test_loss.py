"""The fused cross-entropy has the value and gradient of torch's, for any head and chunks."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedmira.model.packed import loss
from fedmira.model.packed.loss import Head, token_losses, weighted_loss

V, D, N = 7, 5, 6

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "cap": {"cap": 2.0},
    "bias, scale and cap": {"bias": True, "scale": 1.7, "cap": 1.5},
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=HEADS.values(), ids=HEADS.keys())
def head(request: pytest.FixtureRequest) -> Head:
    kind = dict(request.param)
    bias = draw(V, seed=2) if kind.pop("bias", False) else None
    return Head(draw(V, D, seed=1), bias, **kind)


@pytest.fixture(params=[1, 2, 4, 100], ids=lambda rows: f"{rows} rows a chunk")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * V * request.param)


def reference(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Cross-entropy written out with torch: logits = cap tanh(scale (W h + b) / cap)."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return functional.cross_entropy(logits, targets, reduction="none")


@pytest.mark.usefixtures("chunks")
def test_value_and_gradient_are_those_of_torch(head: Head) -> None:
    hidden = draw(N, D, seed=3).requires_grad_()
    targets = torch.tensor([0, 6, 3, 3, 1, 5])
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    expected = reference(hidden, targets, head)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    total, each = weighted_loss(hidden, targets, weights, head)
    (gradient,) = torch.autograd.grad(total, hidden)
    torch.testing.assert_close(total, (expected * weights).sum())
    torch.testing.assert_close(each, expected.detach())
    torch.testing.assert_close(token_losses(hidden.detach(), targets, head), expected.detach())
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.usefixtures("chunks")
def test_the_gradient_is_the_slope_of_the_value(head: Head) -> None:
    targets = torch.tensor([0, 6, 3, 3, 1, 5])
    weights = draw(N, seed=4).abs()
    hidden = draw(N, D, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: 3 * weighted_loss(h, targets, weights, head)[0], (hidden,))


def test_the_loss_is_that_of_the_logits_of_the_head(head: Head) -> None:
    hidden = draw(N, D, seed=3)
    targets = torch.zeros(N, dtype=torch.int64)
    expected = functional.cross_entropy(head.logits(hidden), targets, reduction="none")
    torch.testing.assert_close(token_losses(hidden, targets, head), expected)


def test_without_labelled_tokens_the_loss_is_zero_and_the_gradient_empty() -> None:
    hidden = torch.zeros(0, D, requires_grad=True)
    total, each = weighted_loss(hidden, torch.zeros(0, dtype=torch.int64), torch.zeros(0), Head(torch.ones(V, D)))
    assert total.item() == 0
    assert each.shape == (0,)
    assert torch.autograd.grad(total, hidden)[0].shape == (0, D)


def test_equal_logits_over_four_words_cost_log_four() -> None:
    found = token_losses(torch.zeros(1, D), torch.tensor([2]), Head(torch.ones(4, D)))
    assert found.tolist() == pytest.approx([1.3862944])


def test_huge_logits_stay_finite() -> None:
    hidden = torch.full((1, 1), 1e4)
    assert token_losses(hidden, torch.tensor([1]), Head(torch.tensor([[1.0], [-1.0]]))).tolist() == [2e4]


def test_bfloat16_hidden_states_give_float32_losses_and_bfloat16_gradients() -> None:
    hidden = draw(N, D, seed=3).bfloat16().requires_grad_()
    wide = Head(draw(V, D, seed=1).bfloat16())
    targets = torch.tensor([0, 6, 3, 3, 1, 5])
    total, each = weighted_loss(hidden, targets, torch.ones(N), wide)
    total.backward()
    assert each.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact = reference(hidden.detach().double(), targets, Head(wide.weight.double()))
    torch.testing.assert_close(each.double(), exact, rtol=0.02, atol=0.02)
