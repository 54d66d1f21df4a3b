"""What a folder or hub name may hold; all else is refused with a reason before weights are read."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.model import hub

from fedmira.errors import ModelError
from fedmira.model.base.load import load_base
from fedmira.model.base.source import find_folder, fingerprint, load_config, load_tokenizer, positions

Change = Callable[..., Path]


def count_positions(name: str) -> int | None:
    return positions(load_config(name, find_folder(name)))


@pytest.fixture
def changed(saved: Path) -> Change:
    """Change keys of a JSON file of the saved model; None removes one."""

    def change(file: str = "config.json", **keys: Any) -> Path:
        facts = json.loads((saved / file).read_text()) | keys
        (saved / file).write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
        return saved

    return change


def unread(folder: Path, fault: str) -> None:
    """All three doors refuse a folder with the same reason, and exit code 2; the weights are not even there."""
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(b"")
    for door in (load_tokenizer, count_positions, lambda name: load_base(name, dtype="float32", device="cpu")):
        with pytest.raises(ModelError, match=fault) as refused:
            door(str(folder))
        assert refused.value.exit_code == 2
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("bert", "a bert model is an encoder, not a causal decoder"),
        ("t5", "a t5 model is not a causal decoder; FedMira needs"),
        ("bart", "a bart model is not a causal decoder"),
        ("whisper", "a whisper model is not a causal decoder"),
        ("vit", "a vit model is not a causal decoder"),
        ("llava", "a llava model is not a causal decoder"),
        ("gemma3", "a gemma3 model is more than a text decoder .*vision_config"),
    ],
)
def test_a_model_of_another_kind_is_refused(saved: Path, kind: str, fault: str) -> None:
    transformers.AutoConfig.for_model(kind).save_pretrained(saved)
    unread(saved, fault)


def test_bert_as_a_decoder_is_refused_too(saved: Path) -> None:
    transformers.BertConfig(is_decoder=True).save_pretrained(saved)
    unread(saved, "a bert model is an encoder")


def test_a_decoder_with_an_encoder_beside_it_is_refused(changed: Change) -> None:
    unread(changed(is_encoder_decoder=True), "a llama model is not a causal decoder")


def test_an_unknown_kind_is_refused_and_the_nearest_named(changed: Change) -> None:
    unread(changed(model_type="lama"), r"model_type 'lama', which transformers [\d.]+ does not know \(did you mean 'l")


def test_a_config_without_a_kind_is_refused(changed: Change) -> None:
    """transformers would guess the kind from the folder's name."""
    folder = changed(model_type=None)
    unread(folder.rename(folder.parent / "llama-7b"), "model_type None")


def test_a_kind_that_needs_code_from_its_repository_is_refused_and_the_code_is_not_run(changed: Change) -> None:
    auto = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel"}
    folder = changed(model_type="own", auto_map=auto)
    marker = plant_code(folder)
    unread(folder, "model_type 'own' needs code from its repository, which FedMira never runs")
    assert not marker.exists()


def test_code_beside_a_known_kind_is_not_run(changed: Change) -> None:
    """Older checkpoints of models that transformers knows still name their own code; it is not needed."""
    auto = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel", "AutoTokenizer": ["code.T", None]}
    folder = changed(auto_map=auto)
    changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", "code.T"]})
    changed("generation_config.json", custom_generate="code")
    marker = plant_code(folder)
    base = load_base(str(folder), dtype="float32", device="cpu")
    assert type(base.model).__module__.startswith("transformers.")
    assert not marker.exists()


