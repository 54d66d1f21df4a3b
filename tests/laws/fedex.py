"""FedEx-LoRA as a file that a study can name: what the mean of factors misses is added to the base.

    A = sum_k p_k A_k,  B = sum_k p_k B_k
    W0 <- W0 + s (sum_k p_k B_k A_k - B A) = W0 + s sum_k p_k (B_k - B) (A_k - A)

It is exact where all clients have the same rank. Source: arXiv:2410.09432.
"""

from dataclasses import replace

from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Settings, State
from fedmira.methods.means import mean_row, replace_shared, shares_of


class Config(Settings):
    """No settings."""


def build(settings: Config, cohort: Cohort) -> Method:
    return fedex()


def fedex() -> Method:
    """FedEx-LoRA (arXiv:2410.09432): factors are averaged, and what their product misses is added to the base.

    sum_k p_k s B_k A_k - s B A = s sum_k p_k (B_k - B) (A_k - A) with the means B, A: exact where ranks are equal.
    """

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        shares = shares_of(weights, "examples")
        mean = mean_row(returned.rows, shares)
        shared = state.adapters
        gaps = Adapters(
            shared.layout,
            returned.rows - mean,
            shared.ranks[:1].expand(len(ids), *shared.ranks.shape[1:]),
            shared.scale[:1].expand(len(ids), *shared.scale.shape[1:]),
        )
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for place, (first, second) in enumerate(shared.layout.part("lora").pairs()):
            weighted = gaps.leaf(second) * (gaps.scale_of(place).to(shares) * shares)[:, None, None].to(mean)
            pairs[first.module] = gaps.leaf(first).flatten(0, 1), weighted.permute(1, 0, 2).flatten(1)
        return replace(replace_shared(mean), base=pairs)

    return Method("fedex", merge, facts=Facts(needs="each", weighs=True))
