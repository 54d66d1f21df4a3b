"""FedSA-LoRA: every client trains A and B; A is the mean of all, B stays with the client and never leaves it.

    A = sum_k p_k A_k,   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)
    client k uses s B_k A, and trains both factors from there

In the paper A carries what clients have in common, and B what is their own. Only A travels: half of FedAvg's bytes
where a module is square, v / (d + v) of them in general (v: width of its input). B_k begins at 0, as all of LoRA's do,
and the server never sees it. So a client that was not sampled yet uses the base as it is, whatever A has become. A B_k
that rests for some rounds meets an A that has moved meanwhile.

The paper's classifier head, which stays with the client too, is not part of an adapter for generation.

Source: Guo et al. 2025 (arXiv:2410.01463, ICLR 2025).

Checked against the authors' public code (Pengxin-Guo/FedSA-LoRA, federatedscope/glue/yamls/fedsa-lora.yaml:
`local_param: ['lora_B', 'classifier']`, everything trained) and the abstract.
"""

from typing import Literal

from fedmira.methods.base import Cohort, Facts, Method, Settings
from fedmira.methods.means import merge_mean
from fedmira.methods.wrappers import only


class Config(Settings):
    """Settings of FedSA-LoRA."""

    weights: Literal["examples", "uniform"] = "examples"  # of the mean of A; FederatedScope weights by examples


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedSA-LoRA as a Method."""
    fedavg = Method("fedsa_lora", merge_mean(config.weights), facts=Facts(weighs=config.weights == "examples"))
    return only(fedavg, travels="A")
