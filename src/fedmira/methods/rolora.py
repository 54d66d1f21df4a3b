"""RoLoRA: one shared adapter whose factors take turns: B is trained in odd rounds, A in even ones.

    odd rounds:   B = sum_k p_k B_k,  A as it was;   even rounds:  A = sum_k p_k A_k,  B as it was
    p_k = 1 / |S|   (uniform)   or n_k / sum_{j in S} n_j   (examples)

The factor that rests is the same for all, so that every mean is exact: sum_k p_k B_k A = (sum_k p_k B_k) A. FedAvg's
mean of both factors at once is not, and FFA-LoRA, which is exact too, never trains A. B goes first because LoRA begins
with B = 0, where A has no gradient.

Clients return the factor that they trained, about half of FedAvg's bytes. They are sent both: a client that was away
for a round needs both. The paper counts half both ways, which holds where everybody takes part in every round. As for
FFA-LoRA the mean is exact for clients of one rank. The optimizer's moments of the resting factor rest too.

Sources: Chen et al. 2025 (arXiv:2502.01755, NeurIPS 2025), Algorithm 1; its first version (arXiv:2409.02346).

Checked against the abstracts, and against a reader's notes on Algorithm 1 (odd rounds train B, even ones A, means with
weights 1 / N); the paper's text was not at hand. No code of the authors is known (HuangOwen/RoLoRA is another method).
"""

from typing import Literal

from fedmira.methods.base import Cohort, Facts, Method, Settings
from fedmira.methods.means import merge_mean
from fedmira.methods.wrappers import only


class Config(Settings):
    """Settings of RoLoRA."""

    weights: Literal["uniform", "examples"] = "uniform"  # of the means; uniform: the paper


def build(config: Config, cohort: Cohort) -> Method:
    """Return RoLoRA as a Method."""
    fedavg = Method("rolora", merge_mean(config.weights), facts=Facts(weighs=config.weights == "examples"))
    return only(fedavg, trained="alternating")
