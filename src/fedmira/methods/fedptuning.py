"""FedPTuning: one prompt encoder for all instead of LoRA, the mean of what the sampled clients return.

    E = W2 relu(W1 relu(W0 V + b0) + b1) + b2,   V [n, d], W0 [h, d], W1 [h, h], W2 [d, h]
    theta = sum_k p_k theta_k,   theta = (V, W0, b0, W1, b1, W2, b2),   p_k = n_k / sum_{j in S} n_j  or  1 / |S|

The n virtual tokens E [n, d] precede every text; the base has no other adapter. The encoder travels, not its output:
n d + 2 d h + h^2 + 2 h + d numbers. Only the embeddings E are exported at the end, as PEFT stores them; the encoder
stays in the run's checkpoints. The untouched base is the base without virtual tokens.
Sources: P-tuning, Liu et al. 2021 (arXiv:2103.10385), as PEFT's PromptEncoder with an MLP; federated as in
FederatedScope-LLM, Kuang et al. 2023 (arXiv:2309.00363): FedAvg of the encoder, 20 virtual tokens.

Checked against PEFT's PromptEncoder, the public code of FederatedScope (b108283) and that of MIRA: 20 tokens, width
128, weights by examples. The client of MIRA's code (client_ptuning.py, be23360) seems to upload only E, which its
server then uses as V, so that the encoder is never averaged; that was read, not run.
"""

from typing import Annotated, Literal

from pydantic import Field

from fedmira.adapters import Layout, prompt_layout
from fedmira.methods.base import Cohort, Facts, Method, Regime, Settings
from fedmira.methods.means import merge_mean


class Config(Settings):
    """Settings of FedPTuning."""

    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20  # n, before every text; they take positions of the base
    hidden: Annotated[int, Field(ge=1, le=65536)] = 128  # h, width of the encoder's inner layers
    weights: Literal["examples", "uniform"] = "examples"  # of the mean over clients
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # of its clients; null: that of training, as for LoRA

    @property
    def tokens_ahead(self) -> int:
        return self.virtual_tokens


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedPTuning as a Method."""

    def layout(lora: Layout, width: int) -> Layout:
        return prompt_layout(width, config.virtual_tokens, config.hidden)

    return Method(
        "fedptuning",
        merge_mean(config.weights),
        layout=layout,
        regime=Regime(learning_rate=config.learning_rate),
        facts=Facts(weighs=config.weights == "examples"),
    )
