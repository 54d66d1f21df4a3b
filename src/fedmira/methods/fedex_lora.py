"""FedEx-LoRA: one shared adapter, the mean of the factors; what their product misses is added to everybody's base.

    A = sum_k p_k A_k,   B = sum_k p_k B_k        p_k = n_k / sum_{j in S} n_j   (examples)   or   1 / |S|   (uniform)
    W0 <- W0 + s (sum_k p_k B_k A_k - B A)        s = alpha / r

Base and factors together are then the mean of the clients' products, exactly, where FedAvg has mean(B) mean(A). The
residual is never formed as a d x v matrix. With any one client l of the round

    sum_k p_k B_k A_k - B A = sum_{k != l} p_k (B_k - B) (A_k - A_l)

so that it is a pair of factors of rank (|S| - 1) r, which goes to everybody once (`Change.base`, docs/adr/0012): what a
client lacks of it is in the bytes down. Beyond rank min(d, v) it is the sum itself times a unit matrix. The frozen
weights stay as they are; the pairs are kept beside them in float32, and an exported adapter has both.

It is exact for one rank only, and mixed ranks are refused: everybody has the same base, while a client of rank r_k uses
the first r_k pairs of the mean, whose product misses something else for each rank. FLoRA is exact for any ranks.

The paper's mean is uniform, over clients with about equal shares of the data; the default here is that of FedAvg, so
that the two differ in the residual alone.

Source: FedEx-LoRA (arXiv:2410.09432), Singhal, Ponkshe and Vepakomma 2024.

Checked against the public code (RaghavSinghal10/fedex-lora, fed_agg.py, aggregate_models_ours: uniform means of both
factors, the residual of their product times alpha / r added to the base's weight, the same factors to everybody) and
the paper's abstract. The code forms the residual as a matrix; the identity above is ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedmira.adapters import ranks
from fedmira.adapters.added import stack_products
from fedmira.adapters.columns import factor_columns
from fedmira.adapters.lazy import Tensor, torch
from fedmira.errors import MethodError
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Settings, State
from fedmira.methods.means import at_own_ranks, has_mixed_ranks, mean_row, replace_shared, shares_of


class Config(Settings):
    """Settings of FedEx-LoRA."""

    weights: Literal["examples", "uniform"] = "examples"  # of the means; uniform: the paper


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedEx-LoRA as a Method. Raises MethodError if clients differ in rank."""
    if has_mixed_ranks(cohort):
        assert cohort.ranks is not None
        raise MethodError(
            f"fedex_lora: clients have ranks {ranks.shown(cohort.ranks)}: the residual is added to one base for all, "
            "and is right for one rank only; use flora, which is exact for any ranks, or the same lora.r for all"
        )

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        shares = shares_of(weights, config.weights)
        mean = mean_row(returned.rows, shares)
        change = replace_shared(mean)
        if len(ids) == 1:
            return change  # its product is the mean
        is_a = factor_columns(state.adapters.layout, "A")
        others = returned.rows[:-1] - torch.where(is_a, returned.rows[-1:], mean)  # A_k - A_l and B_k - B
        gaps = at_own_ranks(others, ids[:-1], state, cohort)
        return replace(change, base=stack_products(gaps, shares[:-1]))

    return Method("fedex_lora", merge, facts=Facts(needs="each", weighs=config.weights == "examples"))
