"""FedAvg-FT: FedAvg, and after the last round every client fine-tunes the shared adapter on its own data.

    w^(t+1) = sum_k p_k w_k^(t),   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)
    v_k     = w^(T) after n local steps of client k's own,   for all k

w stands for the pair (B, A), averaged factor by factor as in FedAvg. The v_k are what is tested and handed over; also
clients that were never sampled fine-tune. Nothing of it comes back to the server, so that more rounds later go on from
w^(T). The local optimizer, learning rate and batch size are those of the rounds; steps or passes are settings here, as
the papers leave them open. The usual answer to a shared model that fits nobody, and the one a personal method has to
beat.

Sources: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1; Collins et al. 2022 (arXiv:2205.13692), section 2.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
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
    """Settings of FedAvg-FT."""

    weights: Literal["examples", "uniform"] = "examples"  # of the mean; FedIT weighs by training examples
    steps: int | None = Field(default=None, ge=1)  # local steps of every client after the last round
    epochs: int | None = Field(default=None, ge=1)  # or passes over its own training examples; neither = one pass

    @model_validator(mode="after")
    def _one_length(self) -> "Config":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"found steps: {self.steps} and epochs: {self.epochs}; fine-tuning takes one of them")
        return self


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedAvg-FT as a Method."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        shares = weights if config.weights == "examples" else torch.ones_like(weights)
        total = shares.sum()
        if not bool(total > 0):
            raise MethodError(f"weights of {len(shares)} clients sum to {float(total):g}: need a positive sum")
        mean = (shares / total).to(returned.rows.dtype)[None, :] @ returned.rows
        return Change(torch.zeros(1, dtype=torch.int64), mean)

    return Method(
        name="fedavg_ft",
        init=start_state,
        send=one_row,
        merge=merge,
        serve=serve_one,
        personal=False,
        uses_weights=config.weights == "examples",
        needs="sum",
        tune=("epochs", config.epochs or 1) if config.steps is None else ("steps", config.steps),
    )
