"""pFedMe: every client's adapter minimises its loss and its distance from a copy of the shared one, which follows it.

    theta_k = argmin f_k(theta) + lambda/2 ||theta - w_k||^2    nearly: K steps of the config's optimizer on one batch
    w_k = w_k - eta lambda (w_k - theta_k)                      from w, which was sent; once in every local step
    server:  w = (1 - beta) w + beta sum_k p_k w_k,   p_k = n_k / sum_j n_j   (examples)   or 1 / |S|   (uniform)

theta_k is what the client uses and never leaves it; before its first round it uses w. In each round it begins at w, and
goes on from step to step. w_k takes no gradient: lambda (w_k - theta_k) is the gradient of the Moreau envelope of f_k.
Only w_k travels.

A local step costs K gradients, all on the step's batch: K times the time of FedAvg. eta is not the config's learning
rate, which is theta's. The pull eta lambda may be 1 at most, where w_k becomes theta_k. There, with K = 1 and beta = 1,
the method is FedAvg. In the authors' runs eta lambda is 0.075 to 0.3: the shared adapter goes slowly.

Source: Dinh et al. 2020 (arXiv:2006.08848, NeurIPS 2020), Algorithm 1.

Checked against the authors' public code (CharlieDinh/pFedMe, users/userpFedMe.py, optimizers/fedoptimizer.py: K steps
on one batch, theta from w at the start of a round; servers/serverbase.py: beta, means by examples; main.py, README: K =
5, lambda = 15 to 30, eta = 0.005 to 0.02, beta = 1 or 2). Its theta has a weight decay of 0.001, here the config's; its
clients train whether they are sampled or not. What it tests as a personal model is w_k, as theta's parameters are
overwritten with w_k at the end of a round; here it is theta_k. The paper's text was not at hand.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedmira.adapters import Adapters
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
from fedmira.methods.means import mean_row, replace_shared, shares_of

TUNED = {"lambda": (5.0, 15.0, 30.0)}  # what `fedmira compare` tries


class Config(Settings):
    """Settings of pFedMe."""

    lam: float = Field(default=15.0, gt=0, alias="lambda")  # pull of theta_k to w_k; authors' code: 15
    K: int = Field(default=5, ge=1)  # steps of theta_k in a local step, a gradient each; authors' code: 5
    eta: float = Field(default=0.005, gt=0)  # learning rate of w_k; authors' code: 0.005
    beta: float = Field(default=1.0, gt=0)  # how far the server goes to the mean; 1 = the mean itself
    weights: Literal["examples", "uniform"] = "examples"  # of the mean; authors' code: by examples

    @model_validator(mode="after")
    def _converges(self) -> Config:
        if self.pull > 1 + 1e-9:
            raise ValueError(f"eta x lambda = {self.pull:g}: w_k would jump over theta_k; 1 is the most, lower eta")
        return self

    @property
    def pull(self) -> float:
        """Share of the way to theta_k that w_k goes in a step."""
        return self.eta * self.lam


def build(config: Config, cohort: Cohort) -> Method:
    """Return pFedMe as a Method."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        theta = adapters.with_rows(memory["theta"])
        for _ in range(config.K):
            _, gradient = tools.grad(theta)
            theta = tools.update(theta, gradient.add_(theta.rows - adapters.rows, alpha=config.lam), of="theta")
        adapters.rows.lerp_(theta.rows, min(config.pull, 1.0))
        return adapters, {**memory, "theta": theta.rows}

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        before = state.adapters.rows[torch.zeros(1, dtype=torch.int64)]
        return replace_shared(before.lerp(mean_row(returned.rows, shares_of(weights, config.weights)), config.beta))

    return Method(
        "pfedme",
        merge,
        client=Client(start=start_memory, begin=begin, step=step, use=use_theta),
        regime=Regime(gradients=config.K),
        facts=Facts(weighs=config.weights == "examples"),
    )


def start_memory(adapters: Adapters) -> Memory:
    """theta_k [S, P] of clients that never trained: what they are sent."""
    return {"theta": adapters.rows.clone()}


def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
    return adapters, {**memory, "theta": adapters.rows.clone()}


def use_theta(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters:
    return adapters.with_rows(memory["theta"].clone())
