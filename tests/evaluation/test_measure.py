"""Losses and answers of many clients at once are those of each client alone, with its own adapter."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests import tiny

from fedmira.adapters import Adapters
from fedmira.data.batches import Batch, ClientData, Encoded, Truncation, collate
from fedmira.evaluation import measure
from fedmira.evaluation.measure import measure_answers, measure_loss
from fedmira.evaluation.rouge import score_answer
from fedmira.model.answers import lanes
from fedmira.model.answers.generate import answers
from fedmira.model.base.load import Base

VALIDATION = (3, 0, 5, 1)  # client 1 has no examples


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny.base("gpt2", targets=["c_attn"])


@pytest.fixture(scope="module")
def clients() -> list[ClientData]:
    return [
        tiny.client(f"c{k}", train=1, validation=count, test=count, longest=6 + 5 * k)
        for k, count in enumerate(VALIDATION)
    ]


@pytest.fixture(scope="module")
def stack(base: Base) -> Adapters:
    return tiny.adapters(tiny.layout(base, 2), (2, 1, 2, 1))


def by_hand(base: Base, stack: Adapters, clients: Sequence[ClientData], k: int) -> float:
    """Sum of nats over sum of labelled tokens, each example alone through PEFT."""
    modules = [name for name, _, _ in base.shapes]
    made = tiny.peft_client(tiny.model("gpt2"), stack, k, modules=modules).requires_grad_(False)
    examples = clients[k].validation
    labels = [len(one.ids) - one.prompt_length for one in examples]
    nats = [float(tiny.peft_loss(made, [one])) * count for one, count in zip(examples, labels, strict=True)]
    return sum(nats) / sum(labels)


@pytest.mark.parametrize("cohort", [1, 2, 4])
@pytest.mark.parametrize("pass_tokens", [1, 40, 8192])
def test_a_loss_is_per_own_token_with_the_own_adapter_in_any_pass(
    base: Base,
    stack: Adapters,
    clients: list[ClientData],
    cohort: int,
    pass_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "PASS_TOKENS", pass_tokens)
    found = measure_loss(base, stack.take, clients, [3, 0, 1, 2], split="validation", cohort=cohort)
    assert found[2] is None
    expected = [by_hand(base, stack, clients, k) for k in (3, 0, 2)]
    assert [value for value in found if value is not None] == pytest.approx(expected, rel=1e-9)
    assert len({round(value, 6) for value in expected}) == 3


def test_a_client_scored_alone_has_the_loss_it_has_among_others(
    base: Base, stack: Adapters, clients: list[ClientData]
) -> None:
    together = measure_loss(base, stack.take, clients, range(4), split="validation", cohort=4)
    alone = [measure_loss(base, stack.take, clients, [k], split="validation", cohort=1)[0] for k in range(4)]
    assert [value or 0.0 for value in alone] == pytest.approx([value or 0.0 for value in together], rel=1e-12)


def test_long_texts_weigh_by_their_tokens_and_not_by_their_number(base: Base, stack: Adapters) -> None:
    client = tiny.client("x", train=1, validation=6, longest=15)
    found = measure_loss(base, stack.take, [client], [0], split="validation", cohort=1)[0]
    assert found is not None
    each = [
        measure_loss(base, stack.take, [replace(client, validation=(one,))], [0], split="validation", cohort=1)[0]
        or 0.0
        for one in client.validation
    ]
    labels = [len(one.ids) - one.prompt_length for one in client.validation]
    assert found == pytest.approx(sum(loss * count for loss, count in zip(each, labels, strict=True)) / sum(labels))
    assert found != pytest.approx(sum(each) / len(each))


@pytest.mark.parametrize(("cohort", "rows"), [(1, 1), (2, 4), (4, 64)])
def test_answers_are_scored_for_each_client_with_its_own_adapter(
    base: Base,
    stack: Adapters,
    clients: list[ClientData],
    cohort: int,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "ANSWER_ROWS", rows)
    monkeypatch.setattr(lanes, "ANSWER_ROWS", rows)
    done: list[int] = []
    found = measure_answers(
        base,
        stack.take,
        clients,
        range(4),
        split="test",
        cohort=cohort,
        metrics=["rouge_l", "exact_match"],
        max_new_tokens=5,
        progress=done.append,
    )
    assert done[-1] == 4
    assert found[1] == {"rouge_l": None, "exact_match": None}
    for k in (0, 2, 3):
        scores = []
        for one in clients[k].test:
            own = stack.take(torch.tensor([k]))
            text = answers(base, own, [[list(one.ids[: one.prompt_length])]], max_new_tokens=5)[0][0]
            scores.append(score_answer(text, one.answers)["rouge_l"])
        assert found[k]["rouge_l"] == pytest.approx(sum(scores) / len(scores))


def test_a_score_is_the_mean_over_the_clients_own_examples(
    base: Base, stack: Adapters, clients: list[ClientData]
) -> None:
    """References are what the model writes, except for two of client 2's five: 3 of 3, and 3 of 5."""
    marked = list(clients)
    for k, wrong in ((0, 0), (2, 2)):
        prompts = [list(one.question) for one in clients[k].test]
        (texts,) = answers(base, stack.take(torch.tensor([k])), [prompts], max_new_tokens=5)
        right = [replace(one, answers=(text,)) for one, text in zip(clients[k].test, texts, strict=True)]
        lost = [replace(one, answers=("another",)) for one in right[:wrong]]
        marked[k] = replace(clients[k], test=(*lost, *right[wrong:]))
    options = {"split": "test", "cohort": 4, "metrics": ["exact_match"], "max_new_tokens": 5}
    found = measure_answers(base, stack.take, marked, [0, 2], **options)  # type: ignore[arg-type]
    assert [scores["exact_match"] for scores in found] == pytest.approx([1, 0.6])


