"""A rank for every client: one for all, listed in the config, read from the data, or drawn in FlexLoRA's four types.

    type    attention    feed-forward        share of clients    T1        T2        T3        T4
    T1          8             8              uniform             25 %      25 %      25 %      25 %
    T2         30            30              heavy-tail-light    80 %       5 %       5 %      10 %
    T3         30           200              heavy-tail-strong    5 %       5 %      10 %      80 %
    T4        200           200              normal            5.75 %   44.25 %   44.25 %    5.75 %

A client's type is drawn from a stream of the data's seed and its own id: neither who else takes part nor the order of
the clients matters. `normal` is the density of N(1.5, 0.7) at 0 to 3. The public code counts the types in its own
order there (T1, T4, T3, T2), which makes T3 and T4 the frequent ones; the paper's figure shows T2 and T3, as here.
A module is attention if `attn` or `attention` is part of its name, and feed-forward otherwise.

Source: FlexLoRA (arXiv:2402.11505), table 1; the shares are those of its public code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.config.lora import MAX_RANK, RANK_TYPES
from fedmira.errors import ConfigError, nearest
from fedmira.names import ONLY_IDS, ClientNames

Setting = Sequence[int | str] | Mapping[str, str] | str | None  # lora.ranks of the config
Value = TypeVar("Value")

TYPES = {"T1": (8, 8), "T2": (30, 30), "T3": (30, 200), "T4": (200, 200)}  # rank in attention, in feed-forward
SHARES = {
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "heavy-tail-light": (0.80, 0.05, 0.05, 0.10),
    "heavy-tail-strong": (0.05, 0.05, 0.10, 0.80),
    "normal": (0.0575, 0.4425, 0.4425, 0.0575),
}
STREAM = 0x52414E4B  # keeps the draw of ranks apart from what else is drawn from the data's seed


def client_ranks(
    setting: Setting,
    *,
    usual: int,
    ids: Sequence[str],
    columns: Sequence[Mapping[str, str]],
    keys: Sequence[int],
    seed: int,
    modules: Callable[[], Sequence[str]],
    names: ClientNames = ONLY_IDS,
    by_module: Callable[[], Sequence[int]] | None = None,
) -> Tensor:
    """Return every client's rank [K] int64; [K, modules] where the modules of some client differ.

    usual: lora.r, where `setting` is None. by_module: gives the rank of each module, for all clients, instead.
    columns: of each client, the data columns with one value; keys: 64 bits of its id. modules: gives the names of the
    adapted modules, and is asked only for T3. names: of clients that have others than their ids.
    Raises ConfigError if a list is not as long as there are clients, or a column does not give every client a rank.
    """
    if by_module is not None:
        return torch.tensor([list(by_module())] * len(ids))
    named = _name_ranks(setting, usual=usual, ids=ids, names=names, columns=columns, keys=keys, seed=seed)
    pairs = torch.tensor([TYPES[rank] if isinstance(rank, str) else (rank, rank) for rank in named])  # [K, 2]
    if torch.equal(pairs[:, 0], pairs[:, 1]):
        return pairs[:, 0]
    kinds = torch.tensor([0 if is_attention(name) else 1 for name in modules()])
    ranks = pairs[:, kinds]
    return ranks[:, 0] if bool((ranks == ranks[:, :1]).all()) else ranks


def is_attention(module: str) -> bool:
    """Does a module belong to attention, by its name?"""
    return any(word in module.lower() for word in ("attn", "attention"))


def _name_ranks(
    setting: Setting,
    *,
    usual: int,
    ids: Sequence[str],
    names: ClientNames,
    columns: Sequence[Mapping[str, str]],
    keys: Sequence[int],
    seed: int,
) -> Sequence[int | str]:
    """Give every client a rank or the name of a type."""
    if setting is None:
        return [usual] * len(ids)
    if isinstance(setting, str):
        return [_draw(setting, seed, key) for key in keys]
    if isinstance(setting, Mapping):
        return _read_column(setting["column"], ids, names, columns)
    if len(setting) != len(ids):
        shown = ", ".join(map(names.shown, ids[:8])) + (", ..." if len(ids) > 8 else "")
        raise ConfigError(
            [
                f"lora.ranks: found {len(setting)} ranks, and there are {len(ids)} clients; give one for each in their "
                f"order ({shown}), a column ({{column: NAME}}) or a draw ({', '.join(SHARES)})"
            ]
        )
    return setting


def _draw(shares: str, seed: int, key: int) -> str:
    """Draw the type of the client with this key."""
    drawn = np.random.default_rng([seed, STREAM, key]).random()
    return next((name for name, up_to in zip(TYPES, accumulate(SHARES[shares]), strict=True) if drawn < up_to), "T4")


def _read_column(
    column: str, ids: Sequence[str], names: ClientNames, columns: Sequence[Mapping[str, str]]
) -> list[int | str]:
    """Read every client's rank, or type, from a data column that has one value for it."""
    lacking = [client_id for client_id, own in zip(ids, columns, strict=True) if column not in own]
    if lacking:
        shared = sorted(set.intersection(*(set(client) for client in columns)))
        raise ConfigError(
            [
                f"lora.ranks.column: found '{column}'{nearest(column, shared)}, which has no single value for "
                f"{len(lacking)} clients such as '{names.shown(lacking[0])}'; columns with one value per client: "
                f"{', '.join(shared) or 'none'}"
            ]
        )
    values = [client[column].strip() for client in columns]
    odd = [place for place, value in enumerate(values) if not _is_rank(value)]
    if odd:
        raise ConfigError(
            [
                f"lora.ranks.column: found {values[odd[0]][:20]!r} in '{column}' of client "
                f"'{names.shown(ids[odd[0]])}' (and of {len(odd) - 1} others); allowed are whole numbers from 1 to "
                f"{MAX_RANK:,}, and {', '.join(RANK_TYPES)}"
            ]
        )
    return [value if value in TYPES else int(value) for value in values]


def _is_rank(text: str) -> bool:
    plain = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_RANK))
    return text in TYPES or (plain and 1 <= int(text) <= MAX_RANK)


def is_mixed(ranks: Tensor) -> bool:
    """Do clients differ in rank? ranks [K] or [K, modules]."""
    return bool((ranks != ranks[:1]).any())


def shown(ranks: Tensor) -> str:
    """Write ranks for people: `8`, or `8 to 200`."""
    low, high = int(ranks.min()), int(ranks.max())
    return str(low) if low == high else f"{low} to {high}"


def by_ending(names: Sequence[str], values: Sequence[Value]) -> dict[str, Value]:
    """Say a value of each module by the shortest ending of its name that only modules with this value have.

    q_proj where all of these agree, attn.c_proj and mlp.c_proj where they do not: how PEFT reads a rank_pattern.
    """
    seen: dict[str, set[Value]] = {}
    for name, value in zip(names, values, strict=True):
        for ending in _endings(name):
            seen.setdefault(ending, set()).add(value)
    return {
        next((ending for ending in _endings(name) if len(seen[ending]) == 1), name): value
        for name, value in zip(names, values, strict=True)
    }


def _endings(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[-count:]) for count in range(1, len(words) + 1)]
