"""Adapters as they leave a run: standard PEFT folders that PEFT and vLLM take, with no path of this machine in them."""

import errno
import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from tests import small_study, tiny
from tests.parity.pairing import FLOAT32, stacked_logits
from tests.small_study import CLIENTS, command
from transformers import AutoModelForCausalLM

import fedmira
from fedmira.adapters import Adapters, lora_layout
from fedmira.adapters.ranks import is_attention
from fedmira.cli.chat import open_chat
from fedmira.data.batches import collate
from fedmira.errors import FedMiraError, StoreError
from fedmira.export import peft_folder
from fedmira.export.peft_folder import FILES, export_adapter, read_adapter
from fedmira.export.vllm import NO_LORA, RANKS, max_lora_rank, serve_line
from fedmira.model.passes import gradients
from fedmira.study import face as study
from fedmira.study.face import Run

LOCAL = [{"name": "local"}]
ASKING = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished studies: `near` names its base from there, `far` by an absolute path."""
    folder = tmp_path_factory.mktemp("here")
    small_study.save_base(folder / "base")
    small_study.save_data(folder / "data.jsonl")
    for name, place in (("near", Path()), ("far", folder)):
        raw = small_study.settings(place / "base", place / "data.jsonl", place / name, methods=LOCAL)
        ended = command("run", small_study.save_config(folder / f"{name}.yaml", raw), "-q", folder=folder)
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def run(here: Path) -> Run:
    return fedmira.load_run(here / "near" / "local" / "seed-3")


@pytest.fixture(scope="module")
def copy(here: Path, run: Run) -> Path:
    """One exported folder that tests only read."""
    (made,) = fedmira.export(run, client="ada", out=here / "copies")
    return made


def settings(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(found, dict)
    return found


def test_target_modules_are_sorted(run: Run) -> None:
    """A set has another order in every process, and files of equal runs are to be equal."""
    for client in ("ada", "bo", "eve"):
        assert settings(run.adapters(client))["target_modules"] == ["q_proj", "v_proj"]


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# ---------------------------------------------------------------- copies


def test_export_copies_one_client_or_all(run: Run, tmp_path: Path) -> None:
    assert fedmira.export(run, client="ada", out=tmp_path / "one") == [tmp_path / "one" / "ada"]
    copies = fedmira.export(run.path, out=tmp_path / "all")
    assert sorted(copy.name for copy in copies) == sorted(CLIENTS)
    for name in FILES:
        assert (tmp_path / "all" / "ada" / name).read_bytes() == (run.adapters("ada") / name).read_bytes()
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


def test_export_overwrites_nothing_and_copies_all_or_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cy").mkdir()
    with pytest.raises(StoreError, match=r"'.*cy' exists already; choose another --out"):
        fedmira.export(run, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cy"]


def test_a_dangling_link_counts_as_taken_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cy").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="exists already"):
        fedmira.export(run, client="cy", out=tmp_path)


def test_only_the_files_of_an_adapter_and_its_tokenizer_are_copied(here: Path, tmp_path: Path) -> None:
    own = tmp_path / "study"
    shutil.copytree(here / "near", own)
    folder = own / "local" / "seed-3" / "adapters" / "ada"
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder.parent / ".DS_Store").write_text("x")
    made = fedmira.export(own / "local" / "seed-3", out=tmp_path / "out")
    assert {path.name for path in made[0].parent.iterdir()} == set(CLIENTS)
    assert {path.name for path in (tmp_path / "out" / "ada").iterdir()} == {*FILES, *ASKING}


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_without_one_of_its_files_is_refused_before_anything_is_copied(
    name: str, here: Path, tmp_path: Path
) -> None:
    shutil.copytree(here / "near" / "local" / "seed-3", tmp_path / "run")
    (tmp_path / "run" / "adapters" / "eve" / name).unlink()
    with pytest.raises(StoreError, match=rf"eve' has no {re.escape(name)}; was the run cut short"):
        fedmira.export(tmp_path / "run", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_copy_behind(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, left = peft_folder.copy_file, iter(range(7))

    def full(*arguments: Any) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(peft_folder, "copy_file", full)
        with pytest.raises(StoreError, match=r"cannot write '.*': No space left on device; choose another --out"):
            fedmira.export(run, out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert len(fedmira.export(run, out=tmp_path / "out")) == len(CLIENTS)


def test_a_partial_copy_left_by_a_crash_hinders_no_other(run: Run, tmp_path: Path) -> None:
    (tmp_path / ".ada.tmp").mkdir()
    (tmp_path / ".ada.tmp" / "half").write_text("x")
    fedmira.export(run, client="ada", out=tmp_path)
    assert {path.name for path in (tmp_path / "ada").iterdir()} == {*FILES, *ASKING}
    assert (tmp_path / ".ada.tmp" / "half").read_text() == "x"


def test_a_file_instead_of_the_folder_is_reported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match=r"cannot write '.*ada': .*; choose another --out"):
        fedmira.export(run, client="ada", out=tmp_path / "out")


@pytest.mark.parametrize("client", ["", ".", "..", "nobody"])
def test_an_unknown_client_is_refused_with_the_known_ones(client: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there are: 007, ada"):
        fedmira.export(run, client=client, out=tmp_path / "out")


def test_a_run_without_adapters_says_how_to_get_them(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "near" / "local" / "seed-3", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapters")
    with pytest.raises(StoreError, match="has no adapters yet; finish it with: fedmira resume "):
        fedmira.export(tmp_path / "run", out=tmp_path / "out")


# ---------------------------------------------------------------- what is in them


def test_a_base_is_named_as_in_the_config_and_no_path_of_this_machine_leaves(
    here: Path, copy: Path, tmp_path: Path
) -> None:
    assert settings(copy)["base_model_name_or_path"] == "base"
    far = here / "far" / "local" / "seed-3"
    (moved,) = fedmira.export(far, client="ada", out=tmp_path)
    assert settings(moved) == settings(copy)  # of the absolute path in the config the last name
    for folder in (moved, copy, here / "near" / "local" / "seed-3" / "adapters"):
        assert str(here.parent).encode() not in contents(folder)
    kept = settings(far / "adapters" / "ada")["base_model_name_or_path"]
    assert kept == str(here / "base")  # where `fedmira chat --adapter` finds it


def test_a_copy_gives_the_logits_of_the_run_in_peft(here: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by greedy answers, too: `fedmira chat` computes them with stacked layers, transformers with PEFT's."""
    monkeypatch.chdir(here)
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    plain = model(input_ids=torch.tensor([[3, 4, 5]])).logits.detach()
    model = PeftModel.from_pretrained(model, str(copy)).eval()
    assert float((model(input_ids=torch.tensor([[3, 4, 5]])).logits - plain).detach().abs().max()) > 0.01
    ids = tiny.tokenizer()("w3 w4 w5", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    expected = tiny.tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert open_chat(folders=[copy], max_new_tokens=4).ask("w3 w4 w5")["ada"] == expected


REACHED = 9


def unplugged(action: Callable[[], object], folder: Path) -> int:
    """Do something in a process of its own, where no switch says that there is no hub; REACHED if it asks for one."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # as in small_study.start
            os.chdir(folder)
            constants.HF_HUB_OFFLINE = False
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
                os.environ.pop(name, None)
            for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
                setattr(place, name, lambda *_, **__: os._exit(REACHED))
            action()
            code = 0
        except FedMiraError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_running_exporting_and_merging_on_a_local_base_never_reach_for_the_network(here: Path) -> None:
    place = Path("near/local/seed-3")
    assert unplugged(lambda: fedmira.export(place, client="ada", out="offline"), here) == 0
    assert unplugged(lambda: study.merge(place, client="ada", out="offline-merged"), here) == 0
    config = fedmira.load_config(here / "near.yaml", ["output_dir=offline-study", "federation.rounds=1"])
    assert unplugged(lambda: fedmira.run(config), here) == 0
    assert (here / "offline-study" / "local" / "seed-3" / "adapters" / "ada" / "README.md").is_file()
    elsewhere = config.model_copy(update={"model": config.model.model_copy(update={"base_model": "nobody/nothing"})})
    assert unplugged(lambda: fedmira.run(elsewhere, overwrite=True), here) == REACHED  # a hub's name is asked for


# ---------------------------------------------------------------- a rank for each module


def uneven(base: tiny.Base, *ranks: tuple[int, int], alpha: float = 6.0) -> Adapters:
    """Random adapters; of each client the rank of its attention and of its feed-forward layers."""
    pairs = torch.tensor(ranks)
    own = pairs[:, [0 if is_attention(name) else 1 for name, _, _ in base.shapes]]
    layout = lora_layout(base.shapes, own.amax(dim=0).tolist())
    rows = 0.3 * torch.randn(len(own), layout.size, generator=torch.Generator().manual_seed(1))
    return Adapters(layout, rows, own, alpha / own.float()).mask_()


def export_one(folder: Path, base: tiny.Base, own: Adapters) -> Path:
    modules = [name for name, _, _ in base.shapes]
    options: dict[str, Any] = {"target_modules": modules, "fan_in_fan_out": base.transposed}
    export_adapter(folder, own, base_model="tiny", card={"client": "a"}, **options)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_with_a_rank_for_each_module_is_in_peft_what_it_is_in_the_stack(family: str, tmp_path: Path) -> None:
    """Logits and gradients of three clients in one pass, against their exported folders one by one."""
    base = tiny.base(family, targets="all-linear", dtype=torch.float32)
    stack = uneven(base, (2, 5), (3, 3), (1, 4))
    stream = np.random.default_rng(5)
    texts = [[tiny.example(stream, int(stream.integers(3, 12)), answer=2) for _ in range(2)] for _ in range(3)]
    batch = collate(texts, pad_id=base.pad_id)
    logits, pushes = stacked_logits(base, stack, batch), torch.full_like(stack.rows, 7.0)
    gradients(base, stack, batch, into=pushes)
    for k in range(3):
        own = stack.take(torch.tensor([k]))
        folder = export_one(tmp_path / str(k), base, own)
        plain = tiny.model(family, dtype=torch.float32)
        made = PeftModel.from_pretrained(plain, str(folder), is_trainable=True).eval()
        for place, one in enumerate(texts[k]):
            expected = made(input_ids=torch.tensor([one.ids])).logits[0].detach()
            torch.testing.assert_close(logits[k, place, : len(one.ids)], expected, **FLOAT32)
        tiny.peft_loss(made, texts[k]).backward()
        expected = tiny.peft_row(made, stack.layout, gradient=True)
        mask = stack.layout.rank_mask(own.ranks)[0]
        torch.testing.assert_close(pushes[k][mask], expected[mask], **FLOAT32)
        assert torch.equal(read_adapter(folder, stack.layout), own.rows)


@pytest.mark.parametrize(("family", "transposed"), [("gpt2", True), ("llama", False)])
def test_weights_that_a_base_stores_transposed_are_declared_as_that(
    family: str, transposed: bool, tmp_path: Path
) -> None:
    """PEFT corrects a wrong value by itself, with a warning; other programs that read it do not."""
    base = tiny.base(family, targets="all-linear", dtype=torch.float32)
    assert settings(export_one(tmp_path / "a", base, uneven(base, (2, 2))))["fan_in_fan_out"] is transposed


def test_a_run_on_a_base_with_transposed_weights_declares_them(tmp_path: Path) -> None:
    tiny.model("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    data = small_study.save_data(tmp_path / "data.jsonl", examples=4)
    changes = {"lora": {"target_modules": ["c_attn"]}, "federation": {"rounds": 1}, "methods": LOCAL}
    raw = small_study.settings(tmp_path / "base", data, tmp_path / "study", **changes)
    fedmira.run(fedmira.load_config(small_study.save_config(tmp_path / "config.yaml", raw)))
    assert settings(tmp_path / "study" / "local" / "seed-3" / "adapters" / "ada")["fan_in_fan_out"] is True


def test_a_rank_that_is_not_the_largest_is_written_under_its_shortest_unique_ending(tmp_path: Path) -> None:
    base = tiny.base("gpt2", targets="all-linear", dtype=torch.float32)  # attn.c_proj and mlp.c_proj end alike
    found = settings(export_one(tmp_path / "a", base, uneven(base, (2, 5))))
    assert (found["r"], found["lora_alpha"]) == (5, 6)
    assert (found["rank_pattern"], found["alpha_pattern"]) == ({"c_attn": 2, "attn.c_proj": 2}, {})
    found = settings(export_one(tmp_path / "b", base, uneven(base, (5, 2))))
    assert found["rank_pattern"] == {"c_fc": 2, "mlp.c_proj": 2}
    found = settings(export_one(tmp_path / "c", base, uneven(base, (4, 4))))
    assert (found["r"], found["rank_pattern"], found["alpha_pattern"]) == (4, {}, {})


def test_an_alpha_that_float32_rounds_is_one_alpha_and_one_that_differs_is_written(tmp_path: Path) -> None:
    base = tiny.base("gpt2", targets="all-linear", dtype=torch.float32)
    found = settings(export_one(tmp_path / "a", base, uneven(base, (30, 7), alpha=2.3)))
    assert found["lora_alpha"] == pytest.approx(2.3)
    assert found["alpha_pattern"] == {}
    one = uneven(base, (2, 5))
    found = settings(export_one(tmp_path / "b", base, replace(one, scale=torch.ones_like(one.scale))))
    assert (found["lora_alpha"], found["alpha_pattern"]) == (5, {"c_attn": 2, "attn.c_proj": 2})


# ---------------------------------------------------------------- vLLM's rules (fedmira/export/vllm.py)


def has_both_files(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()


def has_rank_alpha_and_targets(folder: Path) -> bool:
    found = settings(folder)
    return found["r"] > 0 and found["lora_alpha"] > 0 and sorted(found["target_modules"]) == ["q_proj", "v_proj"]


def has_one_rank_and_it_is_allowed(folder: Path) -> bool:
    found = settings(folder)
    ranks = {
        value.shape[0 if "lora_A" in name else 1]
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    return ranks == {found["r"]} and found["r"] <= max(RANKS) and not found["rank_pattern"] | found["alpha_pattern"]


def has_no_bias(folder: Path) -> bool:
    return settings(folder)["bias"] == "none" and settings(folder)["lora_bias"] is False


def has_no_modules_to_save(folder: Path) -> bool:
    return settings(folder)["modules_to_save"] is None


def is_plain_lora(folder: Path) -> bool:
    variants = ("use_dora", "use_rslora", "alora_invocation_tokens", "use_bdlora", "use_qalora", "layer_replication")
    return settings(folder)["peft_type"] == "LORA" and not any(settings(folder)[name] for name in variants)


def leaves_the_base_unchanged(folder: Path) -> bool:
    return settings(folder)["init_lora_weights"] is True


def has_tensors_named_as_peft_names_them(folder: Path) -> bool:
    names = list(load_file(folder / "adapter_model.safetensors"))
    pattern = r"base_model\.model\.model\.layers\.[01]\.self_attn\.[qv]_proj\.lora_[AB]\.weight"
    return len(names) == 8 and all(re.fullmatch(pattern, name) for name in names)


def adapts_linear_layers_of_the_model_only(folder: Path) -> bool:
    modules = dict(tiny.model("llama").named_modules())
    named = {
        name.removeprefix("base_model.model.").rsplit(".", 2)[0]
        for name in load_file(folder / "adapter_model.safetensors")
    }
    return all(isinstance(modules[name], torch.nn.Linear) and name != "lm_head" for name in named)


def has_no_vocabulary_of_its_own(folder: Path) -> bool:
    names = list(load_file(folder / "adapter_model.safetensors"))
    return not [name for name in names if "embed" in name or "lm_head" in name] and not (
        settings(folder)["trainable_token_indices"] or (folder / "added_tokens.json").exists()
    )


@pytest.mark.parametrize(
    "rule",
    [
        has_both_files,
        has_rank_alpha_and_targets,
        has_one_rank_and_it_is_allowed,
        has_no_bias,
        has_no_modules_to_save,
        is_plain_lora,
        leaves_the_base_unchanged,
        has_tensors_named_as_peft_names_them,
        adapts_linear_layers_of_the_model_only,
        has_no_vocabulary_of_its_own,
    ],
)
def test_an_exported_folder_keeps_vllms_rules(rule: Callable[[Path], bool], copy: Path) -> None:
    assert rule(copy)


@pytest.mark.parametrize(
    ("rank", "allowed"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16), (33, 64), (129, 256), (300, 320), (512, 512), (513, None)],
)
def test_the_max_rank_is_the_smallest_that_vllm_allows(rank: int, allowed: int | None) -> None:
    assert max_lora_rank(rank) == allowed


PLAIN = {"peft_type": "LORA", "lora_alpha": 4, "target_modules": ["q_proj"]}


def adapters(folder: Path, *names: str, rank: int = 4) -> list[Path]:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps(PLAIN | {"r": rank}))
    return [folder / name for name in names]


def test_the_line_serves_every_adapter_under_its_clients_name(tmp_path: Path) -> None:
    line = serve_line("some/base", adapters(tmp_path, "ada", "bo"), revision="v2", architecture="LlamaForCausalLM")
    assert line == (
        "vllm serve some/base --revision v2 --enable-lora --max-lora-rank 8 --max-loras 2 "
        f"--lora-modules ada={tmp_path}/ada bo={tmp_path}/bo"
    )


def test_many_adapters_are_counted_off_behind_a_comment_so_that_the_line_runs(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(9)]
    line = serve_line("b", adapters(tmp_path, *names))
    assert line.endswith(f"  # ... and 5 more in {tmp_path}")
    assert shlex.split(line, comments=True)[-4:] == [f"{name}={tmp_path / name}" for name in names[:4]]


def test_the_line_has_the_largest_of_several_ranks(tmp_path: Path) -> None:
    folders = [*adapters(tmp_path, "a", rank=4), *adapters(tmp_path, "b", rank=20)]
    assert "--max-lora-rank 32 " in serve_line("base", folders)


def test_an_adapter_whose_layers_differ_in_rank_is_not_offered_to_vllm(tmp_path: Path) -> None:
    (folder,) = adapters(tmp_path, "ada")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(PLAIN | {"r": 8, "rank_pattern": {"mlp": 4}}))
    assert serve_line("base", [folder]).startswith("# vLLM")
    path.write_text(json.dumps(PLAIN | {"r": 8, "rank_pattern": {}}))
    assert serve_line("base", [folder]).startswith("vllm serve")


def test_a_path_with_a_comma_or_a_space_reaches_vllm_whole(tmp_path: Path) -> None:
    (comma,) = adapters(tmp_path / "a, b", "ada")
    words = shlex.split(serve_line("my base", [comma]))
    assert words[2] == "my base"
    assert json.loads(words[-1]) == {"name": "ada", "path": str(comma)}  # name=path with a comma is read as JSON


def test_an_adapter_never_has_the_name_of_the_base_it_is_served_with(tmp_path: Path) -> None:
    assert serve_line("ada", adapters(tmp_path, "ada")).endswith(f"ada-lora={tmp_path / 'ada'}")


def test_the_bundled_base_is_served_from_its_folder(tmp_path: Path) -> None:
    base = shlex.split(serve_line("bundled:model", adapters(tmp_path, "ada")))[2]
    assert (Path(base) / "model.safetensors").is_file()


def test_what_vllm_cannot_serve_is_reported_with_an_alternative(tmp_path: Path) -> None:
    folders = adapters(tmp_path, "ada", rank=600)
    assert "GPT2LMHeadModel" in NO_LORA
    for line, words in (
        (serve_line("gpt2", folders, architecture="GPT2LMHeadModel"), "does not serve LoRA on GPT2LMHeadModel"),
        (serve_line("base", folders), "allows ranks up to 512, and this is 600"),
    ):
        assert line.startswith("# ")
        assert words in line
        assert "--merge" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no adapter_config"),
        ("{", "is damaged"),
        ("{}", "peft_type is null"),
        (json.dumps(PLAIN | {"r": "x"}), 'r is "x"'),
    ],
)
def test_a_folder_whose_rank_cannot_be_read_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(StoreError, match=words):
        serve_line("base", [tmp_path])


# ---------------------------------------------------------------- the command


def test_export_prints_paths_on_one_stream_and_how_to_serve_them_on_the_other(here: Path, tmp_path: Path) -> None:
    place = here / "near" / "local" / "seed-3"
    ended = command("export", place, "--client", "ada", "--out", tmp_path / "out", folder=here)
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out' / 'ada'}\n")
    serve = "vllm serve base --enable-lora --max-lora-rank 8 --max-loras 1"
    made = tmp_path / "out" / "ada"
    assert ended.err == f"{serve} --chat-template {made}/chat_template.jinja --lora-modules ada={made}\n"
    every = json.loads(command("export", place, "--json", "--out", tmp_path / "all").out)
    assert [Path(path).name for path in every["adapters"]] == sorted(CLIENTS)
    assert every["vllm"].endswith(f"# ... and 2 more in {tmp_path / 'all'}")


def test_without_out_the_copies_are_in_a_folder_adapters(here: Path, tmp_path: Path) -> None:
    ended = command("export", here / "near" / "local" / "seed-3", "--client", "bo", folder=tmp_path)
    assert (ended.code, ended.out) == (0, "adapters/bo\n")


def test_run_json_names_the_class_of_the_base(run: Run) -> None:
    assert run.facts.architecture == "LlamaForCausalLM"
