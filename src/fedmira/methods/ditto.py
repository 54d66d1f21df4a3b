"""Ditto: every client trains an adapter of its own, which a penalty holds near the one that FedAvg makes beside it.

    shared:    w_k = w_k - eta grad f_k(w_k)                           from w, which was sent
    personal:  v_k = v_k - eta (grad f_k(v_k) + lambda (v_k - w))      from the client's last v_k; w as it was sent
    server:    w = sum_k p_k w_k,   p_k = 1 / |S|   (uniform)   or n_k / sum_j n_j   (examples)

Each local step takes one of both kinds, on the same batch: two gradients, twice the time of FedAvg. v_k is what the
client uses; it never leaves it, and w is FedAvg's whatever v_k does. Both have moments of their own. With lambda = 0,
v_k is local training of those clients that took part in the first round. Under SGD eta lambda has to be below 2, or the
pull overshoots. A client begins with v_k = w, as that is when it is sampled for the first time; before, it uses w.

In the paper clients may take other numbers of steps for v_k than for w_k; here it is one each, as in the authors' code.
A penalty that each client chooses by its validation loss, which the paper has too, is not offered.

Source: Li et al. 2021 (arXiv:2012.04221, ICML 2021), Algorithm 1.

Checked against the authors' public code (litian96/ditto, flearn/trainers_MTL/ditto.py: both steps on one batch, the
pull to what was sent, uniform means; lambda = 1 in its example runs and 0.1, 1 and 2 where it is chosen). The paper's
text was not at hand.
"""

from typing import Literal

from pydantic import Field

from fedmira.adapters import Adapters
from fedmira.methods.base import Client, Cohort, Facts, Memory, Message, Method, Regime, Settings, Tools
from fedmira.methods.means import merge_mean

TUNED = {"lambda": (0.1, 1.0, 2.0)}  # what `fedmira compare` tries


class Config(Settings):
    """Settings of Ditto."""

    lam: float = Field(default=1.0, ge=0, alias="lambda")  # pull of the personal adapter to the shared one; 0 = none
    weights: Literal["uniform", "examples"] = "uniform"  # of the mean; authors' code: uniform


def build(config: Config, cohort: Cohort) -> Method:
    """Return Ditto as a Method."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        own = adapters.with_rows(memory["ditto_v"])
        _, gradient = tools.grad(own)
        own = tools.update(own, gradient.add_(own.rows - given.rows, alpha=config.lam), of="ditto_v")
        _, gradient = tools.grad(adapters)
        return tools.update(adapters, gradient), {**memory, "ditto_v": own.rows}

    return Method(
        "ditto",
        merge_mean(config.weights),
        client=Client(start=start_memory, step=step, use=use_own),
        regime=Regime(gradients=2),
        facts=Facts(weighs=config.weights == "examples"),
    )


def start_memory(adapters: Adapters) -> Memory:
    """v_k [S, P] of clients that never trained: what they are sent."""
    return {"ditto_v": adapters.rows.clone()}


def use_own(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters:
    return adapters.with_rows(memory["ditto_v"].clone())
