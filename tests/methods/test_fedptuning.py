"""FedPTuning in numbers worked by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapters, Layout, lora_layout, prompt_layout, start_adapters
from fedmira.config.sections import MethodEntry
from fedmira.errors import ConfigError, ShapeError
from fedmira.methods import build, recipe_of
from fedmira.methods.base import Clock, Cohort, Message, Method, State, use_what_was_sent

LORA = lora_layout([("m", 4, 4)], 2)
FIRST = Clock(1)


def made(**settings: Any) -> Method:
    cohort = Cohort(("a", "b"), (3, 1), ({}, {}), (np.arange(2),), seed=0)
    return build("fedptuning", settings, cohort)


def layout_of(method: Method, width: int) -> Layout:
    assert method.layout is not None
    return method.layout(LORA, width)


@pytest.mark.parametrize(("width", "parameters"), [(2048, 583_936), (1280, 371_200)])
def test_twenty_tokens_and_width_128_are_as_many_numbers_as_in_the_paper(width: int, parameters: int) -> None:
    """MIRA, table II: 2.2275 and 0.708 MiB in float32 and float16."""
    layout = layout_of(made(), width)
    assert layout.parameters == parameters
    assert layout.parameters == 20 * width + 2 * width * 128 + 128 * 128 + 2 * 128 + width
    assert layout.virtual_tokens == 20
    assert layout.size - layout.parameters < 16


def test_leaves_are_named_and_shaped_as_in_peft() -> None:
    """n 3, d 5, h 2: V, then weight and bias of three layers, none overlapping."""
    leaves = layout_of(made(virtual_tokens=3, hidden=2), 5).parts[0].leaves
    assert [(leaf.module, leaf.factor, leaf.shape) for leaf in leaves] == [
        ("embedding", "weight", (3, 5)),
        ("mlp_head.0", "weight", (2, 5)),
        ("mlp_head.0", "bias", (2,)),
        ("mlp_head.2", "weight", (2, 2)),
        ("mlp_head.2", "bias", (2,)),
        ("mlp_head.4", "weight", (5, 2)),
        ("mlp_head.4", "bias", (5,)),
    ]
    assert [leaf.start for leaf in leaves[1:]] == [leaf.stop for leaf in leaves[:-1]]


@pytest.mark.parametrize(("weights", "wanted"), [("examples", 2.5), ("uniform", 4.0)])
def test_the_server_keeps_the_mean_of_the_encoders(weights: str, wanted: float) -> None:
    """(3 x 1 + 1 x 7) / 4, or (1 + 7) / 2; both then get it."""
    method = made(virtual_tokens=1, hidden=1, weights=weights)
    layout = layout_of(method, 2)

    def rows(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, layout.size)

    state = State(Adapters(layout, rows(9.0), torch.zeros(1, dtype=torch.int64), torch.ones(1)))
    ids = torch.arange(2)
    change = method.merge(state, ids, Message(rows(1, 7)), torch.tensor([3.0, 1.0]), FIRST)
    assert change.ids.tolist() == [0]
    assert torch.equal(change.rows, rows(wanted))
    state = State(Adapters(layout, change.rows, torch.zeros(1, dtype=torch.int64), torch.ones(1)))
    assert torch.equal(method.message(state, ids, FIRST).rows, rows(wanted, wanted))
    assert method.client.use is use_what_was_sent


def test_the_encoder_begins_as_pefts_does() -> None:
    """V ~ N(0, 1); weights and biases within 1 / sqrt(in), and filling that range; the same for all clients."""
    layout = prompt_layout(64, 50, 100)
    start = start_adapters(layout, torch.zeros(2, dtype=torch.int64), 1.0, torch.Generator().manual_seed(1))
    assert torch.equal(start.rows[0], start.rows[1])
    embedding, *others = layout.parts[0].leaves
    tokens = start.leaf(embedding)[0]
    assert float(tokens.mean()) == pytest.approx(0, abs=0.05)
    assert float(tokens.std()) == pytest.approx(1, abs=0.05)
    for leaf, fan_in in zip(others, (64, 64, 100, 100, 100, 100), strict=True):
        drawn = start.leaf(leaf)[0]
        assert float(drawn.abs().max()) <= fan_in**-0.5
        assert float(drawn.max()) > 0.9 * fan_in**-0.5
        assert float(drawn.min()) < -0.9 * fan_in**-0.5


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"virtual_tokens": 0}, {"hidden": 0}, {"virtual_token": 3}, {"weights": "all"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            made(**wrong)
    with pytest.raises(ShapeError, match="0 tokens"):
        prompt_layout(4, 0, 4)


def test_its_tokens_are_told_before_any_data_are_read() -> None:
    assert recipe_of(MethodEntry(name="fedptuning", virtual_tokens=7)).settings.tokens_ahead == 7
    assert recipe_of(MethodEntry(name="local")).settings.tokens_ahead == 0