def test_only_the_first_examples_are_answered_where_a_limit_is_set(
    base: Base, stack: Adapters, clients: list[ClientData]
) -> None:
    common = {"split": "test", "cohort": 2, "metrics": ["rouge_l"], "max_new_tokens": 4}
    found = measure_answers(base, stack.take, clients, [2], max_examples=2, **common)  # type: ignore[arg-type]
    cut = [replace(client, test=client.test[:2]) for client in clients]
    assert found == measure_answers(base, stack.take, cut, [2], **common)  # type: ignore[arg-type]


def test_a_batch_of_prompts_of_uneven_number_and_length_is_each_prompt_alone(
    base: Base, stack: Adapters, clients: list[ClientData]
) -> None:
    prompts = [[list(one.ids[: one.prompt_length]) for one in clients[k].test] for k in (2, 3)]
    some = stack.take(torch.tensor([2, 3]))
    together = answers(base, some, prompts, max_new_tokens=6)
    for place, own in enumerate(prompts):
        alone = [answers(base, some.take(torch.tensor([place])), [[prompt]], max_new_tokens=6)[0][0] for prompt in own]
        assert together[place] == alone


def test_a_prompt_that_just_leaves_room_for_the_answer_is_answered(base: Base, stack: Adapters) -> None:
    long = [2 + place % 20 for place in range(tiny.POSITIONS - 4)]
    assert len(answers(base, stack.take(torch.tensor([0])), [[long]], max_new_tokens=4)) == 1


def test_a_large_split_is_measured_in_passes_of_bounded_size(
    base: Base, stack: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = measure.losses

    def watch(base: Base, adapters: Adapters, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(int(batch.lengths.sum()))
        return real(base, adapters, batch)

    monkeypatch.setattr(measure, "losses", watch)
    monkeypatch.setattr(measure, "PASS_TOKENS", 64)
    texts = tuple(Encoded(tuple(range(2, 4 + length)), 1, ("w",)) for length in range(1, 14))
    client = ClientData("c", "c", None, {}, texts[:1], texts, (), Truncation())
    measure_loss(base, lambda ids: stack.take(torch.tensor([0])), [client], [0], split="validation", cohort=1)
    assert len(sizes) > 1
    assert max(sizes) <= 64


def test_without_examples_no_client_is_measured(base: Base, stack: Adapters, clients: list[ClientData]) -> None:
    assert measure_loss(base, stack.take, clients, [1], split="validation", cohort=2) == [None]
    assert collate([[]], pad_id=0).lengths.tolist() == [[0]]
