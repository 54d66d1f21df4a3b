"""Optimizers over rows: every client's own moments and own step count, one pass over [S, P].

An Optimizer is a value: `start` makes the memory, `update` changes rows and memory in place. `memory` is a mapping of
tensors with a leading client axis, so that a prefix of clients can be stepped while finished ones stay untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedmira.adapters import norms
from fedmira.adapters.lazy import Tensor, torch

OptimizerMemory = dict[str, Tensor]


@dataclass(frozen=True)
class Optimizer:
    """start(rows) -> memory; update(rows, gradient, memory, learning_rate) in place. keys: what `memory` holds.

    learning_rate: one for all rows, or float64 [S, 1], one for each.
    """

    name: str
    keys: tuple[str, ...]
    start: Callable[[Tensor], OptimizerMemory]
    update: Callable[[Tensor, Tensor, OptimizerMemory, float | Tensor], None]


def descend_(rows: Tensor, direction: Tensor, learning_rate: float | Tensor) -> None:
    """Subtract learning_rate x direction from rows [S, P], in place. learning_rate: a number, or [S, 1]."""
    if isinstance(learning_rate, Tensor):
        rows.sub_(direction * learning_rate.to(rows.dtype))
    else:
        rows.add_(direction, alpha=-learning_rate)


def decay_(rows: Tensor, share: float | Tensor) -> None:
    """Multiply rows [S, P] by 1 - share, in place. share: learning rate x weight decay, a number or [S, 1]."""
    remaining = 1 - share
    rows.mul_(remaining.to(rows.dtype) if isinstance(remaining, Tensor) else remaining)


def adamw(*, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0) -> Optimizer:
    """AdamW on each row: torch.optim.AdamW's fused kernel, to the bit as if each client were alone.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w = w - lr wd w - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    rows, gradient [S, P]; memory: moment_1, moment_2 [S, P] and steps [S].
    Source: Loshchilov & Hutter 2019 (arXiv:1711.05101), Algorithm 2.
    """

    def start(rows: Tensor) -> OptimizerMemory:
        return {
            "moment_1": torch.zeros_like(rows, memory_format=torch.contiguous_format),
            "moment_2": torch.zeros_like(rows, memory_format=torch.contiguous_format),
            "steps": torch.zeros(len(rows), dtype=torch.int64),
        }

    def update(rows: Tensor, gradient: Tensor, memory: OptimizerMemory, learning_rate: float | Tensor) -> None:
        from torch.optim.adamw import adamw as step

        # One tensor for each client, so that each number meets the same place of the kernel's vectors as it does alone.
        # The kernel takes memory in order, whatever the strides are.
        moved, pushed = rows.contiguous(), gradient.contiguous()
        steps = memory["steps"].to(device=rows.device, dtype=torch.float32)  # the kernel's type; exact up to 2^24
        for rate, clients in _by_rate(learning_rate, len(rows)).items():
            step(
                [moved[k] for k in clients],
                [pushed[k] for k in clients],
                [memory["moment_1"][k] for k in clients],
                [memory["moment_2"][k] for k in clients],
                [],
                [steps[k] for k in clients],
                fused=True,
                amsgrad=False,
                beta1=betas[0],
                beta2=betas[1],
                lr=rate,
                weight_decay=weight_decay,
                eps=eps,
                maximize=False,
            )
        memory["steps"] += 1
        if moved is not rows:
            rows.copy_(moved)

    return Optimizer("adamw", ("moment_1", "moment_2", "steps"), start, update)


def _by_rate(learning_rate: float | Tensor, clients: int) -> dict[float, list[int]]:
    """Return learning rate -> positions of the clients that have it."""
    if not isinstance(learning_rate, Tensor):
        return {learning_rate: list(range(clients))}
    groups: dict[float, list[int]] = {}
    for client, rate in enumerate(learning_rate.flatten().tolist()):
        groups.setdefault(rate, []).append(client)
    return groups


def sgd(*, momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """SGD on each row with torch's conventions: g <- g + wd w; b <- momentum b + g; w <- w - lr b.

    rows, gradient [S, P]; memory: velocity [S, P] with momentum, else nothing.
    """

    def start(rows: Tensor) -> OptimizerMemory:
        return {"velocity": torch.zeros_like(rows)} if momentum else {}

    def update(rows: Tensor, gradient: Tensor, memory: OptimizerMemory, learning_rate: float | Tensor) -> None:
        push = gradient.add(rows, alpha=weight_decay) if weight_decay else gradient
        if momentum:
            push = memory["velocity"].mul_(momentum).add_(push)
        descend_(rows, push, learning_rate)

    return Optimizer("sgd", ("velocity",) if momentum else (), start, update)


def on_columns(optimizer: Optimizer, columns: Tensor) -> Optimizer:
    """Return the optimizer that moves, decays and remembers these columns (bool [P]) alone; the others stay the same.

    Source: optax.masked, over columns of a flat row.
    """
    chosen = columns.nonzero().flatten()

    def update(rows: Tensor, gradient: Tensor, memory: OptimizerMemory, learning_rate: float | Tensor) -> None:
        part = rows[:, chosen]
        packed = {name: value if value.ndim == 1 else value[:, chosen] for name, value in memory.items()}
        optimizer.update(part, gradient[:, chosen], packed, learning_rate)
        rows[:, chosen] = part
        for name, value in packed.items():
            if value.ndim > 1:
                memory[name][:, chosen] = value

    return Optimizer(optimizer.name, optimizer.keys, optimizer.start, update)


def clip_(gradient: Tensor, max_norm: float) -> Tensor:
    """Scale, in place, every client's gradient row to at most max_norm; return the norms before [S] (float64)."""
    before = norms(gradient)
    gradient.mul_((max_norm / before.clamp(min=max_norm)).to(gradient.dtype)[:, None])
    return before
