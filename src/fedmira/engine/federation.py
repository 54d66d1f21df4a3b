"""What the server and the clients of a run agree on before round 1. No config, no base model, no data."""

import functools
import hashlib
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
class Given:
    """Adapters that clients begin with. rows [G, P] at LoRA's layout, and which of their columns are given [G, P].

    of [K]: the row of each client; -1: it begins as without. What is not given of a row, such as pairs beyond its
    rank, is drawn: B = 0 there, so that nothing changes and everything can train.
    """

    rows: Tensor
    columns: Tensor
    of: Tensor

    @property
    def fingerprint(self) -> str:
        """sha256 of what is given to whom, so that a resumed run can tell that it has changed."""
        digest = hashlib.sha256(self.of.numpy().tobytes())
        for row, columns in zip(self.rows, self.columns, strict=True):
            digest.update(row[columns].float().numpy().tobytes())
        return digest.hexdigest()

    def columns_of(self, members: Tensor) -> Tensor:
        """Return the columns [P] that any of these clients, who all begin with an adapter, is given."""
        return self.columns[self.of[members]].any(dim=0)

    def within(self, layout: Layout) -> "Given":
        """Return the same for rows whose first part is LoRA's, and more parts behind it."""
        more = (0, layout.size - self.rows.shape[1])
        pad = torch.nn.functional.pad
        return replace(self, rows=pad(self.rows, more), columns=pad(self.columns, more))


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
    given: Given | None = None  # adapters to begin with instead

    def __len__(self) -> int:
        return len(self.names)

    def under(self, method: Method, width: int) -> "Federation":
        """This federation with the rows that a method carries: LoRA's, or its own, which may have no rank (0).

        width: of the base's embeddings. Raises MethodError for rows that no pass or export could take apart, and where
        clients have adapters to begin with that the method cannot take.
        """
        if self.given is not None:
            self._check_start(method)
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
        if not layout.low_rank:
            if self.given is not None:
                raise MethodError(f"method '{method.name}' has no LoRA, and lora.start is an adapter of LoRA")
            return replace(self, layout=layout, ranks=ranks, alpha=1.0)
        given = None if self.given is None else self.given.within(layout)
        return replace(self, layout=layout, ranks=ranks, given=given)

    def _check_start(self, method: Method) -> None:
        """Raise MethodError where a method cannot begin with these adapters."""
        assert self.given is not None
        if method.regime.starts == "none":
            raise MethodError(
                f"method '{method.name}' begins every round with new factors, and lora.start would be lost: merge that "
                "adapter into the base (fedmira export --merge), or take another method"
            )
        if method.regime.starts == "alike" and len(torch.unique(self.given.of)) > 1:
            raise MethodError(
                f"method '{method.name}' has one A for all clients, and lora.start gives them several; give one "
                "adapter for all (lora.start: FOLDER), or take another method"
            )

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
        """Return the rows that clients begin with, each once [R, P], and whose is which [K].

        Drawn once for all, and cut to each distinct rank; where adapters are given, these instead.
        """
        distinct, kinds = torch.unique(self.ranks, dim=0, return_inverse=True)
        drawn = start_adapters(
            self.layout, distinct, self.alpha, torch.Generator().manual_seed(seed), start=self.start_of
        )
        rows = drawn.rows.to(self.dtype)
        if self.given is None:
            return rows, kinds
        pairs, kinds = torch.unique(torch.stack([kinds, self.given.of], dim=1), dim=0, return_inverse=True)
        rows = rows[pairs[:, 0]]
        has = pairs[:, 1] >= 0
        rows[has] = self._without_b(rows[has])
        own = self.given.rows[pairs[has, 1]].to(self.dtype)
        rows[has] = torch.where(self.given.columns[pairs[has, 1]], own, rows[has])
        return rows, kinds

    def _shared_rows(self, seed: int, method: Method) -> Tensor:
        """Return the rows [R, P] that clients share at the start: the mean of those who begin with an adapter."""
        largest = replace(self, ranks=self.largest_ranks, given=None)
        drawn, _ = largest.start_rows(seed)
        count = method.count_rows(len(self))
        if self.given is None:
            return drawn.expand(count, -1)
        rest = self._without_b(drawn)[0]
        own, kinds = self.start_rows(seed)
        has = (self.given.of >= 0).nonzero().flatten()
        groups = method.row_of(torch.arange(len(self)))
        rows = drawn.repeat(count, 1)
        for number in torch.unique(groups[has]).tolist():
            members = has[groups[has] == number]
            mean = own[kinds[members]].mean(dim=0)
            rows[number] = torch.where(self.given.columns_of(members), mean, rest)
        return rows

    def together(self, name: str, seed: int) -> "Federation":
        """All clients as one of this name, at the largest ranks; it begins with the mean of their adapters."""
        given = self.given
        if given is not None:
            has = (given.of >= 0).nonzero().flatten()
            rows, kinds = self.start_rows(seed)
            mean = rows[kinds[has]].mean(dim=0, keepdim=True)
            given = Given(mean, given.columns_of(has)[None], torch.zeros(1, dtype=torch.int64))
        return replace(self, names=(name,), ranks=self.largest_ranks, given=given)

    def _without_b(self, rows: Tensor) -> Tensor:
        """Return rows [n, P] whose pairs of LoRA add nothing each: a start that is drawn may add nothing as a whole."""
        emptied = rows.clone()
        for _, second in self.layout.parts[0].pairs():
            emptied[:, second.start : second.stop] = 0
        return emptied

    def start(self, seed: int, method: Method, scratch: Path | None = None, *, ram_bytes: int | None = None) -> Stored:
        """Return the common start as the rows that the server has: of each client, of each group, or one.

        scratch: a folder for these rows if they are too many for RAM: more than ram_bytes, as of a Table.
        """
        if method.has_row_of_each:
            rows, kinds = self.start_rows(seed)
            table, ranks = Table(rows, kinds, scratch, ram_bytes=ram_bytes), self.ranks
        else:
            count = method.count_rows(len(self))
            rows = self._shared_rows(seed, method)
            alike = self.given is None
            kinds = torch.zeros(count, dtype=torch.int64) if alike else torch.arange(count)
            table = Table(rows[:1] if alike else rows, kinds, scratch, ram_bytes=ram_bytes)
            ranks = self.largest_ranks.expand(count, *self.largest_ranks.shape[1:]).clone()
        return Stored(self.layout, table, ranks, scales(ranks, self.alpha).to(self.dtype))

    def first_state(
        self, seed: int, method: Method, scratch: Path | None = None, *, ram_bytes: int | None = None
    ) -> State:
        """Return what the server has before round 1. scratch, ram_bytes: as in start.

        Clients without a given adapter begin as a method lets those begin that join others, where some have one.
        """
        state = method.init(self.start(seed, method, scratch, ram_bytes=ram_bytes), Clock(0))
        first = method.regime.first_rows
        if self.given is not None and first is not None and method.has_row_of_each:
            known, new = ((self.given.of >= 0) == there for there in (True, False))
            if bool(known.any()) and bool(new.any()):
                ids = new.nonzero().flatten()
                rows = first(state, ids, known.nonzero().flatten())
                table = state.adapters.rows
                assert isinstance(table, Table)
                table.write(ids, self.adapters(ids, rows).mask_().rows)
        return state
