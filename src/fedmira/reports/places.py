"""Positions of a graph's nodes in a picture, without random numbers: the same graph always has the same picture."""

import math
from collections.abc import Sequence
from typing import NamedTuple

DENSE = 0.5  # fraction of joined pairs from which on a part is drawn as a circle: forces would tangle it
STEPS = 150  # of the forces
TRIES = 120  # row widths that are compared

Weights = Sequence[Sequence[float]]  # [N, N], symmetric, non-negative
Point = tuple[float, float]  # x, y; y grows downwards


class Disc(NamedTuple):
    """One connected part of a graph: its nodes, and their points in the unit disc around (0, 0)."""

    nodes: list[int]
    points: list[Point]
    radius: float


def lay_out(weights: Weights, order: Sequence[int]) -> list[Disc]:
    """Lay out each connected part in a disc, the largest part first.

    order: all nodes, those of one group side by side. Within a part, forces (Fruchterman and Reingold 1991) start from
    a circle in that order; where most pairs are joined, the circle stays.
    """
    labels = _components(weights)
    parts: dict[int, list[int]] = {}
    for node in order:
        parts.setdefault(labels[node], []).append(node)
    members = sorted(parts.values(), key=len, reverse=True)  # stable: equal parts keep the order
    return [Disc(nodes, *_disc([[weights[row][column] for column in nodes] for row in nodes])) for nodes in members]


def pack(discs: Sequence[Disc], *, aspect: float) -> list[Point]:
    """Pack discs in rows; return the point of each node in [0, 1] x [0, 1]. aspect: width over height."""
    centres = _packed([disc.radius for disc in discs], aspect)
    points = {
        node: (x * disc.radius * 0.75 + centre_x, y * disc.radius * 0.75 + centre_y)
        for disc, (centre_x, centre_y) in zip(discs, centres, strict=True)
        for node, (x, y) in zip(disc.nodes, disc.points, strict=True)
    }
    return _fitted([points[node] for node in range(len(points))], aspect)


def _components(weights: Weights) -> list[int]:
    """Number the connected parts; return the number of each node."""
    labels = [-1] * len(weights)
    for start in range(len(weights)):
        reached = [start] if labels[start] < 0 else []
        while reached:
            node = reached.pop()
            if labels[node] < 0:
                labels[node] = start
                reached += [other for other, weight in enumerate(weights[node]) if weight]
    return labels


def _disc(weights: Weights) -> tuple[list[Point], float]:
    """Lay out one connected part in the unit disc; return its points and the radius that it needs."""
    count = len(weights)
    if count == 1:
        return [(0.0, 0.0)], 0.9
    flat = (
        math.pi / count if count % 2 == 0 and count > 2 else 0.0
    )  # a square has a horizontal side, a pair is vertical
    angles = [node * 2 * math.pi / count - math.pi / 2 + flat for node in range(count)]
    circle = [(math.cos(angle), math.sin(angle)) for angle in angles]
    joined = sum(weight != 0 for row in weights for weight in row)
    if count <= 3 or joined >= DENSE * count * (count - 1):
        return circle, max(1.6, 0.35 * count) if count > 12 else 1.2 + 0.12 * count
    return _forces(weights, circle), 1.1 * math.sqrt(count)


def _forces(weights: Weights, circle: Sequence[Point]) -> list[Point]:
    """Let joined nodes attract and all nodes repel each other, in cooling steps; return points in the unit disc."""
    import numpy as np  # takes a third as long to import as a whole report without forces does to write

    count = len(weights)
    table = np.array(weights)
    pull = table / table.max()
    ideal = math.sqrt(math.pi / count)
    points = np.array(circle)
    for step in range(STEPS):
        gaps = points[:, None] - points[None]
        distance = np.maximum(np.linalg.norm(gaps, axis=2), 1e-3)
        force = ideal**2 / distance - pull * distance**2 / ideal
        np.fill_diagonal(force, 0.0)
        move = (gaps / distance[..., None] * force[..., None]).sum(axis=1) - 0.3 * points
        length = np.maximum(np.linalg.norm(move, axis=1, keepdims=True), 1e-9)
        points += move / length * np.minimum(length, 0.15 * (1 - step / STEPS) + 0.002)
    points -= points.mean(axis=0)
    return [(x, y) for x, y in (points / np.linalg.norm(points, axis=1).max()).tolist()]


def _packed(radii: Sequence[float], aspect: float) -> list[Point]:
    """Arrange discs in rows and return their centres; of TRIES row widths the one with the largest picture of discs."""
    whole = 2 * sum(radii)
    candidates = [_rows(radii, whole * (step + 1) / TRIES) for step in range(TRIES)]
    rows = min(candidates, key=lambda rows: max(_widest(rows), aspect * sum(2 * max(row) for row in rows)))
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
    """Break discs into rows of at most this width; a wider disc has its own row."""
    rows: list[list[float]] = [[]]
    for radius in radii:
        if rows[-1] and 2 * (sum(rows[-1]) + radius) > width * (1 + 1e-9):
            rows.append([])
        rows[-1].append(radius)
    return rows


def _widest(rows: Sequence[Sequence[float]]) -> float:
    return max(2 * sum(row) for row in rows)


def _fitted(points: Sequence[Point], aspect: float) -> list[Point]:
    """Scale points by one factor, so that circles stay round, and centre them in the unit square of this aspect."""
    (left, right), (top, bottom) = ((min(ends), max(ends)) for ends in zip(*points, strict=True))
    largest = max((right - left) / aspect, bottom - top) or 1.0
    x_middle, y_middle = (left + right) / 2, (top + bottom) / 2
    return [((x - x_middle) / largest / aspect + 0.5, (y - y_middle) / largest / 1.0 + 0.5) for x, y in points]
