"""FedAMP: every client keeps its own adapter and starts from a mean in which similar clients count more.

    u_k = w_k + alpha/m sum_l exp(-||w_k - w_l||^2 / sigma) (w_l - w_k)      over the m other clients that have trained
    client k:  w_k = w_k - eta (grad f_k(w_k) + lambda (w_k - u_k))          R steps, from u_k, which the server sends

The server stores every w_k as it came, and mixes when a client is sampled; of clients that are not in the round it
takes the newest. w_k is what the client uses. A pair that is close attracts each other and so comes closer: the graph
is learned by itself. alpha is how far a client goes to the others' mean if all are near: at 0 (with lambda = 0) it
trains alone, and at 1 - 1/K with a large sigma everybody starts from the mean of all. In its first round a client
starts from the common start, and is held to it. For each client that is sampled, the rows of all that have trained are
read.

In the paper's letters the weight of w_l is alpha_k A'(||w_k - w_l||^2), A(x) = 1 - exp(-x / sigma), and the penalty is
lambda / (2 alpha_k) ||w_k - u_k||^2. So alpha here is alpha_k m / sigma there, and lambda here is lambda / alpha_k:
both are free of the scale of adapters, and the weights never sum to more than 1. sigma has that scale. `sigma: null`,
ours, is the mean squared distance between the uploads of the newest round in which two clients answered. `pull_percent`
in the record of a round is how far its clients were moved from their own adapters when they were sent u_k.

Source: Huang et al. 2021 (arXiv:2007.03797, AAAI 2021), equations 4 to 6 and Algorithm 1.

Checked against a public implementation by others (TsingZ0/PFLlib, servers/serveramp.py: kernel, weights; its
clients/clientamp.py goes on from w_k, and its penalty is the distance, not its square), a summary of the paper's
algorithm, and others' notes on the authors' notebook, in which clients reload u_k, the own weight is 1/2, the others
are in proportion to the kernel, and sigma is 10. The paper's text was not at hand. Its heuristic form (HeurFedAMP, with
cosines) is not offered.
"""

from __future__ import annotations

from pydantic import Field

from fedmira.adapters import Adapters, RowTable, Stored
from fedmira.adapters.lazy import Tensor, torch
from fedmira.adapters.mixing import mix_rows
from fedmira.methods.base import Change, Client, Clock, Cohort, Facts, Memory, Message, Method, Settings, State, Tools
from fedmira.methods.wrappers import proximal

TUNED = {"alpha": (0.2, 0.5, 0.8)}  # what `fedmira compare` tries
BLOCK = 64  # stored rows that are read together


class Config(Settings):
    """Settings of FedAMP."""

    alpha: float = Field(default=0.5, ge=0, le=1)  # pull to the others; 0 = none
    sigma: float | None = Field(default=None, gt=0)  # squared distance at which a weight is 1/e; null: see above
    lam: float = Field(default=0.1, ge=0, alias="lambda")  # penalty on the distance from u_k while training; 0 = none


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedAMP as a Method."""

    def init(start: Stored, clock: Clock) -> State:
        sigma = torch.tensor([config.sigma or 0.0], dtype=torch.float64)  # 0: not known yet
        return State(start, {"sigma": sigma}, {"trained": torch.zeros(len(start), dtype=torch.bool)})

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        table, trained, sigma = state.adapters.rows, state.tables["trained"], state.shared["sigma"]
        own, others = table[ids], trained.nonzero().flatten()
        nothing = torch.zeros(len(ids), dtype=torch.float64)
        if not len(others) or not bool(sigma > 0):
            return Message(own, {"pull": nothing})
        near = torch.exp(-squared_distances(own, table, others) / sigma) * trained[ids][:, None]  # [S, N]
        near[ids[:, None] == others] = 0
        weights = near * (config.alpha / max(1, len(others) - 1))
        pull = weights.sum(dim=1)
        within, outside = torch.diag(1 - pull).numpy(), weights.numpy()
        rows = mix_rows(within, own, outside=outside, stored=table, neighbours=others.numpy())
        return Message(rows, {"pull": pull})

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        shared = dict(state.shared)
        if config.sigma is None and len(ids) > 1:
            everyone = torch.arange(len(ids))
            total = squared_distances(returned.rows, returned.rows, everyone).sum()
            shared["sigma"] = (total / (len(ids) * (len(ids) - 1)))[None]
        notes = {"pull_percent": 100 * float(returned.scalars["pull"].mean()), "sigma": float(shared["sigma"])}
        return Change(ids, returned.rows, shared, {"trained": torch.ones(len(ids), dtype=torch.bool)}, notes)

    method = Method(
        "fedamp",
        merge,
        rows_of="each",
        init=init,
        send=send,
        client=Client(start=start_memory, finish=finish, use=use_own),
        facts=Facts(needs="each", uploads="more"),
    )
    return proximal(method, mu=config.lam)


def squared_distances(rows: Tensor, table: Tensor | RowTable, others: Tensor) -> Tensor:
    """Return ||x_k - y_l||^2 [S, N] in float64, of rows [S, P] and the rows `others` [N] of a table, read in blocks."""
    mine = rows.double()
    length = mine.square().sum(dim=1, keepdim=True)
    blocks = []
    for ids in torch.split(others, BLOCK):
        block = table[ids].double()
        blocks.append(length + block.square().sum(dim=1) - 2 * mine @ block.T)
    return torch.cat(blocks, dim=1).clamp(min=0)


def start_memory(adapters: Adapters) -> Memory:
    """w_k [S, P] of clients that never trained: what they are sent."""
    return {"fedamp_w": adapters.rows.clone()}


def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
    return Message(adapters.rows, {"pull": given.scalars["pull"]}), {"fedamp_w": adapters.rows.clone()}


def use_own(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> Adapters:
    return adapters.with_rows(memory["fedamp_w"].clone())
