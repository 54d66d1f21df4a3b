"""FedRep: one factor is shared, the other stays private; a client trains the private one first, then the shared one.

    B_k = B_k - eta grad_B f_k(A, B_k)     in the first steps of the client's round, with A as it was sent
    A_k = A_k - eta grad_A f_k(A_k, B_k)   in the others, with B_k as they left it
    server:  A = sum_k p_k A_k,   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)

That is `shared: A`; with `shared: B` the factors change places. The paper shares the body of a network, its
representation, and keeps its head: of LoRA the nearest are A, which reads a layer's input, and B, which writes its
output. FedSA-LoRA has the same two roles and trains both factors in every step. Only the shared factor travels.

The private one begins as the common start. As that has B = 0, a client that was not sampled yet uses the base as it is,
and a private A learns nothing before the shared B has moved. In the authors' last round everybody trains its head, for
which `with: [{name: tuned_after}]` is nearest here: it trains both factors in turn.

`head` is the share of a client's local steps that train the private factor, rounded; a client that takes two steps or
more trains each factor in one at least, one with a single step trains the shared factor. The two have moments of their
own, and weight decay moves only the factor in turn.

In the paper's Algorithm 1 the shared part takes a single step a round; in its experiments, and in the authors' code, it
takes whole epochs, one of five by default.

Source: Collins et al. 2021 (arXiv:2102.07078, ICML 2021), Algorithm 1.

Checked against the authors' public code (lgcollins/FedRep, models/Update.py: first the head's epochs, then the
representation's; main_fedrep.py: what is private, a mean by examples, everybody's heads at the end; utils/options.py).
The paper's text was not at hand: that Algorithm 1 has one step is from memory.
"""

from typing import Literal

from pydantic import Field

from fedmira.adapters import Adapters
from fedmira.adapters.columns import factor_columns
from fedmira.adapters.lazy import Tensor, torch
from fedmira.methods.base import Client, Cohort, Facts, Memory, Message, Method, Settings, Tools
from fedmira.methods.means import merge_mean
from fedmira.methods.wrappers import only

TUNED = {"head": (0.5, 0.8, 0.9)}  # what `fedmira compare` tries


class Config(Settings):
    """Settings of FedRep."""

    shared: Literal["A", "B"] = "A"  # the factor that travels; the other stays with the client
    head: float = Field(default=0.8, gt=0, lt=1)  # share of local steps for the private factor; authors' code: 4 of 5
    weights: Literal["examples", "uniform"] = "examples"  # of the mean; authors' code: by examples


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedRep as a Method."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        assert tools.clock.steps is not None
        private = tools.clock.step < head_steps(tools.clock.steps, config.head)  # [S]
        shared = factor_columns(adapters.layout, config.shared).to(adapters.rows.device)  # [P]
        _, gradient = tools.grad(adapters)
        before = adapters.rows.clone()
        for of, who, columns in (("private", private, ~shared), ("main", ~private, shared)):
            tools.update(adapters, gradient * columns, of=of, who=who)
        turns = private.to(shared.device)[:, None] ^ shared  # the columns in turn [S, P]
        return adapters.with_rows(torch.where(turns, adapters.rows, before)), memory

    fedavg = Method(
        "fedrep",
        merge_mean(config.weights),
        client=Client(step=step),
        facts=Facts(weighs=config.weights == "examples"),
    )
    return only(fedavg, travels=config.shared)


def head_steps(steps: Tensor, share: float) -> Tensor:
    """Return how many of a client's local steps [S] train its private factor."""
    rounded = (steps * share).round().long()
    return torch.minimum(rounded.clamp(min=1), steps - 1)
