"""Attention within the examples of a packed pass: in spans and fans on a CPU, in buckets where attention is fused.

    s_ij = scale q_i k_j  (c tanh(s / c) with a softcap c);   o_i = sum_j softmax_j(s_i + bias_i)_j v_j

over the j that i may see: all before it in its own example, or what the rule of a sliding window or a chunk allows.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fedmira.model.packed.buckets import Buckets, attend_in_buckets
from fedmira.model.packed.spans import Spans, attend_in_spans
from fedmira.model.seam import Rule


@dataclass(frozen=True, eq=False)
class PackedAttention:
    """The attention of one packed pass.

    last: the layer whose queries are needed at labelled tokens alone, None if no layer is. keys_values: takes the keys
    and values [1, H', N, D] of every layer in turn, None: they are not needed.
    """

    plan: Spans | Buckets
    last: nn.Module | None = None
    keys_values: list[tuple[Tensor, Tensor]] | None = None

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
        """Return the attention [1, N, H, D] of query [1, H, N, D] to key and value [1, H', N, D]."""
        if self.keys_values is not None:
            self.keys_values.append((key, value))
        if isinstance(self.plan, Buckets):
            return attend_in_buckets(self.plan, query, key, value, rule, scale=scale, softcap=softcap)
        labelled = layer is self.last
        return attend_in_spans(self.plan, query, key, value, rule, labelled=labelled, scale=scale, softcap=softcap)
