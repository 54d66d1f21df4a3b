"""FedFomo: each client starts from the other clients' rows that its own validation loss likes, each by how much.

    sent to k:  its own last row w_k, and w_j of up to M others that have trained       (chosen by P, see below)
    weights:    d_j = (L_k(v_k) - L_k(w_j)) / ||w_j - v_k||,    q_j = max(0, d_j) / sum_i max(0, d_i)    j: those and k
    start:      v_k <- v_k + sum_j q_j (w_j - v_k);  without a positive d_j it is v_k
    then local steps from v_k give the next w_k, which goes to the server as it is
    affinity:   P_kj <- P_kj + d_j / sum_i |d_i|       for the rows that k was sent
    chosen:     one after another of those not yet chosen: that of the largest P_kj, or with probability
                max(0, epsilon - decay (t - 1)) any of them; ties at random

v_k is what client k began its last local steps from, and w_k what these made of it, so that its own training is one of
the candidates; `baseline: last` takes w_k in place of v_k, which asks others to be better than its own training. L_k is
the loss on the client's own validation split. A client without one trains alone; a federation without any is refused.
An adapter is used as local steps left it. With M = 0 and `baseline: last` it is local training.

The d_j / sum |d_i| follow from losses: a site with share_metrics off sends none (`told` 0), and the server then chooses
for it at random. Rows are handed on as they are, each counted in the bytes down: others see a client's last row. Where
ranks differ, a client sees of another's row what its own rank has room for. P is a table of K x K numbers.

Other than in the authors' code: the norm is the 2-norm of the row, not the 1-norm; P is divided by sum |d_i|, not by
|sum d_i|, which may be near 0; all that have trained are offered, not those of the round before; no means of clusters.

Source: FedFomo (arXiv:2012.08565, ICLR 2021), Zhang et al.

Checked against the authors' code (NVlabs/FedFomo: client.py, federation.py; README: epsilon 0.3, decay 0.05, baseline
first_model, 4 or 9 others) and the abstract; the paper's equations were not at hand.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fedmira.adapters import Adapters, Stored, norms
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.adapters.updates import rescale_
from fedmira.errors import MethodError
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

DIVERGED = 100.0  # nats: a larger loss counts as this one
TINY = 1e-300  # in the place of a sum of 0, whose terms are 0


class Config(Settings):
    """Settings of FedFomo."""

    models: int = Field(default=4, ge=0, alias="M")  # other clients' rows that a client is sent at most
    epsilon: float = Field(default=0.3, ge=0, le=1)  # probability of any instead of the best, in round 1; authors' code
    decay: float = Field(default=0.05, ge=0)  # of epsilon from round to round; authors' code
    baseline: Literal["first", "last"] = "first"  # v_k, or w_k itself, which others have to beat


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedFomo as a Method. Raises MethodError if it is known that no client has a validation example."""
    if cohort.validation and not any(cohort.validation):
        needs = "fedfomo: each client weighs others by its own validation loss, and no client has a validation example"
        raise MethodError(f"{needs}; raise data.split.validation, or name a data.split_column with such examples")
    names = [f"other_{place}" for place in range(config.models)]
    clients, by_name = len(cohort), np.argsort(np.array(cohort.ids))  # draws do not depend on the clients' order

    def choose(state: State, ids: Tensor, clock: Clock) -> Tensor:
        """Whose rows the clients `ids` are sent [S, M]; -1 = nobody's."""
        count = len(ids)
        ties, chance, coins = np.empty((count, clients)), np.empty((count, clients)), np.empty((count, config.models))
        for place, k in enumerate(ids.tolist()):
            stream = np.random.default_rng([cohort.seed, clock.round, zlib.crc32(cohort.ids[k].encode())])
            ties[place, by_name], chance[place, by_name] = stream.random((2, clients))
            coins[place] = stream.random(config.models)
        explores = coins < config.epsilon - config.decay * (clock.round - 1)
        order = np.lexsort((ties, state.tables["affinity"][ids].numpy()), axis=1)  # the best last
        best = np.empty((count, clients))
        np.put_along_axis(best, order, np.arange(clients, dtype=np.float64)[None], axis=1)
        free = np.tile(state.tables["trained"].numpy() > 0, (count, 1))
        free[np.arange(count), ids.numpy()] = False
        chosen = np.full((count, config.models), -1)
        for place in range(config.models):
            some = free.any(axis=1)
            scores = np.where(free, np.where(explores[:, place, None], chance, best), -1.0)
            chosen[some, place] = scores[some].argmax(axis=1)
            free[some, chosen[some, place]] = False
        return torch.from_numpy(chosen)

    def init(start: Stored, clock: Clock) -> State:
        return State(start, tables={"trained": torch.zeros(clients), "affinity": torch.zeros(clients, clients)})

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        chosen, more, absent = choose(state, ids, clock), {}, {}
        for place, name in enumerate(names):
            absent[name] = chosen[:, place] < 0
            others = state.adapters.take(torch.where(absent[name], ids, chosen[:, place]))
            rows = rescale_(others, state.adapters.scale[ids]).rows
            more[name] = rows.masked_fill_(absent[name][:, None], 0)
        return Message(state.adapters.rows[ids], more=more, absent=absent)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        affinity, chosen = state.tables["affinity"][ids], choose(state, ids, clock)
        for place, name in enumerate(names):
            share = torch.where(chosen[:, place] < 0, 0.0, returned.scalars[name]).to(affinity)
            affinity.scatter_add_(1, chosen[:, place : place + 1].clamp(min=0), share[:, None])
        tables = {"affinity": affinity, "trained": torch.ones(len(ids))}
        return Change(ids, returned.rows, tables=tables, notes={"told": float(returned.scalars["told"].sum())})

    client, regime = weighing(names, first=config.baseline == "first"), Regime(scorings=2 + config.models)
    facts = Facts("each", uploads="more", rows_down=lambda k: torch.full_like(k, 1 + min(config.models, clients - 1)))
    return Method("fedfomo", merge, rows_of="each", init=init, send=send, client=client, regime=regime, facts=facts)