def test_a_tokenizer_that_needs_code_is_refused_and_the_code_is_not_run(changed: Change) -> None:
    folder = changed("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["code.T", "code.T"]})
    (folder / "tokenizer.json").unlink()
    marker = plant_code(folder)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(str(folder))
    assert not marker.exists()


def plant_code(folder: Path) -> Path:
    """Put code beside a model that leaves a marker when it runs."""
    marker = folder.parent / "code-has-run"
    (folder / "custom_generate").mkdir()
    for file in ("code.py", "custom_generate/generate.py"):
        (folder / file).write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: ...\nOwnModel = T = Own\n")
    return marker


def test_the_planted_code_leaves_its_marker_when_it_runs(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    marker = plant_code(folder)
    exec((folder / "code.py").read_text())
    assert marker.exists()


def test_attention_kernels_that_a_config_asks_for_are_not_fetched(changed: Change) -> None:
    folder = changed(attn_implementation="some-one/kernel", _attn_implementation="some-one/kernel")
    assert load_base(str(folder), dtype="float32", device="cpu").model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "config.json cannot be read: Expecting property name"),
        ("[]", "config.json holds a list, expected an object"),
        ("[" * 100_000, "config.json cannot be read"),
        (
            '{"model_type": "llama", "hidden_size": "wide"}',
            r"config\.json cannot be used: .*hidden_size.* expected int, got str",
        ),
        ('{"model_type": ["llama"]}', "model_type"),
    ],
    ids=["broken", "list", "deep", "wrong type", "kind is a list"],
)
def test_a_config_that_cannot_be_read_is_refused(saved: Path, text: str, fault: str) -> None:
    (saved / "config.json").write_text(text)
    unread(saved, fault)


def test_a_config_that_is_not_text_is_refused(saved: Path) -> None:
    (saved / "config.json").write_bytes(b'{"model_type": "\xff"}')
    unread(saved, "config.json cannot be read: 'utf-8' codec")


@pytest.mark.parametrize(
    ("found", "method"),
    [
        *(({"quant_method": method, "bits": 4}, method) for method in ("gptq", "awq", "hqq", "quanto", "modelopt")),
        ({"load_in_4bit": True}, "unknown"),
        ("awq", "unknown"),
    ],
)
def test_weights_that_stay_quantised_are_refused(changed: Change, found: object, method: str) -> None:
    unread(
        changed(quantization_config=found),
        rf"quantised \(method: {method}\); .* and compressed-tensors, fp8, mxfp4 as float weights: use the model that",
    )


def test_the_older_entry_of_compressed_tensors_is_refused(changed: Change) -> None:
    unread(changed(compression_config={"format": "int-quantized"}), r"quantised \(method: unknown\)")


def test_weights_under_another_name_are_refused(changed: Change) -> None:
    unread(changed(transformers_weights="adapter_model.bin"), "transformers_weights.*expected model.safetensors")


def test_an_adapter_instead_of_a_base_is_refused(saved: Path) -> None:
    """transformers would load the base that the adapter names, and put the adapter on it."""
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"}')
    unread(saved, r"holds a PEFT adapter \(adapter_config.json\); merge it")


def test_a_folder_without_config_is_refused(saved: Path) -> None:
    (saved / "config.json").unlink()
    unread(saved, "no config.json in this folder")


@pytest.mark.parametrize("shard", ["../other.safetensors", "model.bin", "/etc/passwd", "sub/model.safetensors", 3])
def test_an_index_that_points_out_of_the_folder_is_refused(saved: Path, shard: object) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    unread(saved, r"model\.safetensors\.index\.json points to .* not a safetensors file of this folder")


def test_an_index_without_a_map_is_refused(saved: Path) -> None:
    (saved / "model.safetensors.index.json").write_text("{}")
    unread(saved, "points to None")


