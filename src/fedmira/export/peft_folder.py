"""One client's row as a standard PEFT folder: adapter_model.safetensors, adapter_config.json and a model card.

It contains what PEFT saves: LoRA's factors, or the embeddings computed by a prompt encoder.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fedmira.adapters import Adapters, Layout
from fedmira.adapters.ranks import by_ending
from fedmira.disk.files import copy_file, describe_link, make_folder, sync_folder, write_atomic
from fedmira.disk.folders import TOKENIZER_FILES
from fedmira.errors import ModelError, StoreError
from fedmira.export.adapter_config import (
    CARD,
    CONFIG,
    EMBEDDINGS,
    FILES,
    PREFIX,
    WEIGHTS,
    AdapterConfig,
    check_adapter,
    check_plain,
)
from fedmira.export.asking import share_files, tokenizer_files
from fedmira.export.card import Card, model_card, shown_base
from fedmira.model.base.load import quiet
from fedmira.model.base.source import first_line, join_some, list_pickles
from fedmira.model.packed.virtual import embeddings


@dataclass(frozen=True)
class Depth:
    """The base's decoder layers and attention heads: in PEFT's config of a prompt, but not read by P-tuning."""

    layers: int
    heads: int


def depth_of(config: PretrainedConfig) -> Depth:
    """Return the depth of a base; what its config does not say is 1, because PEFT needs a number."""
    text = config.get_text_config()
    layers, heads = (getattr(text, name, None) or 1 for name in ("num_hidden_layers", "num_attention_heads"))
    return Depth(int(layers), int(heads))


def export_adapter(
    folder: Path,
    adapters: Adapters,
    *,
    base_model: str,
    target_modules: Sequence[str],
    fan_in_fan_out: bool,
    card: Card,
    revision: str | None = None,
    depth: Depth | None = None,
) -> None:
    """Write one client's adapter [1, P] so that PeftModel.from_pretrained loads it with equal logits.

    base_model, revision: as the config has them. Tensors are float32.

    LoRA: cut to the client's own rank; alpha is scale x rank. r is the largest rank; modules with another rank are in
    rank_pattern, with another alpha in alpha_pattern.

    A prompt encoder: the embeddings [n, d] that it computes, not its weights. target_modules and fan_in_fan_out are
    then ignored; depth: None = PEFT reads it from the base.

    Never connects to the hub; PEFT's own saving of a whole model may, to see whether the vocabulary has grown.
    Raises StoreError if the folder cannot be written.
    """
    config: LoraConfig | PromptEncoderConfig
    if adapters.layout.virtual_tokens:
        config = _prompt_config(adapters.layout, depth)
    else:
        config = _lora_config(adapters, target_modules, fan_in_fan_out=fan_in_fan_out)
    config.base_model_name_or_path, config.revision = base_model, revision
    tensors = peft_tensors(adapters)
    make_folder(folder)
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))
    _sort_targets(folder / CONFIG)
    full_card: Card = {**card, **describe(adapters)}
    write_atomic(folder / CARD, model_card(base_model, full_card, revision=revision).encode())


def _sort_targets(path: Path) -> None:
    """Write the target modules in order: PEFT has them as a set, and saves them in a different order every time."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True).encode())  # PEFT writes it for everybody to read


def _lora_config(adapters: Adapters, target_modules: Sequence[str], *, fan_in_fan_out: bool) -> LoraConfig:
    rank, alpha = _rank_and_alpha(adapters)
    modules, ranks, alphas = _by_module(adapters)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: value for name, value in by_ending(modules, ranks).items() if value != rank},
        alpha_pattern={name: value for name, value in by_ending(modules, alphas).items() if not _same(value, alpha)},
        target_modules=list(target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )


def _prompt_config(layout: Layout, depth: Depth | None) -> PromptEncoderConfig:
    tokens, width = layout.part("prompt").leaves[0].shape
    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        token_dim=width,
        num_transformer_submodules=1,
        num_layers=None if depth is None else depth.layers,
        num_attention_heads=None if depth is None else depth.heads,
        encoder_reparameterization_type="MLP",
        encoder_hidden_size=_hidden(layout),
        inference_mode=True,
    )


def _hidden(layout: Layout) -> int | None:
    """Return the width of a prompt encoder's MLP, from its first bias; None without an MLP."""
    return next((leaf.shape[0] for leaf in layout.part("prompt").leaves if leaf.factor == "bias"), None)


def peft_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """Name the tensors of one client [1, P] as PEFT does.

    Factors: base_model.model.<module>.lora_{A,B}.weight; a prompt encoder's output: prompt_embeddings [n, d].
    """
    if adapters.layout.virtual_tokens:
        return {EMBEDDINGS: embeddings(adapters)[0].contiguous()}
    tensors = {}
    for pair, (first, second) in enumerate(adapters.layout.part("lora").pairs()):
        name, rank = f"{PREFIX}{first.module}", int(adapters.ranks_of(pair)[0])
        tensors[f"{name}.lora_A.weight"] = adapters.leaf(first)[0, :rank].contiguous()
        tensors[f"{name}.lora_B.weight"] = adapters.leaf(second)[0, :, :rank].contiguous()
    return tensors


