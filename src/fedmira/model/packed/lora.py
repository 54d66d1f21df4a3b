"""Stacked LoRA: one frozen linear layer, one pair of factors per client, one pass for all of them.

    y_k = W x_k + b + s_k B_k (A_k x_k)          for every client k of the stack, s_k = alpha / r_k

Where a method has added pairs to the base, W x is W x + B (A x), the same for all clients.
Clients come one after another in the pass; a segment of clients with equally many tokens is viewed as [clients, tokens,
in] and the low-rank part is a `bmm` over the leading client axis. Gradients of A and B are written straight into
gradient rows [S, P]; the rows themselves never enter the autograd graph, because each slice of a row would zero-fill a
whole [S, P] on the way back.

Source: Hu et al. 2021 (arXiv:2106.09685), equation 3; Conv1D (GPT-2) keeps its weight as [in, out].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedmira.adapters import Adapters
from fedmira.model.packed.packing import Segment
from fedmira.model.packed.virtual import VirtualTokens, make_virtual_tokens
from fedmira.model.quantised import QuantisedLinear


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout of one pass: rate p and a stream per client of the stack, so that masks depend on it alone."""

    rate: float
    seeds: Sequence[int]

    def mask(self, slot: int, segment: Segment, like: Tensor) -> Tensor:
        """Return multipliers [clients, tokens, in] of a segment: 0 with probability p, else 1 / (1 - p).

        Drawn for a client's real tokens in their order, so other clients of the pass do not matter.
        """
        width = like.shape[-1]
        keep = torch.ones(segment.stop - segment.first, segment.tokens, width, dtype=like.dtype)
        for client, real in enumerate(segment.real, start=segment.first):
            count = real.stop if isinstance(real, slice) else len(real)
            stream = torch.Generator().manual_seed((self.seeds[client] * 1_000_003 + slot) % 2**63)
            drawn = torch.rand(count, width, generator=stream) >= self.rate
            keep[client - segment.first, real] = drawn.to(like.dtype) / (1 - self.rate)
        return keep.to(like.device)


@dataclass
class Pair:
    """The factors of one module for all clients: a [S, r, in], b [S, out, r], scale [S, 1, 1] and gradient views.

    a and b may be views of rows, in the rows' type: `of` makes them what products take.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None
    written: bool = False  # a module used twice in one pass adds its second gradient

    def of(self, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, B and scale of a segment's clients."""
        clients = slice(segment.first, segment.stop)
        scale = self.scale[clients]
        return _factor(self.a[clients], scale.dtype), _factor(self.b[clients], scale.dtype), scale

    def clear_unwritten(self) -> None:
        """Set the gradient of a module that took no part in the pass to 0: it may be that of an earlier pass."""
        if self.grad_a is not None and self.grad_b is not None and not self.written:
            self.grad_a.zero_()
            self.grad_b.zero_()

    def write(self, first: int, stop: int, grad_a: Tensor, grad_b: Tensor) -> None:
        """Write the gradients of clients first..stop."""
        assert self.grad_a is not None
        assert self.grad_b is not None
        if self.written:
            self.grad_a[first:stop].add_(grad_a)
            self.grad_b[first:stop].add_(grad_b)
        else:
            self.grad_a[first:stop].copy_(grad_a)
            self.grad_b[first:stop].copy_(grad_b)


