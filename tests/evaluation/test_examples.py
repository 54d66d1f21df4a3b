"""Losses by example: each is that of a client which has this example alone."""

from dataclasses import replace

import pytest
import torch
from tests import tiny

from fedmira.evaluation.measure import measure_examples, measure_loss


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_nats_and_tokens_of_an_example_are_those_of_a_client_that_has_no_other(family: str) -> None:
    dtype = tiny.DTYPES.get(family, torch.float64)
    digits = 1e-9 if dtype == torch.float64 else 1e-5
    base = tiny.base(family, dtype=dtype)
    assert base.packs == (family == "llama")
    clients = [tiny.client(f"c{k}", train=1, validation=size, longest=30) for k, size in enumerate((5, 1, 0, 3))]
    stack = tiny.adapters(tiny.layout(base, 2), (2, 1, 2, 2), dtype=dtype)
    nats, tokens = measure_examples(base, stack, clients, split="validation")
    assert nats.shape == tokens.shape == (4, 5)
    for k, client in enumerate(clients):
        assert tokens[k].tolist() == [e.labels for e in client.validation] + [0] * (5 - len(client.validation))
        assert not nats[k, len(client.validation) :].any()
        for place, example in enumerate(client.validation):
            alone = replace(client, validation=(example,))
            own = stack.take(torch.tensor([k]))
            (loss,) = measure_loss(base, own.take, [alone], [0], split="validation", cohort=1)
            assert float(nats[k, place] / tokens[k, place]) == pytest.approx(loss, rel=digits)


def test_a_shared_beginning_does_not_change_which_example_a_token_is_of() -> None:
    base = tiny.base("llama")
    beginning = tuple(range(2, 14))
    examples = [tiny.Encoded((*beginning, *range(3, 3 + more), tiny.END), 12, ("",)) for more in (1, 4, 2)]
    client = replace(tiny.client("c", train=1, validation=0), validation=tuple(examples))
    stack = tiny.adapters(tiny.layout(base, 2), (2,))
    nats, tokens = measure_examples(base, stack, [client], split="validation")
    assert tokens.tolist() == [[2, 5, 3]]
    for place, example in enumerate(examples):
        alone = replace(client, validation=(example,))
        (loss,) = measure_loss(base, stack.take, [alone], [0], split="validation", cohort=1)
        assert float(nats[0, place] / tokens[0, place]) == pytest.approx(loss, rel=1e-9)
