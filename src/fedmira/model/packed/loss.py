"""Cross-entropy at labelled tokens only, in chunks, its gradient computed in the same chunks.

For hidden states h_i [d] at labelled positions, head W [V, d], target y_i and weight w_i:

    l_i = logsumexp(W h_i) - (W h_i)[y_i]
    loss = sum_i w_i l_i;   dloss/dh_i = w_i W^T (softmax(W h_i) - e_{y_i})

Targets are given, or drawn from the model itself. Logits are never stored: [chunk, V] is in memory for one chunk, in
float32 for the softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # float32 logits in memory at once


@dataclass(frozen=True)
class Head:
    """The output projection and what some architectures do to its logits.

    logits = cap * tanh(m / cap) with m = scale * (W h + b); cap None: no cap (Gemma 2 caps, Cohere and Granite scale).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 (or wider) logits [n, V] of hidden states [n, d]."""
        out = torch.nn.functional.linear(hidden, self.weight, self.bias)
        out = out if out.dtype == torch.float64 else out.float()
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.cap is None else self.cap * torch.tanh(out / self.cap)


def token_losses(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return the cross-entropy of every token [n] in nats, without gradient."""
    losses = torch.empty(len(targets), dtype=_wide(hidden), device=hidden.device)
    with torch.no_grad():
        for start, stop in _chunks(len(targets), len(head.weight)):
            logits = head.logits(hidden[start:stop])
            losses[start:stop] = _cross_entropy(logits, targets[start:stop])
    return losses


def weighted_loss(hidden: Tensor, targets: Tensor, weights: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return (sum_i w_i l_i with its gradient, l_i [n] detached). hidden [n, d], targets [n], weights [n]."""
    return _WeightedLoss.apply(hidden, targets, weights, head, False)  # type: ignore[no-untyped-call]


def sampled_loss(hidden: Tensor, numbers: Tensor, weights: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return what weighted_loss does for targets y_i ~ softmax(logits_i), which are constants in the gradient.

    y_i is the first token at which the cumulative probability exceeds numbers_i, so that numbers [n], uniform in
    [0, 1), decide. hidden [n, d], weights [n].
    """
    return _WeightedLoss.apply(hidden, numbers, weights, head, True)  # type: ignore[no-untyped-call]


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: object, hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, drawn: bool
    ) -> tuple[Tensor, Tensor]:
        """drawn: `targets` are the numbers by which to draw them."""
        gradient = torch.empty_like(hidden)
        losses = torch.empty(len(targets), dtype=_wide(hidden), device=hidden.device)
        for start, stop in _chunks(len(targets), len(head.weight)):
            logits = head.logits(hidden[start:stop])
            push = torch.softmax(logits, dim=1)
            tokens = targets[start:stop, None]
            if drawn:
                tokens = _draw(push, tokens)
            # The largest probability is 1 / sum_v exp(logit_v - largest logit): no second pass of exponentials.
            total = logits.amax(1) - push.amax(1).log()
            losses[start:stop] = total - logits.gather(1, tokens).squeeze(1)
            push.scatter_add_(1, tokens, push.new_full((1, 1), -1.0).expand(len(tokens), 1))
            if head.cap is not None:
                push.mul_(1 - (logits / head.cap).square())
            push.mul_(weights[start:stop, None].to(push.dtype) * head.scale)
            gradient[start:stop] = push.to(hidden.dtype) @ head.weight
        ctx.save_for_backward(gradient)  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(losses)  # type: ignore[attr-defined]
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def _draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return, for each of [n, V], the first token whose cumulative sum exceeds numbers [n, 1] times the whole sum.

    Rounding may leave none, and where logits are not finite there is none: the last token then.
    """
    sums = probabilities.cumsum(dim=1)
    tokens = torch.searchsorted(sums, numbers.to(sums.dtype) * sums[:, -1:], right=True)
    return tokens.clamp_(max=sums.shape[1] - 1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.logsumexp(logits, dim=1) - logits.gather(1, targets[:, None]).squeeze(1)


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunks(count: int, vocabulary: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [(start, min(start + size, count)) for start in range(0, count, size)]
