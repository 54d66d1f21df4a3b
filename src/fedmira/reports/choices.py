"""What clients chose of a method that lets them (MIRA with `lambda: auto`), from the figures alpha and graph of a run.

A map of clients and rounds, whose last column is the choice after the last round; and who took how much from whom then:

    own share of k: 1 - alpha_k      from l: alpha_k a~_kl, a~ the weights of the graph that k chose, rows sum to 1

with l among those that have trained. `given` and `learned` are known where graph.json holds them, which is one of them;
`global` weighs by training examples and includes k.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedmira.reports.axes import LEVEL, Box, mixed, spread_out
from fedmira.reports.network import TaskGraph, read_graph
from fedmira.reports.record import RunRecord, StudyRecord, examples_of
from fedmira.reports.wording import clean, fitted, plural, short

MOST_CLIENTS = 60  # drawn, in the map at even steps of more
WIDTHS = {"wide": (860, 112, 120), "narrow": (350, 84, 40)}  # width, left margin, most rounds
ROW, FONT = 14, 12
WIDEST = 20  # pixels of a cell
HUES = ("#009E73", "#CC79A7", "#E69F00")  # by place of the graph; blue and vermilion stand for gain on this page
NOTHING = "#D5D8DB"  # alpha 0: the client kept its own adapter
DARKEST = 4  # steps of the legend


class Chosen(NamedTuple):
    """One choice. alpha: share taken of a graph's mean, None = not told; graph: its place in the method's list."""

    alpha: float | None
    graph: int


class Choices(NamedTuple):
    """All choices of the first run of a method, for one part of the adapter ("" = the whole).

    rounds: by round, then by client; last: by client, empty while the run is not at its end.
    """

    label: str
    part: str
    graphs: Sequence[str]
    clients: Sequence[str]
    rounds: Mapping[int, Mapping[str, Chosen]]
    last: Mapping[str, Chosen]


class Line(NamedTuple):
    """One client in a picture. cells: (colour, SVG path); untold: path of those that are outlined."""

    name: str
    y: int
    cells: list[tuple[str, str]]
    untold: str
    tooltip: str


class Picture(NamedTuple):
    """A map or a matrix in one size. marks: (x, label) below."""

    box: Box
    lines: list[Line]
    marks: list[tuple[float, str]]


class Shown(NamedTuple):
    """The choices of one method for one part of its adapter, drawn. pictures: by class of the page."""

    label: str
    part: str
    title: str
    legend: list[tuple[str, list[str]]]  # graph -> colours of small to large alphas
    maps: list[tuple[str, Picture]]
    matrices: list[tuple[str, Picture]]
    matrix_title: str
    last: list[tuple[str, str]]  # (client, choice)
    notes: list[str]


def shown_choices(record: StudyRecord) -> list[Shown]:
    """Draw the choices of every method that has any. Raises StoreError if a graph.json is damaged."""
    found = [choices for label in record.labels for choices in read_choices(record, label)]
    return [_shown(record, choices) for choices in found if any((*choices.rounds.values(), choices.last))]


def read_choices(record: StudyRecord, label: str) -> list[Choices]:
    """Read the choices in a method's first run, one part of the adapter after the other; [] if it has none."""
    run = record.first_run(label)
    if run is None:
        return []
    last = run.facts.figures if isinstance(run.facts.figures, dict) else {}
    lines = [line for line in run.rounds if isinstance(line.get("figures"), dict)]
    names = dict.fromkeys(name for figures in (*(line["figures"] for line in lines), last) for name in figures)
    ends = [name.removeprefix("alpha") for name in names if name.startswith("alpha")]
    everyone = list(record.clients) or record.results.clients
    return [
        Choices(
            label=label,
            part=end.removeprefix("_"),
            graphs=graph_names(run.facts.settings),
            clients=everyone,
            rounds={int(line["round"]): _chosen(line.get("clients", ()), line["figures"], end) for line in lines},
            last=_chosen(everyone, last, end),
        )
        for end in ends
    ]


def graph_names(settings: object) -> list[str]:
    """Return the graphs that clients choose from, in the method's order: as `graphs_of` of methods/choosing.py."""
    choice, graph = _section(settings, "choice"), _section(settings, "graph")
    if isinstance(listed := choice.get("graphs"), list | tuple):
        return [str(name) for name in listed]
    return [*([] if graph.get("kind", "random") in ("random", "learned") else ["given"]), "learned", "global"]


def _section(settings: object, key: str) -> Mapping[str, Any]:
    section = settings.get(key) if isinstance(settings, dict) else None
    return section if isinstance(section, dict) else {}


def _chosen(clients: Sequence[object], figures: Mapping[str, Any], end: str) -> dict[str, Chosen]:
    alphas, graphs = figures.get(f"alpha{end}"), figures.get(f"graph{end}")
    if not isinstance(alphas, list) or not isinstance(graphs, list):
        return {}
    return {
        str(client): Chosen(float(alpha), int(graph))
        if isinstance(alpha, int | float) and isinstance(graph, int | float)
        else Chosen(None, 0)
        for client, alpha, graph in zip(clients, alphas, graphs, strict=False)
    }


