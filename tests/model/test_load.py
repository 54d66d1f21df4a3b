"""A base model is accepted when it is a causal decoder whose own logits our head gives; all else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests import tiny

from fedmira.errors import ModelError
from fedmira.model.load import choose_device, choose_dtype, fingerprint, load_base, load_tokenizer, wrap


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny.model("llama", dtype=torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def refused(model: Any) -> Any:
    return wrap(model.eval(), tiny.tokenizer(), name="x", targets="all-linear", fingerprint="x")


def test_a_saved_model_loads_frozen_with_its_logits_and_pefts_own_targets(saved: Path) -> None:
    base = load_base(str(saved), dtype="float32", device="cpu")
    assert [name.rsplit(".", 1)[-1] for name, _, _ in base.shapes] == ["q_proj", "v_proj"] * 2
    assert base.shapes[1][1:] == (16, 8)  # two of four heads are shared
    assert not any(value.requires_grad for value in base.model.parameters())
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        expected = tiny.model("llama", dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(base.model(input_ids=ids).logits, expected)
    assert base.max_positions == tiny.POSITIONS
    assert base.pad_id == tiny.END


def test_gpt2_stays_in_eval_mode_although_it_has_dropouts_of_its_own() -> None:
    base = tiny.base("gpt2")
    assert base.model.config.resid_pdrop > 0
    assert not any(module.training for module in base.decoder.modules() if isinstance(module, torch.nn.Dropout))
    assert base.transposed


def test_the_fingerprint_follows_weights_tokenizer_and_config(saved: Path) -> None:
    first = fingerprint(str(saved))
    assert first == fingerprint(str(saved))
    seen = {first}
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with (saved / name).open("ab") as file:
            file.write(b" ")
        seen.add(fingerprint(str(saved)))
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "..", "a b"])
def test_a_folder_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"model\.base_model"):
        load_tokenizer(name)


def test_pickled_weights_are_refused_with_the_way_out(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin and no safetensors; pickles can run code"):
        load_base(str(saved), dtype="float32", device="cpu")


def test_weights_that_do_not_fit_their_config_are_refused(saved: Path) -> None:
    facts = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(facts | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"do not fit its config\.json.*layers\.2"):
        load_base(str(saved), dtype="float32", device="cpu")


def test_a_tokenizer_without_an_end_of_text_is_refused(saved: Path) -> None:
    plain = tiny.tokenizer()
    plain.eos_token = None
    plain.save_pretrained(saved)
    with pytest.raises(ModelError, match="no end-of-text token"):
        load_tokenizer(str(saved))


def test_an_encoder_decoder_is_no_causal_decoder(saved: Path) -> None:
    transformers.T5Config(vocab_size=8).save_pretrained(saved)
    with pytest.raises(ModelError, match="t5 model is no causal decoder"):
        load_base(str(saved), dtype="float32", device="cpu")


@pytest.mark.parametrize(("decoder", "fault"), [(False, "later tokens change earlier logits"), (True, "output head")])
def test_a_model_that_looks_ahead_or_has_more_than_a_head_is_refused(decoder: bool, fault: str) -> None:
    """BERT looks both ways; as a decoder it transforms its hidden states between decoder and head."""
    config = transformers.BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        is_decoder=decoder,
    )
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=fault):
        refused(transformers.BertLMHeadModel(config))


def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="cuda:99"):
        choose_device("cuda:99")


def test_a_dtype_that_is_named_is_taken() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("float64", cpu) == torch.float64
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


def test_a_checkpoints_own_sampling_settings_do_not_reach_greedy_answers() -> None:
    model = tiny.model("gpt2")
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=5.0, do_sample=True, temperature=3.0, eos_token_id=[7]
    )
    base = wrap(model, tiny.tokenizer(), name="x", targets="auto", fingerprint="x")
    assert base.model.generation_config.repetition_penalty in (None, 1.0)
    assert base.model.generation_config.eos_token_id == [tiny.END, 7]
