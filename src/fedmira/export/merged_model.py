"""An adapter merged into its base: a whole model per client, for programs without adapters.

PEFT merges, in float32 or wider, and transformers saves. On random tokens the merged logits are compared with those of
base plus adapter, and the saved model is loaded again and compared with the merged one; the folder appears only if
they agree. A model in bfloat16 is rounded once, at the end; the effect of that is reported and is not an error.
"""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedmira import bundled
from fedmira.disk.files import FILE_MODE
from fedmira.disk.run_facts import RunFacts
from fedmira.errors import ConfigError, ModelError, StoreError
from fedmira.export.adapter_config import WEIGHTS, adapted_modules, read_shapes
from fedmira.export.asking import tokenizer_files
from fedmira.export.card import merged_card
from fedmira.export.peft_folder import check_adapters, check_free, new_folder
from fedmira.model.base.load import quiet
from fedmira.model.base.source import digest, find_folder, first_line, load_config, positions
from fedmira.model.base.vocabulary import count_known_ids
from fedmira.model.quantised import (
    Quantisation,
    base_fingerprint,
    loading,
    make_dense,
    take_over,
)

# Largest difference of logits, as a fraction of the largest logit, that a merge may make. Measured with random adapters
# of several sizes on three small trained Llamas (2 to 6 layers) and on random Llamas and GPT-2 of 2 to 32 layers:
# float64 exact, float32 at most 9.7e-7. Rounding to bfloat16 then changes logits by 3e-2 or more.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}
DTYPES = ("float32", "bfloat16", "float64")
SAMPLE = (2, 32)  # texts, tokens


@dataclass(frozen=True)
class Merged:
    """A merged model. difference and effect: fractions of the largest logit, largest over random tokens."""

    client: str
    path: Path
    dtype: str
    difference: float  # between this model and base plus adapter
    effect: float  # between the base without and with the adapter

    @property
    def blurred(self) -> bool:
        """Does rounding change the logits by more than half of the adapter's effect? Then float32 is better."""
        return self.difference > 0.5 * self.effect > 0


def merge_adapters(
    sources: Sequence[Path],
    targets: Sequence[Path],
    *,
    facts: RunFacts,
    revision: str | None = None,
    dtype: str | None = None,
    quantisation: Quantisation | None = None,
) -> list[Merged]:
    """Write one whole model per adapter folder: weights in safetensors, the base's tokenizer files, and a card.

    facts: run.json, for the base's name and sha256 and the type of the run; dtype: another type. quantisation: of the
    base in the run; the adapter, which was trained on the rounded weights, is merged into those, made dense.
    All checks are done before any weights are loaded. Raises ConfigError, StoreError or ModelError: an unknown type, a
    taken target, pickles, a prompt, too little disk, a base that is not the run's, or logits that differ by more than
    TOLERANCES.
    """
    kind = dtype or facts.dtype
    if kind not in DTYPES:
        raise ConfigError([f"--dtype: found '{kind}'; allowed: {', '.join(DTYPES)}"], "export")
    for config in check_adapters(sources):
        if config.is_prompt:
            raise StoreError(
                f"'{config.folder}' is a prompt of virtual tokens, which precede a text and cannot be merged into "
                "weights; export it without --merge, and load it with PEFT"
            )
    check_free(targets)
    name = facts.base_model
    folder = find_folder(bundled.resolve(name), revision=revision, weights=True)
    config = load_config(str(folder), folder)
    packed = getattr(config, "quantization_config", None) is not None
    count = _count_dense(config) if packed else _count_parameters(folder)
    size = count * getattr(torch, kind).itemsize
    _check_room(targets, size + sum(path.stat().st_size for path in tokenizer_files(folder)))
    base_sha256 = base_fingerprint(digest(folder), config, quantisation)
    if base_sha256 != facts.base_fingerprint:
        raise ModelError(
            f"model.base_model '{name}' is not the base this run was trained on (sha256 {base_sha256[:12]}, trained on "
            f"{facts.base_fingerprint[:12]}); use that base"
        )
    return [
        _merge_one(source, target, folder=folder, base_model=name, dtype=kind, bits=quantisation, trained=facts.dtype)
        for source, target in zip(sources, targets, strict=True)
    ]


