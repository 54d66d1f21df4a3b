"""FedAvg-FT: FedAvg, and after the last round every client fine-tunes the shared adapter on its own data.

    w^(t+1) = sum_k p_k w_k^(t),   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)
    v_k     = w^(T) after n local steps of client k alone,   for all k

w is the pair (B, A), averaged factor by factor as in FedAvg. The v_k are tested and exported; clients that were never
sampled fine-tune too. The server never sees them, so that later rounds continue from w^(T). The local optimizer,
learning rate and batch size are those of the rounds; steps or passes are settings here, as the papers leave them open.
It is the usual remedy for a shared model that fits nobody, and the baseline that a personal method has to beat.

Sources: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1; Collins et al. 2022 (arXiv:2205.13692), section 2.

Checked against the abstract of the second paper alone (a few steps of fine-tuning on what FedAvg ends with), not
against its section 2 or any code.
"""

from typing import Literal

from pydantic import Field, model_validator

from fedmira.methods.base import Cohort, Facts, Method, Settings
from fedmira.methods.means import merge_mean
from fedmira.methods.wrappers import tuned_after


class Config(Settings):
    """Settings of FedAvg-FT."""

    weights: Literal["examples", "uniform"] = "examples"  # of the mean; FedIT weights by training examples
    steps: int | None = Field(default=None, ge=1)  # local steps of every client after the last round
    epochs: int | None = Field(default=None, ge=1)  # or passes over its own training examples; neither = one pass

    @model_validator(mode="after")
    def _one_length(self) -> "Config":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"found steps: {self.steps} and epochs: {self.epochs}; fine-tuning takes one of them")
        return self


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedAvg-FT as a Method."""
    shared = Method("fedavg_ft", merge_mean(config.weights), facts=Facts(weighs=config.weights == "examples"))
    return tuned_after(shared, steps=config.steps, epochs=config.epochs)
