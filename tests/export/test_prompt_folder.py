"""Prompts as they leave a run: PEFT loads the folder, and what cannot be done with one is said before it is tried."""

import csv
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import prompted, small_study, tiny
from tests.run_facts import run_facts
from tests.small_study import CLIENTS, command, has_traceback
from transformers import AutoModelForCausalLM

import fedmira
from fedmira.adapters import lora_layout, soft_layout
from fedmira.errors import StoreError
from fedmira.export.card import USE
from fedmira.export.merged_model import merge_adapters
from fedmira.export.peft_folder import Depth, count_exported, depth_of, read_adapter
from fedmira.export.vllm import serve_line
from fedmira.model.answers.generate import answers
from fedmira.model.packed.virtual import embeddings
from fedmira.study import face as study
from fedmira.study import handover

NEW = 5
TEXTS = ((5, 9, 2, 17, 11, 3, 8), (4, 4, 20, 6, 13))
METHOD = {"name": "fedptuning", "virtual_tokens": 3, "hidden": 6}


def one(stack: Any, k: int) -> Any:
    return stack.take(torch.tensor([k]))


# ---------------------------------------------------------------- what PEFT makes of a folder


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3", "granite", "opt", "falcon", "bloom"])
def test_peft_gives_the_logits_of_our_pass(family: str, tmp_path: Path) -> None:
    """Gemma and Granite scale their embeddings, each at another place; OPT's are narrower than its layers."""
    base = tiny.base(family, dtype=torch.float32)
    stack = prompted.encoders(base, 2)
    found = prompted.our_logits(base, stack, TEXTS)
    for k, ids in enumerate(TEXTS):
        plain = tiny.model(family, dtype=torch.float32)
        bare = prompted.peft_logits(plain, ids)
        folder = prompted.export_one(tmp_path / str(k), base, one(stack, k))
        expected = prompted.peft_logits(peft.PeftModel.from_pretrained(plain, str(folder)).eval(), ids)
        largest = float(expected.abs().max())
        assert float((found[k] - expected).abs().max()) < 1e-5 * largest
        assert float((bare - expected).abs().max()) > 1e-2 * largest


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_peft_writes_our_greedy_answers(family: str, tmp_path: Path) -> None:
    base = tiny.base(family, dtype=torch.float32)
    stack = prompted.encoders(base, 2)
    written = [own[0].strip() for own in answers(base, stack, [[ids] for ids in TEXTS], max_new_tokens=NEW)]
    plain = [prompted.peft_answer(tiny.model(family, dtype=torch.float32), ids, new=NEW) for ids in TEXTS]
    for k, ids in enumerate(TEXTS):
        folder = prompted.export_one(tmp_path / str(k), base, one(stack, k))
        made = peft.PeftModel.from_pretrained(tiny.model(family, dtype=torch.float32), str(folder)).eval()
        assert written[k] == prompted.peft_answer(made, ids, new=NEW)
    assert written != plain


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_the_folder_is_what_peft_saves_of_the_same_encoder(family: str, tmp_path: Path) -> None:
    base = tiny.base(family, dtype=torch.float32)
    own = prompted.encoders(base, 1, tokens=4, hidden=7)
    ours = prompted.export_one(tmp_path / "ours", base, own)
    prompted.peft_encoder(tiny.model(family, dtype=torch.float32), own).save_pretrained(tmp_path / "peft")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, tmp_path / "peft"))
    assert list(found) == list(expected) == ["prompt_embeddings"]
    assert found["prompt_embeddings"].dtype == torch.float32
    assert tuple(found["prompt_embeddings"].shape) == (4, base.width)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    configs = [json.loads((place / "adapter_config.json").read_text()) for place in (ours, tmp_path / "peft")]
    assert configs[0].pop("base_model_name_or_path") == "tiny"
    configs[1].pop("base_model_name_or_path")
    assert configs[0] == configs[1]


def test_a_base_without_attention_has_one_head_because_peft_needs_a_number(tmp_path: Path) -> None:
    assert depth_of(tiny.config("gpt2", n_layer=3)) == Depth(3, 2)
    assert depth_of(tiny.config("mamba")) == Depth(2, 1)
    base = tiny.base("mamba", dtype=torch.float32)
    folder = prompted.export_one(tmp_path / "ada", base, prompted.encoders(base, 1))
    peft.PeftModel.from_pretrained(tiny.model("mamba", dtype=torch.float32), str(folder))


