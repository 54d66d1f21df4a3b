"""Where a base comes from: a local folder, or a hub name that becomes one. Unusable ones are refused unread.

A base is safetensors, JSON and tokenizer files. Pickles are never opened and code of a repository is never run, so a
folder that holds pickles, or a config that only such code could read, is refused here, before weights are loaded.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fedmira.errors import ModelError, nearest
from fedmira.model.base.unpacked import METHODS, packed_by, unpacked
from fedmira.model.quantised import stored_quantisation

PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHTS = ["model*.safetensors"]
_NOT_FETCHED = ["*/*", "*.fp16*"]  # copies in other formats are in folders and under other names
# Keys about the form of a model's outputs, and about who computes them. They do not change what a base computes, but
# tuples instead of named outputs, or kernels fetched from a hub, would change or stop our passes.
_FORM = frozenset(
    [
        "return_dict",
        "use_return_dict",
        "return_dict_in_generate",
        "output_hidden_states",
        "output_attentions",
        "_output_attentions",
        "output_router_logits",
        "output_scores",
        "output_logits",
        "use_cache",
        "torchscript",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
    ]
)
_GENERATION = "generation_config.json"
_INSIDE = ("*/config.json", "snapshots/*/config.json")  # where a folder above the model's has it, as in the hub's cache
_CAUSAL = "FedMira needs a causal decoder (GPT-2, Llama, Qwen, Mistral, Gemma, Phi, ...)"


def find_folder(name: str, *, revision: str | None = None, weights: bool = False) -> Path:
    """Return the folder with a base's files; a hub name is fetched into the hub's cache.

    revision: branch, tag or commit of a hub name, None for its main branch; weights: fetch safetensors too.
    Raises ModelError: not found, not reachable, no config, no safetensors, pickles, an adapter instead of a base.
    """
    folder = Path(name)
    local = folder.is_dir()
    if folder.is_file():
        raise refuse(name, "is a file; name the folder that holds the model")
    if not local and (folder.exists() or name.startswith((".", "/", "~")) or not _HUB_NAME.match(name)):
        raise refuse(name, f"no such folder (current folder: {Path.cwd()})")
    if local and revision is not None:
        raise ModelError(
            f"model.revision '{revision}': model.base_model '{name}' is a folder, and only hub names have revisions; "
            "leave it out"
        )
    if not local:
        folder = _fetch(name, revision, [*_SMALL, *(_WEIGHTS if weights else [])])
    _check_files(name, folder, local=local, weights=weights)
    return folder


def load_config(name: str, folder: Path) -> transformers.PretrainedConfig:
    """Read a base's config; what it says about the form of outputs is left out, and packed weights are to be dense.

    Raises ModelError with the reason if it is not a causal decoder that can be used.
    """
    facts = _read_json(name, folder / "config.json")
    kind = _check_facts(name, facts)
    try:
        facts, _ = PretrainedConfig.get_config_dict(str(folder))
        config = CONFIG_MAPPING[kind].from_dict({key: value for key, value in facts.items() if key not in _FORM})
        whole = config.get_text_config() is config
    except Exception as error:  # any error of transformers here is the config's fault
        raise refuse(name, f"config.json cannot be used: {first_line(error)}") from None
    if config.is_encoder_decoder:
        raise refuse(name, f"a {kind} model is not a causal decoder; {_CAUSAL}")
    if not whole:
        parts = ", ".join(sorted(config.sub_configs))
        raise refuse(name, f"a {kind} model is more than a text decoder (its config holds {parts}); {_CAUSAL}")
    vocabulary, pad = vocabulary_of(config), getattr(config, "pad_token_id", None)
    if vocabulary is not None and isinstance(pad, int) and not -vocabulary <= pad < vocabulary:
        raise refuse(
            name,
            f"config.json has pad_token_id {pad}, and vocab_size {vocabulary}: its embeddings have ids 0 to "
            f"{vocabulary - 1}. Set pad_token_id to one of them, or to null",
        )
    config._attn_implementation = None  # transformers chooses
    if packed_by(facts.get("quantization_config")) is not None:
        config.quantization_config = unpacked(facts["quantization_config"])
    return config


def vocabulary_of(config: transformers.PretrainedConfig) -> int | None:
    """Return the number of embeddings that a config states; None: it states none."""
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _check_facts(name: str, facts: Mapping[str, Any]) -> str:
    """Return the kind of model of a config.json. Raises ModelError if the file alone shows that it cannot be used."""
    kind = facts.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        if "auto_map" in facts:
            raise refuse(name, f"model_type '{kind}' needs code from its repository, which FedMira never runs")
        raise refuse(
            name,
            f"config.json has model_type {kind!r}, which transformers {transformers.__version__} does not know"
            f"{nearest(str(kind), list(CONFIG_MAPPING_NAMES))}",
        )
    if facts.get("quantization_config") or facts.get("compression_config"):
        settings = facts.get("quantization_config")
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
        known = isinstance(settings, dict) and (packed_by(settings) or stored_quantisation(settings)) is not None
        if facts.get("compression_config") or not known:
            raise refuse(
                name,
                f"its weights are quantised (method: {method}); FedMira reads plain float weights, 4 or 8 bits of "
                f"bitsandbytes, and {', '.join(sorted(METHODS))} as float weights: use the model that this one is "
                "based on, with model.load_in_4bit where it is too large",
            )
    if facts.get("transformers_weights"):
        raise refuse(name, "config.json names other weights (transformers_weights); expected model.safetensors")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise refuse(name, f"a {kind} model is not a causal decoder; {_CAUSAL}")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not facts.get("is_encoder_decoder"):
        raise refuse(name, f"a {kind} model is an encoder, not a causal decoder; {_CAUSAL}")
    return kind


def load_tokenizer(name: str, *, revision: str | None = None) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer alone. Raises ModelError if there is none, or it has no end-of-text token."""
    folder = find_folder(name, revision=revision)
    config = load_config(name, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), config=config, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise refuse(name, f"no usable tokenizer: {first_line(error)}") from None
    # Without its files transformers returns an empty tokenizer for some kinds, and texts would have no tokens.
    if not set(tokenizer.get_vocab().values()) - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        raise refuse(name, "no usable tokenizer: it has no words; is tokenizer.json missing?")
    if tokenizer.eos_token_id is None or not tokenizer.eos_token:
        raise refuse(name, "the tokenizer has no end-of-text token, so answers could not end")
    return tokenizer


