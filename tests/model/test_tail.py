"""After the last attention only labelled tokens are computed, and no loss or gradient changes."""

from dataclasses import replace

import pytest
import torch
from tests import tiny
from torch import Tensor, nn

from fedmira.data.batches import NO_LOSS, Batch
from fedmira.model.base.load import Base
from fedmira.model.packed.lora import Dropout, Stack
from fedmira.model.packed.packing import Segment, _labelled_segments
from fedmira.model.packed.tail import find_tail
from fedmira.model.passes import gradients, losses

PACKED = [family for family in tiny.FAMILIES if family not in tiny.PADDED]
LENGTHS = torch.tensor([[14, 5], [9, 0], [12, 14], [3, 0]])
LABELS = [[2, 3], [1, 0], [4, 1], [0, 0]]  # of each example, at its end; the last client has none


def batch() -> Batch:
    ids = torch.randint(2, tiny.VOCABULARY, (4, 2, 14), generator=torch.Generator().manual_seed(0))
    places = torch.arange(14)
    count = torch.tensor(LABELS)
    own = (places < LENGTHS[..., None]) & (places >= (LENGTHS - count)[..., None])
    return Batch(ids, ids.masked_fill(~own, NO_LOSS), LENGTHS)


def measure(base: Base, dropout: Dropout | None = None) -> tuple[Tensor, Tensor, Tensor]:
    stack = tiny.adapters(tiny.layout(base, 2), (2, 1, 2, 1), dtype=base.dtype)
    into = torch.full_like(stack.rows, torch.nan)
    found, _ = gradients(base, stack, batch(), into=into, dropout=dropout)
    return found, into, losses(base, stack, batch())[0]


def count_rows(base: Base, name: str) -> list[int]:
    """Return how many rows a module saw in each pass of a measurement."""
    seen: list[int] = []
    layer = base.decoder.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel() // given[0].shape[-1]))
    measure(base)
    hook.remove()
    return seen


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("family", PACKED)
def test_losses_and_gradients_are_those_of_an_uncut_pass(family: str, targets: str) -> None:
    dtype = tiny.DTYPES.get(family, torch.float64)
    base = tiny.base(family, targets=targets, dtype=dtype)
    assert base.tail is not None
    limits = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for one, other in zip(measure(base), measure(replace(base, tail=None)), strict=True):
        torch.testing.assert_close(one, other, **limits)


def test_the_feed_forward_layer_after_the_last_attention_sees_labelled_tokens_alone() -> None:
    base = tiny.base("llama", targets="all-linear")
    assert base.tail is not None
    assert base.tail.names == ("layers.1.self_attn.o_proj", "layers.1.mlp")
    tokens, labelled = int(LENGTHS.sum()), sum(sum(own) for own in LABELS)
    assert count_rows(base, "layers.1.mlp.gate_proj") == [labelled, labelled]
    assert all(seen >= tokens for seen in count_rows(base, "layers.0.mlp.gate_proj"))


def test_a_pass_under_dropout_or_with_labels_everywhere_is_not_cut() -> None:
    base = tiny.base("llama", targets="all-linear")
    assert base.tail is not None
    whole = measure(replace(base, tail=None), Dropout(0.5, [1, 2, 3, 4]))
    for one, other in zip(measure(base, Dropout(0.5, [1, 2, 3, 4])), whole, strict=True):
        assert torch.equal(one, other)
    everything = replace(batch(), labels=batch().ids.masked_fill(torch.arange(14) >= LENGTHS[..., None], NO_LOSS))
    seen: list[int] = []
    layer = base.decoder.get_submodule("layers.1.mlp")
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    losses(base, tiny.adapters(tiny.layout(base, 2), (2, 1, 2, 1)), everything)
    assert seen[0] >= int(LENGTHS.sum())


def test_neighbours_with_equally_many_labelled_tokens_share_a_segment() -> None:
    assert _labelled_segments([3, 3, 0, 2]) == (
        Segment(0, 2, 0, 3, (slice(0, 3), slice(0, 3))),
        Segment(3, 4, 6, 2, (slice(0, 2),)),
    )


class Shift(nn.Module):
    """A feed-forward layer that also looks at the token before."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] * 0.5)
        return y


def test_a_base_that_mixes_tokens_after_its_last_attention_is_not_cut() -> None:
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.mlp = Shift(layer.mlp)
    assert find_tail(model, model.model, Stack(), vocabulary=tiny.VOCABULARY) is None
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    for layer in model.model.layers:  # nothing stays wrapped
        assert torch.equal(layer.mlp(x), Shift.forward(layer.mlp, x))
        assert layer.mlp.forward.__func__ is Shift.forward


def test_a_base_whose_layers_share_their_weights_is_not_cut() -> None:
    model = tiny.model("llama")
    model.model.layers[1] = model.model.layers[0]
    assert find_tail(model, model.model, Stack(), vocabulary=tiny.VOCABULARY) is None
