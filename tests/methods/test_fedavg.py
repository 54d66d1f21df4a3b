"""FedAvg in numbers worked by hand."""

import numpy as np
import pytest
import torch

from fedmira.adapters import Adapters, lora_layout
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, State, use_what_was_sent

LAYOUT = lora_layout([("m", 1, 1)], 1)
FIRST = Clock(1)


def fedavg(**settings: str) -> Method:
    return build("fedavg", settings, Cohort(("a", "b", "c"), (1, 3, 9), ({}, {}, {}), (np.arange(3),), 0))


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, LAYOUT.size)


def state(value: float = 7.0) -> State:
    return State(Adapters(LAYOUT, rows(value), torch.tensor([1]), torch.tensor([1.0])))


def merge(method: Method, uploads: torch.Tensor, *weights: float) -> list[float]:
    ids = torch.arange(len(uploads))
    change = method.merge(state(), ids, Message(uploads), torch.tensor(weights, dtype=torch.float64), FIRST)
    assert change.ids.tolist() == [0]
    assert change.rows.shape == (1, LAYOUT.size)
    return change.rows[0, :2].tolist()


def test_clients_count_by_their_examples() -> None:
    assert merge(fedavg(), rows(0, 4), 1, 3) == [3, 3]


def test_uniform_weights_count_every_client_the_same() -> None:
    assert merge(fedavg(weights="uniform"), rows(0, 4), 1, 3) == [2, 2]


def test_the_stored_row_itself_has_no_part_in_the_mean() -> None:
    assert merge(fedavg(), rows(5), 1) == [5, 5]


def test_the_mean_of_the_factors_is_not_the_mean_of_the_products() -> None:
    """A = B = 1 and A = B = 3: the mean of the products is 5, the product of the means 4."""
    uploads = torch.zeros(2, LAYOUT.size)
    uploads[:, :2] = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    first, second = merge(fedavg(), uploads, 1, 1)
    assert first * second == 4


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(MethodError, match="sum to 0"):
        merge(fedavg(), rows(0, 4), 0, 0)


def test_everyone_is_sent_the_one_row_and_uses_what_it_is_sent() -> None:
    method = fedavg()
    assert method.message(state(), torch.tensor([2, 0]), FIRST).rows[:, 0].tolist() == [7, 7]
    assert method.client.use is use_what_was_sent
    assert method.count_rows(3) == 1


def test_the_mean_is_said_to_use_weights_only_where_it_does() -> None:
    assert fedavg().facts.weighs
    assert not fedavg(weights="uniform").facts.weighs
    assert not fedavg().personal


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"weigths.*weights"):
        fedavg(weigths="uniform")
