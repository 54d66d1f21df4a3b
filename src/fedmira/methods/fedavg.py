"""FedAvg on LoRA factors (FedIT): one shared adapter, the mean of what the sampled clients return.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)

The factors are averaged separately, so the product is biased: mean(B) mean(A) != mean(B A).
Sources: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1; FedIT, Zhang et al. 2023 (arXiv:2305.05644).
"""

from typing import Literal

import torch
from torch import Tensor

from fedmira.errors import MethodError
from fedmira.methods.base import (
    Change,
    Clock,
    Cohort,
    Message,
    Method,
    Settings,
    State,
    one_row,
    serve_one,
    start_state,
)


class Config(Settings):
    """Settings of FedAvg."""

    weights: Literal["examples", "uniform"] = "examples"  # FedIT weighs by training examples


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedAvg as a Method."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        shares = weights if config.weights == "examples" else torch.ones_like(weights)
        return Change(torch.zeros(1, dtype=torch.int64), mean_row(returned.rows, shares))

    return Method(
        name="fedavg",
        init=start_state,
        send=one_row,
        merge=merge,
        serve=serve_one,
        personal=False,
        uses_weights=config.weights == "examples",
        needs="sum",
    )


def mean_row(rows: Tensor, weights: Tensor) -> Tensor:
    """Average rows [S, P] into one [1, P]: sum_k w_k x_k / sum_k w_k.

    weights [S]: examples per client, any positive scale. Raises MethodError if they sum to zero.
    """
    total = weights.sum()
    if not bool(total > 0):
        raise MethodError(f"weights of {len(weights)} clients sum to {float(total):g}: need a positive sum")
    return (weights / total).to(rows.dtype)[None, :] @ rows
