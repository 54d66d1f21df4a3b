"""What the server and the clients of a run agree on before round 1. No config, no base model, no data."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedmira.adapters import Adapters, Alpha, Layout, Start, Stored, scales, start_adapters
from fedmira.disk.table import Table
from fedmira.errors import MethodError
from fedmira.methods.base import Clock, Method, State
from fedmira.names import ONLY_IDS, ClientNames


@dataclass(frozen=True, eq=False)
class Federation:
    """Who takes part, with which rows. names [K]: ids; ranks [K] or, by module, [K, modules]; alpha: LoRA's.

    run, base: the ids of the run and of the base's weights, which every upload has to name. called: how people call the
    clients, for the log. since [K], ascending: the first round of each; None: all are there from the first.
    """

    names: tuple[str, ...]
    layout: Layout
    ranks: Tensor
    alpha: Alpha
    run: str = ""
    base: str = ""
    dtype: torch.dtype = torch.float32  # of rows
    called: ClientNames = ONLY_IDS
    since: Tensor | None = None
    start_of: Start = "kaiming"  # how low-rank factors are drawn

    def __len__(self) -> int:
        return len(self.names)

    def under(self, method: Method, width: int) -> "Federation":
        """This federation with the rows that a method carries: LoRA's, or its own, which may have no rank (0).

        width: of the base's embeddings. Raises MethodError for rows that no pass or export could take apart.
        """
        if method.layout is None:
            return self
        layout = method.layout(self.layout, width)
        encoders = sum(part.kind == "prompt" for part in layout.parts)
        if encoders > 1 or (encoders and layout.low_rank):
            raise MethodError(
                f"method '{method.name}' lays out {len(layout.parts)} parts, {encoders} of them prompt encoders: a row "
                "may have low-rank factors, or one prompt encoder and nothing else"
            )
        ranks = self.ranks if layout.low_rank else torch.zeros(len(self), dtype=torch.int64)
        return replace(self, layout=layout, ranks=ranks, alpha=self.alpha if layout.low_rank else 1.0)

    def joining(self, number: int) -> Tensor:
        """Return the clients [n] whose first round this is, if it is not the first of all."""
        if self.since is None or number <= 1:
            return torch.empty(0, dtype=torch.int64)
        return (self.since == number).nonzero().flatten()

    def adapters(self, ids: Tensor, rows: Tensor) -> Adapters:
        """Return rows [S, P] as adapters of the clients `ids`, at their ranks and scales; nothing is copied."""
        ranks = self.ranks[ids]
        return Adapters(self.layout, rows, ranks, scales(ranks, self.alpha).to(self.dtype))

    @functools.cached_property
    def layout_hash(self) -> str:
        return self.layout.fingerprint

    @property
    def largest_ranks(self) -> Tensor:
        """Those of a row that several clients share: [1] or [1, modules]."""
        return self.ranks.amax(dim=0, keepdim=True)

    def start_rows(self, seed: int) -> tuple[Tensor, Tensor]:
        """Draw the start that every client shares, cut to each distinct rank [R, P], and whose is which [K]."""
        distinct, kinds = torch.unique(self.ranks, dim=0, return_inverse=True)
        drawn = start_adapters(
            self.layout, distinct, self.alpha, torch.Generator().manual_seed(seed), start=self.start_of
        )
        return drawn.rows.to(self.dtype), kinds

    def start(self, seed: int, method: Method, scratch: Path | None = None, *, ram_bytes: int | None = None) -> Stored:
        """Return the common start as the rows that the server has: of each client, of each group, or one.

        scratch: a folder for these rows if they are too many for RAM: more than ram_bytes, as of a Table.
        """
        if method.has_row_of_each:
            rows, kinds = self.start_rows(seed)
            table, ranks = Table(rows, kinds, scratch, ram_bytes=ram_bytes), self.ranks
        else:
            largest = replace(self, ranks=self.largest_ranks)
            count = method.count_rows(len(self))
            rows, _ = largest.start_rows(seed)
            table = Table(rows, torch.zeros(count, dtype=torch.int64), scratch, ram_bytes=ram_bytes)
            ranks = largest.ranks.expand(count, *largest.ranks.shape[1:]).clone()
        return Stored(self.layout, table, ranks, scales(ranks, self.alpha).to(self.dtype))

    def first_state(
        self, seed: int, method: Method, scratch: Path | None = None, *, ram_bytes: int | None = None
    ) -> State:
        """Return what the server has before round 1. scratch, ram_bytes: as in start."""
        return method.init(self.start(seed, method, scratch, ram_bytes=ram_bytes), Clock(0))
