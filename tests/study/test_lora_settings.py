"""`lora:` as PEFT has it: the same layers, ranks, scales and starts, and folders that PEFT scores as the run does."""

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import small_study, tiny
from tests.study.test_matrix import peft_loss

from fedmira.adapters import Scaling, lora_layout, scales, start_adapters
from fedmira.config.lora import REFUSED
from fedmira.config.lora import LoraConfig as OurConfig
from fedmira.errors import ConfigError, FedMiraError, ModelError, ShapeError
from fedmira.model.base.load import wrap
from fedmira.model.base.targets import Wanted, by_pattern
from fedmira.study.face import run
from fedmira.study.loading import check
from fedmira.study.run import Common


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lora")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


def settings(made: tuple[Path, Path], output: Path, **lora: Any) -> dict[str, Any]:
    raw = small_study.settings(*made, output, methods=[{"name": "local"}], federation=FEDERATION)
    raw["lora"] = {**raw["lora"], **lora}
    return raw


FEDERATION = {"rounds": 1, "participation": 1.0}
QUERIES = ["q_proj", "c_attn", "qkv_proj"]
CASES: dict[str, dict[str, Any]] = {
    "root": {"use_rslora": True, "r": 4},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, r"layers\.1\..*down_proj": 1},
        "alpha_pattern": {"mlp.up_proj": 9.5},
    },
    "both": {"use_rslora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"layers.0.self_attn.q_proj": 2}},
    "blocks": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.0.self_attn.k_proj"]},
    "expression": {
        "target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj",
        "exclude_modules": r".*\.0\..*up_proj",
    },
    "gaussian": {"init_lora_weights": "gaussian", "r": 3},
    "orthogonal": {"init_lora_weights": "orthogonal", "rank_pattern": {"v_proj": 4}},
}


FAST = ("root", "patterns", "excluded", "orthogonal")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_folder_of_a_run_is_scored_by_peft_as_by_the_run(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    config = check(settings(made, tmp_path / "out", **CASES[name]), "study.yaml")
    study = run(config)
    clients = {client.id: client for client in Common().prepare(config, lambda event: None).workplace.clients}
    path = study.path / "local" / "seed-3"
    with (path / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    tests = {
        one["client"]: float(one["value"])
        for one in lines
        if (one["split"], one["metric"], one["round"]) == ("test", "loss", "1")
    }
    for client in ("ada", "bo"):
        expected = peft_loss(made[0], path / "adapters" / client, clients[client].test)
        assert tests[client] == pytest.approx(expected, rel=2e-5)
    assert len({round(value, 5) for value in tests.values()}) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize(
    "wanted",
    [
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "c_proj"]},
        {"target_modules": QUERIES, "layers_to_transform": [1]},
        {"target_modules": QUERIES, "layers_to_transform": 0, "layers_pattern": ["layers", "h"]},
        {"target_modules": r".*\.1\..*(q_proj|c_attn|qkv_proj)"},
        {"target_modules": QUERIES, "exclude_modules": r".*\.0\..*"},
    ],
    ids=str,
)  # fmt: skip
def test_the_layers_are_those_that_peft_adapts(family: str, wanted: dict[str, Any]) -> None:
    of_peft = dict(wanted)
    names = [one for one, _ in tiny.model(family).named_modules()]
    if isinstance(wanted["target_modules"], list):
        of_peft["target_modules"] = [one for one in wanted["target_modules"] if any(n.endswith(one) for n in names)]
    model = get_peft_model(tiny.model(family), LoraConfig(**of_peft, task_type="CAUSAL_LM"))
    expected = [
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    ]
    asked = Wanted(
        of_peft["target_modules"],
        wanted.get("layers_to_transform"),
        wanted.get("layers_pattern"),
        wanted.get("exclude_modules"),
    )
    base = wrap(tiny.model(family), tiny.tokenizer(), name=family, targets=asked, fingerprint="x")
    assert [name for name, _, _ in base.shapes] == expected
    assert expected


def test_scales_by_hand() -> None:
    """alpha 8: ranks 4 and 16 give 2 and 1/2, by the root 4 and 2; modules with alphas 8 and 2 at rank 4: 2 and 1/2."""
    ranks = torch.tensor([4, 16])
    assert scales(ranks, 8.0).tolist() == scales(ranks, Scaling(8.0)).tolist() == [2, 0.5]
    assert scales(ranks, Scaling(8.0, root=True)).tolist() == [4, 2]
    assert scales(ranks[:1], Scaling((8.0, 2.0))).tolist() == [[2, 0.5]]
    assert scales(torch.tensor([[4, 16]]), Scaling((8.0, 2.0), root=True)).tolist() == [[4, 0.5]]


