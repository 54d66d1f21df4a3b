"""Weights, config and tokenizer of a base fit each other, or it is refused by name before the first pass."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import small_study, tiny
from tests.small_study import command

from fedmira.cli.chat import open_chat
from fedmira.data.batches import collate
from fedmira.errors import ModelError
from fedmira.export.peft_folder import export_adapter
from fedmira.model.answers.generate import answers, padded_answers
from fedmira.model.base.load import Base, load_base, wrap
from fedmira.model.base.vocabulary import count_known_ids
from fedmira.model.passes import losses

ATTENTION = "model.layers.0.self_attn"
NEW = "<|im_start|>"  # the first token that the tiny base has no embedding for


def add(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put more tensors into a base's file, or into the last of its files."""
    path = sorted(folder.glob("*.safetensors"))[-1]
    save_file(load_file(path) | dict(tensors), path, metadata={"format": "pt"})


def load(folder: Path) -> Base:
    return load_base(str(folder), dtype="float32", device="cpu")


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        found = base.model(input_ids=torch.tensor([[2, 3, 4, 5]])).logits
    assert isinstance(found, torch.Tensor)
    return found


# ---------------------------------------------------------------- tensors and config


@pytest.mark.parametrize(
    "name",
    [
        f"{ATTENTION}.q_proj.bias",
        f"{ATTENTION}.q_proj.weight_scale_inv",
        f"{ATTENTION}.q_norm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "lm_head.bias",
        "mtp.layers.0.weight",
        "vision_tower.patch.weight",
    ],
)
def test_a_tensor_that_no_layer_takes_is_refused_by_its_name(name: str, saved: Path) -> None:
    add(saved, {name: torch.ones(16)})
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM has no place for 1 of the tensors, {name}, and"):
        load(saved)


def test_so_it_is_in_a_base_of_several_files(saved: Path) -> None:
    shutil.rmtree(saved)
    tiny.model("llama", dtype=torch.float32).save_pretrained(saved, max_shard_size="4KB")
    tiny.tokenizer().save_pretrained(saved)
    assert len(list(saved.glob("*.safetensors"))) > 2
    load(saved)
    index = saved / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    facts["weight_map"]["model.extra.weight"] = max(facts["weight_map"].values())
    index.write_text(json.dumps(facts))
    add(saved, {"model.extra.weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"no place for 1 of the tensors, model\.extra\.weight, and"):
        load(saved)


def test_constants_that_old_releases_saved_change_nothing(tmp_path: Path) -> None:
    for family, constants in (
        ("llama", {f"{ATTENTION}.rotary_emb.{name}": 2 for name in ("inv_freq", "cos_cached", "sin_cached")}),
        ("gpt2", {"transformer.h.0.attn.bias": 64, "transformer.h.0.attn.masked_bias": 1}),
    ):
        folder = tmp_path / family
        tiny.model(family, dtype=torch.float32).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        before = logits(load(folder))
        add(folder, {name: torch.ones(size) for name, size in constants.items()})
        assert torch.equal(logits(load(folder)), before)


def test_a_head_that_the_config_takes_for_the_embeddings_is_them_or_is_refused(tmp_path: Path) -> None:
    tiny.model("llama-tied", dtype=torch.float32).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    before = logits(load(tmp_path))
    embeddings = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    add(tmp_path, {"lm_head.weight": embeddings.clone()})
    assert torch.equal(logits(load(tmp_path)), before)
    add(tmp_path, {"lm_head.weight": embeddings + 1})
    with pytest.raises(ModelError, match=r"lm_head\.weight and model\.embed_tokens\.weight are different .*\"tie_word"):
        load(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"tie_word_embeddings": False}))
    assert not torch.equal(logits(load(tmp_path)), before)


# ---------------------------------------------------------------- the form of outputs

FORMS: dict[str, list[Any]] = {
    "return_dict": [False, None],
    "use_return_dict": [False],
    "output_hidden_states": [True],
    "output_attentions": [True],
    "output_router_logits": [True],
    "return_dict_in_generate": [True],
    "use_cache": [False, None],
    "torchscript": [True],
    "_attn_implementation": ["flash_attention_2"],
    "experts_implementation": ["grouped_mm"],
}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_keys_about_the_form_of_outputs_change_no_loss(family: str, tmp_path: Path) -> None:
    tiny.model(family, dtype=torch.float32).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    client = tiny.client("ada", train=3)

    def measure() -> list[Any]:
        base = load(tmp_path)
        rows = tiny.adapters(tiny.layout(base, 2), [2], dtype=torch.float32)
        return [base.packs, losses(base, rows, collate([client.train], pad_id=base.pad_id))]

    expected = measure()
    everything = {key: values[0] for key, values in FORMS.items()}
    others = [{key: value} for key, values in FORMS.items() for value in values[1:]]
    for keys in (everything, *others):
        (tmp_path / "config.json").write_text(json.dumps(facts | keys))
        assert str(measure()) == str(expected), keys


# ---------------------------------------------------------------- ids


