"""Is a merge of factors exact? What the updates s B A of clients are on average, and what the merged row gives."""

from dataclasses import replace

import torch
from tests.laws.worlds import Scene, World
from torch import Tensor

from fedmira.engine.round import play


def one_rank(world: World) -> World:
    """The same federation with rank 2 for everybody."""
    return replace(world, federation=replace(world.federation, ranks=torch.full_like(world.ranks, 2)))


def mean_of_products(scene: Scene, ids: Tensor) -> Tensor:
    """sum_k p_k s B_k A_k over what clients return in the next round, all modules behind one another."""
    uploads = play(scene.method, scene.ledger, scene.clients, ids, scene.clock).uploads
    shares = scene_weights(scene, ids)
    return torch.cat([torch.einsum("k,kov->ov", shares, one).flatten() for one in products(scene, ids, uploads.rows)])


def product_of_means(scene: Scene, ids: Tensor) -> Tensor:
    """s B A of the row that the server makes of the same uploads."""
    change = play(scene.method, scene.ledger, scene.clients, ids, scene.clock).change
    return torch.cat([one.flatten() for one in products(scene, ids[:1], change.rows)])


def products(scene: Scene, ids: Tensor, rows: Tensor) -> list[Tensor]:
    """s_k B_k A_k [n, out, in] of every module."""
    adapters = scene.ledger.federation.adapters(ids, rows)
    return [adapters.product(first.module) for first, _ in adapters.layout.parts[0].pairs()]


def scene_weights(scene: Scene, ids: Tensor) -> Tensor:
    counts = [float(len(scene.clients.workplace.clients[k].train)) for k in ids.tolist()]
    weights = torch.tensor(counts if scene.method.facts.weighs else [1.0] * len(counts), dtype=torch.float64)
    return weights / weights.sum()
