"""FedAvg on LoRA factors (FedIT): one shared adapter, the mean of what the sampled clients return.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)

The factors are averaged separately, so the product is biased: mean(B) mean(A) != mean(B A).
Sources: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1; FedIT, Zhang et al. 2023 (arXiv:2305.05644).

Checked against the public code of FedIT (JayZhang42/FederatedGPT-Shepherd, fed_utils/model_aggregation.py): each tensor
is averaged separately, weighted by the client's share of the selected clients' examples.
"""

from typing import Literal

from fedmira.methods.base import Cohort, Facts, Method, Settings
from fedmira.methods.means import merge_mean


class Config(Settings):
    """Settings of FedAvg."""

    weights: Literal["examples", "uniform"] = "examples"  # FedIT weights by training examples


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedAvg as a Method."""
    return Method("fedavg", merge_mean(config.weights), facts=Facts(weighs=config.weights == "examples"))
