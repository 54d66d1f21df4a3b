"""Where the nodes of a graph are drawn: the same graph always gets the same picture, with no draw of chance in it."""

import math
from collections.abc import Sequence

import numpy as np

DENSE = 0.5  # share of all pairs from which on a part is drawn as a circle: forces would make a knot of it
STEPS = 150  # of the forces
TRIES = 120  # row widths


def place_nodes(weights: np.ndarray, order: Sequence[int], *, aspect: float) -> np.ndarray:
    """Return places [N, 2] in [0, 1] x [0, 1], x first.

    weights [N, N]: symmetric, non-negative. order: all nodes, those that belong together side by side. aspect: width
    over height. Parts that nothing joins get discs of their own, packed in rows; within a part, forces (Fruchterman and
    Reingold 1991) start from a circle in that order, or the circle stays where most pairs are joined.
    """
    labels = _components(weights)
    parts: dict[int, list[int]] = {}
    for node in order:
        parts.setdefault(labels[node], []).append(node)
    members = sorted(parts.values(), key=len, reverse=True)  # stable: equal parts keep the order
    discs = [(nodes, *_disc(weights[np.ix_(nodes, nodes)])) for nodes in members]
    places = np.zeros((len(weights), 2))
    for (nodes, own, radius), (x, y) in zip(discs, _packed([radius for *_, radius in discs], aspect), strict=True):
        places[nodes] = own * radius * 0.75 + (x, y)
    return _fitted(places, aspect)


def _components(weights: np.ndarray) -> list[int]:
    """Number the parts that nothing joins; return each node's."""
    labels = [-1] * len(weights)
    for start in range(len(weights)):
        reached = [start] if labels[start] < 0 else []
        while reached:
            node = reached.pop()
            if labels[node] < 0:
                labels[node] = start
                reached += np.flatnonzero(weights[node]).tolist()
    return labels


def _disc(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Lay out one connected part in the unit disc, and say how large a disc it needs."""
    count = len(weights)
    if count == 1:
        return np.zeros((1, 2)), 0.9
    flat = math.pi / count if count % 2 == 0 and count > 2 else 0.0  # a square lies on a side, a pair stands
    angles = np.arange(count) * 2 * math.pi / count - math.pi / 2 + flat
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if count <= 3 or np.count_nonzero(weights) >= DENSE * count * (count - 1):
        return circle, max(1.6, 0.35 * count) if count > 12 else 1.2 + 0.12 * count
    return _forces(weights, circle), 1.1 * math.sqrt(count)


def _forces(weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Let joined nodes pull and all nodes push each other, in cooling steps; return places in the unit disc."""
    count = len(weights)
    pull = weights / weights.max()
    ideal = math.sqrt(math.pi / count)
    places = start.copy()
    for step in range(STEPS):
        apart = places[:, None] - places[None]
        distance = np.maximum(np.linalg.norm(apart, axis=2), 1e-3)
        force = ideal**2 / distance - pull * distance**2 / ideal
        np.fill_diagonal(force, 0.0)
        move = (apart / distance[..., None] * force[..., None]).sum(axis=1) - 0.3 * places
        length = np.maximum(np.linalg.norm(move, axis=1, keepdims=True), 1e-9)
        places += move / length * np.minimum(length, 0.15 * (1 - step / STEPS) + 0.002)
    places -= places.mean(axis=0)
    return places / np.linalg.norm(places, axis=1).max()


def _packed(radii: Sequence[float], aspect: float) -> list[tuple[float, float]]:
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


def _fitted(places: np.ndarray, aspect: float) -> np.ndarray:
    """Scale places evenly, so that circles stay round, and set them in the middle of the unit square of this aspect."""
    middle = (places.min(axis=0) + places.max(axis=0)) / 2
    extent = places.max(axis=0) - places.min(axis=0)
    largest = max(float(extent[0]) / aspect, float(extent[1]))
    return (places - middle) / (largest or 1.0) / (aspect, 1.0) + 0.5
