"""Folders that other programs have packed: read as the float weights that their codes stand for, or refused by name."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import small_study, tiny
from torch import Tensor

import fedmira
from fedmira.config.faults import check_config
from fedmira.errors import ModelError
from fedmira.model.base.load import Base, load_base
from fedmira.model.quantised import Quantisation
from fedmira.study import face

BLOCK = 4
Packed = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]  # what is stored; as numbers; the config's entry
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "whole, 8 bits": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "whole, 4 bits": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": BLOCK}),
    "floats, 8 bits": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
}
LARGEST = {("int", 8): 127, ("int", 4): 7, ("float", 8): 448}


def pack_fp8(weights: dict[str, Tensor]) -> Packed:
    """W = codes times the scale of their block."""
    stored, dense = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
            scales = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            stored |= {name: codes.reshape(weight.shape), f"{name}_scale_inv": scales}
            dense[name] = (codes.float() * scales[:, None, :, None]).reshape(weight.shape)
    entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    return stored, dense, entry


def pack_compressed(scheme: str) -> Callable[[dict[str, Tensor]], Packed]:
    """By the library's own compressor, whose files have scales of inputs too."""

    def pack(weights: dict[str, Tensor]) -> Packed:
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (an extra)")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize

        form, settings = SCHEMES[scheme]
        how = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings), format=form)
        stored, dense = dict(weights), dict(weights)
        for name, weight in weights.items():
            if name.endswith("_proj.weight"):
                groups = weight.unflatten(1, (-1, settings.get("group_size", weight.shape[1])))
                scales = groups.abs().amax(2) / LARGEST[settings["type"], settings["num_bits"]]
                dense[name] = fake_quantize(weight, scales, torch.zeros_like(scales), how.weights)
                parts = {"weight": stored.pop(name), "weight_scale": scales, "weight_zero_point": None}
                packed = BaseCompressor.get_value_from_registry(form).compress(parts, how)
                layer = name.removesuffix(".weight")
                stored |= {f"{layer}.{part}": value for part, value in packed.items() if value is not None}
                stored[f"{layer}.input_scale"] = torch.ones(1)
        group = {"targets": ["Linear"], "weights": how.weights.model_dump(mode="json"), "format": form}
        entry = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"all": group}}
        return stored, dense, {**entry, "ignore": ["lm_head"], "quantization_status": "compressed"}

    return pack


