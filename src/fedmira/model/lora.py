"""Stacked LoRA: one frozen linear layer, one pair of factors per client, one pass for all of them.

    y_k = W x_k + b + s_k B_k (A_k x_k)          for every client k of the stack, s_k = alpha / r_k

Clients are stacked along the batch: activations [S*B, T, in] are seen as [S, B*T, in] and the low-rank part is a `bmm`
over the leading client axis. Gradients of A and B are written straight into gradient rows [S, P]; the rows themselves
never enter the autograd graph, because each slice of a row would zero-fill a whole [S, P] on the way back.

Source: Hu et al. 2021 (arXiv:2106.09685), equation 3; Conv1D (GPT-2) keeps its weight as [in, out].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedmira.adapters import Adapters
from fedmira.errors import ModelError, nearest


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout of one pass: rate p and one stream per client, so that a client's masks depend on it alone.

    lengths [S]: the longest example of each client; masks are drawn for that length only, whatever the padding is.
    """

    rate: float
    seeds: Sequence[int]
    lengths: Sequence[int]

    def mask(self, slot: int, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        """Return multipliers [S, B*T, in]: 0 with probability p, else 1 / (1 - p)."""
        clients, batch, tokens, width = shape
        keep = torch.ones(clients, batch, tokens, width, dtype=like.dtype)
        for client, (seed, length) in enumerate(zip(self.seeds, self.lengths, strict=True)):
            stream = torch.Generator().manual_seed((seed * 1_000_003 + slot) % 2**63)
            drawn = torch.rand(batch, length, width, generator=stream) >= self.rate
            keep[client, :, :length] = drawn.to(like.dtype) / (1 - self.rate)
        return keep.view(clients, batch * tokens, width).to(like.device)


@dataclass
class Pair:
    """One adapter of one module for all clients: a [S, r, in], b [S, out, r], scale [S, 1, 1] and gradient views."""

    a: Tensor
    b: Tensor
    scale: Tensor
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None
    written: bool = False  # a module used twice in one pass adds its second gradient

    def write(self, grad_a: Tensor, grad_b: Tensor) -> None:
        assert self.grad_a is not None
        assert self.grad_b is not None
        if self.written:
            self.grad_a.add_(grad_a)
            self.grad_b.add_(grad_b)
        else:
            self.grad_a.copy_(grad_a)
            self.grad_b.copy_(grad_b)
            self.written = True


@dataclass
class Stack:
    """What the stacked layers of one base read during a pass; empty means the untouched base."""

    clients: int = 0
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    dropout: Dropout | None = None
    anchor: Tensor | None = None  # makes the first adapted layer differentiable although its input is not

    def fill(
        self, adapters: Adapters, *, dtype: torch.dtype, gradient: Tensor | None = None, dropout: Dropout | None = None
    ) -> None:
        """Point every layer at its leaves; `gradient` [S, P] receives what backward computes."""
        rows = adapters.rows.to(dtype)
        scale = adapters.scale.to(device=rows.device, dtype=dtype)[:, None, None]
        cast = adapters.with_rows(rows)
        into = None if gradient is None else adapters.with_rows(gradient)
        self.pairs = {}
        for part in adapters.layout.parts:
            if not part.served:
                continue
            for first, second in part.pairs():
                pair = Pair(cast.leaf(first), cast.leaf(second), scale)
                if into is not None and part.trained:
                    pair.grad_a, pair.grad_b = into.leaf(first), into.leaf(second)
                self.pairs.setdefault(first.module, []).append(pair)
        self.clients = len(adapters)
        self.dropout = dropout if dropout is not None and dropout.rate > 0 else None
        self.anchor = None if gradient is None else torch.zeros((), requires_grad=True, device=rows.device)

    def clear(self) -> None:
        self.clients, self.pairs, self.dropout, self.anchor = 0, {}, None, None


class StackedLinear(nn.Module):
    """A frozen Linear or Conv1D that adds each client's own low-rank update to that client's part of the batch."""

    def __init__(self, base: nn.Linear | Conv1D, stack: Stack, *, name: str, slot: int) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.transposed = isinstance(base, Conv1D)  # weight is [in, out]
        self.stack, self.name, self.slot = stack, name, slot

    def plain(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.stack.pairs.get(self.name)
        if not pairs:
            return self.plain(x)
        if self.stack.anchor is not None and torch.is_grad_enabled():
            return _StackedLinear.apply(x, self.stack.anchor, self, pairs)  # type: ignore[no-untyped-call]
        y = self.plain(x)
        by_client = y.view(self.stack.clients, -1, y.shape[-1])
        stacked = x.reshape(self.stack.clients, -1, x.shape[-1])
        for pair in pairs:
            by_client.baddbmm_(torch.bmm(stacked, pair.a.mT) * pair.scale, pair.b.mT)
        return y


class _StackedLinear(torch.autograd.Function):
    """Forward and backward of one stacked layer; the frozen weight gets no gradient, the factors write theirs away."""

    @staticmethod
    def forward(ctx: object, x: Tensor, anchor: Tensor, layer: StackedLinear, pairs: list[Pair]) -> Tensor:
        clients = layer.stack.clients
        y = layer.plain(x)
        by_client = y.view(clients, -1, y.shape[-1])
        stacked = x.reshape(clients, -1, x.shape[-1])
        keep = None
        if layer.stack.dropout is not None:
            shape = (clients, x.shape[0] // clients, x.shape[1], x.shape[2])
            keep = layer.stack.dropout.mask(layer.slot, shape, x)
        given = stacked if keep is None else stacked * keep
        inner = [torch.bmm(given, pair.a.mT).mul_(pair.scale) for pair in pairs]
        for pair, z in zip(pairs, inner, strict=True):
            by_client.baddbmm_(z, pair.b.mT)
        ctx.save_for_backward(given, keep, *inner)  # type: ignore[attr-defined]
        ctx.layer, ctx.pairs = layer, pairs  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, keep, *inner = ctx.saved_tensors  # type: ignore[attr-defined]
        layer: StackedLinear = ctx.layer  # type: ignore[attr-defined]
        pairs: list[Pair] = ctx.pairs  # type: ignore[attr-defined]
        (dy,) = grads
        dy3 = dy.reshape(given.shape[0], -1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            dx = dy @ (layer.weight.t() if layer.transposed else layer.weight)
        for pair, z in zip(pairs, inner, strict=True):
            dz = torch.bmm(dy3, pair.b).mul_(pair.scale)
            if pair.grad_a is not None:
                pair.write(torch.bmm(dz.mT, given), torch.bmm(dy3.mT, z))
            if dx is not None:
                by_client = dx.view(given.shape)
                if keep is None:
                    by_client.baddbmm_(dz, pair.a)
                else:
                    by_client.add_(torch.bmm(dz, pair.a).mul_(keep))
        return dx, None, None, None


def find_targets(model: nn.Module, targets: Sequence[str] | str, *, head: nn.Module | None) -> list[str]:
    """Return the full names of the modules to adapt, in the model's order.

    targets: name endings as in PEFT (`q_proj` matches every `...q_proj`), or "all-linear" (all but the output head).
    Raises ModelError if a name matches nothing, or matches a module that is no Linear or Conv1D.
    """
    linear = [name for name, module in _linears(model) if module is not head]
    if targets == "all-linear":
        return linear
    wanted = [targets] if isinstance(targets, str) else list(targets)
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    chosen: set[str] = set()
    for target in wanted:
        matches = [name for name, _ in model.named_modules() if name == target or name.endswith("." + target)]
        if not matches:
            raise ModelError(
                f"lora.target_modules: '{target}' names no module of {type(model).__name__}{nearest(target, endings)}; "
                f"its linear layers end in: {', '.join(endings)} (or use all-linear)"
            )
        odd = [name for name in matches if name not in linear]
        if odd:
            kind = type(model.get_submodule(odd[0])).__name__
            raise ModelError(
                f"lora.target_modules: '{odd[0]}' is a {kind}; adapters go on linear layers below the head"
            )
        chosen.update(matches)
    return [name for name in linear if name in chosen]


def install(model: nn.Module, names: Sequence[str], stack: Stack) -> list[tuple[str, int, int]]:
    """Replace the named layers by stacked ones; return (name, in, out) of each, in order."""
    shapes = []
    for slot, name in enumerate(names):
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | Conv1D)
        layer = StackedLinear(base, stack, name=name, slot=slot)
        model.set_submodule(name, layer)
        first, second = base.weight.shape
        shapes.append((name, first, second) if layer.transposed else (name, second, first))
    return shapes


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module
