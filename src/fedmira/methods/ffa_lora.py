"""FFA-LoRA: one shared adapter whose A stays as it was drawn; clients train B, and its mean is exact.

    A = A_0 for ever,   B = sum_k p_k B_k,   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)
    sum_k p_k B_k A_0 = (sum_k p_k B_k) A_0

As all have the same A, the product of the means is the mean of the products, which FedAvg's is not. Only B travels and
is trained: half of FedAvg's bytes where a module is square, d / (d + v) of them in general (d: width of its output). A
is the common start, which everybody draws from the seed of the run. What an adapter can learn is limited to the rows of
A_0: with the same rank it has half of the freedom.

The exact mean needs clients of one rank: alpha / r_k and the cut of A differ with the rank. It needs one A: of adapters
to begin with (`lora.start`) one for all is taken, and one for each client refused.

Source: Sun et al. 2024 (arXiv:2403.12313, ICLR 2024).

Checked against the abstract (the matrices that begin random are fixed, those that begin at zero are trained), and
against FFA-LoRA as a baseline in others' code (Pengxin-Guo/FedSA-LoRA, glue/model/model_builder.py: no gradient for A).
The paper's own code and its section on the scaling factor alpha were not at hand.
"""

from typing import Literal

from fedmira.methods.base import Cohort, Facts, Method, Regime, Settings
from fedmira.methods.means import merge_mean
from fedmira.methods.wrappers import only


class Config(Settings):
    """Settings of FFA-LoRA."""

    weights: Literal["examples", "uniform"] = "examples"  # of the mean


def build(config: Config, cohort: Cohort) -> Method:
    """Return FFA-LoRA as a Method."""
    facts, regime = Facts(weighs=config.weights == "examples"), Regime(starts="alike")
    fedavg = Method("ffa_lora", merge_mean(config.weights), facts=facts, regime=regime)
    return only(fedavg, trained="B", travels="B")
