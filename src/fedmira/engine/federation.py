"""What all runs of a study share, and what every run begins with."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fedmira.adapters import Adapters, Layout, scales, start_adapters
from fedmira.adapters.optim import Optimizer, adamw, sgd
from fedmira.config.sections import Config
from fedmira.data.batches import ClientData, Truncation
from fedmira.disk.table import Rows
from fedmira.engine.phase import Training
from fedmira.errors import MethodError
from fedmira.methods.base import Clock, Method, State
from fedmira.model.base.load import Base

POOL = "*"  # names all clients' data together; no client is called so
HOLDER = torch.zeros(1, dtype=torch.int64)  # client 0, in whose place the pool's optimizer moments are kept
Observer = Callable[[str, Mapping[str, object]], None]  # (event, facts): round | tuning | scoring


@dataclass(frozen=True, eq=False)
class Federation:
    """What all runs of a study share. ranks [K] or, by module, [K, modules]; cohort: clients trained in one pass."""

    config: Config
    base: Base
    clients: tuple[ClientData, ...]
    layout: Layout
    ranks: Tensor
    cohort: int

    def __len__(self) -> int:
        return len(self.clients)

    def under(self, method: Method) -> "Federation":
        """This federation with the rows that a method carries: LoRA's, or its own, which may have no rank (0).

        Raises MethodError for rows that no pass or export could take apart.
        """
        if method.layout is None:
            return self
        layout = method.layout(self.layout, self.base.width)
        encoders = sum(part.kind == "prompt" for part in layout.parts)
        if encoders > 1 or (encoders and layout.low_rank):
            raise MethodError(
                f"method '{method.name}' lays out {len(layout.parts)} parts, {encoders} of them prompt encoders: a row "
                "may have low-rank factors, or one prompt encoder and nothing else"
            )
        ranks = self.ranks if layout.low_rank else torch.zeros(len(self), dtype=torch.int64)
        return replace(self, layout=layout, ranks=ranks)

    def at_own_ranks(self, adapters: Adapters, ids: Tensor) -> Adapters:
        """Return adapters as the clients of `ids` train and use them: cut to their ranks, at their scales."""
        ranks = self.ranks[ids]
        if torch.equal(adapters.ranks, ranks):
            return adapters
        return Adapters(self.layout, adapters.rows.clone(), ranks, scales(ranks, self.config.lora.lora_alpha)).mask_()

    @property
    def largest_ranks(self) -> Tensor:
        """Those of a row that several clients share: [1] or [1, modules]."""
        return self.ranks.amax(dim=0, keepdim=True)

    @functools.cached_property
    def pool(self) -> ClientData:
        """All clients' training data as one client's, for methods that train on the pool; nothing to score it on."""
        everything = tuple(one for client in self.clients for one in client.train)
        return ClientData(POOL, POOL, None, {}, everything, (), (), Truncation())


def make_optimizer(config: Config) -> Optimizer:
    """Build the clients' optimizer from the config's training section."""
    training = config.training
    if training.optimizer == "sgd":
        return sgd(momentum=training.momentum, weight_decay=training.weight_decay)
    return adamw(betas=training.betas, eps=training.eps, weight_decay=training.weight_decay)


def make_training(config: Config, seed: int) -> Training:
    section = config.training
    return Training(
        optimizer=make_optimizer(config),
        learning_rate=section.learning_rate,
        batch_size=section.batch_size,
        local_steps=section.local_steps,
        local_epochs=section.local_epochs,
        max_grad_norm=section.max_grad_norm,
        keep_optimizer=section.keep_optimizer,
        dropout=config.lora.lora_dropout,
        seed=seed,
    )


def common_start(federation: Federation, seed: int, clients: int, scratch: Path | None = None) -> Adapters:
    """Draw the start that every client shares; one row, or for personal methods one for each of `clients`.

    Several rows are store.Rows: read by client, they take room once they differ from the start. scratch: a folder for
    them if they are too large for RAM.
    """
    ranks = federation.ranks if clients == len(federation) else federation.largest_ranks
    stream = torch.Generator().manual_seed(seed)
    distinct, kinds = torch.unique(ranks, dim=0, return_inverse=True)
    start = start_adapters(federation.layout, distinct, federation.config.lora.lora_alpha, stream)
    if clients == 1:
        return start
    rows = cast(Tensor, Rows(start.rows, kinds, scratch))  # reads and writes by client as one
    return Adapters(federation.layout, rows, ranks, start.scale[kinds])


def first_state(federation: Federation, method: Method, seed: int, scratch: Path | None = None) -> State:
    """Return what the server holds before round 1. scratch: as in common_start."""
    return method.init(common_start(federation, seed, len(federation) if method.personal else 1, scratch), Clock(0))
