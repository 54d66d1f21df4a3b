"""One client's row as a standard PEFT folder: adapter_model.safetensors, adapter_config.json and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedmira import bundled
from fedmira.adapters import Adapters, Layout
from fedmira.errors import StoreError
from fedmira.model.source import join_some, list_pickles
from fedmira.store import write_atomic

PREFIX = "base_model.model."


def export_adapter(
    folder: Path,
    adapters: Adapters,
    *,
    base_model: str,
    target_modules: Sequence[str],
    fan_in_fan_out: bool,
    card: Mapping[str, Any],
) -> None:
    """Write one client's adapter [1, P] so that PeftModel.from_pretrained loads it with equal logits.

    Tensors are float32 and cut to the client's own rank; alpha is scale x rank. Nothing is fetched from a hub.
    Raises StoreError if the folder cannot be written.
    """
    rank = int(adapters.ranks[0])
    tensors = peft_tensors(adapters)
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain(float(adapters.scale[0]) * rank),
        target_modules=list(target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))
    write_atomic(folder / "README.md", model_card(base_model, card).encode())


def peft_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """Name the factors of one client [1, P] as PEFT does: base_model.model.<module>.lora_{A,B}.weight."""
    rank = int(adapters.ranks[0])
    tensors = {}
    for first, second in adapters.layout.part("lora").pairs():
        name = f"{PREFIX}{first.module}"
        tensors[f"{name}.lora_A.weight"] = adapters.leaf(first)[0, :rank].contiguous()
        tensors[f"{name}.lora_B.weight"] = adapters.leaf(second)[0, :, :rank].contiguous()
    return tensors


def read_adapter(folder: Path, layout: Layout) -> Tensor:
    """Read a PEFT folder of ours back into a row [1, P]; only adapter_model.safetensors is opened.

    Raises StoreError if it does not fit the layout, is damaged, or pickles lie in the folder.
    """
    path = folder / "adapter_model.safetensors"
    pickles = list_pickles(folder) if folder.is_dir() else []
    if pickles:
        raise StoreError(
            f"'{folder}' holds pickles, which can run code: {join_some(pickles)}. "
            "FedMira reads only adapter_model.safetensors; remove the pickles."
        )
    if not path.is_file():
        raise StoreError(f"'{folder}' holds no adapter_model.safetensors")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"'{path}' is damaged, or no safetensors file: {error}") from None
    part = layout.part("lora")
    row = torch.zeros(1, layout.size)
    for leaf in part.leaves:
        name = f"{PREFIX}{leaf.module}.lora_{leaf.factor}.weight"
        if name not in tensors:
            raise StoreError(f"'{path}': no tensor '{name}'; was it made for another base or other target_modules?")
        found = tensors.pop(name)
        place = row[0, leaf.start : leaf.stop].view(leaf.shape)
        if found.ndim != 2 or any(own > room for own, room in zip(found.shape, leaf.shape, strict=True)):
            raise StoreError(f"'{path}': '{name}' is {tuple(found.shape)}, at most {leaf.shape} fits")
        place[: found.shape[0], : found.shape[1]] = found
    if tensors:
        raise StoreError(f"'{path}': unexpected tensor '{next(iter(tensors))}'")
    return row


def short_targets(modules: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Name the adapted modules by their endings (q_proj) where these pick no other linear layer, else in full.

    PEFT and vLLM match a module by its ending; `linears`: all linear layers of the base below its head.
    """
    endings = sorted({name.rsplit(".", 1)[-1] for name in modules})
    matched = {name for name in linears if name.rsplit(".", 1)[-1] in endings}
    return endings if matched == set(modules) else list(modules)


def model_card(base_model: str, card: Mapping[str, Any]) -> str:
    """Write a short model card with Hugging Face front matter; `card` is shown as a list."""
    load = repr(base_model)
    if base_model.startswith(bundled.PREFIX):
        load = f"fedmira.bundled.resolve({base_model!r})"
    lines = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, federated-learning, fedmira]",
        "---",
        "",
        "# Personal LoRA adapter made with FedMira",
        "",
        *(f"- {name}: {value}" for name, value in card.items()),
        "",
        "```python",
        *(["import fedmira.bundled"] if base_model.startswith(bundled.PREFIX) else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({load})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _plain(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 * max(1.0, value) else value