@dataclass
class Stack:
    """What the stacked layers of one base read in a pass, and its virtual tokens; empty: the base alone.

    added: module -> factors A [q, in] and B [out, q] that are added to its weight.
    """

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    added: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    virtual: VirtualTokens | None = None
    segments: tuple[Segment, ...] | None = None  # None: the batch is split evenly among the clients
    clients: int = 0
    dropout: Dropout | None = None
    anchor: Tensor | None = None  # makes the first adapted layer differentiable although its input is not

    @contextmanager
    def filled(
        self,
        adapters: Adapters,
        *,
        dtype: torch.dtype,
        device: torch.device,
        segments: tuple[Segment, ...] | None = None,
        gradient: Tensor | None = None,
        dropout: Dropout | None = None,
        frugal: bool = False,
    ) -> Iterator[None]:
        """Point every layer at its leaves for one pass; `gradient` [S, P] receives what backward computes.

        frugal: factors are copied out of the rows at each use and not once for the pass, so that one layer's are there.
        """
        local = adapters.with_rows(adapters.rows.to(device))
        device = local.rows.device
        scale = adapters.scale.to(device=device, dtype=dtype)[..., None, None]  # [S, 1, 1] or [S, modules, 1, 1]

        into = None if gradient is None else adapters.with_rows(gradient)
        encoder = next((part for part in adapters.layout.parts if part.kind == "prompt"), None)
        trained = encoder is not None and into is not None
        if encoder is not None:
            self.virtual = make_virtual_tokens(encoder, adapters, dtype=dtype, device=device, differentiable=trained)
        for part in adapters.layout.parts:
            for number, (first, second) in enumerate(part.pairs()):
                pair_scale = scale if scale.ndim == 3 else scale[:, number]
                a, b = local.leaf(first), local.leaf(second)
                pair = Pair(a, b, pair_scale) if frugal else Pair(_factor(a, dtype), _factor(b, dtype), pair_scale)
                if into is not None:
                    pair.grad_a, pair.grad_b = into.leaf(first), into.leaf(second)
                self.pairs.setdefault(first.module, []).append(pair)
        del local  # on a device it is a copy of all rows
        self.added = {
            module: (a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype))
            for module, (a, b) in adapters.added.items()
        }
        self.segments, self.clients = segments, len(adapters)
        self.dropout = dropout if dropout is not None and dropout.rate > 0 else None
        self.anchor = None if gradient is None else torch.zeros((), requires_grad=True, device=device)
        try:
            yield
            for pair in (pair for pairs in self.pairs.values() for pair in pairs):
                pair.clear_unwritten()
            if trained and self.virtual is not None and encoder is not None and into is not None:
                self.virtual.write(encoder, into)
        finally:
            self.pairs, self.added, self.virtual, self.segments, self.clients = {}, {}, None, None, 0
            self.dropout = self.anchor = None

    def owners(self, tokens: int) -> Tensor:
        """Return the client of each of `tokens` tokens of a pass, on the host."""
        segments = self.split(tokens)
        return torch.cat([torch.arange(s.first, s.stop).repeat_interleave(s.tokens) for s in segments])

    def split(self, tokens: int) -> tuple[Segment, ...]:
        """Return the segments of a sequence of `tokens` tokens."""
        if self.segments is not None:
            return self.segments
        each = tokens // self.clients
        return (Segment(0, self.clients, 0, each, (slice(0, each),) * self.clients),)


