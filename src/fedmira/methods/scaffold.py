"""SCAFFOLD: one shared adapter; every client corrects its steps by how its own gradient differs from everybody's.

    client:  w_k = w_k - eta (grad f_k(w_k) - c_k + c)        R steps from w, which the server sends together with c
             c_k+ = c_k - c + (w - w_k) / sum of the rates eta                         (variate: difference; option II)
             c_k+ = 1/R sum_r grad f_k(w), batch r of the round                        (variate: gradient;   option I)
    server:  w = w + eta_g sum_k p_k (w_k - w)                p_k = 1 / |S|  (uniform)  or  n_k / sum_j n_j  (examples)
             c = c + |S| / K sum_k p_k (c_k+ - c_k)           K: all clients

c_k stays with the client, and is 0 until it has trained; c is a second row down, c_k+ - c_k a second row up, so that a
round costs twice the bytes of FedAvg. In the first round all variates are 0: it is FedAvg's, with eta_g = 1. The
correction takes away the drift of a client's steps towards its own optimum. It does not make anything personal.

Option I is the client's gradient at the shared adapter. The paper takes another pass over its data for it. Here it is
taken on the batches of the round, each in its own step: with `local_epochs: 1` that is one pass over the data, the mean
of the batches' means. It costs a second gradient in every step but the first. Option II costs nothing.

It is for plain SGD, and a study whose optimizer is AdamW, or has momentum, is refused: (w - w_k) / (R eta) is the mean
of the gradients that a client took only if a step is eta times a gradient. Give the entry `training: {optimizer: sgd,
learning_rate: ...}`, with a rate far above AdamW's. `max_grad_norm` clips the corrected gradient; null is the paper's
algorithm. Weights by examples are ours, for comparison with a FedAvg that has them.

Source: Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1.

Checked against two public implementations by others (MLOPTPSU/FedTorch, comms/algorithms/federated/scaffold.py;
TsingZ0/PFLlib, clients/clientscaffold.py and servers/serverscaffold.py: option II, the correction, |S| / K, eta_g). The
authors' own code and the paper's text were not at hand; option I is from memory.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmira.adapters import Adapters, Stored
from fedmira.adapters.lazy import Tensor, torch
from fedmira.methods.base import (
    Change,
    Client,
    Clock,
    Cohort,
    Facts,
    Memory,
    Message,
    Method,
    Regime,
    Settings,
    State,
    Tools,
)
from fedmira.methods.means import mean_row, shares_of


class Config(Settings):
    """Settings of SCAFFOLD."""

    variate: Literal["difference", "gradient"] = "difference"  # what c_k becomes: option II, or option I
    server_learning_rate: float = Field(default=1.0, gt=0)  # eta_g; 1 = the mean of what clients return
    weights: Literal["uniform", "examples"] = "uniform"  # of the means; uniform: the paper


def build(config: Config, cohort: Cohort) -> Method:
    """Return SCAFFOLD as a Method."""
    option_1 = config.variate == "gradient"

    def init(start: Stored, clock: Clock) -> State:
        return State(start, {"c": torch.zeros(1, start.layout.size, dtype=start.rows.dtype)})

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        row = state.adapters.rows[torch.zeros(1, dtype=torch.int64)]
        return Message(row.expand(len(ids), -1), more={"c": state.shared["c"].expand(len(ids), -1)})

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return adapters, {**memory, "sum": torch.zeros_like(adapters.rows)} if option_1 else memory

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        _, gradient = tools.grad(adapters)
        if option_1:
            gradient = gradient.clone()  # the next call overwrites it
            shared = gradient if tools.clock.step == 0 else tools.grad(adapters.with_rows(given.rows))[1]
            memory["sum"].add_(shared)
        return tools.update(adapters, gradient.add_(given.more["c"] - memory["c"])), memory

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        assert tools.clock.steps is not None
        steps = tools.clock.steps.to(adapters.rows)[:, None]
        if option_1:
            change = memory["sum"] / steps - memory["c"]
        else:
            length = (steps * tools.clock.learning_rate).to(adapters.rows.dtype)
            change = (given.rows - adapters.rows) / length - given.more["c"]
        return Message(adapters.rows, more={"c": change}), {"c": memory["c"] + change}

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        shares = shares_of(weights, config.weights)
        first = torch.zeros(1, dtype=torch.int64)
        row = state.adapters.rows[first].lerp(mean_row(returned.rows, shares), config.server_learning_rate)
        present = int((shares > 0).sum()) / len(cohort)
        c = state.shared["c"] + present * mean_row(returned.more["c"], shares)
        return Change(first, row, {"c": c})

    return Method(
        "scaffold",
        merge,
        init=init,
        send=send,
        client=Client(start=start_memory, begin=begin, step=step, finish=finish),
        regime=Regime(optimizer="sgd", gradients=2 if option_1 else 1),
        facts=Facts(weighs=config.weights == "examples", uploads="more"),
    )


def start_memory(adapters: Adapters) -> Memory:
    """c_k [S, P] of clients that never trained: zero."""
    return {"c": torch.zeros_like(adapters.rows)}
