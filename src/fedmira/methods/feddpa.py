"""FedDPA: a shared adapter and one of each client's own; each question gets a mix, by how near it is to the data.

    own part:     grad of f_k(s (1 - a) B A + s a B_k A_k) over (B_k, A_k), with the shared part (B, A) as it was sent
    shared part:  grad of f_k(s B A) over (B, A), without the own part
    server:       (B, A) = sum_{k in S} p_k (B, A)_k,   p_k = n_k / sum_{j in S} n_j  (examples)  or  1 / |S|  (uniform)
    question x:   s (1 - a_x) B A + s a_x B_k A_k,   a_x = w mean_j cos(h(x), h(x_j))   over m training prompts x_j

h is the last hidden state at a prompt's last token, with the own part alone. In every local step both parts take a step
on the same batch, each with optimizer moments of its own, so that a round takes two gradients where FedAvg takes one.
Only the shared part travels. A folder cannot hold the gate: an exported adapter has the mean a_x of the client's
validation questions, as its rank is that of both parts together; scores are with the gate.

This is FedDPA-T, the form that trains both in turn. FedDPA-F, which trains the own part from the shared one after the
last round, is near FedAvg-FT and not offered. In the public code a client's own part starts in the second round, and m
prompts are drawn anew for each question; here it starts in the client's first round, and the prompts are the client's
training examples at even steps.

Source: FedDPA, Yang et al. 2024 (arXiv:2403.19211, NeurIPS 2024).

Checked against the public code (Lydia-yang/FedDPA, code/main.py, fed_utils/client.py, GlobalModel_generated.py): what
is trained with what, a = 1/2, w = 1/2, m = 5, cosine of last states at the last token; and against the abstract of the
paper. Which of the two parts the code multiplies by a_x is in a file that was not found; here a near question uses more
of the own part, as the paper describes it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmira.adapters import Adapters, Layout
from fedmira.adapters.lazy import Tensor, torch
from fedmira.adapters.parts import OWN, SHARED, Gate, own_and_shared, part_columns, scaled_parts
from fedmira.methods.base import Client, Clock, Cohort, Facts, Memory, Message, Method, Regime, Settings, Tools
from fedmira.methods.means import merge_mean


class Config(Settings):
    """Settings of FedDPA."""

    local_weight: float = Field(default=0.5, gt=0, le=1)  # a: of the own part while it is trained
    max_weight: float = Field(default=0.5, ge=0, le=1)  # w: largest share of the own part in an answer
    instances: int = Field(default=5, ge=1)  # m: training prompts that a question is compared with
    weights: Literal["examples", "uniform"] = "examples"  # in the mean of the shared part


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedDPA as a Method."""
    share = config.local_weight

    def travels(layout: Layout, clock: Clock) -> Tensor:
        return part_columns(layout, SHARED)

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        layout, rows = adapters.layout, adapters.rows
        own = part_columns(layout, OWN).to(rows.device)
        _, gradient = tools.grad(adapters.with_rows(scaled_parts(layout, rows, 0.0, 1.0)))
        shared = tools.update(adapters.with_rows(rows.clone()), gradient * ~own)
        before = torch.where(own, rows, given.rows)
        _, gradient = tools.grad(adapters.with_rows(scaled_parts(layout, before, share, 1 - share)))
        gradient = scaled_parts(layout, gradient * own, share, 0.0)  # d/dB_k: a times that of a B_k
        mine = tools.update(adapters.with_rows(before), gradient, of=OWN)
        return adapters.with_rows(torch.where(own, mine.rows, shared.rows)), memory

    def mix(adapters: Adapters, similarity: Tensor) -> Adapters:
        own = (config.max_weight * similarity).clamp(0, 1).to(adapters.rows)[:, None]
        return adapters.with_rows(scaled_parts(adapters.layout, adapters.rows, own, 1 - own))

    def look(adapters: Adapters) -> Adapters:
        return adapters.with_rows(scaled_parts(adapters.layout, adapters.rows, 1.0, 0.0))

    return Method(
        "feddpa",
        merge_mean(config.weights),
        client=Client(step=step, gate=Gate(config.instances, look, mix)),
        layout=own_and_shared,
        travels=travels,
        regime=Regime(gradients=2),
        facts=Facts(weighs=config.weights == "examples"),
    )
