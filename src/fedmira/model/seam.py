"""The one seam between a base's layers and our attention: transformers' attention interface.

While `attending` is open, every layer of a model that asks the interface for its attention comes here. Instead of a
mask it receives the `Rule` that transformers would build the mask from, and brings that rule with its queries, keys
and values. What answers them is an `Attention`: over the examples of a packed pass (packed/attention.py), or over a
cache (answers/cache.py).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "fedmira"

# What layers pass to every attention function and causal attention does not need. The window among it is for attention
# functions that receive no mask; as in transformers' own sdpa and eager attention the mask has it.
HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "sliding_window"}
)


class UnsupportedAttention(Exception):
    """A layer attends in a way that our attention cannot follow; a trial then chooses another way for the base."""


@dataclass(frozen=True, eq=False)
class Rule:
    """Which positions the layers of one kind may see, as transformers defines it.

    sees(batch, head, queries, keys) -> bool, by positions in a text or by index along a packed pass, broadcast;
    reach: the length up to which an example is plainly causal (a window, a chunk), None for any length.
    """

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    reach: int | None

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return which queries [..., T] see which keys [..., L], as bool [..., T, L]."""
        zero = keys.new_zeros(())
        return self.sees(zero, zero, queries[..., :, None], keys[..., None, :])


class Attention(Protocol):
    """What answers the queries of a base's layers in a pass."""

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rule: Rule,
        *,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Return the attention [R, T, H, D] of query [R, H, T, D] to key and value [R, H', T, D]; G = H / H' groups.

        s_ij = scale q_i k_j  (c tanh(s / c) with a softcap c);   o_i = sum_j softmax_j(s_i)_j v_j
        over the j that i may see.
        """
        ...


class Call(NamedTuple):
    """A layer that attended, and the rule it came with."""

    layer: nn.Module
    rule: Rule


@dataclass(frozen=True, eq=False)
class _Session:
    attention: Attention
    calls: list[Call]


_session: _Session | None = None  # of the one pass that runs now: transformers passes its functions nothing of ours


@contextmanager
def attending(model: PreTrainedModel, attention: Attention) -> Iterator[list[Call]]:
    """Let a model's layers attend through `attention`; yield the list of calls, which grows as layers attend."""
    global _session
    config = model.config
    previous = config._attn_implementation
    _session = _Session(attention, [])
    config._attn_implementation = NAME
    try:
        yield _session.calls
    finally:
        config._attn_implementation = previous
        _session = None


def _make_rule(
    *,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **others: object,
) -> Rule:
    """Take what transformers would build a mask from: windows and chunks come with a `local_size`."""
    if use_vmap:  # the model adds another pattern
        raise UnsupportedAttention("attention with a mask of the model's own")
    return Rule(mask_function, local_size)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rule | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Pass a layer's call to the attention of the pass that runs; shapes as in `Attention.attend`."""
    assert _session is not None, "our attention outside of a pass of ours"
    _check_others(others)
    if not isinstance(attention_mask, Rule):
        raise UnsupportedAttention("attention that has its mask from elsewhere")
    _session.calls.append(Call(module, attention_mask))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _session.attention.attend
    return attend(module, query, key, value, attention_mask, scale=scale, softcap=softcap), None


def _check_others(others: Mapping[str, object]) -> None:
    """Raise UnsupportedAttention if a layer passes its attention anything that would have to be taken into account."""
    unknown = {name for name, value in others.items() if name not in HARMLESS and value is not None}
    if unknown:
        raise UnsupportedAttention(f"attention with {sorted(unknown)}")


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _make_rule)
