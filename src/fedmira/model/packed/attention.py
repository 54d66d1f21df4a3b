"""Attention within the examples of a packed sequence, by two roads: spans on a CPU, buckets where attention is fused.

    s_ij = scale q_i k_j  (c tanh(s / c) with a cap c);   o_i = sum_j softmax_j(s_i + bias_i)_j v_j

over the j that i may see: all before it in its own example, or what the mask of a sliding window or a chunk allows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fedmira.model.packed.buckets import Buckets, attend_in_buckets
from fedmira.model.packed.spans import Rule, Spans, attend_in_spans

NAME = "fedmira_packed"
Attention = Spans | Buckets

# What layers hand to every attention function and causal attention does not need. The window among it is for attention
# functions that are given no mask; as in transformers' own sdpa and eager attention the mask has it.
HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "sliding_window"}
)


class UnsupportedAttention(Exception):
    """Layers attend in a way that a pass of ours cannot follow; whoever tries them out takes another road."""


def check_call(others: Mapping[str, object]) -> None:
    """Raise UnsupportedAttention if a layer hands its attention anything that would have to be taken into account."""
    given = {name for name, value in others.items() if name not in HARMLESS and value is not None}
    if given:
        raise UnsupportedAttention(f"attention with {sorted(given)}")


@dataclass(eq=False)
class PackedAttention:
    """One packed pass. last: the module whose queries are only asked for at labels.

    callers: modules that attended; reaches: of the windows and chunks that they came with. keys_values: where the keys
    and values of every layer [1, H', N, D] are wanted, in turn.
    """

    attention: Attention
    last: nn.Module | None
    keys_values: list[tuple[Tensor, Tensor]] | None = None
    callers: list[nn.Module] = field(default_factory=list)
    reaches: set[int] = field(default_factory=set)


@contextmanager
def packed_attention(
    model: PreTrainedModel,
    attention: Attention,
    *,
    last: nn.Module | None = None,
    keys_values: list[tuple[Tensor, Tensor]] | None = None,
) -> Iterator[PackedAttention]:
    """Let a model's layers attend within the examples of a packed sequence; `last` computes what labels need alone."""
    global _current
    config = model.config
    before = config._attn_implementation
    _current = PackedAttention(attention, last, keys_values)
    config._attn_implementation = NAME
    try:
        yield _current
    finally:
        config._attn_implementation = before
        _current = None


_current: PackedAttention | None = None


def _rule(
    *,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **others: object,
) -> Rule:
    """Take what transformers would build a mask from: windows and chunks come with a `local_size`."""
    if use_vmap:  # the model adds a pattern of its own
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
    """Causal attention inside every example. query [1, H, N, D], key and value [1, H', N, D]; returns [1, N, H, D]."""
    assert _current is not None, "packed attention outside of a packed pass"
    check_call(others)
    if not isinstance(attention_mask, Rule):
        raise UnsupportedAttention("attention that has its mask from elsewhere")
    _current.callers.append(module)
    if attention_mask.reach is not None:
        _current.reaches.add(attention_mask.reach)
    if _current.keys_values is not None:
        _current.keys_values.append((key, value))
    plan = _current.attention
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    given = (query, key, value, attention_mask)
    if isinstance(plan, Buckets):
        return attend_in_buckets(plan, *given, scale=scale, softcap=softcap), None
    labelled = module is _current.last
    return attend_in_spans(plan, *given, labelled=labelled, scale=scale, softcap=softcap), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _rule)
