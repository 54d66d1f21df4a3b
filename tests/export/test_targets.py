"""What an exported adapter calls its modules: PEFT finds these and no others, and that is tried before training."""

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from tests import small_study, tiny
from tests.small_study import command
from transformers import AutoModelForCausalLM

from fedmira.errors import ModelError
from fedmira.export.peft_folder import check_targets, short_targets
from fedmira.model.base.load import wrap
from fedmira.study import face as study


def gemma3n(dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    """A Gemma 3n: some of its linear layers are in lists, and named by a number as its decoder layers are."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=tiny.VOCABULARY,
        vocab_size_per_layer_input=tiny.VOCABULARY,
        hidden_size=16,
        hidden_size_per_layer_input=4,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=tiny.POSITIONS,
        sliding_window=4,
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 2,
        bos_token_id=None,
        eos_token_id=tiny.END,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Gemma3nForCausalLM(config).to(dtype).eval()


WORDS = st.lists(st.sampled_from(["layers", "0", "1", "attn", "q_proj", "mlp"]), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(WORDS.map(".".join), min_size=1, max_size=12, unique=True), data=st.data())
def test_peft_finds_the_adapted_modules_and_no_others(names: list[str], data: st.DataObject) -> None:
    """Unless the whole name of one ends another's, so that no ending tells them apart."""
    names = [f"model.{name}" for name in names]
    modules = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    targets = short_targets(modules, names)
    found = [name for name in names if check_target_module_exists(LoraConfig(target_modules=targets), name)]
    assert sorted(found) == sorted(modules)
    assert targets == sorted(targets)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gemma3n"])
def test_every_family_is_named_so_that_peft_loads_it(family: str) -> None:
    if family == "gemma3n":
        base = wrap(gemma3n(), tiny.tokenizer(), name="x", targets="all-linear", fingerprint="x")
    else:
        base = tiny.base(family, targets="all-linear", dtype=tiny.DTYPES.get(family, torch.float64))
    modules = [name for name, _, _ in base.shapes]
    targets = short_targets(modules, [name for name, _ in base.model.named_modules()])
    assert "0" not in targets
    check_targets(base.model, modules, targets)
    with pytest.raises(ModelError, match="it leaves out"):
        check_targets(base.model, modules, targets[:1] if len(targets) > 1 else ["model.layers.0"])


def test_names_that_peft_could_not_load_are_refused() -> None:
    base = wrap(gemma3n(), tiny.tokenizer(), name="x", targets=["q_proj"], fingerprint="x")
    modules = [name for name, _, _ in base.shapes]
    with pytest.raises(ModelError, match=r"PEFT could not load .* for Gemma3nForCausalLM: .*Gemma3nTextDecoderLayer"):
        check_targets(base.model, modules, ["q_proj", "0"])
    with pytest.raises(ModelError, match=r"it adapts 'model\.layers\.0\.mlp\.up_proj' too"):
        check_targets(base.model, modules, ["q_proj", "layers.0.mlp.up_proj"])


@pytest.mark.slow
def test_a_study_of_gemma_3n_ends_in_folders_that_peft_loads_and_merges(tmp_path: Path) -> None:
    gemma3n(torch.float32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    raw = small_study.settings(
        tmp_path / "base",
        small_study.save_data(tmp_path / "data.jsonl"),
        tmp_path / "study",
        methods=[{"name": "local"}],
        lora={"target_modules": "all-linear"},
        federation={"rounds": 1, "participation": 1.0},
        evaluation={"metrics": ["loss"]},
    )
    ended = command("run", small_study.save_config(tmp_path / "config.yaml", raw), "-q")
    assert ended.code == 0, ended.err
    run = study.load_run(tmp_path / "study" / "local" / "seed-3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    PeftModel.from_pretrained(model, str(run.adapters("ada")))
    (merged,) = study.merge(run, client="ada", out=tmp_path / "merged")
    assert merged.effect > 0
