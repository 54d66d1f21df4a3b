"""FedOpt: one shared adapter; the mean update of the clients is a gradient for the server's own optimizer.

    D = sum_k p_k w_k - w,   p_k = n_k / sum_{j in S} n_j   (examples)   or 1 / |S|   (uniform)
    m = b1 m + (1 - b1) D
    v = b2 v + (1 - b2) D * D                           adam      FedAdam
    v = v - (1 - b2) D * D * sign(v - D * D)            yogi      FedYogi
    v = v + D * D                                       adagrad   FedAdagrad
    w = w + eta m / (sqrt(v) + tau)
    m = b1 m + D,   w = w + eta m                       momentum  FedAvgM

All number by number, without a correction of m and v for their start, which is 0 and tau^2. Clients do what they do
in FedAvg, with any optimizer of their own; m and v are the server's and are not sent. momentum with b1 = 0 and eta = 1
is FedAvg. FedAdagrad is used with b1 = 0 in the paper.

eta and tau belong together: an update D of LoRA factors is small, and where |D| is far below tau the step is about
eta / tau times the mean of the last updates. Try several eta. The shared adapter goes on moving where it went before
even if every client returns what it was sent.

Sources: Reddi et al. 2020 (arXiv:2003.00295), Algorithms 1 and 2; FedAvgM, Hsu et al. 2019 (arXiv:1909.06335).

Checked against the authors' public code (google-research/federated, optimization/README.md: variants, tau = 0.001 to
begin with; trainer.py: a mean weighted by examples). It uses Keras' optimizers, whose Adam corrects m and v for their
start, and begins v at 0; the form above is Algorithm 2 as APPFL's documentation has it. The paper's text was not at
hand; b1 = 0.9 and b2 = 0.99 are as Flower gives them for FedAdam.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedmira.methods.base import Cohort, Facts, Method, Settings
from fedmira.methods.means import merge_mean
from fedmira.methods.wrappers import server_optimizer

TUNED = {"server_learning_rate": (0.01, 0.1, 1.0)}  # what `fedmira compare` tries
Beta = Annotated[float, Field(ge=0, lt=1)]


class Config(Settings):
    """Settings of FedOpt."""

    variant: Literal["adam", "yogi", "adagrad", "momentum"] = "adam"  # the server's optimizer
    server_learning_rate: float = Field(default=0.01, gt=0)  # eta; of momentum 1, if it is not given
    betas: tuple[Beta, Beta] = (0.9, 0.99)  # b1 of m and b2 of v; momentum and adagrad use the first
    tau: float = Field(default=1e-3, gt=0)  # added to the root of v; smaller = more adaptive
    weights: Literal["examples", "uniform"] = "examples"  # of the mean; authors' code: by examples

    @model_validator(mode="before")
    @classmethod
    def _of_momentum(cls, given: Any) -> Any:
        """A step of 0.01 D is what adam's division makes up for, and momentum does not divide."""
        if isinstance(given, dict) and given.get("variant") == "momentum":
            return {"server_learning_rate": 1.0, **given}
        return given


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedOpt as a Method."""
    fedavg = Method("fedopt", merge_mean(config.weights), facts=Facts(weighs=config.weights == "examples"))
    return server_optimizer(
        fedavg,
        variant=config.variant,
        learning_rate=config.server_learning_rate,
        betas=config.betas,
        tau=config.tau,
    )