def describe(adapters: Adapters) -> Card:
    """Return a card's facts about one client's adapter [1, P]: its rank and alpha, or its virtual tokens."""
    if not adapters.layout.virtual_tokens:
        rank, alpha = _rank_and_alpha(adapters)
        return {"rank": rank, "alpha": alpha}
    facts: Card = {"virtual_tokens": adapters.layout.virtual_tokens}
    hidden = _hidden(adapters.layout)
    return facts if hidden is None else {**facts, "hidden": hidden}


def count_exported(layout: Layout) -> int:
    """Count the numbers of a client's file at full rank: all parameters, or a prompt encoder's embeddings only."""
    return layout.part("prompt").leaves[0].size if layout.virtual_tokens else layout.parameters


def _rank_and_alpha(adapters: Adapters) -> tuple[int, float | int]:
    """Return the largest rank of one client's modules [1, P], and alpha = scale x rank of the first module with it."""
    _, ranks, alphas = _by_module(adapters)
    return max(ranks), alphas[ranks.index(max(ranks))]


def _by_module(adapters: Adapters) -> tuple[list[str], list[int], list[float | int]]:
    """Return names, ranks and alphas of one client's modules, in the layout's order."""
    pairs = list(enumerate(adapters.layout.part("lora").pairs()))
    ranks = [min(int(adapters.ranks_of(pair)[0]), first.shape[0]) for pair, (first, _) in pairs]
    alphas = [_plain(float(adapters.scale_of(pair)[0]) * rank) for (pair, _), rank in zip(pairs, ranks, strict=True)]
    return [first.module for _, (first, _) in pairs], ranks, alphas


def copy_adapters(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    """Copy the three files of each adapter folder, those of its tokenizer, and no others; all folders or none.

    Where folders share a tokenizer's files, their copies do too.
    An absolute path of the base is shortened to its last name in the copies, because they are shared.
    Raises StoreError if a file is missing, a folder has a pickle, a target exists or the disk is full.
    """
    check_adapters(sources)
    check_free(targets)
    copied: dict[tuple[int, int], Path] = {}  # a tokenizer's file -> its first copy
    with ExitStack() as stack:
        temporaries = [stack.enter_context(new_folder(target)) for target in targets]
        for source, temporary in zip(sources, temporaries, strict=True):
            for name in FILES:
                copy_file(source / name, temporary / name)
            _name_base_only(temporary / CONFIG)
            for path in tokenizer_files(source):
                facts = path.stat()
                first = copied.setdefault((facts.st_dev, facts.st_ino), temporary / path.name)
                if first.parent == temporary:
                    copy_file(path, first)
                else:
                    share_files([first], temporary)


def check_adapters(folders: Sequence[Path]) -> list[AdapterConfig]:
    """Return the settings of adapters' folders. Raises StoreError unless each is whole, and has a card."""
    for folder in folders:
        for path in (folder.parent, folder):
            if path.is_symlink():  # the run may come from others, and its links lead to files of this machine
                raise StoreError(f"{describe_link(path)}, and links in a run are not followed; replace it by a copy")
        missing = [name for name in FILES if not (folder / name).exists() and not (folder / name).is_symlink()]
        if missing:
            raise StoreError(f"'{folder}' has no {missing[0]}; was the run cut short at its end? 'fedmira resume' it")
    configs = [check_adapter(folder, files=FILES) for folder in folders]
    for folder in folders:
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in TOKENIZER_FILES):
                check_plain(path)
        try:
            (folder / CARD).read_text(encoding="utf-8")
        except ValueError:
            raise StoreError(f"'{folder / CARD}' is damaged: it is not UTF-8; put back a copy of it") from None
    return configs


def check_free(targets: Sequence[Path]) -> None:
    """Raise StoreError if one of these folders exists already."""
    taken = [target for target in targets if target.exists() or target.is_symlink()]
    if taken:
        raise StoreError(f"'{taken[0]}' exists already; choose another --out")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `target` if the block succeeds, and is removed otherwise.

    Raises StoreError if the disk is full or read-only, or the path cannot be created.
    """
    temporary = None
    try:
        make_folder(target.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        yield temporary
        temporary.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StoreError(f"cannot write '{target}': {error.strerror or error}; choose another --out") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _name_base_only(path: Path) -> None:
    """Shorten an absolute path of the base in adapter_config.json to its last name; other names stay."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and shown_base(name) != name:
        shortened = {**config, "base_model_name_or_path": shown_base(name)}
        write_atomic(path, json.dumps(shortened, indent=2, sort_keys=True).encode())


