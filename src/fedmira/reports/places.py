"""Where the nodes of a graph are drawn: the same graph always gets the same picture, with no draw of chance in it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

DENSE = 0.5  # share of all pairs from which on a part is drawn as a circle: forces would make a knot of it
STEPS = 150  # of the forces
TRIES = 120  # row widths

Weights = Sequence[Sequence[float]]  # [N, N], symmetric, non-negative
Place = tuple[float, float]  # x, y; y grows downwards


class Disc(NamedTuple):
    """One connected part of a graph: its nodes, and their places around (0, 0), at most 1 away from it."""

    nodes: list[int]
    places: list[Place]
    radius: float


def lay_out(weights: Weights, order: Sequence[int]) -> list[Disc]:
    """Lay out every part that nothing joins in a disc of its own, the largest part first.

    order: all nodes, those that belong together side by side. Within a part, forces (Fruchterman and Reingold 1991)
    start from a circle in that order, or the circle stays where most pairs are joined.
    """
    labels = _components(weights)
    parts: dict[int, list[int]] = {}
    for node in order:
        parts.setdefault(labels[node], []).append(node)
    members = sorted(parts.values(), key=len, reverse=True)  # stable: equal parts keep the order
    return [Disc(nodes, *_disc([[weights[row][column] for column in nodes] for row in nodes])) for nodes in members]


def pack(discs: Sequence[Disc], *, aspect: float) -> list[Place]:
    """Pack discs in rows; return the place of each node in [0, 1] x [0, 1]. aspect: width over height."""
    centres = _packed([disc.radius for disc in discs], aspect)
    places = {
        node: (x * disc.radius * 0.75 + centre_x, y * disc.radius * 0.75 + centre_y)
        for disc, (centre_x, centre_y) in zip(discs, centres, strict=True)
        for node, (x, y) in zip(disc.nodes, disc.places, strict=True)
    }
    return _fitted([places[node] for node in range(len(places))], aspect)


def _components(weights: Weights) -> list[int]:
    """Number the parts that nothing joins; return each node's."""
    labels = [-1] * len(weights)
    for start in range(len(weights)):
        reached = [start] if labels[start] < 0 else []
        while reached:
            node = reached.pop()
            if labels[node] < 0:
                labels[node] = start
                reached += [other for other, weight in enumerate(weights[node]) if weight]
    return labels


def _disc(weights: Weights) -> tuple[list[Place], float]:
    """Lay out one connected part in the unit disc, and say how large a disc it needs."""
    count = len(weights)
    if count == 1:
        return [(0.0, 0.0)], 0.9
    flat = math.pi / count if count % 2 == 0 and count > 2 else 0.0  # a square lies on a side, a pair stands
    angles = [node * 2 * math.pi / count - math.pi / 2 + flat for node in range(count)]
    circle = [(math.cos(angle), math.sin(angle)) for angle in angles]
    joined = sum(weight != 0 for row in weights for weight in row)
    if count <= 3 or joined >= DENSE * count * (count - 1):
        return circle, max(1.6, 0.35 * count) if count > 12 else 1.2 + 0.12 * count
    return _forces(weights, circle), 1.1 * math.sqrt(count)


def _forces(weights: Weights, circle: Sequence[Place]) -> list[Place]:
    """Let joined nodes pull and all nodes push each other, in cooling steps; return places in the unit disc."""
    import numpy as np  # takes a third as long to import as a whole report without forces does to write

    count = len(weights)
    table = np.array(weights)
    pull = table / table.max()
    ideal = math.sqrt(math.pi / count)
    places = np.array(circle)
    for step in range(STEPS):
        apart = places[:, None] - places[None]
        distance = np.maximum(np.linalg.norm(apart, axis=2), 1e-3)
        force = ideal**2 / distance - pull * distance**2 / ideal
        np.fill_diagonal(force, 0.0)
        move = (apart / distance[..., None] * force[..., None]).sum(axis=1) - 0.3 * places
        length = np.maximum(np.linalg.norm(move, axis=1, keepdims=True), 1e-9)
        places += move / length * np.minimum(length, 0.15 * (1 - step / STEPS) + 0.002)
    places -= places.mean(axis=0)
    return [(x, y) for x, y in (places / np.linalg.norm(places, axis=1).max()).tolist()]


def _packed(radii: Sequence[float], aspect: float) -> list[Place]:
    """Set discs in rows and return their centres; of many row widths the one that shows the discs largest."""
    whole = 2 * sum(radii)
    tried = [_rows(radii, whole * (step + 1) / TRIES) for step in range(TRIES)]
    rows = min(tried, key=lambda rows: max(_widest(rows), aspect * sum(2 * max(row) for row in rows)))
    widest = _widest(rows)
    centres, y = [], 0.0
    for row in rows:
        gap = (widest - sum(row) * 2) / len(row)
        x = gap / 2
        for radius in row:
            centres.append((x + radius, y + max(row)))
            x += 2 * radius + gap
        y += 2 * max(row)
    return centres


def _rows(radii: Sequence[float], width: float) -> list[list[float]]:
    """Break discs into rows of at most this width; a wider disc stands alone."""
    rows: list[list[float]] = [[]]
    for radius in radii:
        if rows[-1] and 2 * (sum(rows[-1]) + radius) > width * (1 + 1e-9):
            rows.append([])
        rows[-1].append(radius)
    return rows


def _widest(rows: Sequence[Sequence[float]]) -> float:
    return max(2 * sum(row) for row in rows)


def _fitted(places: Sequence[Place], aspect: float) -> list[Place]:
    """Scale places evenly, so that circles stay round, and set them in the middle of the unit square of this aspect."""
    (left, right), (top, bottom) = ((min(ends), max(ends)) for ends in zip(*places, strict=True))
    largest = max((right - left) / aspect, bottom - top) or 1.0
    x_middle, y_middle = (left + right) / 2, (top + bottom) / 2
    return [((x - x_middle) / largest / aspect + 0.5, (y - y_middle) / largest / 1.0 + 0.5) for x, y in places]
