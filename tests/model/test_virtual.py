"""Clients with virtual tokens: losses, gradients and answers of all in one pass are PEFT's of each alone."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tests import tiny
from torch import Tensor, nn
from torch.nn import functional

from fedmira.adapters import Adapters, prompt_layout, start_adapters
from fedmira.data.batches import Encoded, collate
from fedmira.errors import ModelError
from fedmira.model.answers.generate import answers
from fedmira.model.base.load import Base
from fedmira.model.base.trial import check_embeddings
from fedmira.model.packed.lora import Dropout
from fedmira.model.packed.virtual import embeddings, find_virtual, prepend_virtual, virtual_ids
from fedmira.model.passes import gradients, losses

TOKENS, HIDDEN, CLIENTS, NEW = 9, 6, 4, 8  # more tokens than a prefix needs to be shared
FAMILIES = ("gpt2", "llama-tied", "gemma2", "gemma3", "granite", "opt", "mixtral", "bloom", "mamba")


def make(family: str, *, dtype: torch.dtype | None = None) -> tuple[Base, Adapters]:
    """A base and four clients, each with a separate encoder."""
    kind = tiny.DTYPES.get(family, torch.float64) if dtype is None else dtype
    base = tiny.base(family, targets="all-linear", dtype=kind)
    layout = prompt_layout(base.width, TOKENS, HIDDEN)
    start = start_adapters(layout, torch.zeros(CLIENTS, dtype=torch.int64), 1.0, torch.Generator().manual_seed(2))
    rows = start.rows + 0.3 * torch.randn(start.rows.shape, generator=torch.Generator().manual_seed(3))
    return base, start.with_rows(rows.double() if kind == torch.float64 else rows)


def by_peft(family: str, base: Base, stack: Adapters, k: int) -> Any:
    """Client k as PEFT has it: a copy of the plain model with this client's prompt encoder."""
    plain = copy.deepcopy(tiny.model(family, dtype=base.dtype))
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        encoder_hidden_size=HIDDEN,
        token_dim=base.width,
        num_layers=2,
        num_attention_heads=1,
    )
    model = peft.get_peft_model(plain, config).eval()
    own = model.prompt_encoder["default"].to(stack.rows.dtype)
    own.load_state_dict({f"{leaf.module}.{leaf.factor}": stack.leaf(leaf)[k] for leaf in stack.layout.parts[0].leaves})
    return model


def peft_loss(model: Any, examples: list[Encoded]) -> Tensor:
    """Mean nats per labelled token over examples, each alone behind the virtual tokens."""
    nats = []
    for one in examples:
        logits = model(input_ids=torch.tensor([one.ids])).logits[0, TOKENS:]
        targets = torch.tensor(one.ids[one.prompt_length :])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        nats.append(functional.cross_entropy(wide[one.prompt_length - 1 : -1], targets, reduction="none"))
    return torch.cat(nats).mean()


def peft_gradient(model: Any, stack: Adapters) -> Tensor:
    row = torch.zeros(stack.layout.size, dtype=stack.rows.dtype)
    own = dict(model.prompt_encoder["default"].named_parameters())
    for leaf in stack.layout.parts[0].leaves:
        row[leaf.start : leaf.stop] = own[f"{leaf.module}.{leaf.factor}"].grad.flatten()
    return row


def texts() -> list[list[Encoded]]:
    """Uneven batches; those of client 3 begin alike, client 1 has one example."""
    stream = np.random.default_rng(1)
    alike = tuple(stream.integers(2, tiny.VOCABULARY, 12).tolist())

    def one(size: int) -> Encoded:
        return tiny.example(stream, size, answer=min(3, size - 1))

    found = [[one(size) for size in sizes] for sizes in ((7, 12, 4), (9,), (5, 5))]
    return [*found, [Encoded((*alike, *one(size).ids), 12 + size - 3, ()) for size in (6, 8, 5)]]


