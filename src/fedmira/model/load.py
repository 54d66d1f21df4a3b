"""Load a frozen base model from a local folder or a hub name, and refuse at the door what cannot work.

Only safetensors weights, never code from the model's repository. A base is accepted when two measurements on random
tokens agree: later tokens do not change earlier logits (it is a causal decoder, so right padding needs no mask), and
our head on the decoder's hidden states gives the model's own logits.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedmira.data.batches import Batch
from fedmira.errors import ModelError
from fedmira.model.lora import Stack, find_targets, install
from fedmira.model.loss import Head
from fedmira.model.packing import pack, packed_attention

log = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


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
    dtype: torch.dtype
    device: torch.device
    max_positions: int | None
    transposed: bool  # adapted weights are [in, out] (Conv1D)
    packs: bool  # passes may lay examples end to end; else they are padded
    stack: Stack = field(default_factory=Stack)

    @property
    def pad_id(self) -> int:
        """Any id will do: padding stands right of every label in training and is masked in generation."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer alone. Raises ModelError if there is none, or it has no end-of-text token."""
    _check_place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.base_model '{name}': no usable tokenizer: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.base_model '{name}': the tokenizer has no end-of-text token, so answers could not end")
    return tokenizer


def count_positions(name: str) -> int | None:
    """Return how many positions a base has, by its config alone; None where there is no limit.

    Raises ModelError like load_base, long before weights are read.
    """
    positions = getattr(_load_config(name), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    targets: Sequence[str] | str = "auto",
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
) -> Base:
    """Load, check, freeze and stack a base model.

    dtype "auto": bfloat16 where the machine multiplies it fast (CUDA sm80+, CPUs with avx512_bf16 or amx_bf16), else
    float32. targets "auto": PEFT's list for the architecture, or every linear layer where PEFT has none.
    Raises ModelError: not found, not a causal decoder, weights that are pickles or do not fit the config.
    """
    tokenizer = tokenizer or load_tokenizer(name)
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    config = _load_config(name)
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=kind, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"model.base_model '{name}': weights cannot be loaded: {_first_line(error)}") from None
    missing = sorted(report["missing_keys"])
    if missing or report.get("mismatched_keys"):
        what = missing or sorted(str(key) for key in report["mismatched_keys"])
        raise ModelError(
            f"model.base_model '{name}': weights do not fit its config.json: {len(what)} such as {what[0]}"
        )
    return wrap(model.to(where), tokenizer, name=name, targets=targets, fingerprint=fingerprint(name))


def wrap(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    name: str,
    targets: Sequence[str] | str,
    fingerprint: str,
) -> Base:
    """Freeze a loaded model and install stacked layers in it (load_base after loading; tests on random weights)."""
    model.eval().requires_grad_(False)
    config = model.config
    # A checkpoint's own sampling settings (penalties, ...) would creep into greedy decoding; only its stops are kept.
    stops = getattr(model.generation_config, "eos_token_id", None)
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    model.generation_config = GenerationConfig(eos_token_id=sorted({tokenizer.eos_token_id, *stops}))
    decoder = model.base_model
    output = model.get_output_embeddings()
    if output is None or decoder is model:
        raise ModelError(f"model.base_model '{name}': {type(model).__name__} has no separate decoder and output head")
    head = Head(
        output.weight,
        getattr(output, "bias", None),
        scale=float(getattr(config, "logit_scale", None) or 1 / float(getattr(config, "logits_scaling", None) or 1)),
        cap=getattr(config, "final_logit_softcapping", None),
    )
    _check_decoder(model, decoder, head, name)
    if targets == "auto":
        targets = PEFT_TARGETS.get(config.model_type, "all-linear")
    names = find_targets(model, targets, head=output)
    stack = Stack()
    shapes = install(model, names, stack)
    first = model.get_submodule(names[0])
    return Base(
        name=name,
        model=model,
        tokenizer=tokenizer,
        decoder=decoder,
        head=head,
        shapes=tuple(shapes),
        fingerprint=fingerprint,
        dtype=head.weight.dtype,
        device=head.weight.device,
        max_positions=getattr(config, "max_position_embeddings", None),
        transposed=bool(first.transposed),
        packs=_packs(model, decoder),
        stack=stack,
    )


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


