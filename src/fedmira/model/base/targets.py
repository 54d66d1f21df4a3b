"""Which layers of a base get an adapter, as PEFT's LoraConfig says it, with every mistake named.

names: endings of module names, `all-linear`, `auto` (PEFT's list for the architecture), or a regular expression for
whole names. Of these `layers` keeps some blocks, counted where `pattern` says, and `exclude` leaves some out.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedmira.errors import ModelError, nearest
from fedmira.model.agreement import agree
from fedmira.model.quantised import QuantisedLinear

WORDS = ("auto", "all-linear")


@dataclass(frozen=True)
class Wanted:
    """What lora.target_modules, layers_to_transform, layers_pattern and exclude_modules ask for."""

    names: Sequence[str] | str = "auto"
    layers: Sequence[int] | int | None = None
    pattern: Sequence[str] | str | None = None
    exclude: Sequence[str] | str | None = None

    @property
    def is_pattern(self) -> bool:
        """Are names a regular expression?"""
        return isinstance(self.names, str) and self.names not in WORDS

    @property
    def is_named(self) -> bool:
        """Did the user name layers, so that one that can carry no adapter is an error?"""
        return self.names not in WORDS


def find_targets(model: nn.Module, targets: Sequence[str] | str, *, head: nn.Module | None) -> list[str]:
    """Return the full names of the modules to adapt, in the model's order.

    targets: name endings as in PEFT (`q_proj` matches every `...q_proj`), "all-linear" (all but the output head, and
    those that PEFT keeps no adapter on), or a regular expression for whole names.
    Raises ModelError if a name matches nothing, or matches a module that cannot be adapted, or no name is given.
    """
    linear = [name for name, module in _linears(model) if module is not head]
    barred = _barred(model, {ending(name) for name in linear})
    linear = [name for name in linear if ending(name) not in barred]
    endings = sorted({ending(name) for name in linear})
    if targets == "all-linear" and linear:
        return linear
    choice = f"its linear layers end in: {', '.join(endings) or '(it has none)'}"
    if isinstance(targets, str) and targets != "all-linear" and linear:
        others = [name for name, module in model.named_modules() if name not in linear and _has_weight(module)]
        return match_pattern(targets, linear, others, model=type(model).__name__)
    endings_named = list(targets)
    if not endings_named or not linear:
        raise ModelError(f"lora.target_modules: found no layer of {type(model).__name__} to adapt; {choice}")
    chosen: set[str] = set()
    for target in endings_named:
        matches = [name for name, _ in model.named_modules() if name == target or name.endswith("." + target)]
        if not matches:
            raise ModelError(
                f"lora.target_modules: '{target}' names no module of {type(model).__name__}{nearest(target, endings)}; "
                f"{choice} (or use all-linear)"
            )
        other = [name for name in matches if name not in linear]
        if other and ending(other[0]) in barred:
            raise ModelError(
                f"lora.target_modules: PEFT keeps no adapter on '{other[0]}' of {type(model).__name__}, so none could "
                f"be exported; {choice}"
            )
        if other:
            kind = type(model.get_submodule(other[0])).__name__
            raise ModelError(
                f"lora.target_modules: '{other[0]}' is a {kind}; adapters go on linear layers below the head"
            )
        chosen.update(matches)
    return [name for name in linear if name in chosen]


def match_pattern(pattern: str, linear: Sequence[str], others: Sequence[str], *, model: str) -> list[str]:
    """Return the linear layers whose whole name a regular expression matches.

    Raises ModelError if it is none, or matches no linear layer, or something else too.
    """
    try:
        matched = [name for name in (*linear, *others) if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ModelError(f"lora.target_modules: '{pattern}' is not a regular expression: {error}") from None
    if not matched:
        endings = sorted({ending(name) for name in linear})
        raise ModelError(
            f"lora.target_modules: '{pattern}' matches no module of {model}: a text is a regular expression for whole "
            f"names, such as '{linear[0]}'; for endings write a list{nearest(pattern, endings)}: {', '.join(endings)}"
        )
    if wrong := [name for name in matched if name not in linear]:
        raise ModelError(f"lora.target_modules: '{pattern}' also matches '{wrong[0]}', which takes no adapter")
    return [name for name in linear if name in matched]


def narrow(chosen: Sequence[str], wanted: Wanted, *, model: str) -> list[str]:
    """Return which of the chosen layers are in the wanted blocks and not excluded, as PEFT decides it.

    Raises ModelError if a block is not there, or nothing is left, or nothing is excluded.
    """
    if wanted.layers is None and wanted.exclude is None:
        return list(chosen)
    blocks = [wanted.layers] if isinstance(wanted.layers, int) else list(wanted.layers or ())
    for block in blocks:
        if not _kept(chosen, Wanted(wanted.names, [block], wanted.pattern), [block]):
            there = sorted({int(number) for name in chosen for number in re.findall(r"\.(\d+)\.", name)})
            known = f"they are {there[0]} to {there[-1]}" if there else "it has no numbered blocks"
            where = "" if wanted.pattern is None else f" below {wanted.pattern!r}"
            raise ModelError(f"lora.layers_to_transform: {model} has no block {block} with such layers{where}; {known}")
    kept = _kept(chosen, wanted, blocks)
    if wanted.exclude is not None:
        without = _kept(chosen, Wanted(wanted.names, wanted.layers, wanted.pattern), blocks)
        if len(kept) == len(without):
            raise ModelError(f"lora.exclude_modules: {wanted.exclude!r} leaves out none of the {len(without)} layers")
    if not kept:
        raise ModelError(f"lora.exclude_modules: {wanted.exclude!r} leaves out all layers of {model}")
    return kept


def _kept(chosen: Sequence[str], wanted: Wanted, blocks: Sequence[int]) -> list[str]:
    """Ask PEFT about each layer, one ending at a time so that names that are whole still count blocks."""
    found = []
    for name in chosen:
        config = LoraConfig(
            target_modules=[ending(name)],
            layers_to_transform=list(blocks) or None,
            layers_pattern=(wanted.pattern if isinstance(wanted.pattern, str | None) else list(wanted.pattern))
            if blocks
            else None,
            exclude_modules=wanted.exclude if isinstance(wanted.exclude, str | None) else list(wanted.exclude),
        )
        if check_target_module_exists(config, name) is True:
            found.append(name)
    return found


def by_pattern(patterns: dict[str, float], usual: float, modules: Sequence[str], *, key: str) -> list[float]:
    """Return the value of each module: that of the first pattern that matches its name, as PEFT finds it, or the usual.

    Raises ModelError if a pattern matches no module.
    """
    found = [get_pattern_key(patterns.keys(), module) for module in modules]
    if idle := [pattern for pattern in patterns if pattern not in found]:
        endings = sorted({ending(name) for name in modules})
        raise ModelError(
            f"lora.{key}: '{idle[0]}' matches none of the adapted layers{nearest(idle[0], endings)}; they end in: "
            f"{', '.join(endings)}"
        )
    return [patterns.get(pattern, usual) for pattern in found]


# In models with Mamba layers PEFT assumes that a fused kernel reads these without calling them.
_MAMBA = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
_NOT_IN_MAMBA = frozenset({"out_proj", "conv1d"})


def _barred(model: nn.Module, endings: Iterable[str]) -> frozenset[str]:
    """Return the endings of linear layers on which PEFT keeps no adapter.

    In mixtures of experts it takes `gate_proj` as part of the fused experts even where it names a separate layer.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    barred = set(_NOT_IN_MAMBA if kind in _MAMBA else ())
    for ending in endings:
        lora = LoraConfig(target_modules=[ending])
        try:
            convert_peft_config_for_transformers(lora, model, None)
        except ValueError:  # only together with the layers it is fused with
            barred.add(ending)
        if ending not in (lora.target_modules or ()):
            barred.add(ending)
    return frozenset(barred)


def ending(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and _is_linear(module):
            yield name, module


def _is_linear(module: nn.Linear | Conv1D) -> bool:
    """Does it compute W x + b? Subclasses may in another way (Falcon), or do more (routers): these are tried."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) or isinstance(module, QuantisedLinear):
        return True
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            y = module(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    with torch.no_grad():
        return isinstance(y, Tensor) and agree(y, functional.linear(x, weight, module.bias))


def _has_weight(module: nn.Module) -> bool:
    """Is this a layer of its own, and not a group of layers?"""
    return getattr(module, "weight", None) is not None
