"""APFL: every client uses a mixture of an adapter of its own and the shared one, in a share that it may learn.

    x_k = alpha_k v_k + (1 - alpha_k) w_k
    v_k = v_k - eta alpha_k grad f_k(x_k)                 from the client's last v_k
    alpha_k = alpha_k - eta_a <v_k - w_k, grad f_k(x_k)>  within 0 and 1; only if it is adaptive
    w_k = w_k - eta grad f_k(w_k)                         from w, which was sent
    server:  w = sum_k p_k w_k,   p_k = 1 / |S|  (uniform)  or  n_k / sum_j n_j  (examples)

All in every local step, on the same batch and from the values before it: two gradients, twice the time of FedAvg. The
client uses alpha_k v_k + (1 - alpha_k) w with the w that it would be sent now. v_k and alpha_k never leave it; w is
FedAvg's whatever they do. With alpha = 1 and not adaptive, v_k is local training of those clients that took part in the
first round; with alpha = 0 everybody uses FedAvg's w. A client begins with v_k = w, as that is when it is sampled for
the first time. Both rows have moments of their own, and the gradient of v_k passes through the config's optimizer: to
AdamW its factor alpha_k means little, as long as it is not 0.

alpha_k is one number for a client, and the mixture is of parameters, factor by factor. eta_a is eta in the paper; as
AdamW's rates would hardly move it, it can be given.

Source: Deng et al. 2020 (arXiv:2003.13461), Algorithm 1.

Checked against two public implementations, of which the second is the authors' own: litian96/ditto
(flearn/trainers_MTL/apfl.py: as above, alpha fixed, uniform means) and MLOPTPSU/FedTorch
(comms/trainings/federated/apfl.py, comms/utils/flow_utils.py). FedTorch mixes the outputs of the two models instead of
their parameters, moves alpha in the first step of a round alone, and by a gradient of both losses with 0.02 alpha
added. The paper's text was not at hand: its step of alpha is from memory.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmira.adapters import Adapters
from fedmira.adapters.lazy import Tensor, torch
from fedmira.methods.base import Client, Cohort, Facts, Memory, Message, Method, Regime, Settings, Tools
from fedmira.methods.means import merge_mean

TUNED = {"alpha": (0.25, 0.5, 0.75)}  # what `fedmira compare` tries


class Config(Settings):
    """Settings of APFL."""

    alpha: float = Field(default=0.5, ge=0, le=1)  # share of the personal adapter; where it is adaptive, at the start
    adaptive: bool = True  # does every client learn its own alpha?
    alpha_learning_rate: float | None = Field(
        default=None, gt=0
    )  # eta_a; null: that of the local step, as in the paper
    weights: Literal["uniform", "examples"] = "uniform"  # of the mean; uniform: the paper


def build(config: Config, cohort: Cohort) -> Method:
    """Return APFL as a Method."""

    def start(adapters: Adapters) -> Memory:
        alpha = torch.full((len(adapters), 1), config.alpha, dtype=adapters.rows.dtype, device=adapters.rows.device)
        return {"apfl_v": adapters.rows.clone(), "apfl_alpha": alpha}

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        own, alpha = adapters.with_rows(memory["apfl_v"]), memory["apfl_alpha"]
        _, gradient = tools.grad(mix(adapters, memory))
        slope = ((own.rows - adapters.rows) * gradient).sum(dim=1, keepdim=True)
        own = tools.update(own, gradient * alpha, of="apfl_v")
        if config.adaptive:
            rate = tools.clock.learning_rate if config.alpha_learning_rate is None else config.alpha_learning_rate
            alpha = (alpha - (rate * slope).to(alpha.dtype)).clamp(0, 1)
        _, gradient = tools.grad(adapters)
        return tools.update(adapters, gradient), {**memory, "apfl_v": own.rows, "apfl_alpha": alpha}

    return Method(
        "apfl",
        merge_mean(config.weights),
        client=Client(start=start, step=step, use=use_mixture),
        regime=Regime(gradients=2),
        facts=Facts(weighs=config.weights == "examples"),
    )


def mix(adapters: Adapters, memory: Memory) -> Adapters:
    """alpha v + (1 - alpha) w; to the bit v where alpha is 1, and w where it is 0."""
    rows: Tensor = torch.lerp(adapters.rows, memory["apfl_v"], memory["apfl_alpha"])
    return adapters.with_rows(rows)


def use_mixture(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters:
    return mix(adapters, memory)
