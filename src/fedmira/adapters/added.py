"""Low-rank pairs that a method adds to the base: W_m <- W_m + B_m A_m, kept in float32 beside the frozen weights.

The server decides on one set of pairs a round at most: a version. Whoever has the versions 1 ... v has the base of
version v. A client that comes back is sent those it does not have. Letters: S clients, q rank of a module's pair, d
outputs, v inputs.

Source: FedEx-LoRA (arXiv:2410.09432) adds the residual of a mean of factors to the base; that it is carried as
factors, and never as a d x v matrix, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedmira.adapters import Adapters, Layout, Pairs, lora_layout
from fedmira.adapters.lazy import Tensor, torch
from fedmira.errors import ShapeError, WireError


@dataclass(frozen=True, eq=False)
class BaseVersions:
    """What a message says of the base. pairs: of the versions first + 1, first + 2, ... to the newest.

    known [S]: how many versions each client has already, `first` or more.
    """

    pairs: tuple[Pairs, ...]
    known: Tensor
    first: int = 0

    def take(self, index: Tensor | slice) -> BaseVersions:
        """Return the versions for some clients, by position: all that the one furthest behind does not have."""
        known = self.known[index]
        least = int(known.min()) if len(known) else self.first + len(self.pairs)
        return BaseVersions(self.pairs[least - self.first :], known, least)

    def after(self, had: Sequence[Pairs]) -> tuple[Pairs, ...]:
        """Return all versions of a client that had these. Raises WireError if there is a gap between."""
        if self.first > len(had):
            raise WireError(
                "schema", f"the server sent changes of the base from {self.first + 1} on, and {len(had)} are known here"
            )
        return (*had[: self.first], *self.pairs)

    @property
    def bytes_missing(self) -> list[int]:
        """Bytes of what each of these clients does not have."""
        return [count_bytes(self.pairs[count - self.first :]) for count in self.known.tolist()]


def count_bytes(versions: Sequence[Pairs]) -> int:
    """Return the bytes of all factors."""
    return sum(a.nbytes + b.nbytes for pairs in versions for a, b in pairs.values())


def join_pairs(versions: Sequence[Pairs]) -> Pairs:
    """Return the sum of some versions as one: factors side by side, or the sum itself where that is smaller.

    From rank min(d, v) on, the pair is (B A) I or I (B A).
    """
    joined: dict[str, tuple[Tensor, Tensor]] = {}
    for module in {name: None for pairs in versions for name in pairs}:
        those = [pairs[module] for pairs in versions if module in pairs]
        a, b = torch.cat([first for first, _ in those]), torch.cat([second for _, second in those], dim=1)
        if len(a) > min(a.shape[1], len(b)):
            total = b @ a
            wide = total.shape[1] > total.shape[0]
            unit = torch.eye(min(total.shape), dtype=total.dtype)
            a, b = (total, unit) if wide else (unit, total)
        joined[module] = (a, b)
    return joined


def stack_products(adapters: Adapters, shares: Tensor) -> Pairs:
    """Return sum_k p_k s_k B_k A_k as one pair for each module, exactly: factors side by side, each at its own rank.

    adapters [S]; shares p_k [S]. From rank min(d, v) on a pair is the sum itself times a unit matrix (join_pairs).
    Source: FLoRA (arXiv:2409.05976): A = [p_1 A_1; ...; p_n A_n], B = [B_1, ..., B_n]; here p_k s_k is beside B_k.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for part in adapters.layout.parts:
        for index, (first, second) in enumerate(part.pairs()):
            weights = (shares * adapters.scale_of(index)).to(adapters.rows.dtype)
            weighted = adapters.leaf(second) * weights[:, None, None]
            ranks = adapters.ranks_of(index).tolist()
            a = torch.cat([own[:rank] for own, rank in zip(adapters.leaf(first), ranks, strict=True)])
            b = torch.cat([own[:, :rank] for own, rank in zip(weighted, ranks, strict=True)], dim=1)
            pairs[first.module] = (a, b)
    return join_pairs([pairs])


def check_pairs(pairs: Pairs, layout: Layout) -> None:
    """Raise ShapeError unless every pair is of a module that the layout adapts, with its numbers of inputs and outputs.

    Raises WireError if a number is not finite.
    """
    shapes = {
        first.module: (first.shape[1], second.shape[0]) for part in layout.parts for first, second in part.pairs()
    }
    for module, (a, b) in pairs.items():
        if module not in shapes:
            raise ShapeError(f"a pair for the base's '{module}': pairs are for adapted modules: {', '.join(shapes)}")
        inputs, outputs = shapes[module]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape != (outputs, len(a)) or not len(a):
            raise ShapeError(
                f"a pair for the base's '{module}' has A {tuple(a.shape)} and B {tuple(b.shape)}: need [q, {inputs}] "
                f"and [{outputs}, q] with q >= 1"
            )
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise WireError("not_finite", f"pairs for the base's '{module}' are not finite; nothing was replaced")


def fold(adapters: Adapters) -> Adapters:
    """Return one client's adapter [1, P] and what was added to its base as a single adapter of the untouched base.

    A' = [A_k; A], B' = [s_k B_k, B] of rank r_k + q and scale 1, all parts of a row one after another. One part without
    added pairs: the adapter itself.
    """
    if not adapters.added and len(adapters.layout.parts) == 1:
        return adapters
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in adapters.layout.parts:
        for index, (first, second) in enumerate(part.pairs()):
            rank = int(adapters.ranks_of(index)[0])
            scale = adapters.scale_of(index)[0].to(adapters.rows.dtype)
            pair = adapters.leaf(first)[0, :rank], adapters.leaf(second)[0, :, :rank] * scale
            found.setdefault(first.module, []).append(pair)
    for module, (more_a, more_b) in adapters.added.items():
        found[module].append((more_a.to(adapters.rows), more_b.to(adapters.rows)))
    factors = {
        module: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        for module, pairs in found.items()
    }
    ranks = [len(a) for a, _ in factors.values()]
    layout = lora_layout([(module, a.shape[1], len(b)) for module, (a, b) in factors.items()], ranks)
    row = adapters.rows.new_zeros(1, layout.size)
    for (first, second), (a, b) in zip(layout.parts[0].pairs(), factors.values(), strict=True):
        row[0, first.start : first.stop] = a.flatten()
        row[0, second.start : second.stop] = b.flatten()
    ones = torch.ones(1, len(ranks), dtype=adapters.scale.dtype)
    return replace(adapters, layout=layout, rows=row, ranks=torch.tensor([ranks]), scale=ones, added={})


def named(versions: Sequence[Pairs], first: int) -> dict[str, Tensor]:
    """Name the tensors of versions first + 1, ... for a file: VERSION.A.MODULE and VERSION.B.MODULE."""
    return {
        f"{number}.{factor}.{module}": tensor
        for number, pairs in enumerate(versions, first + 1)
        for module, pair in pairs.items()
        for factor, tensor in zip("AB", pair, strict=True)
    }


def from_named(tensors: Mapping[str, Tensor]) -> Mapping[int, Pairs]:
    """Return version -> pairs of a file's tensors, as `named` wrote them; modules in the order of their names."""
    versions: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for name in sorted(tensors):
        number, factor, module = name.split(".", 2)
        if factor == "A":
            versions.setdefault(int(number), {})[module] = (tensors[name], tensors[f"{number}.B.{module}"])
    return versions
