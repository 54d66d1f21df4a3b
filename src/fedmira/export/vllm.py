"""Serving exported adapters with vLLM: its rules for LoRA folders, and the command that serves them all at once.

What vLLM requires of a folder (from the source of vLLM 0.33.0; tests/export/test_peft_folder.py tests them):

| rule | where in vLLM | here |
|---|---|---|
| adapter_config.json and adapter_model.safetensors are in the folder | lora_model.py | both are written |
| r, lora_alpha and target_modules are present, r > 0 | peft_helper.py | one rank for all layers |
| the rank is at most --max-lora-rank: 1, 8, 16, 32, 64, 128, 256, 320 or 512 | config/lora.py | `max_lora_rank` |
| bias is "none"; no lora_bias | peft_helper.py | never any |
| no modules_to_save (but a classifier's head) | peft_helper.py | never any |
| no DoRA, aLoRA, BD-LoRA, QALoRA, layer_replication | peft_helper.py | never any; rsLoRA would be accepted |
| init_lora_weights means unchanged base weights | peft_helper.py | true |
| every tensor is named base_model.model.<module>.lora_A.weight or .lora_B.weight | lora/utils.py | yes |
| every module is a linear layer of the served model; parts of a fused one by their names | lora_model.py | adapted \
are linear layers of transformers' model, by its names (q_proj) |
| no extra vocabulary: an embedding's adapter must have the base's size | lora_model.py | embeddings get none |
| the model supports LoRA (`SupportsLoRA`) | config/lora.py | `NO_LORA` lists the others |
| names are unique and not the base's name | openai/models/serving.py | client ids; `serve_line` |
| no prompt of virtual tokens: prompt adapters were removed in 0.10 (pull request 20588) | - | `serve_line` says so |

Weights may be float32: vLLM rounds them to its compute type (float16 or bfloat16 on a GPU). It does not read
fan_in_fan_out, and need not: the factors of a Conv1D (GPT-2) have the same shapes. It does not serve LoRA on GPT-2.
Of models with fused projections it serves LoRA on Phi-3 (qkv_proj, gate_up_proj), not on Falcon or Bloom.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from fedmira import bundled
from fedmira.export.adapter_config import read_adapter_config
from fedmira.export.asking import CHAT_TEMPLATE

VERSION = "0.33"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SHOWN = 4  # adapters in the command; each takes GPU memory
# Text decoders that vLLM has without LoRA; models unknown to vLLM run on its Transformers backend.
NO_LORA = frozenset(
    f"{family}ForCausalLM"
    for family in (
        *("Bloom", "Cohere2Moe", "Dbrx", "Falcon", "FalconMamba", "GPTJ", "HrmText", "Mamba", "Mamba2", "MiMoV2Flash"),
        *("StableLm", "Zamba2"),
    )
) | {"GPT2LMHeadModel"}


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank that allows this rank; None if there is none."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)


def serve_line(
    base_model: str, folders: Sequence[Path], *, revision: str | None = None, architecture: str | None = None
) -> str:
    """Return the `vllm serve` command for exported adapters, named after their folders; or a comment that says why not.

    base_model, revision: as in the config; architecture: the class of the base, None = unknown.
    Raises StoreError if a folder's adapter_config.json cannot be used.
    """
    configs = [read_adapter_config(folder) for folder in folders]
    if any(config.is_prompt for config in configs):
        return (
            f"# vLLM {VERSION} does not serve virtual tokens: load base and prompt with PEFT, as each README.md shows"
        )
    if architecture in NO_LORA:
        return (
            f"# vLLM {VERSION} does not serve LoRA on {architecture}: export whole models with --merge, and serve one "
            "with 'vllm serve FOLDER'"
        )
    if any(config.rank_pattern or config.alpha_pattern for config in configs):
        return (
            f"# vLLM {VERSION} reads one rank and one alpha per adapter, and here they differ between layers: export "
            "whole models with --merge"
        )
    rank = max(config.rank for config in configs)
    allowed = max_lora_rank(rank)
    if allowed is None:
        return f"# vLLM {VERSION} allows ranks up to {RANKS[-1]}, and this is {rank}: export whole models with --merge"
    base = bundled.resolve(base_model)
    few = folders[:SHOWN]
    words = ["vllm", "serve", base, *([] if revision is None else ["--revision", revision])]
    words += ["--enable-lora", "--max-lora-rank", str(allowed), "--max-loras", str(len(few))]
    template = few[0] / CHAT_TEMPLATE  # vLLM reads that of the base, not of an adapter
    words += ["--chat-template", str(template)] if template.is_file() else []
    words += ["--lora-modules"]
    words += [_module(folder.name if folder.name != base else f"{folder.name}-lora", str(folder)) for folder in few]
    remaining = len(folders) - len(few)
    return shlex.join(words) + (f"  # ... and {remaining} more in {_parents(folders)}" if remaining else "")


def serve_merged_line(folder: Path) -> str:
    """Return the `vllm serve` command for one merged model."""
    return shlex.join(["vllm", "serve", str(folder)])


def _module(name: str, path: str) -> str:
    """Write one of --lora-modules: name=path, or JSON if the path has a comma, which vLLM reads as JSON."""
    return json.dumps({"name": name, "path": path}) if "," in path else f"{name}={path}"


def _parents(folders: Sequence[Path]) -> str:
    return shlex.quote(str(folders[0].parent))
