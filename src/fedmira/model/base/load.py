"""Load a frozen base model from a local folder or a hub name, and refuse early what cannot work.

Only safetensors weights, never code from the model's repository (source.py). A base is accepted when trials on
random tokens show that it is a causal decoder whose logits our head gives (trial.py).
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from fedmira.errors import ModelError
from fedmira.model.base.memory import keep_freed_memory, return_freed_memory
from fedmira.model.base.source import (
    digest,
    find_folder,
    fingerprint,
    first_line,
    join_some,
    load_config,
    load_tokenizer,
    positions,
    refuse,
)
from fedmira.model.base.targets import Wanted, find_targets, narrow
from fedmira.model.base.trial import check_decoder, check_prompts, list_unfit, try_packing
from fedmira.model.base.unpacked import INPUT_SCALES, packed_by
from fedmira.model.base.vocabulary import check_end, count_known_ids
from fedmira.model.base.weights import check_fit, check_numbers
from fedmira.model.packed.fused import fuse
from fedmira.model.packed.lora import Stack, install
from fedmira.model.packed.loss import Head
from fedmira.model.packed.recompute import find_blocks
from fedmira.model.packed.tail import Tail, find_tail
from fedmira.model.packed.virtual import VirtualIndex
from fedmira.model.quantised import Quantisation, base_fingerprint, loading, quantisation_in, take_over

__all__ = ["Base", "choose_device", "choose_dtype", "fingerprint", "load_base", "load_tokenizer"]
__all__ += ["quiet", "wrap"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen base with stacked layers installed; shared by every client, method and seed of a study."""

    name: str  # as the user wrote it
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    decoder: nn.Module
    head: Head
    shapes: tuple[tuple[str, int, int], ...]  # adapted modules: (name, in, out)
    fingerprint: str  # sha256 over config, tokenizer and weights
    vocabulary: int  # it can read ids below this; its tokenizer may know more tokens
    dtype: torch.dtype
    device: torch.device
    max_positions: int | None
    transposed: bool  # adapted weights are [in, out] (Conv1D)
    packs: bool  # passes lay examples end to end; else they are padded
    stack: Stack = field(default_factory=Stack)
    reach: int | None = None  # longest text whose attention is plainly causal (windows, chunks); None: of any length
    blocks: tuple[nn.Module, ...] = ()  # of the decoder, which a pass may compute again in backward
    tail: Tail | None = None  # what follows the last attention, where it can be cut to the labelled tokens

    @property
    def pad_id(self) -> int:
        """Any id works: padding is right of every label in training and masked in generation."""
        pad = self.tokenizer.pad_token_id
        known = pad is not None and pad < self.vocabulary  # some tokenizers add one that their base does not have
        return int(pad if known else self.tokenizer.eos_token_id)

    @property
    def width(self) -> int:
        """Width d of the token embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def inputs(self, ids: Tensor, virtual: VirtualIndex | None) -> dict[str, Tensor]:
        """Return the decoder's inputs: ids, or embeddings where the stack's clients have virtual tokens among them."""
        if virtual is None:
            return {"input_ids": ids}
        assert self.stack.virtual is not None, "virtual tokens without a prompt encoder"
        plain = self.model.get_input_embeddings()(ids.clamp(min=0))
        return {"inputs_embeds": self.stack.virtual.put(plain, virtual, self.stack.owners(ids.numel()))}


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    targets: Sequence[str] | str | Wanted = "auto",
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    quantisation: Quantisation | None = None,
) -> Base:
    """Load, check, freeze and stack a base model.

    quantisation: of float weights, when they are loaded; a folder that was quantised before is read as it is.
    revision: branch, tag or commit of a hub name, None for its main branch. dtype "auto": bfloat16 where the machine
    multiplies it fast (CUDA sm80+, CPUs with avx512_bf16 or amx_bf16), else float32. targets: as in Wanted; "auto":
    PEFT's list for the architecture, or every linear layer where PEFT has none.
    Raises ModelError: not found, not a causal decoder, weights that are pickles, do not fit the config or the device.
    """
    tokenizer = load_tokenizer(name, revision=revision) if tokenizer is None else tokenizer
    on = choose_device(device)
    kind = choose_dtype(dtype, on)
    return_freed_memory()  # pieces that stay would lie between the freed ones of other sizes, and the heap grow
    folder = find_folder(name, revision=revision, weights=True)
    config = load_config(name, folder)
    stored, packed = quantisation_in(config), packed_by(getattr(config, "quantization_config", None))
    already = packed if stored is None else stored.name
    if already is not None and quantisation is not None and quantisation != stored:
        asked = f"the config asks for {quantisation.name}: remove load_in_4bit or load_in_8bit"
        raise refuse(name, f"its weights are in {already} already, and {asked}")
    if packed is not None:
        log.warning("%s: its weights (%s) are used as float weights, and no layer's inputs are rounded", name, packed)
    elif stored is None:
        check_numbers(folder, name=name)
    how = loading(config, quantisation, dtype=kind, device=on)
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=kind,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
                **how,
            )
    except Exception as error:  # a damaged file, or a config that no model can be built from
        raise refuse(name, f"weights cannot be loaded: {type(error).__name__}: {first_line(error)}") from None
    check_fit(model, report, name=name, ignored=INPUT_SCALES if packed else None)
    try:
        model = model if how else model.to(on)
    except torch.OutOfMemoryError as error:
        raise refuse(name, f"does not fit on {on} in {kind}: {first_line(error)}") from None
    sha256 = base_fingerprint(digest(folder), config, quantisation)
    if how:
        take_over(model, kind)
    base = wrap(model, tokenizer, name=name, targets=targets, fingerprint=sha256)
    keep_freed_memory()
    return base


def wrap(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    name: str,
    targets: Sequence[str] | str | Wanted,
    fingerprint: str,
) -> Base:
    """Freeze a loaded model and install stacked layers in it, as load_base does; tests do so with random weights."""
    wanted = targets if isinstance(targets, Wanted) else Wanted(targets)
    model.eval().requires_grad_(False)
    config = model.config
    decoder = model.base_model if model.base_model is not model else getattr(model, "model", model)
    output = model.get_output_embeddings()
    if output is None or decoder is model:
        raise refuse(name, f"{type(model).__name__} has no separate decoder and output head")
    head = _make_head(output, config)
    with quiet():
        vocabulary = count_known_ids(model, name=name)
        check_end(tokenizer, vocabulary=vocabulary, name=name)
        model.generation_config = _ends_only(model.generation_config, tokenizer, vocabulary=vocabulary, name=name)
        check_decoder(model, decoder, head, vocabulary=vocabulary, name=name)
        check_prompts(model, vocabulary=vocabulary, name=name)
        fuse(decoder)
        names = narrow(_choose_targets(model, wanted.names, head=output), wanted, model=type(model).__name__)
        layers = {layer: model.get_submodule(layer) for layer in names}
        unfit = list_unfit(decoder, layers, vocabulary=vocabulary)
        if unfit:
            names = _leave_out(names, unfit, wanted, name=name)
        stack = Stack()
        shapes = install(model, names, stack)
        reaches = try_packing(model, decoder, vocabulary=vocabulary)
        tail = find_tail(model, decoder, stack, vocabulary=vocabulary) if reaches is not None else None
    return Base(
        name=name,
        model=model,
        tokenizer=tokenizer,
        decoder=decoder,
        head=head,
        shapes=tuple(shapes),
        fingerprint=fingerprint,
        vocabulary=vocabulary,
        dtype=head.weight.dtype,
        device=head.weight.device,
        max_positions=positions(config),
        transposed=bool(model.get_submodule(names[0]).transposed),
        packs=reaches is not None,
        reach=min(reaches, default=None) if reaches else None,
        stack=stack,
        blocks=find_blocks(decoder),
        tail=tail,
    )


def _ends_only(
    settings: GenerationConfig | None,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    vocabulary: int,
    name: str,
) -> GenerationConfig:
    """Return what stays of a checkpoint's settings: its ends of text. Others (penalties, ...) change greedy answers."""
    stated = getattr(settings, "eos_token_id", None)
    ends = [stated] if isinstance(stated, int) else list(stated or [])
    unknown = [index for index in ends if not 0 <= index < vocabulary]
    if unknown:
        log.warning(
            "%s: its generation settings end answers at id %s, which no answer can have: its embeddings have ids 0 to "
            "%d",
            name,
            join_some([str(index) for index in unknown]),
            vocabulary - 1,
        )
    return GenerationConfig(eos_token_id=sorted({tokenizer.eos_token_id, *ends} - {*unknown}))