def taken(record: StudyRecord, choices: Choices) -> dict[str, dict[str, float] | None]:
    """Return, by client, whose adapter its own is a mean of after the last round, itself included; None = not known.

    Raises StoreError if the graph.json is damaged.
    """
    run = record.first_run(choices.label)
    assert run is not None
    trained = _trained(run)
    stored = read_graph(record, run.folder)
    weights = _weights(stored) if stored is not None else None
    held = "given" if "given" in choices.graphs else "learned"  # which of them graph.json has
    examples = examples_of(record.clients, "train")
    everyone = {client: float(examples.get(client, 0)) for client in choices.clients if client in trained}
    found: dict[str, dict[str, float] | None] = {}
    for client, (alpha, place) in choices.last.items():
        name = choices.graphs[place] if 0 <= place < len(choices.graphs) else ""
        met: Mapping[str, float] | None = None
        if name == "global":
            met = everyone if all(everyone.values()) else None
        elif name == held and weights is not None:
            met = {other: weight for other, weight in weights.get(client, {}).items() if other in trained}
        if alpha is None or (alpha > 0 and met is None):
            found[client] = None
            continue
        total = sum(met.values()) if met else 0.0
        shares = {client: 1.0 if not total else 1.0 - alpha}
        for other, weight in (met or {}).items() if alpha > 0 and total else ():
            shares[other] = shares.get(other, 0.0) + alpha * weight / total
        found[client] = shares
    return found


def _trained(run: RunRecord) -> set[str]:
    """Return the clients of which the server has an upload."""
    return {str(client) for line in run.rounds for client in line.get("answered", line.get("clients", ()))}


def _weights(graph: TaskGraph) -> dict[str, dict[str, float]] | None:
    """Return the weights by client and neighbour; None if they were too many to be stored."""
    if graph.edges is None:
        return None
    weights: dict[str, dict[str, float]] = {}
    for row, column, weight in graph.edges:
        if row != column:
            weights.setdefault(graph.clients[row], {})[graph.clients[column]] = weight
    return weights


def _shown(record: StudyRecord, choices: Choices) -> Shown:
    clients = [choices.clients[place] for place in spread_out(len(choices.clients), MOST_CLIENTS)]
    notes = []
    if len(clients) < len(choices.clients):
        notes.append(f"{len(clients)} of {plural(len(choices.clients), 'client')} are drawn, at even steps.")
    if len(choices.rounds) > WIDTHS["wide"][2]:
        notes.append(f"Of {len(choices.rounds):,} rounds {WIDTHS['wide'][2]} are drawn, at even steps.")
    matrices: list[tuple[str, Picture]] = []
    if choices.last and len(choices.clients) <= MOST_CLIENTS:
        shares = taken(record, choices)
        hidden = sum(of is None for of in shares.values())
        if hidden < len(shares):
            matrices = [(name, _matrix(record, choices, shares, name)) for name in WIDTHS]
        if hidden:
            notes.append(
                f"From whom {plural(hidden, 'client')} took is not known: not told, or by a graph that is not stored."
            )
    elif choices.last:
        notes.append(f"Who took from whom is drawn for up to {MOST_CLIENTS} clients.")
    of = f" for {clean(choices.part)} modules" if choices.part else ""
    told = [one for by_client in choices.rounds.values() for one in by_client.values() if one.alpha is not None]
    pulls = [one.alpha or 0.0 for one in told]
    often = f"{sum(pull > 0 for pull in pulls)} of {len(pulls)} choices took from others"
    return Shown(
        label=choices.label,
        part=choices.part,
        title=f"Choices under {clean(choices.label)}{of}, clients by rounds: {often}",
        legend=[
            (clean(name), [_colour(Chosen(step / DARKEST, place)) for step in range(1, DARKEST + 1)])
            for place, name in enumerate(choices.graphs)
        ],
        maps=[(name, _map(record, choices, clients, name)) for name in WIDTHS],
        matrices=matrices,
        matrix_title=f"Shares that clients took from each other under {clean(choices.label)}{of} after the last round",
        last=[
            (record.called(client), _said(choices.last[client], choices.graphs))
            for client in clients
            if client in choices.last
        ],
        notes=notes,
    )


def _colour(one: Chosen) -> str:
    """Return the colour of a choice that was told: the hue of its graph, as deep as its alpha."""
    if not one.alpha:
        return NOTHING
    return mixed(LEVEL, HUES[one.graph % len(HUES)], 0.25 + 0.75 * min(one.alpha, 1.0))


def _said(one: Chosen, graphs: Sequence[str]) -> str:
    if one.alpha is None:
        return "not told"
    name = graphs[one.graph] if 0 <= one.graph < len(graphs) else f"graph {one.graph}"
    return f"{one.alpha:g} of {clean(name)}" if one.alpha else "its own alone"


