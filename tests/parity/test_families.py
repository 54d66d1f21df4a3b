"""Every family of models: which layers are adapted, as PEFT chooses them, and padding that changes nothing."""

import peft
import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tests import tiny
from tests.parity.pairing import Pairing, pair, stacked_logits
from torch import Tensor, nn

from fedmira.data.batches import Batch, collate
from fedmira.errors import ModelError
from fedmira.model.answers.generate import padded_answers
from fedmira.model.base.load import Base
from fedmira.model.base.targets import find_targets

MLP = ["down_proj", "gate_proj", "up_proj"]
HEADS = ["k_proj", "o_proj", "q_proj", "v_proj"]
DEFAULTS = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "llama-tied": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gemma3": ["q_proj", "v_proj"],
    "phi": ["fc1", "fc2", "q_proj", "v_proj"],
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],  # PEFT has no list: all
    "gpt_neox": ["query_key_value"],
    "opt": ["q_proj", "v_proj"],
    "granite": sorted(MLP + HEADS),  # likewise
    "falcon": ["query_key_value"],
    "bloom": ["query_key_value"],
    "mamba": ["in_proj", "x_proj"],  # likewise, but for what no adapter can stand on
}
PATHS = [
    (family, packs) for family in tiny.FAMILIES for packs in (True, False) if not packs or family not in tiny.PADDED
]


def peft_modules(family: str, targets: object) -> set[str]:
    """The layers that PEFT adapts in a tiny model."""
    made = peft.get_peft_model(tiny.model(family), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    return {
        name.removeprefix("base_model.model.") for name, module in made.named_modules() if hasattr(module, "lora_A")
    }


def all_linear(family: str) -> set[str]:
    plain = tiny.model(family)
    return set(find_targets(plain, "all-linear", head=plain.get_output_embeddings()))


def endings(names: set[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in ("mixtral", "mamba")])
def test_all_linear_is_what_peft_takes_for_it(family: str) -> None:
    assert all_linear(family) == peft_modules(family, "all-linear")


def test_all_linear_of_a_mixture_is_pefts_but_for_its_experts_and_their_router() -> None:
    """Experts are one fused parameter and no layers; each sees only the tokens that the router sends it."""
    theirs = peft_modules("mixtral", "all-linear")
    assert all_linear("mixtral") == {name for name in theirs if "self_attn" in name}
    assert {name.split(".")[-1] for name in theirs - all_linear("mixtral")} == {"experts", "base_layer", "gate"}


def test_layers_that_peft_reads_as_part_of_fused_experts_are_no_targets() -> None:
    """Qwen3-Next has a shared expert with a gate_proj of its own, which PEFT would not find again in an adapter."""
    config = transformers.Qwen3NextConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        layer_types=["full_attention"],
    )
    plain = transformers.AutoModelForCausalLM.from_config(config)
    found = find_targets(plain, "all-linear", head=plain.get_output_embeddings())
    assert endings(set(found)) == sorted([*HEADS, "shared_expert_gate"])
    with pytest.raises(ModelError, match=r"PEFT keeps no adapter on 'model\.layers\.0\.mlp\.shared_expert\.gate_proj'"):
        find_targets(plain, ["gate_proj"], head=plain.get_output_embeddings())


