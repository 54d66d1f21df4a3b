"""Rows of two low-rank parts: two adapters of the same shapes beside each other on one base, and a gate between them.

    y = W x + s B_own A_own x + s B_shared A_shared x          `own` is first in the row

Every pass adds the parts up (model/packed/lora.py); an exported folder has one adapter of the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedmira.adapters import ALIGN, Adapters, Layout, Part
from fedmira.adapters.lazy import Tensor, torch

OWN, SHARED = "own", "shared"


def own_and_shared(layout: Layout, width: int = 0) -> Layout:
    """Return the layout of LoRA's rows [P] with a second part of the same shapes beside it [2 P].

    The first part is drawn as the only one would be, so that a method without the second starts as others do.
    """
    (part,) = layout.parts
    first = replace(part, name=OWN)
    start = -(-part.stop // ALIGN) * ALIGN
    leaves = tuple(replace(leaf, start=leaf.start + start) for leaf in part.leaves)
    return Layout((first, Part(SHARED, part.rank, leaves, start, start + part.stop)))


def part_columns(layout: Layout, name: str) -> Tensor:
    """Return the columns of one part, bool [P]."""
    columns = torch.zeros(layout.size, dtype=torch.bool)
    part = layout.part(name)
    columns[part.start : part.stop] = True
    return columns


def scaled_parts(layout: Layout, rows: Tensor, own: Tensor | float, shared: Tensor | float) -> Tensor:
    """Return rows [S, P] whose updates are `own` times that of one part and `shared` times that of the other.

    own, shared: numbers, or [S, 1]. The factor B is scaled, and A stays.
    """
    scaled = rows.clone()
    for name, share in ((OWN, own), (SHARED, shared)):
        for _, second in layout.part(name).pairs():
            scaled[:, second.start : second.stop] *= share
    return scaled


@dataclass(frozen=True)
class Gate:
    """A mix of a row's parts that depends on what the client is asked.

    prompts: with how many of the client's training prompts a question is compared: the similarity of a question is the
    mean cosine between its state and theirs, the last hidden state at the last token of a prompt. look: the adapters
    that prompts are read with. mix: adapters [n] and similarities [n], one for each question, -> the adapters that
    answer it.
    """

    prompts: int
    look: Callable[[Adapters], Adapters]
    mix: Callable[[Adapters, Tensor], Adapters]
