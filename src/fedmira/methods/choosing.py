"""The pull that a client chooses by itself, when it fetches its adapter: MIRA with `lambda: auto`.

    m_k^g = sum_l a~_kl w_l           over clients l != k that have trained, newest stored rows; rows of a~ sum to 1
    m_k^global = sum_l n_l w_l / sum_l n_l     over all that have trained, k included, n: training examples
    start of k:  w_k(alpha, g) = (1 - alpha) w_k + alpha m_k^g,  (alpha, g) = argmin_j s_kj over alphas x graphs
    s_kj = (n_k d_kj + n_0 d_j) / (n_k + n_0)

d_kj: change of k's own validation loss from alpha = 0 to candidate j; n_k: its validation examples. It is noisy, so it
is shrunk to d_j, a running mean of what clients report, with the weight of n_0 (`prior`) examples. Candidates whose
change is not below -margin standard errors are left out; alpha = 0 is always one, if it is in the list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fedmira.adapters import Adapters, Stored
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.adapters.mixing import mix_rows
from fedmira.graphs.graph import Graph
from fedmira.graphs.learned import LearnedGraph
from fedmira.graphs.settings import GraphConfig, given_graph, learn_graph
from fedmira.graphs.step import extend, normalise
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

Share = Annotated[float, Field(ge=0, le=1)]
Graphs = Annotated[tuple[Literal["given", "learned", "global"], ...], Field(min_length=1)]
LEARNED = GraphConfig(kind="learned", degree=5, centred=True)
FIXED = ("eta", "neighbours", "normalise", "space", "solver", "clip", "accept", "reply")  # of a fixed lambda
DIVERGED = 100.0  # nats: a larger change of a loss counts as this one
KEPT = 0.5  # of the running mean of reported changes, when a round is added
GROUPS = {"attention": ("attn", "attention")}  # a group of its own -> what names of its modules contain


class ChoiceConfig(Settings):
    """What clients choose from, and how."""

    graphs: Graphs | None = None  # null: given (if `graph` describes one), learned, global
    alphas: Annotated[tuple[Share, ...], Field(min_length=1)] = (0, 0.25, 0.5, 0.75, 1)  # shares of the others' mean
    prior: float = Field(default=6, ge=0)  # validation examples that the mean over clients is worth; 0 = own alone
    margin: float = Field(default=0, ge=0)  # standard errors by which a candidate has to be better than alpha 0
    fewest: int = Field(default=1, ge=1)  # with fewer validation examples a client goes by the others' mean alone
    otherwise: Share = 0  # alpha, with the first graph, where nothing is known
    by: Literal["whole", "module_group"] = "whole"  # one choice, or others for attention and for the rest
    scored: Literal["all", "parabola"] = "all"  # parabola: three alphas of each graph; the others from these

    @model_validator(mode="after")
    def _fits(self) -> ChoiceConfig:
        for name, values in (("alphas", self.alphas), ("graphs", self.graphs or ())):
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: {', '.join(map(str, values))} has a value twice")
        if self.otherwise not in self.alphas and self.otherwise != type(self).model_fields["otherwise"].default:
            raise ValueError(f"otherwise: {self.otherwise} is not one of alphas: {', '.join(map(str, self.alphas))}")
        return self


def _checked(value: float | str) -> float | str:
    if not isinstance(value, str) and value < 0:
        raise ValueError("input should be greater than or equal to 0")
    return value


Strength = Annotated[float | Literal["auto"], AfterValidator(_checked)]


def check_auto(config: Any) -> None:
    """Raise ValueError where settings of MIRA are of a fixed lambda and of `auto` at the same time."""
    if config.lam != "auto" and config.choice is not None:
        raise ValueError("choice is for lambda: auto, where clients choose; a fixed lambda leaves them none")
    defaults = {key: type(config).model_fields[key].default for key in FIXED}
    if config.lam == "auto" and (changed := [key for key in FIXED if getattr(config, key) != defaults[key]]):
        raise ValueError(
            f"{', '.join(changed)}: not with lambda: auto, where the server sends means of stored neighbours, row by "
            "row, and clients choose how much of them they take; use graph and choice"
        )


def graph_of(config: GraphConfig, cohort: Cohort) -> Graph:
    """Return a graph that is known before training. Raises MethodError if it cannot be made from this cohort."""
    parts = {"ids": cohort.ids, "names": cohort.names, "columns": cohort.columns, "profile": cohort.profile}
    return given_graph(config, seed=cohort.seed, **parts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Choice:
    """The client's half: what it starts its local steps from. graphs: names of the rows of means that it is sent."""

    config: ChoiceConfig
    graphs: tuple[str, ...]

    @property
    def candidates(self) -> list[tuple[float, int]]:
        """(alpha, place of the graph); the first is what the others are compared with."""
        alphas = sorted(self.config.alphas)
        own = [(0.0, 0)] if alphas[0] == 0 else []
        return own + [(alpha, place) for place in range(len(self.graphs)) for alpha in alphas if alpha > 0]

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of parts of an adapter that are chosen for separately."""
        return ("whole",) if self.config.by == "whole" else (*GROUPS, "rest")

    @property
    def figures(self) -> tuple[str, ...]:
        """What is reported of a choice: the share taken of a mean, and the place of its graph in the list."""
        ends = [""] if self.config.by == "whole" else [f"_{group}" for group in self.groups]
        return tuple(f"{what}{end}" for end in ends for what in ("alpha", "graph"))

    @property
    def scorings(self) -> int:
        """How often a client scores its validation split for a choice, at most."""
        if len(self.candidates) == 1:
            return 0
        refined = 0 if self.config.by == "whole" else 1 + len(self.groups) * len(self.candidates)
        return 1 + len(self.scored_alphas) * len(self.graphs) + refined

    @property
    def scored_alphas(self) -> list[float]:
        """The alphas above the first candidate's that are scored, ascending; the others follow from these."""
        alphas = sorted(alpha for alpha in self.config.alphas if alpha > 0)
        if self.config.scored == "all" or len(alphas) <= 2 or 0 not in self.config.alphas:
            return alphas
        return [min(alphas, key=lambda alpha: abs(alpha - alphas[-1] / 2)), alphas[-1]]

    def begin(self, adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        """Start from the candidate that is best by the client's own validation loss."""
        seen = _Fetched(self, adapters, given, tools)
        changes, errors, examples = seen.compare()
        best = self._pick(changes, errors, examples, seen.apart, given)
        rows = seen.candidate(best)
        taken = np.repeat(best[:, None], len(self.groups), axis=1)
        if len(self.groups) > 1:
            rows, taken = seen.refine(rows, taken)
        candidates = np.array(self.candidates)
        said: dict[str, np.ndarray] = {}
        for column, (alpha, graph) in enumerate(zip(self.figures[::2], self.figures[1::2], strict=True)):
            said[alpha], said[graph] = candidates[taken[:, column]].T
        told = tools.reports & (examples > 0)
        said = {name: value if tools.reports else np.full(len(value), -1.0) for name, value in said.items()}
        said["told"] = told * 1.0
        said |= {f"change_{j}": np.where(told, changes[:, j], 0.0) for j in range(1, len(candidates))}
        kept = {f"choice.{name}": torch.from_numpy(value).to(rows.device) for name, value in said.items()}
        return adapters.with_rows(rows), {**memory, **kept}

    def finish(self, adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        """Return the row as training left it, and, where the client agrees, what it chose and what it saw."""
        said = {name: value for name, value in memory.items() if name.startswith("choice.")}
        scalars = {name.removeprefix("choice."): value for name, value in said.items()}
        return Message(adapters.rows, scalars), {name: memory[name] for name in memory.keys() - said.keys()}

    def _pick(
        self, changes: np.ndarray, errors: np.ndarray, examples: np.ndarray, apart: np.ndarray, given: Message
    ) -> np.ndarray:
        """Return the place [S] of each client's candidate."""
        config, candidates = self.config, self.candidates
        count, places = changes.shape
        typical = np.zeros((count, places))
        for j in range(1, places):
            typical[:, j] = given.scalars[f"change_{j}"].cpu().numpy()
        own = np.where(examples >= config.fewest, examples, 0)[:, None]
        prior = np.where(given.scalars["reports"].cpu().numpy() > 0, config.prior, 0.0)[:, None]
        weight = own + prior
        scores = np.divide(own * changes + prior * typical, weight, out=np.zeros((count, places)), where=weight > 0)
        bound = np.divide(config.margin * errors * own, weight, out=np.zeros((count, places)), where=weight > 0)
        none = np.array([[j > 0 and not apart[g, k] for j, (_, g) in enumerate(candidates)] for k in range(count)])
        scores[(scores >= -bound) | none] = np.inf
        scores[:, 0] = 0.0
        best = scores.argmin(axis=1)
        fixed = (config.otherwise, 0)
        blind = candidates.index(fixed) if fixed in candidates else 0
        return np.where(weight[:, 0] > 0, best, np.where(none[:, blind], 0, blind))


@dataclass(frozen=True, eq=False)
class _Fetched:
    """What clients of a pass have fetched: their own rows, and the means."""

    choice: Choice
    adapters: Adapters
    given: Message
    tools: Tools

    @property
    def apart(self) -> np.ndarray:
        """Whether a mean differs from the client's own row [graphs, S]: else there is nobody to meet."""
        own = self.adapters.rows
        means = [self.given.more[name] for name in self.choice.graphs]
        return np.stack([(mean != own).any(dim=1).cpu().numpy() for mean in means])

    def candidate(self, places: np.ndarray) -> Tensor:
        """Rows [S, P] of one candidate of each client."""
        own, candidates = self.adapters.rows, np.array(self.choice.candidates)[places]
        rows = own.clone()
        for graph, name in enumerate(self.choice.graphs):
            takes = (candidates[:, 1] == graph) & (candidates[:, 0] > 0)
            if takes.any():
                index = torch.from_numpy(np.flatnonzero(takes)).to(own.device)
                alpha = torch.from_numpy(candidates[takes, :1]).to(own)
                rows[index] = (1 - alpha) * own[index] + alpha * self.given.more[name][index]
        return rows

    def compare(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return changes of the validation loss and their standard errors [S, J], and examples [S].

        A candidate that is the same as the first for everybody here is not scored, and where all are, nothing is.
        """
        count, candidates = len(self.adapters), self.choice.candidates
        changes, errors = np.zeros((2, count, len(candidates)))
        apart, alphas = self.apart, self.choice.scored_alphas
        compared = [j for j, (_, graph) in enumerate(candidates) if j and apart[graph].any()]
        if not compared:
            return changes, errors, np.zeros(count)
        first, tokens = self._score(self.candidate(np.zeros(count, dtype=np.int64)))
        nats = {j: self._score(self.candidate(np.full(count, j)))[0] for j in compared if candidates[j][0] in alphas}
        for j in compared:
            alpha, graph = candidates[j]
            if j not in nats:
                middle, last = (nats[candidates.index((known, graph))] for known in alphas)
                nats[j] = _parabola(alpha, (0.0, *alphas), (first, middle, last))
            changes[:, j], errors[:, j] = _change(first, nats[j], tokens)
        return changes, errors, (tokens > 0).sum(axis=1)

    def refine(self, rows: Tensor, taken: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Let each client take another candidate for one group of modules after the other, where that helps it."""
        count, config = len(rows), self.choice.config
        best, tokens = self._score(rows)
        examples = (tokens > 0).sum(axis=1)
        for column, group in enumerate(self.choice.groups):
            mask = self._columns(group)
            if not bool(mask.any()):
                continue
            started, start = rows, best
            lowest = np.zeros(count)
            for j in range(len(self.choice.candidates)):
                trial = torch.where(mask, self.candidate(np.full(count, j)), started)
                nats, _ = self._score(trial)
                change, error = _change(start, nats, tokens)
                better = (examples >= config.fewest) & (change < -config.margin * error) & (change < lowest)
                lowest[better] = change[better]
                taken[better, column] = j
                chosen = torch.from_numpy(better).to(rows.device)
                rows = torch.where(chosen[:, None], trial, rows)
                best = np.where(better[:, None], nats, best)
        return rows, taken

    def _columns(self, group: str) -> Tensor:
        """Columns [P] of the modules of a group."""
        own = self.adapters.rows
        mask = torch.zeros(own.shape[1], dtype=torch.bool)
        for part in self.adapters.layout.parts:
            for leaf in part.leaves:
                of = next((name for name, some in GROUPS.items() if any(part in leaf.module for part in some)), "rest")
                mask[leaf.start : leaf.stop] = of == group
        return mask.to(own.device)

    def _score(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        nats, tokens = self.tools.each(self.adapters.with_rows(rows))
        return nats.cpu().numpy(), tokens.cpu().numpy()


def _parabola(at: float, alphas: Sequence[float], nats: Sequence[np.ndarray]) -> np.ndarray:
    """Return the nats [S, N] at an alpha on the parabola through those at three; nan where one has diverged."""
    with np.errstate(invalid="ignore"):
        return sum(
            values * math.prod((at - other) / (here - other) for other in alphas if other != here)
            for here, values in zip(alphas, nats, strict=True)
        ) + np.zeros_like(nats[0])


def _change(first: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the change [S] of the loss from `first` to `other` [S, N] nats, and its standard error.

    (sum_i x_i) / (sum_i t_i) with x_i the change of an example's nats and t_i its tokens: a ratio of sums.
    """
    total, count = tokens.sum(axis=1), (tokens > 0).sum(axis=1)
    with np.errstate(invalid="ignore"):  # both diverged
        differences = other - first
    change = np.divide(differences.sum(axis=1), total, out=np.zeros(len(total)), where=total > 0)
    change = np.clip(np.nan_to_num(change, nan=0.0), -DIVERGED, DIVERGED)
    left = np.nan_to_num(differences - change[:, None] * tokens, nan=0.0, posinf=0.0, neginf=0.0)
    sums = np.sqrt((left**2).sum(axis=1) * count / np.maximum(count - 1, 1))
    return change, np.divide(sums, total, out=np.zeros(len(total)), where=total > 0)


@dataclass(frozen=True, eq=False)
class Offer:
    """The server's half: means of others for whoever fetches, and the running mean of what clients report."""

    choice: Choice
    graph: Graph | None
    learned: LearnedGraph | None

    def init(self, start: Stored, clock: Clock) -> State:
        shared: dict[str, Tensor] = {
            "reports": torch.zeros(1, dtype=torch.float64),
            "changes": torch.zeros(len(self.choice.candidates), dtype=torch.float64),
        }
        tables = {"examples": torch.zeros(len(start), dtype=torch.float64)}  # 0 = has not trained yet
        if "global" in self.choice.graphs:
            shared["sum"] = torch.zeros(1, start.layout.size, dtype=torch.float64)  # sum_l n_l w_l
        if self.learned is not None:
            of_learned, seen = self.learned.begin(start)
            shared |= of_learned
            tables |= seen
        return State(start, shared, tables)

    def send(self, state: State, ids: Tensor, clock: Clock) -> Message:
        own = state.adapters.rows[ids]
        more = {name: self._mean(name, state, ids, own) for name in self.choice.graphs}
        typical = state.shared["changes"]
        scalars = {"reports": state.shared["reports"].expand(len(ids)).clone()}
        scalars |= {f"change_{j}": typical[j].expand(len(ids)).clone() for j in range(1, len(typical))}
        return Message(own, scalars, more)

    def _mean(self, name: str, state: State, ids: Tensor, own: Tensor) -> Tensor:
        """Rows [S, P] of the others' mean by one graph; a client's own row where it has nobody to meet."""
        examples = state.tables["examples"]
        if name == "global":
            total = examples.sum()
            return (state.shared["sum"] / total).to(own.dtype).expand(len(ids), -1) if total > 0 else own.clone()
        if name == "learned":
            assert self.learned is not None
            others, weights = self.learned.nearest(state.tables, ids)
        else:
            assert self.graph is not None
            everyone = np.union1d(self.graph.neighbours(ids.numpy()), ids.numpy())
            others = everyone[(examples > 0).numpy()[everyone]]
            weights = self.graph.subgraph(ids.numpy(), others)
        met = weights.any(axis=0)
        shares = normalise(weights[:, met], "row")
        alone = np.diag((shares.sum(axis=1) == 0) * 1.0)
        return mix_rows(alone, own, outside=shares, stored=state.adapters.rows, neighbours=others[met])

    def merge(self, state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        """Store the uploads as they are; take down what the next means are made of."""
        shared, examples = dict(state.shared), state.tables["examples"]
        tables: dict[str, Tensor] = {"examples": weights.to(examples)}
        if "global" in self.choice.graphs:
            total = shared["sum"].clone()
            before = state.adapters.rows[ids]
            for row, new, old, had in zip(returned.rows, weights.tolist(), before, examples[ids].tolist(), strict=True):
                total.add_(row.double(), alpha=new).sub_(old.double(), alpha=had)
            shared["sum"] = total
        if self.learned is not None:
            tables |= self.learned.note_down(state.adapters, shared, state.tables, ids, returned.rows, clock.round)
        told = returned.scalars["told"] > 0
        if bool(told.any()):
            found = [returned.scalars[f"change_{j}"][told].mean() for j in range(1, len(shared["changes"]))]
            newest = torch.stack([torch.zeros((), dtype=torch.float64), *found])
            had_any = bool(shared["reports"] > 0)
            shared["changes"] = KEPT * shared["changes"] + (1 - KEPT) * newest if had_any else newest
            shared["reports"] = shared["reports"] + told.sum()
        return Change(ids, returned.rows, shared, tables, self._notes(returned))

    def _notes(self, returned: Message) -> Mapping[str, float]:
        alphas = returned.scalars[self.choice.figures[0]]
        known = alphas[alphas >= 0]
        return {"pull_percent": 100 * float(known.mean())} if len(known) else {}


def graphs_of(config: GraphConfig, choice: ChoiceConfig) -> tuple[str, ...]:
    """Return the names of the graphs that clients choose from, in order."""
    given = () if config.kind in ("random", "learned") else ("given",)
    return choice.graphs or (*given, "learned", "global")


def build_auto(config: GraphConfig, choice: ChoiceConfig, cohort: Cohort) -> Method:
    """Return MIRA in which each client chooses its own pull when it fetches, and once more after the last round.

    config: of the graph that is given, or learned otherwise than by default. Raises MethodError if the graph cannot be
    made from this cohort.
    """
    half = Choice(choice, graphs_of(config, choice))
    graph = graph_of(config, cohort) if "given" in half.graphs else None
    learned: LearnedGraph | None = None
    if "learned" in half.graphs:
        own = config if config.kind == "learned" else LEARNED
        learned = learn_graph(own, products=False, stored=True, seed=cohort.seed)
    offer = Offer(half, graph, learned)

    def first_rows(state: State, ids: Tensor, known: Tensor) -> Tensor:
        assert graph is not None
        return extend(graph, state.adapters, ids.numpy(), known.numpy(), products=False)

    return Method(
        "mira",
        offer.merge,
        rows_of="each",
        init=offer.init,
        send=offer.send,
        client=Client(begin=half.begin, finish=half.finish),
        regime=Regime(first_rows=None if graph is None else first_rows, tune=("steps", 0), scorings=half.scorings),
        facts=Facts(
            needs="each",
            weighs="global" in half.graphs,
            graph=graph,
            learned=None if learned is None or graph is not None else lambda state: learned.directed(state.tables),
            figures=half.figures,
            uploads="more",
        ),
    )