def test_a_gaussian_start_has_pefts_spread_and_an_orthogonal_one_no_product() -> None:
    layout = lora_layout([("wide", 4000, 40), ("other", 30, 20)], [8, 4])
    draw = {"layout": layout, "ranks": torch.tensor([[8, 4]]), "alpha": 8.0}
    (first, second), other = layout.parts[0].pairs()
    gaussian = start_adapters(**draw, generator=torch.Generator().manual_seed(0), start="gaussian")
    a = gaussian.leaf(first)
    assert float(a.std()) == pytest.approx(1 / 8, rel=0.02)  # 32,000 draws: 0.4 %
    assert float(a.mean()) == pytest.approx(0, abs=0.003)
    assert not bool(gaussian.leaf(second).any())
    orthogonal = start_adapters(**draw, generator=torch.Generator().manual_seed(0), start="orthogonal")
    for one, two in ((first, second), other):
        assert float(orthogonal.leaf(two).abs().max()) > 0.01
        product = orthogonal.leaf(two) @ orthogonal.leaf(one)
        assert float(product.abs().max()) < 1e-6
        assert int(torch.linalg.matrix_rank(orthogonal.leaf(one)[0])) == one.shape[0] // 2
    # of PEFT: A = randn(in, r/2) Q_odd / 10, so that its numbers have variance (r/2) (1/r) / 100 = 0.005
    assert float(orthogonal.leaf(first).var()) == pytest.approx(0.005, rel=0.2)
    with pytest.raises(ShapeError, match="even rank, found 3"):
        start_adapters(
            lora_layout([("m", 4, 4)], 3), torch.tensor([3]), 1.0, torch.Generator().manual_seed(0), start="orthogonal"
        )


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"use_dora": True}, "lora.use_dora: not offered: DoRA has a magnitude"),
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save: not offered: whole layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "it changes the base's weights"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs even ranks, the same for all clients: found rank 3"),
        ({"init_lora_weights": "orthogonal", "r": 8, "ranks": "uniform"}, "would cut it"),
        ({"r": 8, "ranks": "uniform", "rank_pattern": {"q_proj": 2}}, "rank_pattern is for clients of one rank"),
        ({"layers_pattern": "h"}, "give that too"),
        ({"layers_to_transform": [-1]}, "should be a list of block numbers"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj: found 0"),
        ({"target_modules": [3]}, "should be a list of names, or one regular expression"),
        ({"layers_to_transform": [2]}, "has no block 2 with such layers; they are 0 to 1"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "has no block 0 with such layers below 'h'"),
        ({"exclude_modules": ["k_proj"]}, "'k_proj'] leaves out none of the 4 layers"),
        ({"exclude_modules": ".*"}, "leaves out all layers"),
        ({"rank_pattern": {"w_proj": 4}}, "lora.rank_pattern: 'w_proj' matches none of the adapted layers"),
        ({"alpha_pattern": {"k_proj": 4}}, "lora.alpha_pattern: 'k_proj' matches none of the adapted layers"),
        ({"target_modules": "q_proj"}, "a text is a regular expression for whole names"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_modules": r".*(q_proj|norm)"}, "which takes no adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_before_anything_is_run(
    made: tuple[Path, Path], tmp_path: Path, lora: dict[str, Any], words: str
) -> None:
    with pytest.raises(FedMiraError) as caught:
        Common().prepare(check(settings(made, tmp_path / "out", **lora), "study.yaml"), lambda event: None)
    assert words in str(caught.value)
    assert isinstance(caught.value, ConfigError | ModelError)
    assert not (tmp_path / "out").exists()


def test_every_setting_of_peft_is_a_key_or_refused_by_name(made: tuple[Path, Path], tmp_path: Path) -> None:
    theirs = {one.name for one in dataclasses.fields(LoraConfig)}
    assert theirs == (theirs & set(OurConfig.model_fields)) | set(REFUSED)
    for key, why in REFUSED.items():
        with pytest.raises(ConfigError, match=re.escape(f"lora.{key}: not offered: {why}")):
            check(settings(made, tmp_path / "x", **{key: None}), "study.yaml")


def test_the_first_pattern_that_matches_counts_as_in_peft() -> None:
    modules = ["a.q_proj", "b.q_proj", "b.v_proj"]
    assert by_pattern({"b.q_proj": 2, "q_proj": 3}, 1, modules, key="rank_pattern") == [3, 2, 1]
    with pytest.raises(ModelError, match=r"'b\.q_proj' matches none"):  # the one before it took all
        by_pattern({"q_proj": 3, "b.q_proj": 2}, 1, modules, key="rank_pattern")
