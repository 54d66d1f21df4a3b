"""A base is accepted when it is a causal decoder that does what the passes rely on; all else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import tiny

from fedmira.errors import ModelError
from fedmira.model.base.load import choose_device, choose_dtype, fingerprint, load_base, load_tokenizer, wrap


def refused(model: Any) -> Any:
    return wrap(model.eval(), tiny.tokenizer(), name="x", targets="all-linear", fingerprint="x")


def test_a_saved_model_loads_frozen_with_its_logits_and_the_targets_of_peft(saved: Path) -> None:
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


def test_gpt2_stays_in_eval_mode_although_it_has_dropout_layers() -> None:
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


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("num_hidden_layers", 3, r"layers\.2"), ("intermediate_size", 24, r"mlp"), ("vocab_size", 40, r"lm_head")],
)
def test_weights_that_do_not_fit_their_config_are_refused(saved: Path, key: str, value: int, named: str) -> None:
    facts = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(facts | {key: value}))
    with pytest.raises(ModelError, match=rf"do not fit its config\.json.*{named}"):
        load_base(str(saved), dtype="float32", device="cpu")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_weight_file_is_refused(saved: Path, size: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"weights cannot be loaded: \w*Error: .") as error:
        load_base(str(saved), dtype="float32", device="cpu")
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no safetensors \(model\.safetensors, or"):
        load_base(str(saved), dtype="float32", device="cpu")


def test_weights_that_are_not_numbers_are_refused(saved: Path) -> None:
    model = tiny.model("llama", dtype=torch.float32)
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(saved)
    with pytest.raises(ModelError, match=r"logits are not all finite in torch\.float32: damaged weights"):
        load_base(str(saved), dtype="float32", device="cpu")


def test_whole_numbers_as_weights_are_refused(saved: Path) -> None:
    """Without the scales that belong to them they would be trained on as they are."""
    weights = load_file(saved / "model.safetensors")
    name = next(key for key in weights if key.endswith("q_proj.weight"))
    save_file(weights | {name: (weights[name] * 100).to(torch.int8)}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"whole numbers \(I8\) as weights: .*q_proj\.weight; FedMira trains on plain"):
        load_base(str(saved), dtype="float32", device="cpu")


def test_a_tokenizer_without_an_end_of_text_is_refused(saved: Path) -> None:
    plain = tiny.tokenizer()
    plain.eos_token = None
    plain.save_pretrained(saved)
    with pytest.raises(ModelError, match="no end-of-text token"):
        load_tokenizer(str(saved))


@pytest.mark.parametrize(("decoder", "fault"), [(False, "later tokens change earlier logits"), (True, "output head")])
def test_a_model_that_sees_later_tokens_or_has_more_than_a_head_is_refused(decoder: bool, fault: str) -> None:
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


def test_a_named_dtype_is_used() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("float64", cpu) == torch.float64
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


def test_sampling_settings_of_a_checkpoint_do_not_change_greedy_answers() -> None:
    model = tiny.model("gpt2")
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=5.0, do_sample=True, temperature=3.0, eos_token_id=[7]
    )
    base = wrap(model, tiny.tokenizer(), name="x", targets="auto", fingerprint="x")
    assert base.model.generation_config.repetition_penalty in (None, 1.0)
    assert base.model.generation_config.eos_token_id == [tiny.END, 7]


def test_a_tokenizer_that_ends_texts_with_an_id_beyond_the_vocabulary_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert tokenizer.eos_token_id == tiny.VOCABULARY
    with pytest.raises(ModelError, match=r"ends texts with '<end>' \(id 23\), and its embeddings have ids 0 to 22"):
        wrap(tiny.model("llama"), tokenizer, name="x", targets="auto", fingerprint="x")


def test_padding_is_an_id_that_the_model_knows() -> None:
    for word, pad in ((None, tiny.END), ("w4", 4), ("<pad>", tiny.END)):  # the last is new, and beyond the vocabulary
        tokenizer = tiny.tokenizer()
        if word is not None:
            tokenizer.add_special_tokens({"pad_token": word})
        base = wrap(tiny.model("llama"), tokenizer, name="x", targets="auto", fingerprint="x")
        assert base.pad_id == pad


def test_a_first_pass_that_fails_is_reported_with_the_base() -> None:
    model = tiny.model("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(5, 20)
    with pytest.raises(
        ModelError, match=r"model\.base_model 'x': a first pass of LlamaForCausalLM failed: RuntimeError"
    ):
        refused(model)


class Unmasked(transformers.LlamaForCausalLM):
    """A model that ignores the mask of padding, as recurrent ones do."""

    def forward(self, *args: Any, attention_mask: Any = None, position_ids: Any = None, **others: Any) -> Any:
        return super().forward(*args, **others)


def test_a_model_that_does_not_mask_padding_left_of_a_prompt_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"Unmasked in torch\.float32 continues a prompt differently beside a longer"):
        refused(Unmasked(tiny.config("llama", initializer_range=0.5)))


def test_rwkv_is_refused_because_it_has_no_mask() -> None:
    config = transformers.RwkvConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, eos_token_id=tiny.END
    )
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"RwkvForCausalLM in torch\.float32 continues a prompt differently"):
        refused(transformers.RwkvForCausalLM(config))


def test_a_dtype_in_which_a_models_mask_overflows_is_refused_and_another_named() -> None:
    with pytest.raises(
        ModelError, match=r"Gemma2ForCausalLM in torch\.float64 continues.*model\.dtype: float32 may do"
    ):
        tiny.base("gemma2", dtype=torch.float64)


def test_a_base_that_is_too_large_for_its_device_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "to", full)
    with pytest.raises(ModelError, match=r"does not fit on cpu in torch\.float32: CUDA out of memory"):
        load_base(str(saved), dtype="float32", device="cpu")


class NoHead(transformers.LlamaForCausalLM):
    def get_output_embeddings(self) -> None:
        return None


def test_a_model_without_output_head_is_refused() -> None:
    with pytest.raises(ModelError, match="NoHead has no separate decoder and output head"):
        refused(NoHead(tiny.config("llama")))


class NoWords(transformers.LlamaForCausalLM):
    def generate(self, *args: Any, **others: Any) -> Any:
        raise RuntimeError("no words")


def test_a_model_that_cannot_write_is_refused() -> None:
    with pytest.raises(ModelError, match="NoWords failed to write a first word: RuntimeError: no words"):
        refused(NoWords(tiny.config("llama")))


class Mixture(torch.nn.Module):
    """Two experts: the first takes the tokens with a positive sum, the second the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16, dtype=torch.float64) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x.sum(dim=-1) > 0
        y = torch.empty_like(x)
        for chosen, expert in zip((first, ~first), self.experts, strict=True):
            y[chosen] = expert(x[chosen])
        return y