def test_of_mamba_only_the_layers_are_taken_that_peft_takes_and_a_pass_calls() -> None:
    with pytest.raises(ValueError, match="out_proj"):
        peft_modules("mamba", "all-linear")
    assert endings(all_linear("mamba")) == ["dt_proj", "in_proj", "x_proj"]
    base = tiny.base("mamba", targets="all-linear")  # in it dt_proj's weight is multiplied without calling the layer
    assert endings({name for name, _, _ in base.shapes}) == ["in_proj", "x_proj"]
    with pytest.raises(ModelError, match=r"dt_proj' is not called in a pass"):
        tiny.base("mamba", targets=["in_proj", "dt_proj"])
    with pytest.raises(ModelError, match=r"PEFT keeps no adapter on .*out_proj"):
        tiny.base("mamba", targets=["out_proj"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_default_targets_are_pefts_own_or_every_linear_layer(family: str) -> None:
    found = {name for name, _, _ in tiny.base(family, dtype=torch.float32).shapes}
    assert endings(found) == DEFAULTS[family]
    if (kind := tiny.config(family).model_type) in PEFT_TARGETS:
        assert found == peft_modules(family, PEFT_TARGETS[kind])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_misspelt_target_is_refused_with_the_nearest_name(family: str) -> None:
    right = DEFAULTS[family][0]
    wrong = right[:-2] + right[-1]
    with pytest.raises(ModelError, match=rf"'{wrong}' names no module.*did you mean '{right}'"):
        tiny.base(family, targets=[wrong], dtype=torch.float32)


def test_a_list_that_names_no_layer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lora\.target_modules: found no layer.*q_proj"):
        tiny.base("llama", targets=[])


@pytest.mark.parametrize(("family", "packs"), PATHS, ids=lambda value: value if isinstance(value, str) else None)
def test_what_stands_in_the_padding_changes_no_logit_loss_or_gradient(family: str, packs: bool) -> None:
    """To the last bit; but experts multiply as many tokens as they are sent, and sums of other length round apart."""
    pairing = pair(family, "all-linear", tiny.DTYPES.get(family, torch.float64), packs=packs)
    batch = collate(pairing.texts, pad_id=0, batch_size=4)
    stream = torch.Generator().manual_seed(1)
    padding = torch.arange(batch.ids.shape[2]) >= batch.lengths[:, :, None]
    garbage = torch.randint(tiny.VOCABULARY, batch.ids.shape, generator=stream)
    other = Batch(torch.where(padding, garbage, batch.ids), batch.labels, batch.lengths)
    assert int(padding.sum()) > 20
    assert not torch.equal(other.ids, batch.ids)
    clean, dirty = (stacked_logits(pairing.base, pairing.stack, one)[~padding] for one in (batch, other))
    for one, same in zip(
        (clean, *pairing.gradients(batch=batch)), (dirty, *pairing.gradients(batch=other)), strict=True
    ):
        if family == "mixtral":
            torch.testing.assert_close(one, same, **pairing.tolerance)
        else:
            assert torch.equal(one, same)


def written(pairing: Pairing, pad: str) -> list[tuple[list[int], list[Tensor]]]:
    """What `padded_answers` writes to prompts filled with a given word: per row its ids and the logits of each."""
    base: Base = pairing.base
    base.tokenizer.pad_token = pad
    assert base.tokenizer.decode([base.pad_id]) == pad
    steps: list[Tensor] = []
    hook = base.model.register_forward_hook(lambda _, given, out: steps.append(out.logits[:, -1]))
    prompts = [[list(one.ids[: one.prompt_length]) for one in texts] for texts in pairing.texts]
    try:
        padded_answers(base, pairing.stack, prompts, max_new_tokens=5)
    finally:
        hook.remove()
    rows = []
    for row in range(len(steps[0])):
        ids = [int(step[row].argmax()) for step in steps]
        stop = ids.index(tiny.END) + 1 if tiny.END in ids else len(ids)  # after its end a row is filled with padding
        rows.append((ids[:stop], [step[row] for step in steps[:stop]]))
    return rows


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_stands_left_of_a_prompt_changes_no_logit_of_its_answer(family: str) -> None:
    pairing = pair(family, "all-linear", torch.float32, packs=family not in tiny.PADDED)
    clean, dirty = written(pairing, "w2"), written(pairing, "w9")
    width = max(len(texts) for texts in pairing.texts)
    real = [k * width + place for k, texts in enumerate(pairing.texts) for place in range(len(texts))]
    assert sum(len(clean[row][0]) for row in real) > 10
    for row in real:
        assert clean[row][0] == dirty[row][0]
        for one, same in zip(clean[row][1], dirty[row][1], strict=True):
            if family == "mixtral":
                torch.testing.assert_close(one, same, **pairing.tolerance)
            else:
                assert torch.equal(one, same)


class Router(nn.Linear):
    """What some mixtures call a linear layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Own(nn.Linear):
    """What Falcon calls one."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Twofold(nn.Linear):
    """What none would."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * weight


@pytest.mark.parametrize(("kind", "linear"), [(Own, True), (Router, False), (Twofold, False)])
def test_a_subclass_of_linear_is_a_target_if_it_does_what_a_linear_layer_does(kind: type, linear: bool) -> None:
    plain = tiny.model("llama")
    plain.model.layers[0].mlp.up_proj = kind(16, 20).to(torch.float64)
    found = find_targets(plain, "all-linear", head=plain.lm_head)
    assert ("model.layers.0.mlp.up_proj" in found) == linear