def _factor(of_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor of some clients [S, ...] in separate memory: every product with a view of rows would copy it."""
    return of_rows.to(dtype).contiguous()


class StackedLinear(nn.Module):
    """A frozen Linear or Conv1D that adds each client's low-rank update to that client's tokens."""

    def __init__(self, base: nn.Linear | Conv1D, stack: Stack, *, name: str, slot: int) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.transposed = isinstance(base, Conv1D)  # weight is [in, out]
        self.stack, self.name, self.slot = stack, name, slot
        self.quantised = base if isinstance(base, QuantisedLinear) else None

    def dense(self) -> Tensor:
        """Return the weight [out, in]; one in 4 or 8 bits is made dense for this call."""
        if self.quantised is not None:
            return self.quantised.dense()
        return self.weight.t() if self.transposed else self.weight

    def plain(self, x: Tensor) -> Tensor:
        """Compute the base's layer, with what was added to it."""
        y = functional.linear(x, self.dense(), self.bias)
        if self.name in self.stack.added:
            a, b = self.stack.added[self.name]
            y = y + functional.linear(functional.linear(x, a), b)
        return y

    def plain_backward(self, dy: Tensor, added: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the gradient of the input [tokens, in] of `plain` from that of its output [tokens, out]."""
        dx = dy @ self.dense()
        if added is not None:
            a, b = added
            dx.addmm_(dy @ b, a)
        return dx

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.stack.pairs.get(self.name, [])
        if self.quantised is not None and torch.is_grad_enabled() and x.requires_grad:  # else a dense weight is kept
            anchor = x.new_zeros(()) if self.stack.anchor is None else self.stack.anchor
            return _StackedLinear.apply(x, anchor, self, pairs)  # type: ignore[no-untyped-call]
        if not pairs:
            return self.plain(x)
        if self.stack.anchor is not None and torch.is_grad_enabled():
            return _StackedLinear.apply(x, self.stack.anchor, self, pairs)  # type: ignore[no-untyped-call]
        y = self.plain(x)
        outputs, inputs = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        for segment in self.stack.split(len(inputs)):
            outs, ins = segment.view(outputs), segment.view(inputs)
            for pair in pairs:
                a, b, scale = pair.of(segment)
                outs.baddbmm_(torch.bmm(ins, a.mT) * scale, b.mT)
        return y


class _StackedLinear(torch.autograd.Function):
    """Forward and backward of one stacked layer; the frozen weight gets no gradient, the factors write theirs."""

    @staticmethod
    def forward(ctx: object, x: Tensor, anchor: Tensor, layer: StackedLinear, pairs: list[Pair]) -> Tensor:
        y = layer.plain(x)
        outputs, inputs = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        segments = layer.stack.split(len(inputs))
        dropout = layer.stack.dropout
        keeps: list[Tensor | None] = []
        inner: list[Tensor] = []  # s (A x), per segment and pair
        for segment in segments:
            outs, ins = segment.view(outputs), segment.view(inputs)
            keep = None if dropout is None else dropout.mask(layer.slot, segment, ins)
            ins = ins if keep is None else ins * keep
            keeps.append(keep)
            for pair in pairs:
                a, b, scale = pair.of(segment)
                z = torch.bmm(ins, a.mT).mul_(scale)
                outs.baddbmm_(z, b.mT)
                inner.append(z)
        ctx.save_for_backward(inputs, *inner, *keeps)  # type: ignore[attr-defined]
        ctx.layer, ctx.pairs, ctx.segments, ctx.shape = layer, pairs, segments, x.shape  # type: ignore[attr-defined]
        ctx.added = layer.stack.added.get(layer.name)  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: StackedLinear = ctx.layer  # type: ignore[attr-defined]
        pairs: list[Pair] = ctx.pairs  # type: ignore[attr-defined]
        segments: tuple[Segment, ...] = ctx.segments  # type: ignore[attr-defined]
        inputs, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        inner, keeps = saved[: -len(segments)], saved[-len(segments) :]
        dy = grads[0].reshape(len(inputs), -1)
        dx = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            dx = layer.plain_backward(dy, ctx.added)  # type: ignore[attr-defined]
        for number, (segment, keep) in enumerate(zip(segments, keeps, strict=True)):
            push, ins = segment.view(dy), segment.view(inputs)
            ins = ins if keep is None else ins * keep
            for pair_number, pair in enumerate(pairs):
                a, b, scale = pair.of(segment)
                dz = torch.bmm(push, b).mul_(scale)
                if pair.grad_a is not None:
                    z = inner[number * len(pairs) + pair_number]
                    pair.write(segment.first, segment.stop, torch.bmm(dz.mT, ins), torch.bmm(push.mT, z))
                if dx is not None:
                    back = segment.view(dx)
                    if keep is None:
                        back.baddbmm_(dz, a)
                    else:
                        back.add_(torch.bmm(dz, a).mul_(keep))
        for pair in pairs:
            pair.written = True
        return None if dx is None else dx.view(ctx.shape), None, None, None  # type: ignore[attr-defined]


def install(model: nn.Module, names: Sequence[str], stack: Stack) -> list[tuple[str, int, int]]:
    """Replace the named layers by stacked ones; return (name, in, out) of each, in order."""
    shapes = []
    for slot, name in enumerate(names):
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | Conv1D)
        model.set_submodule(name, StackedLinear(base, stack, name=name, slot=slot))
        first, second = base.weight.shape if isinstance(base, Conv1D) else (base.in_features, base.out_features)
        shapes.append((name, first, second))
    return shapes
