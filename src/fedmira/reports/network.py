"""The task graph of a method, its clients coloured by gain; groups where there are too many clients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedmira.errors import StoreError
from fedmira.reports.axes import CIRCLE, DIAMOND, SQUARE, Box, gain_colour
from fedmira.reports.paths import without_folders
from fedmira.reports.places import Disc, Point, Weights, lay_out, pack
from fedmira.reports.record import StudyRecord, read_object
from fedmira.reports.stats import gains
from fedmira.reports.wording import clean, fitted, number, plural, signed

MOST_CLIENTS, MOST_GROUPS = 200, 60
MOST_EDGES = 600  # the strongest are drawn
MOST_LABELS, LABEL_PITCH, LABEL_EMS = 40, 17, 8  # named marks; pixels of width for each; length of a name
WIDE = Box(860, 480, 46, 46, 26, 36)
NARROW = Box(350, 380, 34, 34, 24, 30)
SWATCHES = 9  # steps of the colour scale's legend


class TaskGraph(NamedTuple):
    """graph.json. edges: (row, column, weight); None if there were too many to be written."""

    kind: str
    note: str
    clients: list[str]
    entries: int
    lonely: int  # clients without a neighbour
    edges: list[tuple[int, int, float]] | None


class Node(NamedTuple):
    """A client or a group. scale: of the mark. label: empty if there is no room; label_y: on the side away from the
    neighbours."""

    x: float
    y: float
    fill: str
    mark: str
    scale: float
    label: str
    label_y: float
    tooltip: str
    known: bool
    name: str
    gain: float  # NaN = n/a


class Drawing(NamedTuple):
    """The graph in one size. edges: (x1, y1, x2, y2, opacity); ends: (node, node, weight) of the same."""

    box: Box
    nodes: list[Node]
    edges: list[tuple[float, float, float, float, float]]
    ends: list[tuple[int, int, float]]


class Network(NamedTuple):
    """A method's graph. refused: the reason if it is not drawn; scale: (colour, gain) from worst to best.

    measure: what the colour is.
    """

    label: str
    about: str
    refused: str = ""
    groups: bool = False
    drawings: Sequence[Drawing] = ()
    notes: Sequence[str] = ()
    scale: Sequence[tuple[str, str]] = ()
    title: str = ""
    measure: str = ""


class _Nodes(NamedTuple):
    """The nodes to draw, in the graph's order, with members (1 for a client), gain (NaN = n/a) and weights [N, N]."""

    names: list[str]
    groups: list[str]
    members: list[int]
    gains: list[float]
    weights: Weights
    joined: list[int]


def networks(record: StudyRecord) -> list[Network]:
    """Draw the graph of every method that has one, from its first run.

    Raises StoreError if a graph.json is damaged.
    """
    drawn = []
    for label in record.labels:
        run = record.first_run(label)
        graph = read_graph(record, run.folder) if run else None
        if graph is not None:
            drawn.append(_network(record, label, graph))
    return drawn