def _merge_one(
    source: Path, target: Path, *, folder: Path, base_model: str, dtype: str, bits: Quantisation | None, trained: str
) -> Merged:
    """Merge, compare, save, load the saved model, compare again, and only then let the folder appear.

    bits: of the base in the run, which computed in the type `trained`.
    """
    exact = "float32" if dtype == "bfloat16" else dtype
    model = _load_base(folder, exact, bits, trained)
    ids = _draw_ids(model)
    bare = _logits(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a call in PEFT
        joined = _join(model, source)
    apart = _logits(joined, ids)
    scale = float(apart.abs().max()) or 1.0
    with new_folder(target) as temporary:
        try:
            with quiet():
                whole = joined.merge_and_unload(safe_merge=True)
                _check(target, _logits(whole, ids), apart, TOLERANCES[exact], "base and adapter")
                for value in whole.parameters():  # not the buffers, which a loaded model has in their own type
                    value.data = value.data.to(getattr(torch, dtype)).to(value.dtype)
                merged_logits = _logits(whole, ids)
                for value in whole.parameters():
                    value.data = value.data.to(getattr(torch, dtype))
                whole.save_pretrained(str(temporary))
        except ValueError as error:  # a sum that is not finite, or generation settings that transformers does not save
            raise ModelError(f"'{source}' cannot be merged: {first_line(error)}") from None
        del model, joined, whole
        _check(target, _logits(_load(temporary, exact), ids), merged_logits, TOLERANCES[exact], "the saved model")
        difference = float((_logits(_load(temporary, dtype), ids) - apart).abs().max()) / scale
        for path in tokenizer_files(source) or tokenizer_files(folder):  # the adapter's has the trained prompt
            shutil.copyfile(path, temporary / path.name)
        card = (source / "README.md").read_text(encoding="utf-8")
        text = merged_card(card, base_model=base_model, dtype=dtype, difference=difference)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        mode = (source / "adapter_model.safetensors").stat().st_mode & FILE_MODE
        for path in temporary.iterdir():  # the adapter is in the weights: nobody else may read them either
            path.chmod(mode)
    effect = float((bare - apart).abs().max()) / scale
    return Merged(target.name, target, dtype, difference, effect)


def _join(model: Any, source: Path) -> Any:
    """Return the base with an adapter beside it. Raises StoreError if the adapter was made for another base.

    PEFT only warns of a layer that the adapter has no tensors for.
    """
    try:
        joined = PeftModel.from_pretrained(model, str(source)).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        raise StoreError(f"'{source}' does not fit its base: {first_line(error)}") from None
    factors = (value for name, value in joined.named_parameters() if "lora_" in name)
    if not all(bool(value.isfinite().all()) for value in factors):
        raise StoreError(f"'{source / WEIGHTS}' has numbers that are not finite; export the adapter again")
    expected = {name.removeprefix("base_model.model.") for name in joined.base_model.targeted_module_names}
    stored = set(adapted_modules(read_shapes(source / WEIGHTS)))
    if odd := sorted(expected ^ stored):
        what = "no tensors for" if odd[0] in expected else "tensors for another base's"
        raise StoreError(f"'{source}' does not fit its base: it has {what} '{odd[0]}'")
    return joined


def _check(target: Path, logits: Tensor, expected: Tensor, tolerance: float, of: str) -> None:
    """Raise ModelError if logits differ by more than a fraction of the largest."""
    difference = float((logits - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    if not difference <= tolerance:
        raise ModelError(
            f"'{target}': the merged model's logits differ by {difference:.1e} of the largest from those of {of}; "
            f"{tolerance:.0e} is allowed. It was removed"
        )


def _load(folder: Path, dtype: str) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=load_config(str(folder), folder),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        ).eval()


def _load_base(folder: Path, dtype: str, bits: Quantisation | None, trained: str) -> Any:
    """Return the base of a run as a dense model; one in 4 or 8 bits as these bits were read in the run."""
    config = load_config(str(folder), folder)
    kind = getattr(torch, trained)
    how = loading(config, bits, dtype=kind, device=torch.device("cpu"))
    if not how:
        return _load(folder, dtype)
    with quiet():
        rounded = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=kind,
            use_safetensors=True,
            trust_remote_code=False,
            **how,
        )
        take_over(rounded, kind)
        make_dense(rounded)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        model.load_state_dict({name: value.to(getattr(torch, dtype)) for name, value in rounded.state_dict().items()})
    return model


def _draw_ids(model: Any) -> Tensor:
    """Draw random tokens [B, T] within the vocabulary and positions of the base."""
    texts, tokens = SAMPLE
    length = min(tokens, positions(model.config) or tokens)
    stream = torch.Generator().manual_seed(0)
    return torch.randint(count_known_ids(model, name="the base"), (texts, length), generator=stream)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    with quiet():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.to(torch.float64)


def _count_parameters(folder: Path) -> int:
    """Count the parameters in a base's safetensors from the headers alone."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():  # the folder may have other copies beside the listed ones
            files = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        total = 0
        for path in files:
            with safe_open(path, framework="pt") as file:
                total += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"the base in '{folder}' cannot be read: {first_line(error)}") from None
    return total


def _count_dense(config: Any) -> int:
    """Count the parameters of a base by its config; packed files have several of them in one number."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(value.numel() for value in model.parameters())


def _check_room(targets: Sequence[Path], each: int) -> None:
    """Raise StoreError if the disk has less than `each` bytes per target."""
    out = targets[0].parent
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free, need = shutil.disk_usage(existing).free, each * len(targets)
    if free < need:
        raise StoreError(
            f"'{out}' needs {need:,} bytes for {len(targets)} merged models, and {free:,} are free; choose another "
            "--out, one --client, or a smaller --dtype"
        )