def test_weights_in_several_files_are_read(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    tiny.model("llama", dtype=torch.float32).save_pretrained(saved, max_shard_size="6KB")
    assert len(list(saved.glob("*.safetensors"))) > 1
    base = load_base(str(saved), dtype="float32", device="cpu")
    torch.testing.assert_close(base.head.weight, tiny.model("llama", dtype=torch.float32).lm_head.weight.data)


@pytest.mark.parametrize("ends", ["2", 2.0, True, [2, None], ["2"], [[2]], {"id": 2}])
def test_ends_of_answers_that_are_no_ids_are_refused(changed: Change, ends: object) -> None:
    unread(changed("generation_config.json", eos_token_id=ends), r"generation_config\.json has eos_token_id .*expected")


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_generation_settings_that_cannot_be_read_are_refused(saved: Path, text: str) -> None:
    (saved / "generation_config.json").write_text(text)
    unread(saved, r"generation_config\.json (cannot be read|holds a)")


@pytest.mark.parametrize("inside", ["model", "snapshots/0123abc"])
def test_a_folder_above_the_model_names_the_one_below(saved: Path, tmp_path: Path, inside: str) -> None:
    above = tmp_path / "above"
    shutil.copytree(saved, above / inside)
    unread(above, f"no config.json in this folder; '.*{inside}' has one: name that folder")


def test_a_file_instead_of_a_folder_is_refused_as_such(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"is a file; name the folder that holds the model"):
        load_tokenizer(str(saved / "config.json"))


def test_an_end_of_text_without_letters_is_none(changed: Change) -> None:
    """transformers gives it the id of the unknown token, and every answer would end with that one."""
    with pytest.raises(ModelError, match="has no end-of-text token"):
        load_tokenizer(str(changed("tokenizer_config.json", eos_token="")))


def test_a_missing_tokenizer_is_refused(saved: Path) -> None:
    for file in saved.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(str(saved))


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "LlamaTokenizer"), ("gemma2", "GemmaTokenizer"), ("gpt2", None)]
)
def test_an_empty_tokenizer_that_transformers_invents_is_refused(tmp_path: Path, family: str, kind: str | None) -> None:
    tiny.config(family).save_pretrained(tmp_path)
    if kind is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("of") in ([], [3])
    with pytest.raises(ModelError, match=r"it has no words; is tokenizer\.json missing\?"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_refused(saved: Path) -> None:
    (saved / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(str(saved))


def longrope() -> dict[str, Any]:
    """Settings of a Phi-3 for long texts: frequencies for up to 16 tokens, and others for longer ones."""
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]}
    return {"rope_parameters": parameters, "original_max_position_embeddings": 16}


def test_positions_end_where_frequencies_would_depend_on_the_longest_text_of_a_pass(tmp_path: Path) -> None:
    tiny.config("phi3").save_pretrained(tmp_path)
    assert count_positions(str(tmp_path)) == tiny.base("phi3").max_positions == tiny.POSITIONS
    tiny.config("phi3", **longrope()).save_pretrained(tmp_path)
    base = tiny.base("phi3", **longrope())
    assert count_positions(str(tmp_path)) == base.max_positions == 16
    ids = torch.arange(34).reshape(2, 17) % tiny.VOCABULARY
    with torch.no_grad():
        short, long = (base.model(input_ids=ids[:, :length]).logits[:, :16] for length in (16, 17))
    assert float((short - long).abs().max()) > 0.1  # one token more, and the first 16 are seen otherwise


def test_a_base_without_positions_has_no_limit(tmp_path: Path) -> None:
    tiny.config("mamba").save_pretrained(tmp_path)
    assert count_positions(str(tmp_path)) is None


