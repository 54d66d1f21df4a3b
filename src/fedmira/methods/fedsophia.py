"""Fed-Sophia: one shared adapter; clients take clipped Newton steps with a cheap estimate of their own curvature.

    m = b1 m + (1 - b1) g,   g = grad h_k(w)                       in every local step of client k
    v = b2 v + (1 - b2) B u * u                                    where the client's own count is a multiple of tau
    w = w - eta weight_decay w
    w = w - eta clip(m / max(v, eps), rho)                         clip(z, rho) = max(min(z, rho), -rho)
    server:  w = 1 / |S| sum_{k in S} w_k                          or sum_k n_k w_k / sum_k n_k  (`weights: examples`)

u is the gradient of the mean cross-entropy over the B labelled tokens of the step's batch, its labels drawn from the
model, y ~ softmax(f(x)); the mean of B u * u over draws is the diagonal of the Gauss-Newton matrix of the batch's loss.
Under dropout u has the masks of g. Only w travels. m, v and the count stay on the client and continue when it is
sampled again. All three start at 0, and m and v are not corrected for that. With a count of 0 a client's first step
estimates v; in the first round the factor B is 0, so the estimate for LoRA's factor A is 0, and A takes steps of full
length, eta rho, until the next estimate.

eta is the step's learning rate: `training.learning_rate`, times the factor of a schedule. `form: public` reads it as
the code of Sophia-G does, as the longest step of one number: lr = eta rho.

    w = w - lr weight_decay w - lr sign(m) min(|m| / (rho max(v, eps)), 1)

There v has a constant bs instead of B; here B is that of each batch. This step replaces the config's optimizer, whose
settings, including `max_grad_norm`, have no effect: rho bounds every number instead. An estimate costs as much as a
gradient, and is computed for all clients of a pass as soon as it is due for one.

Not specified in the paper: rho and betas are those of Sophia, eps is small enough to matter only where v is 0, and the
default is no decay. `count: rounds` is the authors' code: an estimate in every step of each tau-th round. They count
the rounds of the run; here each client's rounds are counted, or one that joins late would start without an estimate.

Sources: Fed-Sophia, Elbakary et al. 2024 (arXiv:2406.06655); Sophia, Liu et al. 2023 (arXiv:2305.14342), Algorithms 2
and 3.

Checked against the public code of Sophia (Liuhong99/Sophia, sophia.py: rho, betas, step, an estimate without B) and of
Fed-Sophia (Ahmed-Khaled-Saleh/Fed-Sophia-pytorch: what is averaged, by which weights, what tau counts); in both an
estimate follows the step in which it is due, here it precedes that step. Its equations were read on a secondary page.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedmira.adapters import Adapters
from fedmira.adapters.lazy import torch
from fedmira.adapters.optim import decay_, descend_
from fedmira.methods.base import Client, Cohort, Facts, Memory, Message, Method, Regime, Settings, Tools
from fedmira.methods.means import merge_mean

Beta = Annotated[float, Field(ge=0, lt=1)]


class Config(Settings):
    """Settings of Fed-Sophia."""

    form: Literal["paper", "public"] = "paper"  # what training.learning_rate is: eta, or lr = eta rho
    rho: float = Field(default=0.04, gt=0)  # largest m / v; as in Sophia
    betas: tuple[Beta, Beta] = (0.965, 0.99)  # b1 of m and b2 of v; as in Sophia
    eps: float = Field(default=1e-12, gt=0)  # smallest denominator: max(v, eps)
    tau: int = Field(default=10, ge=1)  # from one estimate of v to the next; as in Sophia
    count: Literal["steps", "rounds"] = "steps"  # what tau counts: local steps, or rounds that the client took part in
    weight_decay: float = Field(default=0.0, ge=0)  # times the learning rate, per step; 0 = none (authors' code: 0.02)
    weights: Literal["uniform", "examples"] = "uniform"  # in the server's mean; authors' code: by examples


def build(config: Config, cohort: Cohort) -> Method:
    """Return Fed-Sophia as a Method."""
    first, second = config.betas

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        m, v, count = memory["sophia_m"], memory["sophia_v"], memory["sophia_count"]
        _, gradient = tools.grad(adapters)
        m.lerp_(gradient, 1 - first)
        due = count % config.tau == 0
        if bool(due.any()):
            tokens, drawn = tools.curvature(adapters)
            estimate = drawn.square().mul_(tokens[:, None])
            v.lerp_(estimate, (due.to(v.dtype) * (1 - second))[:, None])  # by 0 where none is due
        rate = tools.clock.learning_rate
        eta = rate if config.form == "paper" else rate / config.rho
        decay_(adapters.rows, rate * config.weight_decay)
        descend_(adapters.rows, (m / v.clamp(min=config.eps)).clamp_(-config.rho, config.rho), eta)
        if config.count == "steps":
            count.add_(1)
        return adapters.mask_(), memory

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        if config.count == "rounds":
            memory = {**memory, "sophia_count": memory["sophia_count"] + 1}
        return Message(adapters.rows), memory

    return Method(
        "fedsophia",
        merge_mean(config.weights),
        client=Client(start=start_memory, step=step, finish=finish),
        regime=Regime(gradients=None),
        facts=Facts(weighs=config.weights == "examples"),
    )


def start_memory(adapters: Adapters) -> Memory:
    """m, v [S, P] and count [S] of clients that never trained: all zero."""
    return {
        "sophia_m": torch.zeros_like(adapters.rows),
        "sophia_v": torch.zeros_like(adapters.rows),
        "sophia_count": torch.zeros(len(adapters), dtype=torch.int64),
    }
