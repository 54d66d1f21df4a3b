"""HetLoRA: clients of different ranks share padded factors, weighed by what they learned, and may give up last pairs.

    server:  A = sum_k p_k A_k,  B = sum_k p_k B_k        factors padded with zeros to the largest rank r
             p_k = ||B_k A_k||_F / sum_{j in S} ||B_j A_j||_F                (`weights: norm`)
    down:    B[:, :r_k],  A[:r_k]
    local:   loss of client k + lambda ||B_k[:, t:]|| ||A_k[t:]||            t = floor(gamma r_k), of each module
    after:   r_k <- t, if the sum of these products of norms over modules is less than when the round began

The norm is that of a client's whole update, over all modules; where all are 0 the mean is uniform. As the paper writes
W0 + B A, s_k B_k takes the place of B_k everywhere, s_k = alpha / r_k: a factor keeps its product when it goes to a
client of another rank. The mean is over all clients of a round, as in the paper: a pair that few clients have is small.

Ranks of a federation are fixed: each client has room for the rank it began with, s_k stays what it was, and what it
gave up are pairs of zeros, kept at 0 in training and in use. These zeros still travel and are counted in the bytes. How
many pairs a client has is in its own memory, and as `rank`, a mean over modules, in its uploads and metrics.jsonl. The
last pair of a module stays. With `gamma: 1` nobody prunes; with weights by examples and one rank it is then FedAvg.

Not specified, or not found: whether norms and pruning are of a client or of each module (here of the client, each
module falling to its own t), lambda, and how gamma r is rounded. Rounded down at least one pair is on trial; the public
code of FlexLoRA rounds to the nearest, so that at gamma 0.99 ranks below 50 have no penalty.

Source: HetLoRA (arXiv:2401.06432, EMNLP 2024), Cho et al., section 3.

Checked against a caption of the paper (figure 2: padding, weights ||S_k|| / Z by the norm of B_k A_k, truncation) and
the abstract. There is no code of the authors'; penalty and gamma are those of FlexLoRA's authors
(alibaba/FederatedScope, fed_utils/client.py). The rule after training was not checked against the text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from fedmira.adapters import Adapters
from fedmira.adapters.lazy import Tensor, torch
from fedmira.adapters.updates import rescale_, update_norms
from fedmira.methods.base import Change, Client, Clock, Cohort, Facts, Memory, Message, Method, Settings, State, Tools
from fedmira.methods.means import at_own_ranks, has_mixed_ranks, mean_row, replace_shared, send_cut, shares_of

TUNED = {"lambda": (5e-4, 5e-3, 5e-2)}  # what `fedmira compare` tries


class Config(Settings):
    """Settings of HetLoRA."""

    weights: Literal["norm", "examples", "uniform"] = "norm"  # of the mean; norm: the paper
    gamma: float = Field(default=0.99, gt=0, le=1)  # share of its pairs that a client keeps when it prunes; 1 = all
    lam: float = Field(default=5e-3, ge=0, alias="lambda")  # of the penalty on the pairs on trial; 0 = none


def build(config: Config, cohort: Cohort) -> Method:
    """Return HetLoRA as a Method."""
    mixed = has_mixed_ranks(cohort)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        uploads = at_own_ranks(returned.rows, ids, state, cohort)
        if config.weights == "norm":
            found = update_norms(uploads)
            shares = shares_of(found, "examples" if bool(found.sum() > 0) else "uniform")
        else:
            shares = shares_of(weights, config.weights)
        rows = uploads.rows
        if mixed:
            rows = rescale_(uploads.with_rows(rows.clone()), state.adapters.scale[:1]).rows
        return replace_shared(mean_row(rows, shares))

    pruned = config.gamma < 1
    facts = Facts(
        needs="each" if config.weights == "norm" else "sum",
        weighs=config.weights == "examples",
        figures=("rank",) if pruned else (),
        uploads="more" if pruned else "row",
    )
    client = pruning(config.gamma, config.lam) if pruned else Client()
    return Method("hetlora", merge, send=send_cut(cohort), client=client, facts=facts)


def pruning(gamma: float, penalty: float) -> Client:
    """The half of a client that prunes its own rank. Memory: pairs it has, hetlora_ranks [S, modules]."""

    def start(adapters: Adapters) -> Memory:
        modules = sum(1 for part in adapters.layout.parts for _ in part.pairs())
        ranks = adapters.ranks if adapters.ranks.ndim == 2 else adapters.ranks[:, None].expand(-1, modules)
        return {"hetlora_ranks": ranks.clone()}

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        own = _prune_(adapters, memory["hetlora_ranks"])
        return own, {**memory, "hetlora_begun": _trial(own, memory["hetlora_ranks"], gamma)}

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        _, gradient = tools.grad(adapters)
        if penalty > 0:
            slope = torch.zeros_like(adapters.rows)
            _trial(adapters, memory["hetlora_ranks"], gamma, slope=adapters.with_rows(slope))
            gradient = gradient.add_(slope, alpha=penalty)
        return _prune_(tools.update(adapters, gradient), memory["hetlora_ranks"]), memory

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        ranks = memory["hetlora_ranks"]
        fell = _trial(adapters, ranks, gamma) < memory["hetlora_begun"]
        ranks = torch.where(fell[:, None], _kept(ranks, gamma), ranks)
        rows = _prune_(adapters, ranks).rows
        return Message(rows, {"rank": ranks.double().mean(dim=1)}), {"hetlora_ranks": ranks}

    def use(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters:
        return _prune_(adapters.with_rows(adapters.rows.clone()), memory["hetlora_ranks"])

    return Client(start=start, begin=begin, step=step, finish=finish, use=use)


def _prune_(adapters: Adapters, ranks: Tensor) -> Adapters:
    """Zero, in place, the pairs that clients have given up. ranks [S, modules]: of those they have."""
    replace(adapters, ranks=ranks.cpu()).mask_()
    return adapters


def _kept(ranks: Tensor, gamma: float) -> Tensor:
    """t = floor(gamma r), at least 1; without the rounding error of a product such as 0.29 x 100."""
    return (ranks.double() * gamma + 1e-9).floor().long().clamp(min=1)


def _trial(adapters: Adapters, ranks: Tensor, gamma: float, *, slope: Adapters | None = None) -> Tensor:
    """Sum over modules of ||B_k[:, t:r]|| ||A_k[t:r]|| [S], float64; its gradient is added to the rows of `slope`.

    Where a norm is 0 the gradient with respect to that factor is 0, one of those that it may be.
    """
    kept, total = _kept(ranks, gamma), torch.zeros(len(adapters), dtype=torch.float64, device=adapters.rows.device)
    for part in adapters.layout.parts:
        for index, (first, second) in enumerate(part.pairs()):
            place = torch.arange(first.shape[0], device=ranks.device)
            tail = ((place >= kept[:, index, None]) & (place < ranks[:, index, None])).to(adapters.rows)  # [S, r]
            a, b = adapters.leaf(first) * tail[:, :, None], adapters.leaf(second) * tail[:, None, :]
            of_a, of_b = (torch.linalg.vector_norm(factor, dim=(1, 2)) for factor in (a, b))
            total += of_a.double() * of_b.double()
            if slope is not None:
                for leaf, factor, own, other in ((first, a, of_a, of_b), (second, b, of_b, of_a)):
                    ratio = torch.where(own > 0, other / own, torch.zeros_like(own))
                    slope.leaf(leaf).add_(factor * ratio[:, None, None])
    return total