def read_graph(record: StudyRecord, folder: str) -> TaskGraph | None:
    """Read a run's graph.json; None if it has none. Raises StoreError if it is damaged."""
    path = record.path / folder / "graph.json"
    stored = read_object(path)
    if not stored:
        return None
    try:
        clients = [str(name) for name in stored["clients"]]
        edges = None
        if stored.get("edges") is not None:
            edges = [_read_edge(edge, len(clients)) for edge in stored["edges"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"'{path}' is damaged ({type(error).__name__}: {error}): graph.json has clients and edges "
            "[[from, to, weight], ...] between their indices; restore it from a copy"
        ) from None
    entries, lonely = stored.get("entries"), stored.get("lonely")
    if not isinstance(lonely, int):  # of an earlier version, which did not count them
        lonely = 0 if edges is None else len(clients) - len({row for row, _, weight in edges if weight})
    return TaskGraph(
        kind=str(stored.get("kind", "unknown")),
        note=without_folders(str(stored.get("note", ""))),
        clients=clients,
        entries=entries if isinstance(entries, int) else len(edges or ()),
        lonely=lonely,
        edges=edges,
    )


def notices(record: StudyRecord) -> list[str]:
    """Say where a graph joins nobody, or leaves clients alone. Raises StoreError if a graph.json is damaged."""
    said = []
    for label in record.labels:
        run = record.first_run(label)
        graph = read_graph(record, run.folder) if run else None
        if run is None or graph is None:
            continue
        if graph.lonely >= len(graph.clients):
            said.append(f"The graph of {clean(label)} joins nobody: its results are those of training alone.")
        elif graph.lonely:
            said.append(
                f"{plural(graph.lonely, 'client')} of {len(graph.clients):,} {'has' if graph.lonely == 1 else 'have'} "
                f"no neighbour in the graph of {clean(label)}, and {'learns' if graph.lonely == 1 else 'learn'} alone."
            )
        elif isinstance(pulls := run.facts.pull_percent, list) and pulls and max(pulls) == 0:
            said.append(
                f"No merge of {clean(label)} moves a client: those sampled together are not joined, or the coupling is "
                "0."
            )
    return said


def _read_edge(edge: Any, clients: int) -> tuple[int, int, float]:
    """Read [from, to, weight]. Raises TypeError or ValueError if it is not one between two of the clients."""
    row, column, weight = map(float, edge)
    if not (math.isfinite(weight) and 0 <= row < clients and 0 <= column < clients):
        raise ValueError("an edge has no client at one end")
    return int(row), int(column), weight


def _network(record: StudyRecord, label: str, graph: TaskGraph) -> Network:
    note = f" ({clean(graph.note)})" if graph.note else ""
    about = f"{clean(graph.kind)} graph{note}: {plural(len(graph.clients), 'client')}, {graph.entries:,} weights"
    gain_of, gain_name = _gains_of(record, label)
    of_clients = len(graph.clients) <= MOST_CLIENTS
    if len(graph.clients) < 2:
        return Network(label, about, "no client has a neighbour")
    if graph.edges is None and of_clients:
        return Network(label, about, "its weights are not in graph.json")
    nodes = _clients(record, graph, gain_of) if of_clients else _groups(record, graph, gain_of)
    if not of_clients and not 1 < len(nodes.names) <= MOST_GROUPS:
        return Network(
            label,
            about,
            f"{len(graph.clients):,} clients are too many to distinguish (up to {MOST_CLIENTS} are drawn), and "
            f"they form {plural(len(nodes.names), 'group')} (2 to {MOST_GROUPS} are drawn instead)",
        )
    finite = [abs(value) for value in nodes.gains if math.isfinite(value)]
    limit = max(finite, default=0.0)
    steps = [limit * (2 * step / (SWATCHES - 1) - 1) for step in range(SWATCHES)]
    known = [value for value in nodes.gains if not math.isnan(value)]
    better, worse = sum(value > 0 for value in known), sum(value < 0 for value in known)
    what = "groups" if not of_clients else "clients"
    order = sorted(range(len(nodes.names)), key=lambda node: (nodes.groups.index(nodes.groups[node]), node))
    discs = lay_out(nodes.weights, order)
    return Network(
        label=label,
        about=about,
        groups=not of_clients,
        drawings=[_drawing(nodes, discs, box, limit) for box in (WIDE, NARROW)],
        notes=_notes(graph, nodes),
        scale=[(gain_colour(step, limit), signed(step)) for step in steps] if limit else [],
        title=f"Task graph of {clean(label)}, {what} coloured by {gain_name}: {len(nodes.names)} {what}, {better} "
        f"better, {len(known) - better - worse} equal, {worse} worse, {len(nodes.gains) - len(known)} without a value",
        measure=gain_name,
    )


def _gains_of(record: StudyRecord, label: str) -> tuple[dict[str, float], str]:
    """Return each client's gain under a method, and a name that says over what."""
    if record.judged is None:
        return {}, "gain (not measured)"
    reference, table = gains(record.results, metric=record.judged.name, baseline=record.baseline)
    return table.get(label, {}), f"gain over {clean(reference)}"


def _clients(record: StudyRecord, graph: TaskGraph, gain_of: Mapping[str, float]) -> _Nodes:
    weights = _symmetric(graph, list(range(len(graph.clients))), len(graph.clients))
    return _Nodes(
        names=[record.called(client) for client in graph.clients],
        groups=[record.group(client) or "" for client in graph.clients],
        members=[1] * len(graph.clients),
        gains=[gain_of.get(client, math.nan) for client in graph.clients],
        weights=weights,
        joined=_joined(weights),
    )


def _groups(record: StudyRecord, graph: TaskGraph, gain_of: Mapping[str, float]) -> _Nodes:
    """Merge clients of one group into a node: mean gain, and the sum of the weights between two groups."""
    of_client = [record.group(client) or "(no group)" for client in graph.clients]
    names = list(dict.fromkeys(of_client))
    node_of = {name: node for node, name in enumerate(names)}
    values: list[list[float]] = [[] for _ in names]
    for client, group in zip(graph.clients, of_client, strict=True):
        if math.isfinite(value := gain_of.get(client, math.nan)):
            values[node_of[group]].append(value)
    weights: Weights = []
    if len(names) <= MOST_GROUPS:  # more are not drawn
        weights = _symmetric(graph, [node_of[group] for group in of_client], len(names))
    return _Nodes(
        names=names,
        groups=names,
        members=[of_client.count(name) for name in names] if len(names) <= MOST_GROUPS else [],
        gains=[sum(members) / len(members) if members else math.nan for members in values],
        weights=weights,
        joined=_joined(weights),
    )


def _symmetric(graph: TaskGraph, nodes: Sequence[int], count: int) -> Weights:
    """Return the weights [N, N] between nodes, the larger of both directions; nodes: the node of each client."""
    weights = [[0.0] * count for _ in range(count)]
    for row, column, weight in graph.edges or ():
        weights[nodes[row]][nodes[column]] += weight
    return [
        [max(weights[row][column], weights[column][row]) if row != column else 0.0 for column in range(count)]
        for row in range(count)
    ]


def _joined(weights: Weights) -> list[int]:
    """Count each node's neighbours."""
    return [sum(weight != 0 for weight in row) for row in weights]


def _notes(graph: TaskGraph, nodes: _Nodes) -> list[str]:
    drawn, notes = sum(nodes.joined) // 2, []
    if graph.edges is None:
        notes.append("Edges are not drawn: there were too many to be written to graph.json.")
    elif drawn > MOST_EDGES:
        notes.append(f"Of {drawn:,} edges the {MOST_EDGES} strongest are drawn.")
    if len(nodes.names) != len(graph.clients):
        notes.append("A mark is a group, coloured by the mean gain of its clients; a larger mark has more clients.")
        if graph.edges is not None and not drawn:
            notes.append("No edge leads from one group to another.")
    if graph.edges is not None and len(nodes.names) == len(graph.clients):
        weight_of = {(row, column): weight for row, column, weight in graph.edges}
        if any(weight_of.get((column, row), 0.0) != weight for (row, column), weight in weight_of.items()):
            notes.append("Weights differ by direction; an edge shows the larger of both.")
    return notes


def _drawing(nodes: _Nodes, discs: Sequence[Disc], box: Box, limit: float) -> Drawing:
    width, height = box.x_end - box.left, box.y_end - box.top
    points = [(x * width + box.left, y * height + box.top) for x, y in pack(discs, aspect=width / height)]
    pairs = [
        (weight, row, column)
        for row, weights in enumerate(nodes.weights)
        for column, weight in enumerate(weights[row:], row)
        if weight
    ]
    strongest = sorted(pairs, key=lambda pair: -pair[0])[:MOST_EDGES]
    faint = 0.75 if len(strongest) <= 120 else 0.35
    edges = [
        (*_rounded(points[row]), *_rounded(points[column]), round(share, 2))
        for weight, row, column in strongest
        if (share := faint * (0.25 + 0.75 * (weight / strongest[0][0]))) > 0
    ]
    scales = _scales(nodes)
    labelled = len(nodes.names) <= min(MOST_LABELS, box.width // LABEL_PITCH)
    above = [_is_above(point, weights, points) for point, weights in zip(points, nodes.weights, strict=True)]
    return Drawing(
        box=box,
        nodes=[
            Node(
                x=round(points[index][0], 1),
                y=round(points[index][1], 1),
                fill="#FFFFFF" if math.isnan(gain) else gain_colour(gain, limit),
                mark=_mark(gain),
                scale=scales[index],
                label=fitted(name, LABEL_EMS) if labelled else "",
                label_y=round(-6 * scales[index] - 3 if above[index] else 6 * scales[index] + 11, 1),
                tooltip=_tooltip(nodes, index),
                known=not math.isnan(gain),
                name=name,
                gain=gain,
            )
            for index, (name, gain) in enumerate(zip(nodes.names, nodes.gains, strict=True))
        ],
        edges=edges,
        ends=[(row, column, weight) for weight, row, column in strongest],
    )


def _rounded(point: Point) -> Point:
    return round(point[0], 1), round(point[1], 1)


def _is_above(point: Point, weights: Sequence[float], points: Sequence[Point]) -> bool:
    """Is a node above the weighted mean of its neighbours? Its label then has room on top."""
    total = sum(weights)
    if not total > 0:
        return False
    mean = sum(weight * y for weight, (_, y) in zip(weights, points, strict=True)) / total
    return point[1] < mean - 1


def _scales(nodes: _Nodes) -> list[float]:
    """Return the size of each mark: by the number of clients in a group, else by the number of marks."""
    most = max(nodes.members)
    if most > 1:
        return [round(1.0 + 2.2 * math.sqrt(members / most), 2) for members in nodes.members]
    return [1.9 if len(nodes.names) <= MOST_LABELS else 1.3 if len(nodes.names) <= 100 else 1.0] * len(nodes.names)


def _mark(gain: float) -> str:
    return CIRCLE if gain > 0 or math.isnan(gain) else SQUARE if gain < 0 else DIAMOND


def _tooltip(nodes: _Nodes, index: int) -> str:
    name, group, gain = nodes.names[index], nodes.groups[index], nodes.gains[index]
    inside = f" ({clean(group)})" if group and group != name else ""
    inside += f", {plural(nodes.members[index], 'client')}" if nodes.members[index] > 1 else ""
    strongest = max(nodes.weights[index], default=0.0)
    neighbours = f"{plural(nodes.joined[index], 'neighbour')}, strongest weight {number(strongest, 2)}"
    return f"{clean(name)}{inside}: gain {'n/a' if math.isnan(gain) else signed(gain)}; {neighbours}"
