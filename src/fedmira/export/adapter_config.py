"""An adapter's folder as PEFT writes it, read once for chat, merging, copying and vLLM: known settings, or a refusal.

PEFT has dozens of settings that change what an adapter computes (DoRA, activated LoRA, layers that are replicated or
chosen by a pattern, ...). One that is overlooked gives other answers without a word. So every key of a config file is
on one of the lists below: read, harmless at any value, or harmless at its listed values. All else is refused by name.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from fedmira.disk.files import describe_link
from fedmira.disk.folders import ADAPTER_FILES
from fedmira.errors import StoreError
from fedmira.model.base.source import join_some, list_pickles

PREFIX = "base_model.model."
EMBEDDINGS = "prompt_embeddings"  # the one tensor of a prompt
LORA, PROMPT = "LORA", "P_TUNING"  # kinds of adapters, as in peft_type
WEIGHTS, CONFIG, CARD = FILES = ADAPTER_FILES

# Read below, or by this project's callers.
READ = {
    LORA: frozenset(
        [
            "peft_type",
            "base_model_name_or_path",
            "revision",
            "r",
            "lora_alpha",
            "target_modules",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "init_lora_weights",
        ]
    ),
    PROMPT: frozenset(["peft_type", "base_model_name_or_path", "revision", "num_virtual_tokens"]),
}
# Whatever their value is, a trained adapter computes the same: settings of training, of initialisation, of files.
HARMLESS = {
    LORA: frozenset(
        [
            "peft_version",
            "inference_mode",
            "auto_mapping",
            "fan_in_fan_out",
            "lora_dropout",
            "layers_pattern",
            "megatron_core",
            "qalora_group_size",
            "runtime_config",
            "eva_config",
            "ensure_weight_tying",
        ]
    ),
    PROMPT: frozenset(
        [
            "peft_version",
            "inference_mode",
            "auto_mapping",
            "token_dim",
            "num_attention_heads",
            "num_layers",
            "encoder_hidden_size",
            "encoder_reparameterization_type",
            "encoder_num_layers",
            "encoder_dropout",
        ]
    ),
}
# Others must have one of these values; where none are listed, one that is empty (null, false, [], {}).
LISTED: dict[str, dict[str, tuple[object, ...]]] = {
    LORA: {"task_type": (None, "CAUSAL_LM"), "bias": (None, "none")},
    PROMPT: {"task_type": (None, "CAUSAL_LM"), "num_transformer_submodules": (None, 1)},
}
EMPTY = {
    LORA: frozenset(
        [
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "megatron_config",
            "trainable_token_indices",
            "loftq_config",
            "corda_config",
            "lora_ga_config",
            "use_dora",
            "velora_config",
            "alora_invocation_tokens",
            "use_qalora",
            "monteclora_config",
            "layer_replication",
            "lora_bias",
            "target_parameters",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
        ]
    ),
    PROMPT: frozenset({"modules_to_save"}),
}
# Ways of initialising that leave the base's weights as they are; others (pissa, olora, ...) subtract from them.
_STARTS = (None, "gaussian", "orthogonal", "eva")  # or a truth value


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says. LoRA: rank, alpha, targets; a prompt: virtual_tokens above 0."""

    folder: Path
    base_model: str | None
    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    root_scale: bool = False  # scale = alpha / sqrt(rank), not alpha / rank
    virtual_tokens: int = 0

    @property
    def is_prompt(self) -> bool:
        return self.virtual_tokens > 0

    def rank_of(self, module: str) -> int:
        """The rank of a module by its full name, as PEFT finds it."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), module), self.rank)

    def scale_of(self, module: str) -> float:
        """s in s B A for a module by its full name: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), module), self.alpha)
        return alpha / (math.sqrt(rank) if self.root_scale else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read a folder's adapter_config.json.

    Raises StoreError: missing, a link, not JSON, of another kind, or with a setting that FedMira does not compute.
    """
    path = folder / CONFIG
    if not path.exists() and not path.is_symlink():
        raise StoreError(f"'{folder}' is not an adapter: it has no {CONFIG}")
    check_plain(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise StoreError(f"'{path}' is damaged: it is not a JSON object; export or download the adapter again")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READ:
        raise _unfit(path, "peft_type", kind, f"{LORA} or {PROMPT}: only plain LoRA and P-tuning are supported")
    _check_keys(path, kind, config)
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise _unfit(path, "base_model_name_or_path", base, "a name or null")
    if kind == PROMPT:
        tokens = _number(path, config, "num_virtual_tokens", whole=True)
        return AdapterConfig(folder, base, virtual_tokens=int(tokens))
    return AdapterConfig(
        folder,
        base,
        rank=int(_number(path, config, "r", whole=True)),
        alpha=_number(path, config, "lora_alpha", whole=False),
        targets=_targets(path, config.get("target_modules")),
        rank_pattern={name: int(value) for name, value in _pattern(path, config, "rank_pattern", whole=True)},
        alpha_pattern=dict(_pattern(path, config, "alpha_pattern", whole=False)),
        root_scale=bool(config.get("use_rslora")),
    )


def check_adapter(folder: Path, *, files: Sequence[str] = (WEIGHTS, CONFIG)) -> AdapterConfig:
    """Read a folder's settings and the names and shapes of its tensors, which must fit each other; no numbers.

    files: those that must be there. Raises StoreError as read_adapter_config does, and for a file that is missing or a
    link, pickles, a file of weights that is cut short, and tensors that the settings do not announce.
    """
    pickles = list_pickles(folder) if folder.is_dir() else []
    if pickles:  # of any origin: it must not be passed on
        raise StoreError(
            f"'{folder}' holds pickles, which can run code: {join_some(pickles)}. FedMira reads only {WEIGHTS}; remove "
            "the pickles"
        )
    config = read_adapter_config(folder)
    missing = [name for name in files if not (folder / name).exists() and not (folder / name).is_symlink()]
    if missing:
        raise StoreError(f"'{folder}' has no {missing[0]}; export or download the adapter again")
    for name in files:
        check_plain(folder / name)
    _check_tensors(config, read_shapes(folder / WEIGHTS))
    return config


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a safetensors file by their shapes, from its head. Raises StoreError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StoreError(f"'{path}' is damaged, or not a safetensors file: {error}") from None


def adapted_modules(shapes: Mapping[str, object]) -> list[str]:
    """Return the modules that tensors named as PEFT names them are for, in order."""
    ending = re.compile(r"\.lora_[AB]\.weight$")
    return list(dict.fromkeys(ending.sub("", name).removeprefix(PREFIX) for name in shapes))


def check_plain(path: Path) -> None:
    """Raise StoreError for what is not a regular file, and for a link, except one within the hub's cache.

    A link in a folder that somebody else made leads to any file of this machine, and its content would be copied.
    """
    cached = path.is_symlink() and path.resolve().parent == path.parent.resolve().parent.parent / "blobs"
    if path.is_symlink() and not cached:
        raise StoreError(f"{describe_link(path)}, and FedMira writes no links; replace it by a copy")
    if not path.is_file():
        raise StoreError(f"'{path}' is not a file; export or download the adapter again")


def _check_keys(path: Path, kind: str, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in READ[kind] or key in HARMLESS[kind]:
            continue
        if key in LISTED[kind]:
            if not any(value == allowed and type(value) is type(allowed) for allowed in LISTED[kind][key]):
                raise _unfit(path, key, value, " or ".join(json.dumps(allowed) for allowed in LISTED[kind][key]))
        elif not (value is None or value is False or value in ("", [], {})):  # 0 is a layer
            known = "" if key in EMPTY[kind] else "a setting that FedMira does not know, "
            raise _unfit(path, key, value, f"{known}only null, false or empty: other settings change what it computes")
    start = config.get("init_lora_weights", True)
    if kind == LORA and not (isinstance(start, bool) or start in _STARTS):
        allowed = "true, false, gaussian, orthogonal or eva: others take part of the adapter from the base's weights"
        raise _unfit(path, "init_lora_weights", start, allowed)
    if kind == LORA and config.get("use_rslora") not in (None, False, True):
        raise _unfit(path, "use_rslora", config["use_rslora"], "true or false")


def _number(path: Path, config: Mapping[str, Any], key: str, *, whole: bool) -> float:
    value: Any = config.get(key)
    kinds = (int,) if whole else (int, float)
    if type(value) in kinds and 0 < value < math.inf:  # a truth value is an int too, and is not meant
        return value
    raise _unfit(path, key, value, "a whole number above 0" if whole else "a number above 0")


def _pattern(path: Path, config: Mapping[str, Any], key: str, *, whole: bool) -> Iterator[tuple[str, float]]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise _unfit(path, key, found, "an object: names of modules and numbers")
    for name in found:
        try:
            re.compile(name)
        except re.error:
            raise _unfit(path, key, name, "names of modules") from None
        yield name, _number(path, found, name, whole=whole)


def _targets(path: Path, found: object) -> tuple[str, ...]:
    if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
        raise _unfit(path, "target_modules", found, "a list of names of modules, not a pattern")
    return tuple(found)


def _check_tensors(config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StoreError unless tensors are what the settings announce: factors A [r, in] and B [out, r], or a prompt."""
    path = config.folder / WEIGHTS
    if config.is_prompt:
        if list(shapes) != [EMBEDDINGS] or len(shapes[EMBEDDINGS]) != 2:
            raise StoreError(
                f"'{path}': found {_names(shapes)}; a prompt has one tensor '{EMBEDDINGS}' [tokens, width]"
            )
        if shapes[EMBEDDINGS][0] != config.virtual_tokens:
            raise StoreError(
                f"'{path}': '{EMBEDDINGS}' is {shapes[EMBEDDINGS]}, but {CONFIG} says num_virtual_tokens "
                f"{config.virtual_tokens}"
            )
        return
    modules = adapted_modules(shapes)
    for module in modules:
        rank = config.rank_of(module)
        for factor, axis in (("A", 0), ("B", 1)):
            name = f"{PREFIX}{module}.lora_{factor}.weight"
            shape = shapes.get(name)
            if shape is None:
                raise StoreError(f"'{path}': found {_names(shapes)}, and no '{name}'; export or download it again")
            if len(shape) != 2 or shape[axis] != rank:
                raise StoreError(f"'{path}': '{name}' is {shape}, but {CONFIG} says rank {rank}")
    matches = {target: [m for m in modules if m == target or m.endswith(f".{target}")] for target in config.targets}
    idle = next((target for target, found in matches.items() if not found), None)
    if idle is not None:
        raise StoreError(f"'{path}' has no tensor for '{idle}', which is in target_modules of {CONFIG}")
    matched = {module for found in matches.values() for module in found}
    other = next((module for module in modules if module not in matched), None)
    if other is not None:
        raise StoreError(f"'{path}' has tensors for '{other}', which target_modules of {CONFIG} do not name")


def _names(shapes: Mapping[str, object]) -> str:
    return f"'{next(iter(shapes))}'" + (f" and {len(shapes) - 1} more" if len(shapes) > 1 else "") if shapes else "none"


def _unfit(path: Path, key: str, value: object, allowed: str) -> StoreError:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return StoreError(f"'{path}': {key} is {shown}; allowed: {allowed}")
