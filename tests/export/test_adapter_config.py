"""One judge of adapters' folders for chat, merge, export and vLLM: known settings at known values, whole files."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import small_study, tiny
from tests.small_study import command, has_traceback
from transformers import AutoModelForCausalLM

from fedmira.cli.chat import open_chat
from fedmira.errors import StoreError
from fedmira.export.adapter_config import (
    EMPTY,
    HARMLESS,
    LISTED,
    LORA,
    PROMPT,
    READ,
    check_adapter,
    read_adapter_config,
)
from fedmira.export.peft_folder import export_adapter
from fedmira.model.base import load
from fedmira.study import face as study

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of `local`, of one round."""
    folder = tmp_path_factory.mktemp("here")
    base = small_study.save_base(folder / "base")
    data = small_study.save_data(folder / "data.jsonl")
    raw = small_study.settings(
        base, data, folder / "study", methods=[{"name": "local"}], federation={"rounds": 1, "participation": 1.0}
    )
    ended = command("run", small_study.save_config(folder / "config.yaml", raw), "-q")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def run(here: Path, tmp_path: Path) -> Path:
    """A copy of its run, with adapters that a test may damage."""
    shutil.copytree(here / "study", tmp_path / "study")
    return tmp_path / "study" / "local" / "seed-3"


def change(folder: Path, **keys: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ---------------------------------------------------------------- every setting that PEFT has


@pytest.mark.parametrize(("kind", "settings"), [(LORA, peft.LoraConfig), (PROMPT, peft.PromptEncoderConfig)])
def test_every_setting_of_the_installed_peft_is_on_exactly_one_list(kind: str, settings: type) -> None:
    """A new release may bring settings; whoever raises it decides what they mean."""
    lists = [READ[kind], HARMLESS[kind], LISTED[kind].keys(), EMPTY[kind]]
    named = sorted(name for names in lists for name in names)
    assert named == sorted(field.name for field in dataclasses.fields(settings))


def test_each_setting_that_changes_what_is_computed_is_refused_by_its_name(here: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ada"
    shutil.copytree(here / "study" / "local" / "seed-3" / "adapters" / "ada", folder)
    plain = (folder / CONFIG).read_text()
    values = {key: [1] for key in EMPTY[LORA]} | {
        "bias": "all",
        "task_type": "SEQ_CLS",
        "init_lora_weights": "pissa_niter_4",
        "use_rslora": "yes",
        "something_new": True,
        "peft_type": "LOHA",
        "r": "2",
        "lora_alpha": float("nan"),
        "rank_pattern": {"q_proj": 0},
        "alpha_pattern": [1],
        "target_modules": ".*q_proj",
        "base_model_name_or_path": 3,
    }
    for key, value in values.items():
        (folder / CONFIG).write_text(plain)
        change(folder, **{key: value})
        with pytest.raises(StoreError, match=rf"'.*ada/adapter_config\.json': .*{key}|q_proj is 0") as refused:
            read_adapter_config(folder)
        assert refused.value.exit_code == 2
    for key in EMPTY[LORA]:
        (folder / CONFIG).write_text(plain)
        for value in (None, False, [], {}, ""):
            change(folder, **{key: value})
            assert check_adapter(folder).rank == 2
    change(folder, layers_to_transform=0)  # a layer's number, not an empty value
    with pytest.raises(StoreError, match="layers_to_transform is 0"):
        read_adapter_config(folder)


def test_ranks_and_scales_are_those_that_peft_gives_each_layer(tmp_path: Path) -> None:
    base = tiny.base("llama", dtype=torch.float32)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 4},
        alpha_pattern={"layers.0.self_attn.v_proj": 7},
        use_rslora=True,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.model("llama", dtype=torch.float32), settings).eval()
    model.save_pretrained(str(tmp_path / "ada"))
    config = check_adapter(tmp_path / "ada")
    for name, _, _ in base.shapes:
        layer = model.get_submodule(f"base_model.model.{name}")
        assert config.rank_of(name) == layer.r["default"]
        assert config.scale_of(name) == pytest.approx(layer.scaling["default"])


def test_chat_answers_with_a_rank_for_each_layer_as_peft_does(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "choose_dtype", lambda dtype, device: torch.float32)  # on every machine
    model = AutoModelForCausalLM.from_pretrained(here / "base", dtype=torch.float32)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=9,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        use_rslora=True,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    joined = peft.get_peft_model(model, settings).eval()
    joined.save_pretrained(str(tmp_path / "ada"))
    chat = open_chat(folders=[tmp_path / "ada"], model=str(here / "base"), max_new_tokens=6)
    ids = chat.base.tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    out = joined.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    expected = chat.base.tokenizer.decode(out[0, 3:], skip_special_tokens=True).strip()
    replies = chat.ask("w3 w4 w5")
    assert replies["ada"] == expected != replies["base"]


# ---------------------------------------------------------------- damage, in every command


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-3])


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, folder / WEIGHTS)


