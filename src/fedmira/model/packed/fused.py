"""Layers of a base with a gradient that reads memory less often than the code that transformers composes.

    RMSNorm            y = x r w,  r = (mean(x^2) + eps)^(-1/2)
                       dx = r (w dy - x r^2 mean(w dy x))             w, eps frozen; Gemma's own has 1 + w for w
    GELU by tanh       torch's kernel for 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), forward and backward

Forward, a norm stays the model's own code. A layer is only replaced where a trial gives the gradient that automatic
differentiation gives, so a class with another meaning of the name keeps its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

TANH_GELUS = (NewGELUActivation, FastGELUActivation, GELUTanh)
Forward = Callable[[Tensor], Tensor]


def fuse(decoder: nn.Module) -> int:
    """Give all layers of a decoder that can be fused a new forward; return their count. Names and weights stay."""
    count = 0
    for module in decoder.modules():
        forward = _fused(module)
        if forward is not None:
            module.forward = forward
            count += 1
    return count


def _fused(module: nn.Module) -> Forward | None:
    if isinstance(module, TANH_GELUS):
        return nn.GELU(approximate="tanh").forward
    if type(module).__name__.endswith("RMSNorm"):
        return _fit(module)
    return None


@dataclass(frozen=True, eq=False)
class Norm:
    """A model's RMSNorm with a gradient written by hand. model_forward: the model's; offset: added to its weight."""

    model_forward: Forward
    weight: Tensor
    eps: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = _Norm.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return self.model_forward(x)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        ctx.norm = norm  # type: ignore[attr-defined]
        return norm.model_forward(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        norm: Norm = ctx.norm  # type: ignore[attr-defined]
        wide = torch.promote_types(x.dtype, torch.float32)
        size = x.shape[-1]
        values = x.to(wide)
        square = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().div_(size)
        root = square.add_(norm.eps).rsqrt_()
        push = grads[0].to(wide) * (norm.weight.to(wide) + norm.offset)
        along = (push * values).sum(-1, keepdim=True).mul_(root.square()).div_(size)
        push.addcmul_(values, along, value=-1).mul_(root)
        return push.to(x.dtype), None


def _fit(module: nn.Module) -> Norm | None:
    """Return the fused form of a norm, None where no trial agrees.

    Judged by the norms of gradients, whose size follows the weight; `agree` has a scale of at least 1.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    stream = torch.Generator().manual_seed(4)
    x, push = (
        torch.randn(3, len(weight), generator=stream).to(dtype=weight.dtype, device=weight.device) for _ in range(2)
    )
    expected = _gradient(module.forward, x, push)
    if expected is None:
        return None
    tolerance = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    for offset in (0.0, 1.0):
        norm = Norm(module.forward, weight, eps, offset)
        gradient = _gradient(norm, x, push)
        if gradient is not None and float((gradient - expected).norm()) <= tolerance * float(expected.norm()):
            return norm
    return None


def _gradient(forward: Forward, x: Tensor, push: Tensor) -> Tensor | None:
    """Return d(push . forward(x)) / dx; None for a layer with several inputs or results."""
    try:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(forward(leaf), leaf, push)[0]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