def weighing(names: Sequence[str], *, first: bool) -> Client:
    """A client that starts from what its validation loss likes of further rows by these names. Memory: v_k."""

    def start(adapters: Adapters) -> Memory:
        return {"fedfomo_v": adapters.rows.clone()}

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        own, base = adapters.rows, memory["fedfomo_v"] if first else adapters.rows
        rows = [own, *(given.more[name] for name in names)]
        gaps = torch.stack([norms(row - base) for row in rows])  # [1 + M, S]
        there = gaps > 0
        for place, name in enumerate(names, 1):
            there[place] &= ~given.absent[name].to(own.device)

        before, changes = torch.zeros_like(gaps[0]), torch.zeros_like(gaps)
        if bool(there.any()):
            before = tools.loss(adapters.with_rows(base)).to(gaps).clamp(max=DIVERGED)
        for place in there.any(dim=1).nonzero().flatten().tolist():  # what nobody here has is not scored
            after = tools.loss(adapters.with_rows(rows[place])).to(gaps).clamp(max=DIVERGED)
            changes[place] = (before - after) / gaps[place].clamp(min=TINY)
        blind = before.isnan()
        changes = torch.where(there, changes, 0.0).nan_to_num(nan=0.0)
        good = changes.clamp(min=0)
        shares = (good / good.sum(dim=0).clamp(min=TINY)).to(own.dtype)
        begun = base + sum(share[:, None] * (row - base) for share, row in zip(shares, rows, strict=True))
        begun = torch.where(blind[:, None], own, begun)
        told = (there.any(dim=0) & ~blind & tools.reports).double()
        said = (told * changes / changes.abs().sum(dim=0).clamp(min=TINY)).T[:, 1:]
        kept = {"fedfomo_v": begun.clone(), "fedfomo_said": said, "fedfomo_told": told}
        return adapters.with_rows(begun), kept

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        scalars = {name: memory["fedfomo_said"][:, place].contiguous() for place, name in enumerate(names)}
        scalars["told"] = memory["fedfomo_told"]
        return Message(adapters.rows, scalars), {"fedfomo_v": memory["fedfomo_v"]}

    return Client(start=start, begin=begin, finish=finish)