@pytest.fixture(params=[(family, packed) for family in FAMILIES for packed in (True, False)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[str, Base, Adapters]:
    family, packed = request.param
    base, stack = make(family)
    return family, base if packed else replace(base, packs=False), stack


def test_losses_and_gradients_are_those_of_peft(case: tuple[str, Base, Adapters]) -> None:
    family, base, stack = case
    batch = collate(texts(), pad_id=base.pad_id)
    into = torch.full_like(stack.rows, 7.0)
    real = stack.layout.rank_mask(stack.ranks)  # not what fills a row up to its size
    nats, tokens = gradients(base, stack, batch, into=into)
    sums, counts = losses(base, stack, batch)
    tolerance = {"gpt2": 1e-12, "opt": 1e-12}.get(family, 1e-5)  # many norms are float32 in any dtype
    for k, own in enumerate(texts()):
        model = by_peft(family, base, stack, k)
        expected = peft_loss(model, own)
        expected.backward()
        assert int(tokens[k]) == int(counts[k]) == sum(one.labels for one in own)
        assert float(nats[k]) == pytest.approx(expected.item(), rel=tolerance)
        assert float(sums[k]) / int(counts[k]) == pytest.approx(expected.item(), rel=tolerance)
        gradient = peft_gradient(model, stack)
        assert float(gradient.abs().max()) > 1e-4
        off = float((into[k] - gradient)[real[k]].abs().max() / gradient.abs().max())
        assert off < 10 * tolerance, f"client {k}: {off:.1e}"


def test_answers_are_those_of_peft(case: tuple[str, Base, Adapters]) -> None:
    family, base, stack = case
    prompts = [[list(one.ids) for one in own] for own in texts()]
    found = answers(base, stack, prompts, max_new_tokens=NEW)
    expected = []
    for k, own in enumerate(prompts):
        model = by_peft(family, base, stack, k)
        expected.append([base.tokenizer.decode(written(model, ids), skip_special_tokens=True) for ids in own])
    assert found == expected
    assert len({text for own in found for text in own}) > 1


@torch.no_grad()
def written(model: Any, ids: list[int]) -> list[int]:
    """What PEFT's model writes to a prompt, the whole text passed again for every token.

    Its own `generate` puts the virtual tokens before every new token of a model that keeps states and no keys (Mamba).
    """
    text = list(ids)
    while len(text) < len(ids) + NEW and (text == ids or text[-1] != tiny.END):
        text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :]


def test_a_client_without_examples_has_gradient_zero_and_does_not_change_the_others() -> None:
    base, stack = make("llama-tied")
    full, some = texts(), texts()
    some[2] = []
    into, apart = torch.full_like(stack.rows, 7.0), torch.full_like(stack.rows, 7.0)
    gradients(base, stack, collate(full, pad_id=base.pad_id), into=into)
    gradients(base, stack, collate(some, pad_id=base.pad_id), into=apart)
    assert not bool(apart[2].any())
    torch.testing.assert_close(apart[[0, 1, 3]], into[[0, 1, 3]], rtol=1e-9, atol=1e-12)


def test_lora_dropout_does_not_change_virtual_tokens() -> None:
    base, stack = make("llama-tied")
    batch = collate(texts(), pad_id=base.pad_id)
    plain, dropped = torch.zeros_like(stack.rows), torch.zeros_like(stack.rows)
    gradients(base, stack, batch, into=plain)
    gradients(base, stack, batch, into=dropped, dropout=Dropout(0.5, [1, 2, 3, 4]))
    assert torch.equal(plain, dropped)


def test_encoders_are_run_in_float32_under_a_base_in_bfloat16() -> None:
    """Rounding their weights would move the virtual tokens by 0.4 %; only the outcome is rounded."""
    base, stack = make("llama-tied", dtype=torch.bfloat16)
    with base.stack.filled(stack, dtype=base.dtype, device=base.device):
        assert base.stack.virtual is not None
        torch.testing.assert_close(base.stack.virtual.embedded, embeddings(stack), rtol=0, atol=0)
        ids = torch.tensor([[*virtual_ids(TOKENS), 5, 6]] * CLIENTS)
        given = base.inputs(ids, find_virtual(ids))["inputs_embeds"]
    assert given.dtype == torch.bfloat16
    assert torch.equal(given[:, :TOKENS], embeddings(stack).bfloat16())
    assert torch.equal(given[:, TOKENS:], base.model.get_input_embeddings()(ids[:, TOKENS:]))


def test_the_stack_is_empty_after_a_pass_and_after_a_failed_one() -> None:
    base, stack = make("llama-tied")
    batch = collate(texts(), pad_id=base.pad_id)
    losses(base, stack, batch)
    assert base.stack.virtual is None
    with pytest.raises(RuntimeError), base.stack.filled(stack, dtype=base.dtype, device=base.device):
        raise RuntimeError
    assert base.stack.virtual is None


def test_virtual_tokens_come_before_examples_but_not_before_padding() -> None:
    batch = collate([texts()[0][:1], []], pad_id=0)
    longer = prepend_virtual(batch, 3)
    assert longer.ids[0, 0, :3].tolist() == [-1, -2, -3]
    assert longer.lengths.tolist() == [[batch.lengths[0, 0] + 3], [0]]
    assert torch.equal(longer.labels[0, 0, 3:], batch.labels[0, 0])
    assert prepend_virtual(batch, 0) is batch


def test_a_base_that_reads_more_than_embeddings_takes_no_virtual_tokens() -> None:
    class Odd(nn.Module):
        """Counts its tokens by their ids."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor | None = None, **given: Any) -> Any:
            out = self.inner(input_ids=input_ids, **given)
            if input_ids is not None:
                out.last_hidden_state = out.last_hidden_state + input_ids[..., None]
            return out

    class Blind(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            raise AssertionError("never called")

    base, _ = make("llama-tied")
    embedding = base.model.get_input_embeddings()
    check_embeddings(base.decoder, embedding, vocabulary=tiny.VOCABULARY, name="x")
    with pytest.raises(ModelError, match="reads more than embeddings"):
        check_embeddings(Odd(base.decoder), embedding, vocabulary=tiny.VOCABULARY, name="x")
    with pytest.raises(ModelError, match="takes no virtual tokens"):
        check_embeddings(Blind(), embedding, vocabulary=tiny.VOCABULARY, name="x")