def _make_head(output: nn.Linear, config: transformers.PretrainedConfig) -> Head:
    return Head(
        output.weight,
        getattr(output, "bias", None),
        scale=float(getattr(config, "logit_scale", None) or 1 / float(getattr(config, "logits_scaling", None) or 1)),
        cap=getattr(config, "final_logit_softcapping", None),
    )


def _choose_targets(model: transformers.PreTrainedModel, targets: Sequence[str] | str, *, head: nn.Module) -> list[str]:
    """Return the layers to adapt; "auto" is PEFT's list for the architecture where it fits, else all linear layers."""
    if targets != "auto":
        return find_targets(model, targets, head=head)
    peft_targets = PEFT_TARGETS.get(model.config.model_type)
    if not isinstance(peft_targets, list):  # some are patterns for models with more than a text decoder
        return find_targets(model, "all-linear", head=head)
    try:
        return find_targets(model, peft_targets, head=head)
    except ModelError:  # PEFT's list is for another version of the architecture
        return find_targets(model, "all-linear", head=head)


def choose_device(device: str) -> torch.device:
    """Resolve "auto | cpu | cuda | cuda:N". Raises ModelError if that CUDA device is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"model.device '{device}': this machine shows {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Resolve "auto" to bfloat16 where matrix products in it are fast, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        info = Path("/proc/cpuinfo")
        fast = info.is_file() and re.search(r"\b(avx512_bf16|amx_bf16)\b", info.read_text()) is not None
    return torch.bfloat16 if fast else torch.float32


def _leave_out(names: list[str], unfit: dict[str, str], wanted: Wanted, *, name: str) -> list[str]:
    """Return the layers that can carry an adapter. Raises ModelError if the user named others, or none is left."""
    fit = [layer for layer in names if layer not in unfit]
    layer, why = next(iter(unfit.items()))
    if wanted.is_named or not fit:
        raise refuse(
            name,
            f"lora.target_modules: '{layer}' {why}, so it cannot carry an adapter per client; name other layers, or "
            "all-linear for every layer that can",
        )
    log.warning("%s: %d of %d linear layers get no adapter: '%s' %s", name, len(unfit), len(names), layer, why)
    return fit


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' advice (padding, masks), which does not apply to our passes."""
    level = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
