"""FLoRA: everybody's base takes up the mean of the clients' updates, exactly; factors begin anew in every round.

    A = [p_1 s_1 A_1; ...; p_n s_n A_n],   B = [B_1, ..., B_n]     p_k = n_k / sum_{j in S} n_j,   s_k = alpha / r_k
    W0 <- W0 + B A = W0 + sum_k p_k s_k B_k A_k                    exact, whatever ranks r_k the clients have
    the next round starts from A ~ U(-1/sqrt(v), 1/sqrt(v)) and B = 0, at each client's own rank

A round's sum is a pair of rank sum_k r_k, which goes to everybody once (`Change.base`, docs/adr/0012): what a client
lacks of it is in the bytes down, and is most of them. Beyond rank min(d, v) it is the sum itself times a unit matrix,
which is exact and smaller. All that was learned is in the base: a client's own factors are B = 0 until it trains, and
an exported adapter is the sum of all rounds.

With B = 0 the gradient of A is 0 in the first local step of every round. Moments of the optimizer that go on
(`keep_optimizer`) would be those of factors that are no more: leave them off. `start: common` begins every round with
the first round's A instead of a new one. Adapters to begin with (`lora.start`) are refused: they would be lost.

Not specified in the paper: the scale; the authors' code has alpha = 2 r, so that s_k is 2 for every client. There each
client draws an A of its own; here the server draws one for all, which is in the bytes down. `weights: uniform` is ours.

Source: FLoRA (arXiv:2409.05976), Wang et al. 2024, section 3.

Checked against the public code (ATP-1010/FederatedLLM, fed_utils/model_aggregation.py: factors side by side, A times
the client's share of examples; main.py: the stack is merged into the model, from which each client begins with new
factors) and the paper's abstract, not against its text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedmira.adapters import start_adapters
from fedmira.adapters.added import stack_products
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Regime, Settings, State
from fedmira.methods.means import at_own_ranks, replace_shared, shares_of

STREAM = 0x464C6F5241  # of the starts, apart from what else is drawn from the run's seed


class Config(Settings):
    """Settings of FLoRA."""

    weights: Literal["examples", "uniform"] = "examples"  # of the sum; examples: the paper
    start: Literal["drawn", "common"] = "drawn"  # A of each round: drawn anew, as in the authors' code, or the first


def build(config: Config, cohort: Cohort) -> Method:
    """Return FLoRA as a Method."""

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        shared = state.adapters.take(torch.zeros(1, dtype=torch.int64))
        drawn = np.random.default_rng([cohort.seed, clock.round, STREAM]).integers(2**63)
        stream = torch.Generator().manual_seed(int(drawn))
        row = start_adapters(shared.layout, shared.ranks, 1.0, stream).rows.to(shared.rows.dtype)
        return Message(row.expand(len(ids), -1))

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        uploads = at_own_ranks(returned.rows, ids, state, cohort)
        begun = state.adapters.rows[torch.zeros(1, dtype=torch.int64)]  # B = 0, and stays
        return replace(replace_shared(begun), base=stack_products(uploads, shares_of(weights, config.weights)))

    return Method(
        "flora",
        merge,
        send=None if config.start == "common" else send,
        regime=Regime(starts="none"),
        facts=Facts(needs="each", weighs=config.weights == "examples", compare="products"),
    )
