"""Adapters as flat rows: one row per client, one Layout that names every slice of it.

Mean, mix, norm, clip, hash, checkpoint and wire format are operations on rows; stacked LoRA layers read leaves
([K, r, in] and [K, out, r]) as views, a prompt encoder its weights. Axes: K clients, S sampled clients, P adapter
parameters per client, r rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from fedmira.adapters.lazy import Tensor, torch
from fedmira.errors import ShapeError

NORM_NUMBERS = 2**22  # that norms are taken of at once
ALIGN = 16  # floats: 64 bytes, so that parts and rows start on a cache line


@dataclass(frozen=True)
class Leaf:
    """One tensor inside a row. Of LoRA a factor of an adapted module: A [r, in] or B [out, r].

    Of a prompt encoder the weight or bias of one of its modules, as PEFT names and shapes them.
    """

    module: str
    factor: Literal["A", "B", "weight", "bias"]
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Part:
    """A named slice of a row (`lora`, `prompt`) with its own rank.

    kind: pairs of low-rank factors, or a prompt encoder, which has no rank (0).
    """

    name: str
    rank: int
    leaves: tuple[Leaf, ...]
    start: int
    stop: int
    kind: Literal["lora", "prompt"] = "lora"

    def pairs(self) -> Iterator[tuple[Leaf, Leaf]]:
        """Yield (A, B) for each adapted module, in the base model's order; a prompt encoder has none."""
        if self.kind == "lora":
            yield from zip(self.leaves[::2], self.leaves[1::2], strict=True)

    @property
    def ranks(self) -> list[int]:
        """The rank of each adapted module; `rank` is the largest of them."""
        return [first.shape[0] for first, _ in self.pairs()]