def fingerprint(name: str) -> str:
    """sha256 over config.json, tokenizer.json and the weight files, so that two sites can tell they hold one base."""
    folder = Path(name)
    if not folder.is_dir():
        found = transformers.utils.cached_file(name, "config.json")
        if found is None:
            raise ModelError(f"model.base_model '{name}': its files are not in the local cache")
        folder = Path(found).parent
    digest = hashlib.sha256()
    patterns = ("config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.safetensors")
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_place(name: str) -> None:
    folder = Path(name)
    if folder.is_dir():
        pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
        if pickles and not list(folder.glob("*.safetensors")):
            raise ModelError(
                f"model.base_model '{name}': holds {pickles[0]} and no safetensors; pickles can run code and are "
                "refused. Convert the weights with transformers' save_pretrained."
            )
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.base_model '{name}': no config.json in this folder; expected a transformers model")
    elif folder.exists() or name.startswith((".", "/", "~")) or not _HUB_NAME.match(name):
        raise ModelError(f"model.base_model '{name}': no such folder (current folder: {Path.cwd()})")


def _load_config(name: str) -> transformers.PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.base_model '{name}': config cannot be read: {_first_line(error)}") from None
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not causal or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model.base_model '{name}': a {config.model_type} model is no causal decoder; FedMira needs one "
            "(GPT-2, Llama, Qwen, Mistral, Gemma, Phi, ...)"
        )
    return config


def _check_decoder(model: nn.Module, decoder: nn.Module, head: Head, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(head.weight)
    ids = torch.randint(vocabulary, (1, 8), generator=generator).to(head.weight.device)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    with torch.no_grad(), quiet():
        own = _wide(model(input_ids=ids, use_cache=False).logits)
        changed = _wide(model(input_ids=other, use_cache=False).logits)
        ours = head.logits(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    tolerance = 1e-4 if head.weight.dtype != torch.bfloat16 else 5e-2
    span = own.abs().max().clamp(min=1)
    if bool((own[:, :-1] - changed[:, :-1]).abs().max() > tolerance * span):
        raise ModelError(f"model.base_model '{name}': later tokens change earlier logits, so it is no causal decoder")
    if bool((own - ours).abs().max() > tolerance * span):
        raise ModelError(
            f"model.base_model '{name}': {type(model).__name__} changes its logits after the output head in a way "
            "FedMira does not know; its loss would be wrong"
        )


def _packs(model: transformers.PreTrainedModel, decoder: nn.Module) -> bool:
    """Measure whether uneven examples laid end to end give the hidden states that each gives alone."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    lengths = [5, 9, 2, 9]
    own = [torch.randint(vocabulary, (1, 1, length), generator=generator) for length in lengths]
    batch = Batch(
        ids=torch.cat([nn.functional.pad(ids, (0, 9 - ids.shape[-1])) for ids in own]),
        labels=torch.full((len(lengths), 1, 9), -100),
        lengths=torch.tensor(lengths)[:, None],
    )
    plan = pack(batch, pad_id=0).to(device)
    assert plan.attention is not None
    try:
        with torch.no_grad(), quiet():
            alone = [decoder(input_ids=ids[0].to(device), use_cache=False).last_hidden_state[0] for ids in own]
            with packed_attention(model, plan.attention):
                together = decoder(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state[
                    0
                ]
    except (NotImplementedError, TypeError, KeyError, ValueError, RuntimeError) as error:
        log.info("%s is trained on padded batches: %s", type(model).__name__, error)
        return False
    starts = {
        client: segment.start + place * segment.tokens
        for segment in plan.segments
        for place, client in enumerate(plan.order[segment.first : segment.stop].tolist())
    }
    tolerance = 1e-4 if together.dtype != torch.bfloat16 else 5e-2
    worst = max(
        float((_wide(together[starts[client] : starts[client] + length]) - _wide(alone[client])).abs().max())
        for client, length in enumerate(lengths)
    )
    span = max(1.0, max(float(_wide(states).abs().max()) for states in alone))
    if worst > tolerance * span:
        log.info("%s is trained on padded batches: packed states differ by %.2g", type(model).__name__, worst)
    return worst <= tolerance * span


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own advice (padding, masks) inside a pass that knows what it does."""
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