def positions(config: transformers.PretrainedConfig) -> int | None:
    """Return the number of positions whose frequencies do not depend on the texts that share a pass; None: no limit.

    "longrope" (Phi-3 with 128k) has two sets of frequencies and uses the second for a whole pass as soon as one text
    in it is longer than the limit of the first: a client's losses would depend on who else is in the pass.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *ropes.values()]:  # one for all layers, or one for each kind of layer
        if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
    return min((int(limit) for limit in limits if limit is not None), default=None)


def fingerprint(name: str, *, revision: str | None = None) -> str:
    """sha256 over config.json, tokenizer files and weights, by which two sites know that they have the same base."""
    return digest(find_folder(name, revision=revision, weights=True))


def digest(folder: Path) -> str:
    """Return the fingerprint of the base in a folder."""
    total = hashlib.sha256()
    patterns = ("config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.safetensors")
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.is_file():
            total.update(path.name.encode())
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def refuse(name: str, why: str) -> ModelError:
    """Make the error that says which base is meant and why it cannot be used."""
    return ModelError(f"model.base_model '{name}': {why}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with the second where the first ends in a colon; or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def list_pickles(folder: Path) -> list[str]:
    """Return the names of a folder's files that are pickles by their ending."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES and not path.is_dir())


def join_some(names: Sequence[str]) -> str:
    """Return up to five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_files(name: str, folder: Path, *, local: bool, weights: bool) -> None:
    """local: the user's folder, not one of the hub's cache. There other programs may have put pickles, which stay
    unread, and weights are there once they were needed."""
    pickles = list_pickles(folder) if local or weights else []
    files = {path.name for path in folder.glob("*.safetensors")}
    if pickles and not files:
        raise refuse(
            name,
            f"holds {pickles[0]} and no safetensors; pickles can run code and are refused. Convert the weights with "
            "transformers' save_pretrained.",
        )
    if pickles and local:
        raise refuse(
            name,
            f"holds pickles beside its safetensors: {join_some(pickles)}. "
            "FedMira reads only safetensors; remove the pickles.",
        )
    if (folder / "adapter_config.json").is_file():
        raise refuse(name, "holds a PEFT adapter (adapter_config.json); merge it into its base first, or name the base")
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent for pattern in _INSIDE for path in folder.glob(pattern)) if local else []
        hint = f"; '{inside[0]}' has one: name that folder" if inside else "; expected a transformers model"
        raise refuse(name, f"no config.json in this folder{hint}")
    _check_ends(name, folder)
    if weights and not files:
        raise refuse(
            name, "has no safetensors (model.safetensors, or an index and its parts); FedMira reads no other format"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file() and (local or weights):
        shards = _read_json(name, index).get("weight_map")
        unknown = [shard for shard in shards.values() if shard not in files] if isinstance(shards, dict) else [shards]
        if unknown:
            raise refuse(name, f"{index.name} points to {unknown[0]!r}, not a safetensors file of this folder")


def _check_ends(name: str, folder: Path) -> None:
    """Raise ModelError for a generation_config.json that does not say clearly which ids end answers.

    transformers leaves out a file that it cannot read, and answers would not end where they should.
    """
    if not (folder / _GENERATION).is_file():
        return
    facts = _read_json(name, folder / _GENERATION)
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        found = facts.get(key)
        ids = found if isinstance(found, list) and key == "eos_token_id" else [found]
        if found is not None and not all(type(index) is int for index in ids):
            allowed = "a whole number, a list of them, or null" if key == "eos_token_id" else "a whole number, or null"
            raise refuse(name, f"{_GENERATION} has {key} {json.dumps(found)}; expected {allowed}")


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder of a hub name in the cache, with the files that `patterns` name: one revision, no code."""
    where = f"no such folder here ({Path.cwd()}), and the Hugging Face hub"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_FETCHED))
    except GatedRepoError:
        raise refuse(name, "is gated: accept its terms on its hub page and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ModelError(f"model.revision '{revision}': '{name}' has no such branch, tag or commit") from None
    except RepositoryNotFoundError:
        raise refuse(name, f"{where} has no such model, or a private one (set HF_TOKEN)") from None
    except LocalEntryNotFoundError as error:
        at = "" if revision is None else f" at revision '{revision}'"
        if constants.HF_HUB_OFFLINE:
            why = f"may not be used (HF_HUB_OFFLINE is set); the local cache does not have all of it{at}"
        else:
            cause = first_line(error.__cause__ or error)
            why = f"cannot be reached ({cause}); with HF_HUB_OFFLINE=1 only the local cache is searched"
        raise refuse(name, f"{where} {why}") from None
    except (OSError, ValueError) as error:
        raise refuse(name, f"{where} gave an error: {first_line(error)}") from None


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(name, f"{path.name} cannot be read: {first_line(error)}") from None
    if not isinstance(facts, dict):
        raise refuse(name, f"{path.name} holds a {type(facts).__name__}, expected an object")
    return facts