def read_adapter(folder: Path, layout: Layout) -> Tensor:
    """Read a folder written by `export_adapter` into a row [1, P]; only adapter_model.safetensors is opened.

    A prompt needs a soft_layout: its encoder is not in the folder.
    Raises StoreError if it does not fit the layout, is damaged, or the folder has pickles.
    """
    path = folder / WEIGHTS
    pickles = list_pickles(folder) if folder.is_dir() else []
    if pickles:
        raise StoreError(
            f"'{folder}' holds pickles, which can run code: {join_some(pickles)}. FedMira reads only {WEIGHTS}; remove "
            "the pickles"
        )
    if not path.is_file():
        raise StoreError(f"'{folder}' holds no adapter_model.safetensors")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"'{path}' is damaged, or not a safetensors file: {error}") from None
    row = (_prompt_row if layout.virtual_tokens else _lora_row)(path, tensors, layout)
    if tensors:
        raise StoreError(f"'{path}': unexpected tensor '{next(iter(tensors))}'")
    if not bool(row.isfinite().all()):
        raise StoreError(f"'{path}' has numbers that are not finite; export or download the adapter again")
    return row


def _lora_row(path: Path, tensors: dict[str, Tensor], layout: Layout) -> Tensor:
    """Write the factors into a row, zero beyond their rank; removes them from `tensors`."""
    row = torch.zeros(1, layout.size)
    for leaf in layout.part("lora").leaves:
        name = f"{PREFIX}{leaf.module}.lora_{leaf.factor}.weight"
        if name not in tensors:
            raise StoreError(f"'{path}': no tensor '{name}'; was it made for another base or other target_modules?")
        factor = tensors.pop(name)
        columns = row[0, leaf.start : leaf.stop].view(leaf.shape)
        rank_axis = 0 if leaf.factor == "A" else 1
        if factor.ndim != 2 or any(
            size > room or (size < room and axis != rank_axis)
            for axis, (size, room) in enumerate(zip(factor.shape, leaf.shape, strict=True))
        ):
            raise StoreError(
                f"'{path}': '{name}' is {tuple(factor.shape)}, at most {leaf.shape} fits; was it made for another base?"
            )
        columns[: factor.shape[0], : factor.shape[1]] = factor
    return row


def _prompt_row(path: Path, tensors: dict[str, Tensor], layout: Layout) -> Tensor:
    """Write the embeddings into a row; removes them from `tensors`."""
    leaf, *encoder = layout.part("prompt").leaves
    if encoder:
        raise StoreError(f"'{path}' has the output of a prompt encoder, not the encoder: read it with soft_layout")
    if EMBEDDINGS not in tensors:
        raise StoreError(f"'{path}': no tensor '{EMBEDDINGS}'; is it a prompt?")
    prompt = tensors.pop(EMBEDDINGS)
    if tuple(prompt.shape) != leaf.shape:
        raise StoreError(
            f"'{path}': '{EMBEDDINGS}' is {tuple(prompt.shape)}, but must be {leaf.shape}; was it made for another "
            "base?"
        )
    row = torch.zeros(1, layout.size)
    row[0, leaf.start : leaf.stop] = prompt.flatten()
    return row


def short_targets(modules: Sequence[str], others: Sequence[str]) -> list[str]:
    """Name the adapted modules by the shortest endings (q_proj) that no other module has; `others`: names of all.

    PEFT and vLLM match by endings, and whatever has one: a list of layers too, whose first is named `layers.0`.
    """
    adapted = frozenset(modules)
    names = list(dict.fromkeys([*modules, *others]))
    endings = by_ending(names, [name in adapted for name in names])
    return sorted(ending for ending, own in endings.items() if own)


def check_targets(model: PreTrainedModel, modules: Sequence[str], targets: Sequence[str]) -> None:
    """Raise ModelError unless PEFT puts adapters on exactly these modules of a base when it reads `targets`.

    Tried before anything is trained, on a copy of the base's architecture without weights (on the device "meta").
    """
    settings = LoraConfig(target_modules=list(targets), r=1, task_type="CAUSAL_LM", inference_mode=True)
    problem = ""
    try:
        with quiet(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            bare = AutoModelForCausalLM.from_config(model.config)
            joined = get_peft_model(bare, settings, low_cpu_mem_usage=True)
        found = set(joined.base_model.targeted_module_names)
    except Exception as error:  # PEFT's and any architecture's own code
        problem = first_line(error)
    else:
        odd = sorted(found ^ set(modules))
        if odd:
            problem = f"it adapts '{odd[0]}' too" if odd[0] in found else f"it leaves out '{odd[0]}'"
    if problem:
        raise ModelError(
            f"lora.target_modules: PEFT could not load what would be exported for {type(model).__name__}: {problem}. "
            "Name other layers, such as [q_proj, v_proj]"
        )


def _plain(value: float) -> float | int:
    return round(value) if _same(value, round(value)) else value


def _same(value: float, other: float) -> bool:
    """Return whether two numbers are equal up to float32 rounding."""
    return abs(value - other) < 1e-6 * max(1.0, value)
