"""Fused layers give what the model's own code gives, forward and backward, and impostors keep their own."""

import pytest
import torch
import transformers
from tests import tiny
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fedmira.model.packed.fused import Norm, fuse


def gradient(module: nn.Module, x: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    given = x.clone().requires_grad_()
    y = module(given)
    return y.detach(), torch.autograd.grad(y, given, push)[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3", "granite", "mixtral"])
def test_every_norm_of_a_family_is_fused_and_has_the_same_gradient(family: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny.config(family)).eval()
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    for module in norms.values():
        assert isinstance(module.weight, nn.Parameter)
        nn.init.normal_(module.weight)
    model.requires_grad_(False)
    inputs = {name: torch.randn(2, 3, 5, len(module.weight)) for name, module in norms.items()}  # type: ignore[arg-type]
    pushes = {name: torch.randn_like(x) for name, x in inputs.items()}
    before = {name: gradient(module, inputs[name], pushes[name]) for name, module in norms.items()}
    assert fuse(model) >= len(norms)
    for name, module in norms.items():
        assert isinstance(module.forward, Norm)
        for one, other in zip(gradient(module, inputs[name], pushes[name]), before[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_gelu_by_tanh_gives_the_values_of_torch(name: str) -> None:
    holder = nn.Sequential(ACT2FN[name])
    x = torch.linspace(-8, 8, 999, dtype=torch.float64)
    before = gradient(holder, x, torch.ones_like(x))
    assert fuse(holder) == 1
    for one, other in zip(gradient(holder, x, torch.ones_like(x)), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)  # gelu_fast has the constant to 10 digits


class OddRMSNorm(nn.Module):
    """A norm by name that squares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 3.0), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight.square()


class GatedRMSNorm(OddRMSNorm):
    """A norm that wants a gate beside its input."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


@pytest.mark.parametrize("kind", [OddRMSNorm, GatedRMSNorm])
def test_a_norm_that_computes_something_else_is_not_fused(kind: type[nn.Module]) -> None:
    holder = nn.Sequential(kind())
    assert fuse(holder) == 0
    assert not isinstance(holder[0].forward, Norm)