@dataclass(frozen=True)
class Layout:
    """The parts of a row, in order; `size` is P, padding included."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return self.parts[-1].stop

    @property
    def parameters(self) -> int:
        """Trainable numbers of one client at full rank, alignment padding not counted."""
        return sum(leaf.size for part in self.parts for leaf in part.leaves)

    @property
    def low_rank(self) -> bool:
        """Are there low-rank factors, which ranks and scales are about?"""
        return any(part.kind == "lora" for part in self.parts)

    @property
    def virtual_tokens(self) -> int:
        """The number n of virtual tokens before every text: the rows of the prompt encoder's embedding."""
        return sum(part.leaves[0].shape[0] for part in self.parts if part.kind == "prompt")

    @property
    def fingerprint(self) -> str:
        """sha256 over every name, shape and offset: two sides of a wire compare it before they exchange rows."""
        spec = [
            [part.name, part.rank, [[leaf.module, leaf.factor, *leaf.shape, leaf.start] for leaf in part.leaves]]
            for part in self.parts
        ]
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()

    @property
    def gaps(self) -> list[slice]:
        """The stretches between and after parts that only align them; no client has a parameter there."""
        return [slice(part.leaves[-1].stop, part.stop) for part in self.parts if part.leaves[-1].stop < part.stop]

    def part(self, name: str) -> Part:
        for part in self.parts:
            if part.name == name:
                return part
        raise ShapeError(f"no part '{name}' in this layout: it has {[part.name for part in self.parts]}")

    def sizes(self, ranks: Tensor) -> Tensor:
        """Return how many numbers [K] a client's row has where it is laid out for the client's own ranks.

        Padding to ALIGN included. ranks as in rank_mask.
        """
        total = torch.zeros(len(ranks), dtype=torch.int64)
        for part in self.parts:
            sizes = torch.full_like(total, 0 if part.kind == "lora" else sum(leaf.size for leaf in part.leaves))
            for index, (first, second) in enumerate(part.pairs()):
                rank, fan_in = first.shape
                sizes += _of_module(ranks, index).clamp(max=rank) * (fan_in + second.shape[0])
            total += -(-sizes // ALIGN) * ALIGN
        return total

    def rank_mask(self, ranks: Tensor) -> Tensor:
        """Return a bool mask [K, P]: False where a client of rank r_k < r has no parameter (and in padding).

        ranks [K], or [K, modules] where the modules of a client differ.
        """
        mask = torch.zeros(len(ranks), self.size, dtype=torch.bool)
        for part in self.parts:
            if part.kind == "prompt":
                for leaf in part.leaves:
                    mask[:, leaf.start : leaf.stop] = True
            for index, (first, second) in enumerate(part.pairs()):
                has = torch.arange(first.shape[0]) < _of_module(ranks, index)[:, None]  # [K, r]
                for leaf, keep in ((first, has[:, :, None]), (second, has[:, None, :])):
                    mask[:, leaf.start : leaf.stop] = keep.expand(-1, *leaf.shape).reshape(len(ranks), -1)
        return mask


def lora_layout(shapes: Sequence[tuple[str, int, int]], rank: int | Sequence[int], *, name: str = "lora") -> Layout:
    """Lay out one LoRA part: for each (module, in, out) the leaves A [r, in] and B [out, r], in that order.

    rank: of all modules, or of each. Raises ShapeError if there is no module, or a rank is below 1 or missing.
    """
    ranks = [rank] * len(shapes) if isinstance(rank, int) else list(rank)
    if not shapes or len(ranks) != len(shapes) or min(ranks) < 1:
        raise ShapeError(
            f"rank {rank} over {len(shapes)} modules: need rank >= 1, for all or each, and at least one adapted module"
        )
    leaves: list[Leaf] = []
    offset = 0
    for (module, fan_in, fan_out), own in zip(shapes, ranks, strict=True):
        for factor, shape in (("A", (own, fan_in)), ("B", (fan_out, own))):
            leaf = Leaf(module, "A" if factor == "A" else "B", shape, offset)
            leaves.append(leaf)
            offset = leaf.stop
    return Layout((Part(name, max(ranks), tuple(leaves), 0, -(-offset // ALIGN) * ALIGN),))


def prompt_layout(width: int, tokens: int, hidden: int) -> Layout:
    """Lay out the prompt encoder of P-tuning: n virtual tokens, embeddings of width d, an MLP of width h.

    E = W2 relu(W1 relu(W0 V + b0) + b1) + b2, with V [n, d], W0 [h, d], W1 [h, h], W2 [d, h], is made of
    n d + 2 d h + h^2 + 2 h + d parameters. Modules are named as in PEFT's PromptEncoder. Raises ShapeError for a size
    below 1.
    Source: Liu et al. 2021 (arXiv:2103.10385), with an MLP where the paper has an LSTM before it.
    """
    if min(width, tokens, hidden) < 1:
        raise ShapeError(f"a prompt encoder of {tokens} tokens, width {width}, hidden width {hidden}: need all >= 1")
    sizes = ((hidden, width), (hidden, hidden), (width, hidden))
    leaves = [Leaf("embedding", "weight", (tokens, width), 0)]
    for number, shape in zip((0, 2, 4), sizes, strict=True):  # the layers between are relus
        leaves.append(Leaf(f"mlp_head.{number}", "weight", shape, leaves[-1].stop))
        leaves.append(Leaf(f"mlp_head.{number}", "bias", shape[:1], leaves[-1].stop))
    stop = -(-leaves[-1].stop // ALIGN) * ALIGN
    return Layout((Part("prompt", 0, tuple(leaves), 0, stop, kind="prompt"),))


def soft_layout(width: int, tokens: int) -> Layout:
    """Lay out n virtual tokens without their encoder, as a PEFT folder has them: the embeddings [n, d] alone.

    Raises ShapeError for a size below 1.
    """
    if min(width, tokens) < 1:
        raise ShapeError(f"{tokens} virtual tokens of width {width}: need both >= 1")
    leaf = Leaf("embedding", "weight", (tokens, width), 0)
    return Layout((Part("prompt", 0, (leaf,), 0, -(-leaf.stop // ALIGN) * ALIGN, kind="prompt"),))


@dataclass(frozen=True)
class Scaling:
    """How a rank becomes a scale, where it is not one alpha / r for all. alpha: of each module, or one for all.

    root: alpha / sqrt(r), as rank-stabilised LoRA has it (Kalajdzievski 2023, arXiv:2312.03732).
    """

    alpha: float | tuple[float, ...]
    root: bool = False


Alpha = float | Scaling
Start = Literal["kaiming", "gaussian", "orthogonal"]


def scales(ranks: Tensor, alpha: Alpha) -> Tensor:
    """Return alpha / r, or as `alpha` says, in float32: [K], or [K, modules] where modules differ.

    alpha where there is no rank (nothing reads it).
    """
    rank = ranks.clamp(min=1).to(torch.float32)
    if not isinstance(alpha, Scaling):
        return alpha / rank
    divisor = rank.sqrt() if alpha.root else rank
    if isinstance(alpha.alpha, float | int):
        return alpha.alpha / divisor
    return torch.tensor(alpha.alpha, dtype=torch.float32) / (divisor[:, None] if divisor.ndim == 1 else divisor)


def _of_module(values: Tensor, index: int) -> Tensor:
    """Of values per client [K], or per client and module [K, modules], those of one module [K]."""
    return values if values.ndim == 1 else values[:, index]


Pairs = Mapping[str, tuple["Tensor", "Tensor"]]  # module -> A [q, in] and B [out, q] of an update B A of its weight


@dataclass(frozen=True, eq=False)
class Adapters:
    """One flat row per client: rows [K, P] float32, ranks [K] int64 (each <= the layout's), scale [K] = alpha / r_k.

    Where the modules of a client differ in rank, ranks and scale are [K, modules], in the layout's order. added: what
    the base of all these clients has beside its frozen weights.
    """

    layout: Layout
    rows: Tensor
    ranks: Tensor
    scale: Tensor
    added: Pairs = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[1] != self.layout.size:
            raise ShapeError(f"rows are {tuple(self.rows.shape)}: this layout needs [K, {self.layout.size}]")
        if len(self.ranks) != len(self.rows) or len(self.scale) != len(self.rows):
            raise ShapeError(
                f"{len(self.rows)} rows with {len(self.ranks)} ranks and {len(self.scale)} scales: need one each"
            )
        for name, value in (("ranks", self.ranks), ("scale", self.scale)):
            modules = sum(1 for _ in self.layout.parts[0].pairs())
            if value.ndim != 1 and value.shape[1:] != (modules,):
                raise ShapeError(f"{name} are {tuple(value.shape)}: need [K] or, one for each module, [K, {modules}]")

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, ids: Tensor, *, rows: Tensor | None = None) -> Adapters:
        """Copy the rows of `ids` [n] in that order; `rows` [n, P], where given, replace them and are not copied."""
        taken = self.rows[ids] if rows is None else rows
        return Adapters(self.layout, taken, self.ranks[ids], self.scale[ids], self.added)

    def head(self, count: int) -> Adapters:
        """View the first `count` clients; writing to the view writes to these rows."""
        return Adapters(self.layout, self.rows[:count], self.ranks[:count], self.scale[:count], self.added)

    def with_rows(self, rows: Tensor) -> Adapters:
        return replace(self, rows=rows)

    def leaf(self, leaf: Leaf) -> Tensor:
        """View one tensor of all clients: a factor [K, r, in] or [K, out, r], a weight or bias [K, ...]."""
        return self.rows[:, leaf.start : leaf.stop].view(len(self), *leaf.shape)

    def ranks_of(self, index: int) -> Tensor:
        """Every client's rank [K] in one module, the part's pair number `index`."""
        return _of_module(self.ranks, index)

    def scale_of(self, index: int) -> Tensor:
        """Every client's scale [K] in one module, the part's pair number `index`."""
        return _of_module(self.scale, index)

    def product(self, module: str, part: str = "lora") -> Tensor:
        """Return the update of one module, scale_k B_k A_k, as [K, out, in]."""
        for index, (first, second) in enumerate(self.layout.part(part).pairs()):
            if first.module == module:
                return self.scale_of(index)[:, None, None] * (self.leaf(second) @ self.leaf(first))
        raise ShapeError(f"module '{module}' has no adapter in this layout")

    def mask_(self) -> Adapters:
        """Zero, in place, every padded pair beyond a client's own rank, and what only aligns parts."""
        if self.is_padded:
            self.rows.mul_(self.layout.rank_mask(self.ranks).to(self.rows.device))
        else:
            for gap in self.layout.gaps:
                self.rows[:, gap] = 0
        return self

    @property
    def is_padded(self) -> bool:
        """Has any client less rank than its row has room for?"""
        if self.ranks.ndim == 1:
            return bool((self.ranks < max(part.rank for part in self.layout.parts)).any())
        parts = [part for part in self.layout.parts if part.kind == "lora"]
        return any(bool((self.ranks < torch.tensor(part.ranks)).any()) for part in parts)


class RowTable(Protocol):
    """Rows [K, ...] of all clients, read by client: there may be too many to be read at once."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, ids: Tensor) -> Tensor:
        """Copy the rows `ids` [n], in that order."""
        ...

    def mean(self) -> Tensor:
        """Return the mean of all rows [1, ...], read a block at a time."""
        ...

    def numpy(self) -> Any:
        """Return what reads as a numpy array does by client and columns: numpy()[ids, start:stop]."""
        ...


@dataclass(frozen=True, eq=False)
class Stored:
    """The adapters that a server keeps: as Adapters, but rows are a table, read by client."""

    layout: Layout
    rows: RowTable
    ranks: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, ids: Tensor, *, rows: Tensor | None = None) -> Adapters:
        """Copy the adapters `ids` [n] in that order; `rows` [n, P], where given, replace the stored ones."""
        return Adapters(self.layout, self.rows[ids] if rows is None else rows, self.ranks[ids], self.scale[ids])


def start_adapters(
    layout: Layout, ranks: Tensor, alpha: Alpha, generator: torch.Generator, *, start: Start = "kaiming"
) -> Adapters:
    """Draw the common start: every client gets the same A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, cut to its rank.

    The bound is PEFT's (kaiming_uniform with a = sqrt 5). start: gaussian: A ~ N(0, 1/r^2), B = 0; orthogonal: B A = 0
    with B and A of r/2 directions each, which needs even ranks that no client cuts. A prompt encoder is drawn as PEFT's
    is: V ~ N(0, 1), weights and biases ~ U(-1/sqrt(in), 1/sqrt(in)). ranks [K] or [K, modules]; rows [K, P] float32.
    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; PEFT's init_lora_weights.
    """
    row = torch.zeros(1, layout.size)
    for part in layout.parts:
        if part.kind == "lora" and start != "kaiming":
            for first, second in part.pairs():
                a, b = _drawn_pair(first, second, start, generator)
                row[0, first.start : first.stop], row[0, second.start : second.stop] = a.flatten(), b.flatten()
            continue
        bound = 0.0
        for leaf in part.leaves:
            if leaf.factor == "B":
                continue
            if leaf.factor != "bias":  # which goes with the weight before it
                bound = 1 / math.sqrt(leaf.shape[1])
            if part.kind == "prompt" and leaf is part.leaves[0]:
                drawn = torch.randn(leaf.shape, generator=generator)
            else:
                drawn = (2 * torch.rand(leaf.shape, generator=generator) - 1) * bound
            row[0, leaf.start : leaf.stop] = drawn.flatten()
    return Adapters(layout, row.repeat(len(ranks), 1), ranks, scales(ranks, alpha)).mask_()


def _drawn_pair(first: Leaf, second: Leaf, start: Start, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw A [r, in] and B [out, r] of one module, as PEFT does for this start."""
    rank, outputs = first.shape[0], second.shape[0]
    if start == "gaussian":
        return torch.randn(first.shape, generator=generator) / rank, torch.zeros(second.shape)
    if rank % 2:
        raise ShapeError(f"an orthogonal start needs an even rank, found {rank} of {first.module}")
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    a = (torch.randn(first.shape[1], rank // 2, generator=generator) @ basis[0::2]).T / 10
    b = (torch.randn(rank // 2, outputs, generator=generator).T @ basis[1::2]) / 10
    return a, b


def norms(rows: Tensor) -> Tensor:
    """Return the 2-norm of every row [K] in float64, so that large rows do not overflow."""
    some = max(1, NORM_NUMBERS // max(1, rows.shape[1]))  # rows at once: torch makes them float64 first
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in torch.split(rows, some)])