def test_layers_that_do_not_see_all_tokens_get_no_adapter_and_cannot_be_targets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def mixture() -> Any:
        model = tiny.model("llama")
        model.model.layers[1].mlp = Mixture()
        return model

    with caplog.at_level("WARNING"):
        base = refused(mixture())
    assert [name for name, _, _ in base.shapes if "mlp" in name] == [
        f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert (
        "x: 2 of 13 linear layers get no adapter: 'model.layers.1.mlp.experts.0' does not see every token"
        in caplog.text
    )
    with pytest.raises(
        ModelError, match=r"lora\.target_modules: 'model\.layers\.1\.mlp\.experts\.0' does not see every"
    ):
        wrap(mixture(), tiny.tokenizer(), name="x", targets=["experts.0"], fingerprint="x")


def test_a_layer_that_no_pass_calls_gets_no_adapter() -> None:
    model = tiny.model("llama")
    model.model.layers[0].mlp.spare = torch.nn.Linear(16, 16)
    assert not [name for name, _, _ in refused(model).shapes if "spare" in name]


def test_all_linear_layers_are_targets_where_the_list_of_peft_names_none() -> None:
    model = tiny.model("llama")
    model.config.model_type = "gpt2"  # of which PEFT expects a c_attn
    base = wrap(model, tiny.tokenizer(), name="x", targets="auto", fingerprint="x")
    assert len(base.shapes) == 2 * 7
