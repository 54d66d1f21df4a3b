"""PFTT: every client has two adapters, one that all share and average, and one of its own that never leaves it.

    y = W x + s B_k A_k x + s B A x            own part k, shared part
    local:   both parts take the steps of client k's loss together
    server:  (B, A) = sum_{k in S} p_k (B, A)_k,   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)

The client uses the sum of both. Only the shared part travels, so that a round costs what FedAvg's costs, and the
client's memory, and its training, hold twice the numbers. Both parts have the client's rank and begin at B = 0. Without
the shared part it is local training.

In the paper the shared part consists of adapter layers (two dense layers with a bottleneck, in each block) and the own
part of LoRA; here both are LoRA, on the same modules. The paper leaves the weights of the mean and the ranks open. Its
second scheme, PFIT, needs a reward model and reinforcement learning and is not offered.

Source: Jiang et al. 2024, Personalized Wireless Federated Learning for Large Language Models (arXiv:2404.13238).

Checked against the abstract of the paper alone: global adapters are aggregated, local LoRAs are not.
"""

from typing import Literal

from fedmira.adapters import Layout
from fedmira.adapters.lazy import Tensor
from fedmira.adapters.parts import SHARED, own_and_shared, part_columns
from fedmira.methods.base import Clock, Cohort, Facts, Method, Settings
from fedmira.methods.means import merge_mean


class Config(Settings):
    """Settings of PFTT."""

    weights: Literal["examples", "uniform"] = "examples"  # in the mean of the shared part


def build(config: Config, cohort: Cohort) -> Method:
    """Return PFTT as a Method."""

    def travels(layout: Layout, clock: Clock) -> Tensor:
        return part_columns(layout, SHARED)

    return Method(
        "pftt",
        merge_mean(config.weights),
        layout=own_and_shared,
        travels=travels,
        facts=Facts(weighs=config.weights == "examples"),
    )
