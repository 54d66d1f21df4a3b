"""Stacked layers: targets, LoRA dropout, and gradients that are the slope of the loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import tiny
from torch import Tensor, nn

from fedmira.adapters import Adapters, lora_layout
from fedmira.data.batches import Encoded, collate
from fedmira.errors import ModelError
from fedmira.model.base.targets import find_targets
from fedmira.model.packed.lora import Dropout, Stack, install
from fedmira.model.packed.packing import Segment
from fedmira.model.passes import gradients, losses

SEEDS = (11, 22, 33)


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "padded"])
def base(request: pytest.FixtureRequest) -> tiny.Base:
    return replace(tiny.base("gpt2", targets="all-linear"), packs=request.param)


@pytest.fixture(scope="module")
def stack(base: tiny.Base) -> Adapters:
    return tiny.adapters(tiny.layout(base, 2), (2, 2, 2))


@pytest.fixture(scope="module")
def texts() -> list[list[Encoded]]:
    stream = np.random.default_rng(2)
    return [[tiny.example(stream, size, answer=2) for size in sizes] for sizes in ((4, 6), (12, 9, 7), (3,))]


def dropped(
    base: tiny.Base, stack: Adapters, texts: list[list[Encoded]], seeds: tuple[int, ...], *, multiple: int = 8
) -> tuple[Tensor, Tensor]:
    batch = collate(texts, pad_id=0, multiple=multiple)
    into = torch.zeros_like(stack.rows)
    found, _ = gradients(base, stack, batch, into=into, dropout=Dropout(0.4, seeds))
    return found, into


def test_dropout_drops_its_rate_and_scales_the_rest() -> None:
    segment = Segment(0, 2, 0, 1000, (slice(0, 1000),) * 2)
    mask = Dropout(0.3, [5, 6]).mask(0, segment, torch.zeros(1, 16, dtype=torch.float64))
    assert mask.shape == (2, 1000, 16)
    assert sorted(set(mask.flatten().tolist())) == pytest.approx([0, 1 / 0.7])
    for own in mask:  # 16,000 draws: a standard deviation is 0.0036
        assert float((own == 0).double().mean()) == pytest.approx(0.3, abs=0.015)


def test_dropout_differs_between_layers_clients_and_streams() -> None:
    like = torch.zeros(1, 16)
    segment = Segment(0, 2, 0, 12, (slice(0, 12),) * 2)
    first = Dropout(0.5, [5, 6]).mask(0, segment, like)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, Dropout(0.5, [5, 6]).mask(1, segment, like))
    assert not torch.equal(first[0], Dropout(0.5, [7, 6]).mask(0, segment, like)[0])
    assert torch.equal(first, Dropout(0.5, [5, 6]).mask(0, segment, like))


def test_dropout_of_a_client_does_not_depend_on_its_segment_or_its_filler() -> None:
    like = torch.zeros(1, 16)
    alone = Dropout(0.5, [5]).mask(0, Segment(0, 1, 0, 7, (slice(0, 7),)), like)
    among = Dropout(0.5, [8, 5, 9]).mask(0, Segment(1, 3, 30, 9, (slice(0, 7), slice(0, 9))), like)
    assert torch.equal(among[0, :7], alone[0])


def test_a_clients_dropout_does_not_depend_on_its_cohort_or_on_padding(
    base: tiny.Base, stack: Adapters, texts: list[list[Encoded]]
) -> None:
    loss, gradient = dropped(base, stack, texts, SEEDS)
    plain, _ = dropped(base, stack, texts, (44, 55, 66))
    for k in range(3):
        alone, own = dropped(base, stack.take(torch.tensor([k])), [texts[k]], SEEDS[k : k + 1], multiple=1)
        torch.testing.assert_close(alone[0], loss[k], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(own[0], gradient[k], rtol=1e-12, atol=1e-13)
        assert not torch.allclose(plain[k], loss[k])


def test_dropout_of_rate_zero_drops_nothing(base: tiny.Base, stack: Adapters, texts: list[list[Encoded]]) -> None:
    batch = collate(texts, pad_id=0)
    into, other = torch.zeros_like(stack.rows), torch.zeros_like(stack.rows)
    gradients(base, stack, batch, into=into)
    gradients(base, stack, batch, into=other, dropout=Dropout(0.0, SEEDS))
    assert torch.equal(into, other)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_the_gradient_is_the_slope_of_the_loss(
    base: tiny.Base, stack: Adapters, texts: list[list[Encoded]], rate: float
) -> None:
    """(loss(w + h v) - loss(w - h v)) / 2h = gradient . v for a random direction v, with fixed masks."""
    batch = collate(texts, pad_id=0)
    dropout = Dropout(rate, SEEDS)
    real = stack.layout.rank_mask(stack.ranks)
    direction = torch.randn(stack.rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * real
    into = torch.zeros_like(stack.rows)
    gradients(base, stack, batch, into=into, dropout=dropout)
    spare = torch.zeros_like(into)
    ahead, behind = (
        gradients(base, stack.with_rows(stack.rows + h * direction), batch, into=spare, dropout=dropout)[0]
        for h in (1e-6, -1e-6)
    )
    torch.testing.assert_close((ahead - behind) / 2e-6, (into * direction).sum(dim=1), rtol=1e-6, atol=1e-8)


def test_a_zero_b_leaves_every_client_at_the_base(base: tiny.Base, stack: Adapters, texts: list[list[Encoded]]) -> None:
    start = stack.with_rows(stack.rows.clone())
    for leaf in start.layout.part("lora").leaves:
        if leaf.factor == "B":
            start.leaf(leaf).zero_()
    same = [texts[1]] * 3
    sums, counts = losses(base, start, collate(same, pad_id=0))
    plain = tiny.model("gpt2").requires_grad_(False)
    expected = sum(
        float(nn.functional.cross_entropy(plain(torch.tensor([one.ids])).logits[0, -3:-1], torch.tensor(one.ids[-2:])))
        * 2
        for one in texts[1]
    )
    assert counts.tolist() == [6, 6, 6]
    assert sums.tolist() == pytest.approx([expected] * 3)


class Twice(nn.Module):
    """One linear layer used twice: y = W tanh(W x)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_a_module_used_twice_adds_up_its_gradients() -> None:
    model = Twice().requires_grad_(False)
    weight = model.layer.weight.clone()
    stack = Stack()
    adapters = tiny.adapters(lora_layout(install(model, ["layer"], stack), 2), (2, 2))
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    into = torch.full_like(adapters.rows, 7.0)
    with stack.filled(adapters, dtype=torch.float64, device=torch.device("cpu"), gradient=into):
        model(x).square().sum().backward()
    real = adapters.layout.rank_mask(torch.tensor([2]))[0]
    for k in range(2):
        row = adapters.rows[k].clone().requires_grad_()
        own = Adapters(adapters.layout, row[None], adapters.ranks[k : k + 1], adapters.scale[k : k + 1])
        whole = weight + own.product("layer")[0]
        (torch.tanh(x[k] @ whole.T) @ whole.T).square().sum().backward()
        assert row.grad is not None
        torch.testing.assert_close(into[k][real], row.grad[real])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e308])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_client_with_numbers_that_are_not_finite_does_not_change_the_others(factor: str, broken: float) -> None:
    """1e308: finite factors whose product is not."""
    model, stack = Twice().requires_grad_(False), Stack()
    adapters = tiny.adapters(lora_layout(install(model, ["layer"], stack), 2), (2, 2))
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def answers() -> Tensor:
        with stack.filled(adapters, dtype=torch.float64, device=torch.device("cpu")):
            return model(x)

    sound = answers()
    for leaf in adapters.layout.part("lora").leaves:
        if leaf.factor == factor:
            adapters.leaf(leaf)[0] = broken
    torch.testing.assert_close(answers()[1], sound[1], rtol=0, atol=0)


def test_all_linear_leaves_the_output_head_out() -> None:
    plain = tiny.model("llama")
    assert len(find_targets(plain, "all-linear", head=plain.get_output_embeddings())) == 2 * 7


def test_targets_are_name_endings_in_the_models_order() -> None:
    plain = tiny.model("llama")
    assert find_targets(plain, ["v_proj", "q_proj"], head=plain.lm_head) == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]


def test_a_misspelt_target_is_refused_and_the_nearest_and_all_others_named() -> None:
    plain = tiny.model("llama")
    with pytest.raises(ModelError, match=r"'q_prj' names no module.*q_proj.*down_proj"):
        find_targets(plain, ["q_prj"], head=plain.lm_head)


def test_a_target_that_is_not_a_linear_layer_is_refused() -> None:
    plain = tiny.model("llama")
    with pytest.raises(ModelError, match="LlamaMLP"):
        find_targets(plain, ["mlp"], head=plain.lm_head)


def test_the_output_head_cannot_be_a_target() -> None:
    plain = tiny.model("llama")
    with pytest.raises(ModelError, match="lm_head"):
        find_targets(plain, ["lm_head"], head=plain.lm_head)