def _map(record: StudyRecord, choices: Choices, clients: Sequence[str], size: str) -> Picture:
    """Draw a line for each client, a column for each round, and one for the last choice."""
    width, left, most = WIDTHS[size]
    turns = sorted(choices.rounds)
    turns = [turns[place] for place in spread_out(len(turns), most)]
    room = width - left - 12 - WIDEST
    step = round(min(WIDEST, room / max(len(turns), 1)), 1)
    at = {turn: round(left + step * place, 1) for place, turn in enumerate(turns)}
    end = round(left + step * len(turns) + 6, 1)
    lines = []
    for row, client in enumerate(clients):
        own = {turn: by_client[client] for turn, by_client in choices.rounds.items() if client in by_client}
        placed = [(at[turn], step, one) for turn, one in own.items() if turn in at]
        placed += [(end, WIDEST, choices.last[client])] if client in choices.last else []
        told = [one.alpha for one in own.values() if one.alpha is not None]
        mean = f", on average {sum(told) / len(told):.2g}" if told else ""
        after = f"; after the last: {_said(choices.last[client], choices.graphs)}" if client in choices.last else ""
        tooltip = f"{clean(record.called(client))}: chose in {plural(len(own), 'round')}{mean}{after}"
        lines.append(_line(record.called(client), row, left, placed, tooltip))
    marked = [turns[place] for place in spread_out(len(turns), 4 if size == "narrow" else 10)]
    marks = [(round(at[turn] + step / 2, 1), str(turn)) for turn in marked]
    if choices.last and turns:
        marks = [mark for mark in marks if mark[0] < end - 18] + [(end + WIDEST / 2, "end")]
    return _picture(left, round(end) + WIDEST, lines, marks)


def _picture(left: int, end: int, lines: list[Line], marks: list[tuple[float, str]]) -> Picture:
    return Picture(Box(max(end, left + 80) + 4, 4 + ROW * len(lines) + 34, left, 4, 4, 34), lines, marks)


def _line(name: str, row: int, left: int, placed: Sequence[tuple[float, float, Chosen]], tooltip: str) -> Line:
    """Draw one client's cells, those of one colour as one path."""
    y, paths, untold = 4 + ROW * row, dict[str, str](), ""
    for x, width, one in placed:
        path = f"M{x},{y + 1}h{round(width - 0.6, 1)}v{ROW - 2}h-{round(width - 0.6, 1)}z"
        if one.alpha is None:
            untold += path
        else:
            paths[_colour(one)] = paths.get(_colour(one), "") + path
    return Line(fitted(name, (left - 8) / FONT), y, list(paths.items()), untold, tooltip)


def _matrix(
    record: StudyRecord, choices: Choices, shares: Mapping[str, Mapping[str, float] | None], size: str
) -> Picture:
    """Draw a row for each client and a column for each that it took from; the darkest is the largest share."""
    width, left, _ = WIDTHS[size]
    clients = list(choices.clients)
    most = max((part for k, of in shares.items() for other, part in (of or {}).items() if other != k), default=0.0)
    step = round(min(WIDEST, (width - left - 4) / max(len(clients), 1)), 1)
    lines = []
    for row, client in enumerate(clients):
        of = shares.get(client)
        y, cells, untold = 4 + ROW * row, [], ""
        for place, other in enumerate(clients):
            share = (of or {}).get(other, 0.0)
            path = f"M{round(left + step * place, 1)},{y + 1}h{round(step - 0.6, 1)}v{ROW - 2}"
            path += f"h-{round(step - 0.6, 1)}z"
            if of is None:
                untold += path if other == client else ""
            elif other == client:
                cells.append((mixed(LEVEL, "#4A4F55", share), path))
            elif share > 0:
                hue = HUES[choices.last[client].graph % len(HUES)]
                cells.append((mixed(LEVEL, hue, 0.2 + 0.8 * share / most), path))
        tooltip = f"{clean(record.called(client))}: {_shares(client, of, record.called)}"
        lines.append(Line(fitted(record.called(client), (left - 8) / FONT), y, cells, untold, tooltip))
    marks = [
        (round(left + step * (place + 0.5), 1), str(place + 1))
        for place in spread_out(len(clients), 6 if size == "narrow" else 20)
    ]
    return _picture(left, round(left + step * len(clients)), lines, marks)


def _shares(client: str, of: Mapping[str, float] | None, called: Callable[[str], str]) -> str:
    """Say from whom a client took, the largest shares first."""
    if of is None:
        return "not known"
    others = sorted(((value, other) for other, value in of.items() if other != client), reverse=True)
    said = [f"{short(called(other), 20)} {value:.2g}" for value, other in others[:5]]
    rest = f" and {len(others) - 5} more" if len(others) > 5 else ""
    return f"own {of.get(client, 0.0):.2g}" + (f"; {', '.join(said)}{rest}" if said else "")