def without_a_layer(folder: Path) -> None:
    tensors = {name: value for name, value in load_file(folder / WEIGHTS).items() if "layers.1" not in name}
    save_file(tensors, folder / WEIGHTS)


def for_another_width(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: v[:, :8].contiguous() if "lora_A" in name else v for name, v in tensors.items()}, folder / WEIGHTS)


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value * torch.nan for name, value in tensors.items()}, folder / WEIGHTS)


def link(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).rename(folder.parent.parent / name)
        (folder / name).symlink_to(folder.parent.parent / name)

    return replace


def written(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_text(text) and None


def changed(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, **keys)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "is damaged, or not a safetensors file"),
    "r = -3": (changed(r=-3), "r is -3; allowed: a whole number above 0"),
    "r too large": (changed(r=10**9), "but adapter_config.json says rank 1000000000"),
    "alpha as text": (changed(lora_alpha="4"), 'lora_alpha is "4"; allowed: a number above 0'),
    "unknown target": (changed(target_modules=["q_proj", "v_proj", "nowhere"]), "has no tensor for 'nowhere'"),
    "fewer targets": (changed(target_modules=["q_proj"]), "which target_modules of adapter_config.json do not name"),
    "other kind": (changed(peft_type="IA3"), "only plain LoRA and P-tuning are supported"),
    "kind is a list": (changed(peft_type=["LORA"]), "only plain LoRA and P-tuning are supported"),
    "dora": (changed(use_dora=True), "use_dora is true; allowed: only null, false or empty"),
    "activated": (changed(alora_invocation_tokens=[3]), "alora_invocation_tokens is [3]; allowed: only null"),
    "not JSON": (written("{"), "is damaged: it is not a JSON object"),
    "not an object": (written("[]"), "is damaged: it is not a JSON object"),
    "deep": (written("[" * 100_000), "is damaged: it is not a JSON object"),
    "a tensor less": (without_a_tensor, "and no 'base_model.model."),
    "linked config": (link(CONFIG), "is a link to"),
    "linked weights": (link(WEIGHTS), "is a link to"),
}
WHOLE_ONLY = {  # the base must be there to see it
    "a layer less": (without_a_layer, "layers.1"),
    "other width": (for_another_width, "lora_A"),
    "not finite": (not_finite, "finite"),
}


def refuse(words: str, *arguments: object) -> None:
    ended = command(*arguments)
    assert (ended.code, ended.out) == (2, ""), ended
    assert words in ended.err, ended.err
    assert not has_traceback(ended.err)


FAST = ("cut", "r = -3", "unknown target", "dora", "a tensor less", "linked weights", "other width", "not finite")


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*DAMAGES, *WHOLE_ONLY)],
)
def test_a_damaged_folder_ends_each_command_with_a_sentence(name: str, run: Path, tmp_path: Path) -> None:
    damage, words = (DAMAGES | WHOLE_ONLY)[name]
    damage(run / "adapters" / "ada")
    refuse(words, "chat", run, "--client", "ada", "-p", "w3", "--max-new-tokens", 2)
    refuse(words, "chat", "--adapter", run / "adapters" / "ada", "-p", "w3", "--max-new-tokens", 2)
    refuse(words, "export", run, "--client", "ada", "--out", tmp_path / "out", "--merge")
    if name in DAMAGES:  # prints vLLM's command too
        refuse(words, "export", run, "--client", "ada", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("option", [[], ["--merge"]])
def test_a_link_or_other_bytes_instead_of_the_card_or_the_folder_are_not_copied(
    option: list[str], run: Path, tmp_path: Path
) -> None:
    folder = run / "adapters" / "ada"
    arguments = ("export", run, "--client", "ada", "--out", tmp_path / "out", *option)
    card = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(b"\xff" + card)
    refuse("is not UTF-8", *arguments)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")
    refuse("README.md' is a link to", *arguments)
    (folder / "README.md").unlink()
    (folder / "README.md").write_bytes(card)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    refuse("ada' is a link to", *arguments)


def test_links_of_the_hubs_cache_are_read(here: Path, tmp_path: Path) -> None:
    """There a snapshot is links to files of the same repository."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in (here / "study" / "local" / "seed-3" / "adapters" / "ada").iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert check_adapter(snapshot).targets == ("q_proj", "v_proj")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(StoreError, match="is a link"):
        check_adapter(snapshot)


def test_our_folders_pass(here: Path, tmp_path: Path) -> None:
    base = tiny.base("gpt2", dtype=torch.float32, targets=["c_attn", "c_proj"])
    rows = tiny.adapters(tiny.layout(base, 3), [2], dtype=torch.float32)
    export_adapter(
        tmp_path / "ada",
        rows,
        base_model="gpt2",
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        card={},
    )
    assert check_adapter(tmp_path / "ada").rank == 2
    assert study.load_run(here / "study" / "local" / "seed-3").adapters("ada").is_dir()