def pack_mxfp4(weights: dict[str, Tensor]) -> Packed:
    """Experts [in, out] are stored [out, in/32, 16], two codes in a byte, with an exponent for each 32."""
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    stream = torch.Generator().manual_seed(0)
    stored, dense = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj") and "experts" in name:
            experts, inputs, outputs = weight.shape
            codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=stream)
            powers = torch.randint(-6, -2, (experts, outputs, inputs // 32), generator=stream)
            del stored[name]
            stored[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            stored[f"{name}_scales"] = (powers + 127).to(torch.uint8)
            dense[name] = (
                (values[codes] * torch.exp2(powers.float())[..., None]).flatten(2).transpose(1, 2).contiguous()
            )
    return stored, dense, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def gpt_oss() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.GptOssConfig(
        vocab_size=tiny.VOCABULARY, pad_token_id=None, eos_token_id=tiny.END, **sizes, **heads
    )
    return transformers.GptOssForCausalLM(config)


def folders(model: Any, pack: Callable[[dict[str, Tensor]], Packed], at: Path) -> tuple[Path, Path]:
    """Save a model packed, and as the numbers that its codes stand for."""
    plain, packed = at / "plain", at / "packed"
    for folder in (plain, packed):
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    stored, dense, entry = pack(load_file(plain / "model.safetensors"))
    for folder, tensors in ((plain, dense), (packed, stored)):
        whole = {name: value.contiguous() for name, value in tensors.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    note(packed, entry)
    return plain, packed


def note(folder: Path, entry: object, key: str = "quantization_config") -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: entry}), encoding="utf-8")


def loaded(folder: Path, dtype: str = "float32") -> Base:
    return load_base(str(folder), dtype=dtype, device="cpu", targets=["q_proj", "v_proj"])


def same(found: Base, expected: Base) -> None:
    """Assert that two bases have the same numbers in the same types."""
    one, other = found.model.state_dict(), expected.model.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_8_bit_floats_are_read_as_their_numbers(dtype: str, tmp_path: Path) -> None:
    plain, packed = folders(tiny.model("qwen3", dtype=torch.float32), pack_fp8, tmp_path)
    base = loaded(packed, dtype)
    same(base, loaded(plain, dtype))
    assert base.fingerprint != loaded(plain, dtype).fingerprint


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_are_read_as_their_numbers(
    scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, packed = folders(tiny.model("llama", dtype=torch.float32), pack_compressed(scheme), tmp_path)
    same(loaded(packed), loaded(plain))
    assert "(compressed-tensors) are used as float weights, and no layer's inputs are rounded" in caplog.text


def test_experts_in_mxfp4_are_read_as_their_numbers(tmp_path: Path) -> None:
    plain, packed = folders(gpt_oss(), pack_mxfp4, tmp_path)
    same(loaded(packed), loaded(plain))


@pytest.mark.parametrize("pack", [pack_fp8, pack_compressed("whole, 4 bits")], ids=["fp8", "compressed"])
def test_a_run_on_packed_weights_is_that_on_their_numbers_and_is_merged_into_a_plain_model(
    pack: Callable[[dict[str, Tensor]], Packed], tmp_path: Path
) -> None:
    plain, packed = folders(tiny.model("llama", dtype=torch.float32), pack, tmp_path)
    data, losses = small_study.save_data(tmp_path / "data.jsonl"), []
    for folder in (plain, packed):
        raw = small_study.settings(folder, data, tmp_path / f"study-{folder.name}", methods=[{"name": "fedavg"}])
        study = fedmira.run(check_config(raw))
        losses.append(study.results.query("metric == 'loss'")["value"].tolist())
    assert losses[0] == losses[1]
    (run,) = study.runs
    (merged,) = face.merge(run, client="ada", out=tmp_path / "merged")
    assert merged.difference < 1e-4 < merged.effect
    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text(encoding="utf-8"))
    with safe_open(merged.path / "model.safetensors", framework="pt") as tensors:
        assert not [name for name in tensors.keys() if "scale" in name]  # noqa: SIM118


def test_packed_weights_are_not_quantised_once_more(tmp_path: Path) -> None:
    _, packed = folders(tiny.model("llama", dtype=torch.float32), pack_fp8, tmp_path)
    with pytest.raises(ModelError, match=r"in fp8 already, and the config asks for nf4: remove load_in_4bit"):
        load_base(str(packed), dtype="float32", device="cpu", quantisation=Quantisation(4))


def test_tensors_that_no_method_has_are_refused_there_too(tmp_path: Path) -> None:
    _, packed = folders(tiny.model("llama", dtype=torch.float32), pack_fp8, tmp_path)
    path = packed / "model.safetensors"
    save_file(
        load_file(path) | {"model.layers.0.self_attn.q_proj.other": torch.ones(1)}, path, metadata={"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"no place for 1 of the tensors, model\.layers\.0\.self_attn\.q_proj\.other"):
        loaded(packed)


@pytest.mark.parametrize(
    ("library", "named"), [("compressed_tensors", "that library"), ("bitsandbytes", "bitsandbytes")]
)
def test_a_missing_library_is_named_before_weights_are_read(
    library: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = small_study.save_base(tmp_path / "base"), small_study.save_data(tmp_path / "data.jsonl")
    raw = small_study.settings(base, data, tmp_path / "study")
    (base / "model.safetensors").write_bytes(b"")
    if library == "bitsandbytes":
        raw["model"] |= {"load_in_4bit": True}
    else:
        note(base, {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}})
    there = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == library else there(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ModelError, match=rf"need {named}: pip install 'fedmira\[quant\]'"):
        fedmira.run(check_config(raw))
    assert not (tmp_path / "study").exists()