def extend(folder: Path, *words: str) -> Path:
    """Add tokens to a base's tokenizer and leave its weights as they are."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(words)})
    tokenizer.save_pretrained(folder)
    return folder


def with_second_table(model: Any, *, rows: int) -> Any:
    """Let a model look ids up in a second, smaller table too, as Gemma 3n does."""

    class Tables(torch.nn.Module):
        def __init__(self, first: torch.nn.Embedding) -> None:
            super().__init__()
            self.first, self.second = first, torch.nn.Embedding(rows, 16, dtype=torch.float64)

        @property
        def weight(self) -> torch.Tensor:
            return self.first.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found = self.first(ids) + self.second(ids)
            assert isinstance(found, torch.Tensor)
            return found

    torch.manual_seed(0)
    model.model.embed_tokens = Tables(model.model.embed_tokens)
    return model


def test_a_base_reads_the_ids_that_all_its_tables_have() -> None:
    assert count_known_ids(tiny.model("gpt2"), name="x") == tiny.VOCABULARY  # and not its 64 positions
    model = tiny.model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:20])
    assert count_known_ids(model, name="x") == 20
    assert count_known_ids(with_second_table(tiny.model("llama"), rows=21), name="x") == 21


def test_an_added_token_that_no_text_has_is_accepted(saved: Path) -> None:
    assert load(extend(saved, NEW)).vocabulary == tiny.VOCABULARY


@pytest.mark.parametrize("place", ["prompt", "completion", "template"])
@pytest.mark.parametrize("option", [[], ["--dry-run"], ["--show-example"]])
def test_a_text_with_an_id_that_the_base_does_not_know_is_refused_before_any_pass(
    place: str, option: list[str], saved: Path, tmp_path: Path
) -> None:
    extend(saved, NEW)
    extra = {"prompt": [f"w3 {NEW}", "w4"], "completion": [], "template": []}[place]
    data = small_study.save_data(tmp_path / "data.jsonl", extra=extra)
    if place == "completion":
        lines = data.read_text().splitlines()
        row = json.loads(lines[5])
        lines[5] = json.dumps(row | {"completion": f"w3 {NEW}"})
        data.write_text("\n".join(lines))
    template = tmp_path / "own.jinja"
    template.write_text(f"{NEW} {{{{ instruction }}}}")
    chosen = {"template": str(template)} if place == "template" else {}
    raw = small_study.settings(saved, data, tmp_path / "study", data=chosen)
    ended = command("run", small_study.save_config(tmp_path / "c.yaml", raw), "-q", *option)
    assert ended.code == 2, ended.err
    assert f"'{NEW}' (id 23) in" in ended.err
    assert "ids 0 to 22" in ended.err
    assert f"resize_token_embeddings({tiny.VOCABULARY + 1})" in ended.err
    assert not (tmp_path / "study").exists()


def test_a_question_with_such_an_id_is_refused_by_chat(saved: Path, tmp_path: Path) -> None:
    base = load(saved)
    rows = tiny.adapters(tiny.layout(base, 2), [2], dtype=torch.float32)
    export_adapter(
        tmp_path / "ada",
        rows,
        base_model=str(saved),
        target_modules=["q_proj", "v_proj"],
        fan_in_fan_out=False,
        card={},
    )
    chat = open_chat(folders=[tmp_path / "ada"], model=str(extend(saved, NEW)), max_new_tokens=2)
    assert set(chat.ask("w3 w4")) == {"base", "ada"}
    with pytest.raises(
        ModelError, match=r"of 2 questions \(template none\) its tokenizer writes '<\|im_start\|>' \(id"
    ):
        chat.ask(f"w3 {NEW} w4")


def test_padding_of_the_config_beyond_the_embeddings_is_refused(saved: Path) -> None:
    facts = json.loads((saved / "config.json").read_text())
    for pad, allowed in ((-1, True), (22, True), (23, False), (-24, False)):
        (saved / "config.json").write_text(json.dumps(facts | {"pad_token_id": pad}))
        if allowed:
            load(saved)
        else:
            with pytest.raises(ModelError, match=rf"has pad_token_id {pad}, and vocab_size 23"):
                load(saved)


def test_ends_of_answers_beyond_the_embeddings_are_left_out_with_a_warning(
    saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 400], "do_sample": True}))
    with caplog.at_level("WARNING", logger="fedmira"):
        base = load(saved)
    assert base.model.generation_config is not None
    assert base.model.generation_config.eos_token_id == [tiny.END, 7]
    assert "end answers at id 400" in caplog.text


def test_a_model_never_writes_a_token_that_it_cannot_read() -> None:
    """Its head may be wider than one of its tables; then the next step could not look the token up."""
    model = with_second_table(tiny.model("llama"), rows=21)
    with torch.no_grad():
        model.lm_head.weight[21:] *= 100  # of the two rows one has the largest logit, nearly always
    base = wrap(model, tiny.tokenizer(), name="x", targets="auto", fingerprint="x")
    assert base.vocabulary == 21
    rows = tiny.adapters(tiny.layout(base, 2), [2])
    assert max(int(logits(base).argmax(-1).max()), 0) >= 21
    prompts = [[[3, 4, 5], [6, 7]]]
    written = answers(base, rows, prompts, max_new_tokens=4)
    assert written == padded_answers(base, rows, prompts, max_new_tokens=4)
    assert not {"w21", "w22"} & {word for text in written[0] for word in text.split()}
