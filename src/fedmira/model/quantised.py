"""Weights in 4 or 8 bits (extra `quant`: bitsandbytes): loaded so, and made dense again for one product at a time.

    4 bits: blocks of 64 numbers, each the nearest of 16 values (nf4, fp4) times the block's largest number
    8 bits: W_ij = C_ij s_i / 127, C_ij whole, s_i: the largest number of row i

A layer computes W x + b with the dense W of one product, in the type of the rest; it is dropped at once. So 8 bits are
of weights alone: LLM.int8's rounding of what goes into a layer depends on what else is in a pass, and a client's loss
would depend on who shares it. In 4 bits this is what bitsandbytes' own layer and PEFT compute.

Sources: Dettmers et al. 2023 (arXiv:2305.14314), 2022 (arXiv:2208.07339).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmira.errors import ModelError

HINT = "weights in 4 or 8 bits need bitsandbytes: pip install 'fedmira[quant]'"
KINDS = ("Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class Quantisation:
    """How weights of linear layers are stored. kind, double, of 4 bits: the values; are the scales quantised too?"""

    bits: Literal[4, 8]
    kind: Literal["nf4", "fp4"] = "nf4"
    double: bool = False

    @property
    def name(self) -> str:
        if self.bits == 8:
            return "int8"
        return f"{self.kind}-double" if self.double else self.kind

    @property
    def keys(self) -> dict[str, str | bool]:
        """As a config has it, ours and transformers'."""
        if self.bits == 8:
            return {"load_in_8bit": True}
        return {"load_in_4bit": True, "bnb_4bit_quant_type": self.kind, "bnb_4bit_use_double_quant": self.double}

    def config(self, dtype: torch.dtype) -> Any:
        """Return what transformers asks for. Raises ModelError if bitsandbytes is not installed, or dtype is double."""
        check_installed()
        if dtype == torch.float64:
            raise ModelError("model.dtype float64: weights in 4 or 8 bits are computed with in float32 or bfloat16")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**self.keys, **({"bnb_4bit_compute_dtype": dtype} if self.bits == 4 else {}))

    def fingerprint(self, of_folder: str) -> str:
        """Return the sha256 of a base that is quantised when it is loaded, from that of its folder."""
        return hashlib.sha256(f"{of_folder} {self.name}".encode()).hexdigest()


def base_fingerprint(of_folder: str, config: Any, asked: Quantisation | None) -> str:
    """Return the sha256 of a base from that of its folder: the folder's own where the weights are plain or stored so.

    config: of the base, which says how its weights are stored; asked: how they are quantised when they are loaded.
    """
    return of_folder if asked is None or quantisation_in(config) is not None else asked.fingerprint(of_folder)


def check_installed() -> None:
    """Raise ModelError if bitsandbytes is not there."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(HINT)


def loading(config: Any, asked: Quantisation | None, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` needs for weights in 4 or 8 bits, stored so or asked for; {}: they are plain."""
    stored = quantisation_in(config)
    if stored is not None:
        stored.config(dtype)  # is it there, and does the type fit?
        return {"device_map": {"": device}}
    return {} if asked is None else {"device_map": {"": device}, "quantization_config": asked.config(dtype)}


def stored_quantisation(settings: Mapping[str, Any] | None) -> Quantisation | None:
    """Return how a folder's weights are stored, by the quantization_config of its config.json.

    None: they are plain, or stored by another method than bitsandbytes'.
    """
    if settings is None or settings.get("quant_method") != "bitsandbytes":
        return None
    if settings.get("load_in_8bit"):
        return Quantisation(8)
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    return Quantisation(4, "nf4" if kind == "nf4" else "fp4", bool(settings.get("bnb_4bit_use_double_quant")))


def quantisation_in(config: Any) -> Quantisation | None:
    """Return how the weights of a base with this config are stored; None: they are plain."""
    return stored_quantisation(getattr(config, "quantization_config", None))


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight [out, in] is in 4 or 8 bits."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        """layer: of bitsandbytes; dtype: that products are computed in."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.dtype = layer.weight, layer.bias, dtype
        self.scales: Tensor | None = None
        if type(layer).__name__ == "Linear8bitLt":
            held = layer.state if layer.state.CB is not None else layer.weight  # its first pass moves them there
            codes = layer.weight.data if held.CB is None else held.CB
            self.weight = nn.Parameter(codes, requires_grad=False)
            self.scales = held.SCB.float()[:, None] / 127

    def dense(self) -> Tensor:
        """Return the weight as numbers; it is made anew at every call."""
        if self.scales is not None:
            return (self.weight.float() * self.scales).to(self.dtype)
        from bitsandbytes.functional import dequantize_4bit

        packed: Any = self.weight
        weight: Tensor = dequantize_4bit(packed.data, packed.quant_state)
        return weight.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:  # autograd alone would keep the dense weight
            out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return out
        return functional.linear(x, self.dense(), self.bias)


class _Product(torch.autograd.Function):
    """W x + b of a quantised layer; backward makes W dense again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dense(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dense(), None


def take_over(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace bitsandbytes' layers in a model by ours."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ in KINDS and type(layer).__module__.startswith("bitsandbytes."):
            model.set_submodule(name, QuantisedLinear(layer, dtype))


def stored_as(model: nn.Module) -> str:
    """Say how a loaded model's linear layers are stored."""
    kinds = {8 if layer.scales is not None else 4 for layer in model.modules() if isinstance(layer, QuantisedLinear)}
    return f"in {min(kinds)} bits" if kinds else "in plain numbers"


def make_dense(model: nn.Module) -> None:
    """Replace quantised layers in a model by plain ones with the same numbers."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantisedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.dense(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = layer.bias
            model.set_submodule(name, plain)
