"""FedProx: FedAvg whose clients stay near the shared adapter, by a penalty on their distance from it.

    client:  w_k = w_k - eta (grad f_k(w_k) + mu (w_k - w)),   loss f_k(w_k) + mu/2 ||w_k - w||^2, w: what was sent
    server:  w = sum_k p_k w_k,   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)

w is the pair (B, A); the distance is over both factors together. The gradient goes through the config's optimizer,
clipping included. With mu = 0 it is FedAvg. The first step of a round is FedAvg's for any mu, as w_k is w there: with
one local step mu has no effect.

The paper's clients may also do different amounts of work. Here every client takes the steps that the config asks for.
There is no default for mu in the paper, which tries 0.001, 0.01, 0.1 and 1 and takes the best for each data set. A
gradient of an adapter is of another size than one of a whole model, so try them all.

Source: Li et al. 2020 (arXiv:1812.06127), Algorithm 2.

Checked against the authors' public code (litian96/FedProx, flearn/optimizer/pgd.py: the step; trainers/fedbase.py: the
mean by examples; README: values of mu). The paper's text was not at hand; in its Algorithm 2, as far as known, clients
are drawn by their numbers of examples and then averaged uniformly, which the code does the other way round.
"""

from typing import Literal

from pydantic import Field

from fedmira.methods.base import Cohort, Facts, Method, Settings
from fedmira.methods.means import merge_mean
from fedmira.methods.wrappers import proximal

TUNED = {"mu": (0.001, 0.01, 0.1, 1.0)}  # what `fedmira compare` tries


class Config(Settings):
    """Settings of FedProx."""

    mu: float = Field(default=0.01, ge=0)  # pull back to what was sent, per unit of distance; 0 = FedAvg
    weights: Literal["examples", "uniform"] = "examples"  # of the mean; authors' code: by examples


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedProx as a Method."""
    fedavg = Method("fedprox", merge_mean(config.weights), facts=Facts(weighs=config.weights == "examples"))
    return proximal(fedavg, mu=config.mu)