# ---------------------------------------------------------------- reading one back


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported prompt of 3 tokens, of width 16."""
    base = tiny.base("llama", dtype=torch.float32)
    return prompted.export_one(tmp_path / "ada", base, prompted.encoders(base, 1))


def test_a_prompt_is_read_back_as_the_embeddings_that_its_encoder_made(folder: Path) -> None:
    own = prompted.encoders(tiny.base("llama", dtype=torch.float32), 1)
    layout = soft_layout(16, 3)
    soft = type(own)(layout, read_adapter(folder, layout), own.ranks, own.scale)
    assert torch.equal(embeddings(soft), embeddings(own))
    assert soft.layout.virtual_tokens == 3
    assert count_exported(own.layout) == count_exported(layout) == 48 < own.layout.parameters
    assert count_exported(lora_layout([("q", 4, 3)], 2)) == 14


@pytest.mark.parametrize(("width", "tokens"), [(8, 3), (16, 2), (16, 4), (3, 16)])
def test_a_prompt_of_another_size_does_not_fit(width: int, tokens: int, folder: Path) -> None:
    words = rf"'prompt_embeddings' is \(3, 16\), but must be \({tokens}, {width}\); was it made for another base\?"
    with pytest.raises(StoreError, match=words):
        read_adapter(folder, soft_layout(width, tokens))


def test_neither_kind_is_read_as_the_other(folder: Path, tmp_path: Path) -> None:
    base = tiny.base("llama", dtype=torch.float32)
    with pytest.raises(StoreError, match=r"no tensor 'base_model\.model\..*lora_A\.weight'"):
        read_adapter(folder, tiny.layout(base, 2))
    with pytest.raises(StoreError, match="the output of a prompt encoder, not the encoder"):
        read_adapter(folder, prompted.encoders(base, 1).layout)
    save_file({"x": torch.zeros(3, 16)}, folder / "adapter_model.safetensors")
    with pytest.raises(StoreError, match=r"no tensor 'prompt_embeddings'; is it a prompt\?"):
        read_adapter(folder, soft_layout(16, 3))


def test_damaged_and_foreign_prompts_are_refused(folder: Path) -> None:
    path, layout = folder / "adapter_model.safetensors", soft_layout(16, 3)
    whole = path.read_bytes()
    save_file({**load_file(path), "mlp_head.0.weight": torch.zeros(2)}, path)
    with pytest.raises(StoreError, match=r"unexpected tensor 'mlp_head\.0\.weight'"):
        read_adapter(folder, layout)
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match="is damaged"):
        read_adapter(folder, layout)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"holds pickles, which can run code: adapter_model\.bin"):
        read_adapter(folder, layout)


# ---------------------------------------------------------------- what cannot be done with one


def test_a_prompt_is_not_merged_and_no_weights_are_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights are loaded"))
    facts = run_facts(base_model=str(tmp_path / "nowhere"))
    with pytest.raises(StoreError, match=r"ada' is a prompt of virtual tokens.* cannot be merged.* without --merge"):
        merge_adapters([folder], [tmp_path / "out"], facts=facts)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(StoreError, match=r"adapter_config\.json' is damaged"):
        merge_adapters([folder], [tmp_path / "out"], facts=facts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", [None, "LlamaForCausalLM", "GPT2LMHeadModel"])
def test_no_vllm_command_is_printed_for_a_prompt_and_whole_models_are_not_offered(
    architecture: str | None, folder: Path
) -> None:
    line = serve_line("base", [folder], architecture=architecture)
    assert line.startswith("# vLLM 0.33 does not serve virtual tokens")
    assert "--merge" not in line
    assert "\n" not in line


# ---------------------------------------------------------------- from a run


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data whose rows name their split, and a finished study of fedptuning and local."""
    place = tmp_path_factory.mktemp("here")
    small_study.save_base(place / "base")
    rows = [json.loads(line) for line in small_study.save_data(place / "rows.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["split"] = ("train", "train", "validation", "test")[index % 4]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = small_study.settings(
        Path("base"),
        Path("rows.jsonl"),
        Path("study"),
        data={"split_column": "split"},
        methods=[METHOD, {"name": "local"}],
    )
    ended = command("run", small_study.save_config(place / "config.yaml", raw), "-q", folder=place)
    assert ended.code == 0, ended.err
    return place


@pytest.fixture(scope="module")
def run(here: Path) -> study.Run:
    return fedmira.load_run(here / "study" / "fedptuning" / "seed-3")


def test_the_folder_of_a_run_has_the_test_loss_of_its_results_in_peft(
    here: Path, run: study.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of the card is run as it stands, and transformers computes the loss on the client's test rows."""
    monkeypatch.chdir(here)
    with (run.path / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["split"], row["metric"]) == ("test", "loss")]
    scores = {(row["client"], row["round"]): float(row["value"]) for row in rows}
    data = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    for client in ("007", "ada"):
        card = (run.adapters(client) / "README.md").read_text(encoding="utf-8")
        names: dict[str, Any] = {}
        program = card.split(USE)[1].split("```python\n")[1].split("```")[0]
        exec(program.replace("path/to/this/folder", str(run.adapters(client))), names)
        losses = []
        for row in data:
            if (row["client"], row["split"]) == (client, "test"):
                prompt, answer = (tiny.tokenizer()(row[key])["input_ids"] for key in ("prompt", "completion"))
                labels = [-100] * len(prompt) + [*answer, tiny.END]
                ids = torch.tensor([[*prompt, *answer, tiny.END]])
                with torch.no_grad():
                    losses.append(names["model"](input_ids=ids, labels=torch.tensor([labels])).loss)
        assert float(torch.stack(losses).mean()) == pytest.approx(scores[client, "4"], abs=1e-5)
        assert scores[client, "4"] != pytest.approx(scores[client, "0"], abs=1e-3)


def test_the_settings_of_a_runs_prompt_contain_all_that_peft_needs_of_its_base(run: study.Run) -> None:
    found = json.loads((run.adapters("ada") / "adapter_config.json").read_text())
    assert {key: found[key] for key in ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens")} == {
        "num_layers": 2,
        "num_attention_heads": 4,
        "token_dim": 16,
        "num_virtual_tokens": 3,
    }
    assert (found["base_model_name_or_path"], found["inference_mode"]) == ("base", True)


def test_the_card_of_a_prompt_says_what_the_run_says(run: study.Run) -> None:
    text = (run.adapters("ada") / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert "- virtual tokens: 3, made by an MLP of width 6" in lines
    assert "- adapter: shared by all clients of the run" in lines
    assert any(line.startswith("- method: fedptuning with") for line in lines)
    assert not any(line.startswith("- LoRA") for line in lines)


@pytest.mark.slow
def test_equal_prompts_share_a_file_where_copies_would_fill_the_disk(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has 3 x 16 numbers, however many the encoder has: six of them are 1,152 bytes."""
    monkeypatch.chdir(here)
    for limit, files in ((1151, 1), (1152, len(CLIENTS))):
        monkeypatch.setattr(handover, "LINK_BYTES", limit)
        ended = command("run", "config.yaml", f"output_dir={tmp_path / str(limit)}", "federation.rounds=1", "-q")
        assert ended.code == 0, ended.err
        adapters = tmp_path / str(limit) / "fedptuning" / "seed-3" / "adapters"
        assert len({path.stat().st_ino for path in adapters.glob("*/adapter_model.safetensors")}) == files
        cards = {path.read_text().split("\n- group")[1] for path in adapters.glob("*/README.md")}
        assert all("- virtual tokens: 3, made by an MLP of width 6" in text for text in cards)


def test_exporting_a_prompt_prints_paths_and_why_vllm_cannot_serve_it(
    here: Path, run: study.Run, tmp_path: Path
) -> None:
    ended = command("export", run.path, "--client", "ada", "--out", tmp_path / "out", folder=here)
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out' / 'ada'}\n"), ended.err
    assert ended.err.startswith("# vLLM 0.33 does not serve virtual tokens")
    every = command("export", run.path, "--json", "--out", tmp_path / "all", folder=here)
    assert json.loads(every.out)["vllm"].startswith("# vLLM")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "out" / "ada" / name).read_bytes() == (run.adapters("ada") / name).read_bytes()


def test_merging_a_prompt_on_the_command_line_is_bad_input(here: Path, run: study.Run, tmp_path: Path) -> None:
    ended = command("export", run.path, "--merge", "--out", tmp_path / "out", folder=here)
    assert (ended.code, ended.out) == (2, "")
    assert "cannot be merged into weights" in ended.err
    assert not has_traceback(ended.err)
    assert list(tmp_path.iterdir()) == []
