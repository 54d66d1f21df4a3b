"""Stacked LoRA is PEFT, one client at a time: loss, logits, gradients, training, export and answers."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from tests import tiny
from tests.marks import one_in
from tests.parity.pairing import EXAMPLES, FLOAT32, RANKS, Pairing, pair, real_numbers, stacked_logits
from torch import Tensor

from fedmira.adapters.optim import adamw, sgd
from fedmira.data.batches import NO_LOSS, Batch, collate
from fedmira.engine.phase import local_phase, plan_steps
from fedmira.engine.tools import Training
from fedmira.export.peft_folder import export_adapter, read_adapter, short_targets
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message
from fedmira.model.answers.generate import answers
from fedmira.model.passes import losses

SHORT = {"gpt2": ["c_attn"]}
CASES = [
    (family, targets, dtype, packs)
    for family in ("gpt2", "llama", "llama-tied")
    for targets in ("short", "all-linear")
    for dtype in (torch.float32, torch.float64)
    for packs in (True, False)
] + [
    (family, "all-linear", tiny.DTYPES.get(family, torch.float64), packs)
    for family in tiny.FAMILIES
    if family not in ("gpt2", "llama", "llama-tied")
    for packs in (True, False)
    if not packs or family not in tiny.PADDED
]


def name_of(case: tuple[str, str, torch.dtype, bool]) -> str:
    family, targets, dtype, packs = case
    return f"{family}-{targets}-{str(dtype).removeprefix('torch.')}-{'packed' if packs else 'padded'}"


def is_fast(case: tuple[str, str, torch.dtype, bool]) -> bool:
    """All layers of every family, packed where it can be; few layers and padding of one family of each kind."""
    family, targets, dtype, packs = case
    if family in ("gpt2", "llama"):
        return targets == "all-linear" or dtype == torch.float32
    return targets == "all-linear" and (packs or family in tiny.PADDED)


@pytest.fixture(
    scope="module",
    params=[case if is_fast(case) else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=name_of,
)
def pairing(request: pytest.FixtureRequest) -> Pairing:
    family, targets, dtype, packs = request.param
    wanted = SHORT.get(family, ["q_proj", "v_proj"]) if targets == "short" else targets
    return pair(family, wanted, dtype, packs=packs)


@pytest.fixture(
    scope="module",
    params=[("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)],
    ids=["gpt2-packed", "gpt2-padded", "llama-packed", "llama-padded"],
)
def small(request: pytest.FixtureRequest) -> Pairing:
    family, packs = request.param
    return pair(family, "all-linear", packs=packs)


def test_loss_of_every_client_is_what_peft_gives_it_alone(pairing: Pairing) -> None:
    found, _ = pairing.own
    sums, counts = losses(pairing.base, pairing.stack, pairing.batch)
    expected = torch.stack([tiny.peft_loss(pairing.peft(k), texts) for k, texts in enumerate(pairing.texts)]).detach()
    assert counts.tolist() == [2 * count for count in EXAMPLES]
    torch.testing.assert_close(found, expected.to(found.dtype), **pairing.tolerance)
    torch.testing.assert_close(sums / counts, expected.to(sums.dtype), **pairing.tolerance)


def test_gradient_of_every_factor_is_what_peft_gives_it_alone(pairing: Pairing) -> None:
    _, found = pairing.own
    for k, texts in enumerate(pairing.texts):
        made = pairing.peft(k)
        tiny.peft_loss(made, texts).backward()
        expected = tiny.peft_row(made, pairing.stack.layout, gradient=True)
        assert float(expected.abs().max()) > 1e-3
        for leaf in pairing.stack.layout.part("lora").leaves:
            place = slice(leaf.start, leaf.stop)
            torch.testing.assert_close(found[k, place], expected[place], **pairing.tolerance, msg=f"{k} {leaf}")


def test_logits_of_every_real_token_are_what_peft_gives_them_alone(pairing: Pairing) -> None:
    logits = stacked_logits(pairing.base, pairing.stack, pairing.batch)
    for k, texts in enumerate(pairing.texts):
        made = pairing.peft(k)
        for place, one in enumerate(texts):
            with torch.no_grad():
                expected = made(input_ids=torch.tensor([one.ids])).logits[0]
            expected = expected.to(logits.dtype)  # Mamba's are float32 in any dtype
            torch.testing.assert_close(logits[k, place, : len(one.ids)], expected, **pairing.tolerance)


def test_a_gradient_beyond_a_clients_own_rank_is_exactly_zero(pairing: Pairing) -> None:
    _, found = pairing.own
    own = pairing.stack.layout.rank_mask(pairing.stack.ranks)
    assert bool((found[~own] == 0).all())
    assert bool((found[own] != 0).any())


def test_a_client_alone_is_the_client_in_a_batch_of_three(small: Pairing) -> None:
    together, gradient = small.own
    for k, texts in enumerate(small.texts):
        alone, own = small.gradients(small.stack.take(torch.tensor([k])), collate([texts], pad_id=0))
        torch.testing.assert_close(alone[0], together[k], **small.tolerance)
        torch.testing.assert_close(own[0], gradient[k], **small.tolerance)


def test_longer_padding_changes_no_loss_or_gradient(small: Pairing) -> None:
    found = small.own
    wider = small.gradients(batch=collate(small.texts, pad_id=3, batch_size=5, multiple=32))
    for one, other in zip(found, wider, strict=True):
        torch.testing.assert_close(one, other, **small.tolerance)


def test_another_clients_texts_and_adapter_change_nothing_of_ones_own(small: Pairing) -> None:
    found = small.own
    rows = small.stack.rows.clone()
    rows[1] *= -3
    texts = [small.texts[0], [one for one in small.texts[2] for _ in range(2)], small.texts[2]]
    changed = small.gradients(small.stack.with_rows(rows), collate(texts, pad_id=0))
    for one, other in zip(found, changed, strict=True):
        torch.testing.assert_close(one[[0, 2]], other[[0, 2]], **small.tolerance)
        assert not torch.allclose(one[1], other[1])


def test_a_client_without_a_label_has_loss_and_gradient_zero(small: Pairing) -> None:
    labels = small.batch.labels.clone()
    labels[1] = NO_LOSS
    found, gradient = small.gradients(batch=Batch(small.batch.ids, labels, small.batch.lengths))
    assert float(found[1]) == 0
    assert bool((gradient[1] == 0).all())
    torch.testing.assert_close(gradient[[0, 2]], small.own[1][[0, 2]], **small.tolerance)


def test_the_base_is_untouched_between_passes(small: Pairing) -> None:
    small.gradients()
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        found, wanted = small.base.model(input_ids=ids).logits, small.plain(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)  # a fused GELU rounds in its own way
    assert all(value.grad is None and not value.requires_grad for value in small.base.model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_cohorts_local_steps_are_torch_and_peft_one_client_at_a_time(family: str, optimizer: str) -> None:
    pairing = pair(family, "all-linear")
    clients = [tiny.client(f"c{k}", train=count, longest=12) for k, count in enumerate((5, 2, 3))]
    rate, clip, decay = 0.05, 0.5, 0.1
    chosen = adamw(weight_decay=decay) if optimizer == "adamw" else sgd(momentum=0.9, weight_decay=decay)
    training = Training(chosen, rate, 2, 4, None, clip, False, 0.0, seed=3)
    cohort = Cohort(tuple(one.id for one in clients), (5, 2, 3), ({}, {}, {}), (), 3)
    clock = Clock(1, learning_rate=rate)
    given = Message(pairing.stack.rows)
    found = local_phase(
        pairing.base,
        build("local", {}, cohort),
        clients,
        pairing.stack,
        given,
        {},
        training=training,
        clock=clock,
        cohort=2,
    )
    norms = []
    for k, client in enumerate(clients):
        made = pairing.peft(k)
        own = [value for value in made.parameters() if value.requires_grad]
        judge = (
            torch.optim.AdamW(own, lr=rate, weight_decay=decay)
            if optimizer == "adamw"
            else torch.optim.SGD(own, lr=rate, momentum=0.9, weight_decay=decay)
        )
        seen = []
        for chosen_texts in plan_steps(client, training, 1):
            judge.zero_grad()
            loss = tiny.peft_loss(made, [client.train[i] for i in chosen_texts])
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(own, clip)))
            judge.step()
            seen.append(float(loss.detach()))
        expected = tiny.peft_row(made, pairing.stack.layout, gradient=False)
        # torch divides by norm + 1e-6 when it clips, so the comparison cannot be closer than that.
        torch.testing.assert_close(found.returned.rows[k], expected, rtol=1e-4, atol=1e-5)
        assert float(found.losses[k]) == pytest.approx(np.mean(seen), rel=1e-5)
        assert float((expected - pairing.stack.rows[k]).abs().max()) > 0.02
    assert max(norms) > clip


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied"])
@pytest.mark.parametrize("targets", ["short", "all-linear", "one layer"])
def test_an_exported_adapter_reloads_in_peft_with_equal_logits(family: str, targets: str, tmp_path: Path) -> None:
    wanted: str | list[str] = SHORT.get(family, ["q_proj", "v_proj"]) if targets == "short" else targets
    if targets == "one layer":  # its ending would match the other layer too
        wanted = ["transformer.h.1.attn.c_attn" if family == "gpt2" else "model.layers.1.self_attn.q_proj"]
    pairing = pair(family, wanted, torch.float32)
    others = [name for name, _ in pairing.plain.named_modules()]
    logits = stacked_logits(pairing.base, pairing.stack, pairing.batch)
    for k, texts in enumerate(pairing.texts):
        folder = tmp_path / f"client-{k}"
        own = pairing.stack.take(torch.tensor([k]))
        export_adapter(
            folder,
            own,
            base_model="tiny",
            target_modules=short_targets(pairing.modules, others),
            fan_in_fan_out=pairing.base.transposed,
            card={"client": k},
        )
        plain = tiny.model(family, dtype=torch.float32)
        reloaded = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
        assert reloaded.peft_config["default"].r == RANKS[k]
        assert float(reloaded.peft_config["default"].lora_alpha) == 6
        for place, one in enumerate(texts):
            with torch.no_grad():
                expected = reloaded(input_ids=torch.tensor([one.ids])).logits[0]
            torch.testing.assert_close(logits[k, place, : len(one.ids)], expected, **FLOAT32)
        assert torch.equal(read_adapter(folder, pairing.stack.layout), own.rows * real_numbers(own))


@pytest.mark.parametrize("family", one_in(2, tiny.FAMILIES))
def test_greedy_answers_are_what_peft_generates_client_by_client(family: str) -> None:
    dtype = tiny.DTYPES.get(family, torch.float64)
    pairing = pair(family, "all-linear", dtype, packs=family not in tiny.PADDED)
    prompts = [[list(one.ids[: one.prompt_length]) for one in texts] for texts in pairing.texts]
    found = answers(pairing.base, pairing.stack, prompts, max_new_tokens=6)
    seen = set()
    for k, own in enumerate(prompts):
        made = pairing.peft(k)
        for place, prompt in enumerate(own):
            with torch.no_grad():
                out = made.generate(
                    input_ids=torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    do_sample=False,
                    max_new_tokens=6,
                    pad_token_id=tiny.END,
                    eos_token_id=tiny.END,
                )
            text = pairing.base.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
            assert found[k][place] == text
            seen.add(text)
    assert len(seen) > 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied"])
def test_bfloat16_is_no_further_from_float32_than_peft_in_bfloat16(family: str) -> None:
    """Loss within 2 %; error of the gradients (relative 2-norm) at most 1.25 times PEFT's, and below 15 %.

    A bfloat16 number keeps 8 bits (0.4 %); the weights of these models are far larger than those of trained ones.
    """
    wide, narrow = (pair(family, "all-linear", dtype) for dtype in (torch.float32, torch.bfloat16))
    exact, gradient = wide.gradients()
    # Adapters stay float32 beside a bfloat16 base, as in a run.
    found, close = narrow.gradients(wide.stack)
    assert found.dtype == close.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.0)
    theirs = torch.zeros_like(close)
    for k, texts in enumerate(narrow.texts):
        made = narrow.peft(k)
        tiny.peft_loss(made, texts).backward()
        theirs[k] = tiny.peft_row(made, narrow.stack.layout, gradient=True).float()

    def error(of: Tensor) -> float:
        return float(torch.linalg.vector_norm(of - gradient) / torch.linalg.vector_norm(gradient))

    assert error(close) < min(0.15, 1.25 * error(theirs))