def test_a_revision_of_a_folder_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.revision 'main': model\.base_model '.*' is a folder"):
        load_tokenizer(str(saved), revision="main")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(saved: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The saved model on a hub of this machine, beside files that are not needed; gives the names of fetched ones."""
    for name in ("pytorch_model.bin", "modeling_own.py", "onnx/config.json", "model.fp16.safetensors", "x.safetensors"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_bytes(b"no")
    with hub.serve(saved) as (address, fetched):
        point_to(address, monkeypatch)
        yield fetched


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + files)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("served")
def test_files_of_other_programs_in_the_hubs_cache_stay_unread(saved: Path, cache: Path) -> None:
    """A pickle and its index, from a program that reads them; before the weights were fetched, and after."""
    load_tokenizer(hub.NAME)
    (snapshot,) = cache.glob("models--*/snapshots/*")
    for folder in (saved, snapshot):
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    (snapshot / "pytorch_model.bin").write_bytes(b"no")
    load_tokenizer(hub.NAME)
    load_base(hub.NAME, dtype="float32", device="cpu")


def test_a_hub_name_without_safetensors_is_refused_and_its_pickles_are_not_fetched(
    served: list[str], saved: Path
) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "x.safetensors").unlink()
    tokenizer = load_tokenizer(hub.NAME)
    with pytest.raises(ModelError, match=r"some-one/tiny': has no safetensors \(model\.safetensors, or"):
        load_base(hub.NAME, dtype="float32", device="cpu", tokenizer=tokenizer)
    assert not [name for name in served if name.endswith(".bin")]


def test_only_the_needed_files_of_a_hub_name_are_fetched_and_only_once(served: list[str]) -> None:
    small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    tokenizer = load_tokenizer(hub.NAME)
    assert count_positions(hub.NAME) == tiny.POSITIONS
    assert sorted(served) == small
    base = load_base(hub.NAME, dtype="float32", device="cpu", tokenizer=tokenizer)
    assert sorted(served) == [*small[:2], "model.safetensors", *small[2:]]
    assert base.name == hub.NAME
    torch.testing.assert_close(base.head.weight, tiny.model("llama", dtype=torch.float32).lm_head.weight.data)
    assert base.fingerprint == fingerprint(hub.NAME)


@pytest.mark.usefixtures("served")
def test_a_tensor_that_no_layer_of_a_hub_name_takes_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    save_file(load_file(path) | {"lm_head.bias": torch.ones(23)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"some-one/tiny': .* no place for 1 of the tensors, lm_head\.bias"):
        load_base(hub.NAME, dtype="float32", device="cpu")


@pytest.mark.usefixtures("served")
def test_a_branch_or_commit_of_a_hub_name_is_found_and_another_is_refused() -> None:
    assert load_tokenizer(hub.NAME, revision="second").eos_token_id == tiny.END
    assert load_tokenizer(hub.NAME, revision=hub.COMMIT).eos_token_id == tiny.END
    with pytest.raises(ModelError, match=r"model\.revision 'third': 'some-one/tiny' has no such branch, tag or commit"):
        load_tokenizer(hub.NAME, revision="third")


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("name", "fault"), [("gated", "is gated: accept its terms"), ("nothing", "has no such model")])
def test_a_refusal_by_the_hub_is_explained(name: str, fault: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.base_model 'some-one/{name}': .*{fault}.*HF_TOKEN"):
        load_tokenizer(f"some-one/{name}")


@pytest.mark.usefixtures("served")
def test_files_that_were_fetched_once_are_found_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    load_base(hub.NAME, dtype="float32", device="cpu")
    point_to("http://127.0.0.1:9", monkeypatch)  # no server is there
    assert count_positions(hub.NAME) == tiny.POSITIONS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_base(hub.NAME, dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="does not have all of it at revision 'second'"):
        load_tokenizer(hub.NAME, revision="second")


@pytest.mark.usefixtures("cache")
def test_offline_mode_is_named_where_a_model_is_not_in_the_cache() -> None:
    with pytest.raises(ModelError) as refused:
        load_tokenizer("some-one/tiny")
    assert "model.base_model 'some-one/tiny': no such folder here" in str(refused.value)
    assert "hub may not be used (HF_HUB_OFFLINE is set)" in str(refused.value)


@pytest.mark.usefixtures("cache")
def test_a_hub_that_cannot_be_reached_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s for a hub that is not there"))
    with pytest.raises(ModelError, match=r"hub cannot be reached \(.*refused\); with HF_HUB_OFFLINE=1"):
        load_tokenizer("some-one/tiny")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["a--b", "some-one/tiny.git"])
def test_a_name_that_the_hub_does_not_allow_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.base_model '{name}'.*gave an error"):
        load_tokenizer(name)
