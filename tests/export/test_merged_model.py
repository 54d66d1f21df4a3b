"""Merged models: whole, loadable without PEFT, and refused rather than wrong."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from tests import small_study, tiny
from tests.model import hub
from tests.run_facts import run_facts
from tests.small_study import command, has_traceback
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmira import bundled
from fedmira.adapters import lora_layout
from fedmira.disk.run_facts import RunFacts
from fedmira.errors import ConfigError, ModelError, StoreError
from fedmira.export import merged_model as merge
from fedmira.export.merged_model import TOLERANCES, Merged, merge_adapters
from fedmira.export.peft_folder import export_adapter
from fedmira.model.base.load import load_base
from fedmira.study import face as study
from fedmira.study.face import Run

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a finished study of `local`."""
    folder = tmp_path_factory.mktemp("here")
    base = small_study.save_base(folder / "base")
    data = small_study.save_data(folder / "data.jsonl")
    raw = small_study.settings(base, data, folder / "study", methods=[{"name": "local"}])
    ended = command("run", small_study.save_config(folder / "config.yaml", raw), "-q")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that are loaded from now on."""
    seen: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def noted(path: str, **options: Any) -> Any:
        seen.append(path)
        return load(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    return seen


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()  # type: ignore[no-any-return]


def apart(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of base and adapter as PEFT runs them."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(adapter)))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def make_adapter(base: Path | str, folder: Path, *, size: float = 0.2, revision: str | None = None) -> RunFacts:
    """Write a random adapter for a base into a folder; return the facts of a run that could have."""
    loaded = load_base(bundled.resolve(str(base)), dtype="float32", device="cpu", revision=revision)
    layout = lora_layout(loaded.shapes, 2)
    rows = tiny.adapters(layout, [2], dtype=torch.float32)
    export_adapter(
        folder,
        rows.with_rows(rows.rows * size),
        base_model=str(base),
        target_modules=sorted({name.rsplit(".", 1)[-1] for name, _, _ in loaded.shapes}),
        fan_in_fan_out=loaded.transposed,
        card={"client": folder.name},
    )
    return run_facts(base_model=str(base), base_fingerprint=loaded.fingerprint)


# ---------------------------------------------------------------- what is written


def test_a_merged_model_has_the_logits_of_base_and_adapter(here: Path, run: Run, tmp_path: Path) -> None:
    (made,) = study.merge(run, client="007", out=tmp_path)
    assert made.path == tmp_path / "007"
    expected = apart(here / "base", run.adapters("007"))
    whole = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    assert distance(logits(whole), expected) < TOLERANCES["float32"]
    assert distance(logits(AutoModelForCausalLM.from_pretrained(here / "base")), expected) > 0.1
    assert made.difference < 1e-5
    assert made.effect > 0.1
    assert not made.blurred


@pytest.mark.slow
def test_every_client_gets_its_own_model(run: Run, tmp_path: Path) -> None:
    made = study.merge(run, out=tmp_path)
    assert [one.client for one in made] == sorted(small_study.CLIENTS)
    weights = [load_file(one.path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"] for one in made]
    assert not torch.equal(weights[0], weights[1])


def test_a_merged_folder_is_a_model_with_its_tokenizer_and_a_card(here: Path, run: Run, tmp_path: Path) -> None:
    (made,) = study.merge(run, client="ada", out=tmp_path)
    names = {path.name for path in made.path.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"),
    }
    assert AutoTokenizer.from_pretrained(made.path)("w3 w4")["input_ids"] == [3, 4]
    assert "library_name: transformers" in (made.path / "README.md").read_text()
    assert {path.stat().st_mode for path in made.path.iterdir()} == {(made.path / "README.md").stat().st_mode}
    for path in made.path.iterdir():
        assert str(here.parent).encode() not in path.read_bytes()


def test_the_type_is_that_of_the_run_or_the_requested_one(here: Path, run: Run, tmp_path: Path) -> None:
    (plain,) = study.merge(run, client="007", out=tmp_path / "plain")
    (narrow,) = study.merge(run, client="007", out=tmp_path / "narrow", dtype="bfloat16")
    kinds = [{value.dtype for value in load_file(one.path / "model.safetensors").values()} for one in (plain, narrow)]
    assert kinds == [{torch.float32}, {torch.bfloat16}]
    assert (plain.dtype, narrow.dtype) == ("float32", "bfloat16")
    whole = AutoModelForCausalLM.from_pretrained(narrow.path, dtype=torch.bfloat16)
    found = distance(logits(whole), apart(here / "base", run.adapters("007"), torch.bfloat16))
    assert 1e-4 < found < 0.2


def test_the_difference_of_a_narrow_model_is_from_base_and_adapter_before_any_rounding(
    here: Path, run: Run, tmp_path: Path
) -> None:
    (made,) = study.merge(run, client="007", out=tmp_path, dtype="bfloat16")
    whole = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.bfloat16)
    ids = merge._draw_ids(whole)
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "base"), str(run.adapters("007")))
    assert made.difference == pytest.approx(distance(logits(whole, ids), logits(exact, ids)), rel=1e-4)


def test_an_adapter_lost_in_rounding_is_reported(here: Path, tmp_path: Path) -> None:
    facts = make_adapter(here / "base", tmp_path / "faint", size=0.02)
    (narrow,) = merge_adapters([tmp_path / "faint"], [tmp_path / "b"], facts=facts, dtype="bfloat16")
    (wide,) = merge_adapters([tmp_path / "faint"], [tmp_path / "f"], facts=facts)
    assert narrow.blurred
    assert not wide.blurred
    assert not Merged("x", tmp_path, "bfloat16", difference=0.0, effect=0.0).blurred  # a client never drawn


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama-tied"])
def test_other_families_merge_as_well(family: str, tmp_path: Path) -> None:
    base = tmp_path / family
    tiny.model(family, dtype=torch.float32).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    facts = make_adapter(base, tmp_path / "ada")
    (made,) = merge_adapters([tmp_path / "ada"], [tmp_path / "out"], facts=facts)
    whole = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    assert distance(logits(whole), apart(base, tmp_path / "ada")) < TOLERANCES["float32"]
    assert made.effect > 0.01


def test_the_bundled_base_is_merged_too(tmp_path: Path) -> None:
    facts = make_adapter("bundled:model", tmp_path / "ada")
    (made,) = merge_adapters([tmp_path / "ada"], [tmp_path / "out"], facts=facts)
    assert made.difference < 1e-5
    assert (made.path / "tokenizer.json").read_bytes() == (bundled.MODEL_PATH / "tokenizer.json").read_bytes()


def test_a_base_on_a_hub_is_merged_at_the_runs_revision(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub.serve(here / "base") as (address, _):
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + files)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        facts = make_adapter(hub.NAME, tmp_path / "ada", revision="second")
        (made,) = merge_adapters([tmp_path / "ada"], [tmp_path / "out"], facts=facts, revision="second")
        with pytest.raises(ModelError, match=r"model\.revision 'third'"):
            merge_adapters([tmp_path / "ada"], [tmp_path / "other"], facts=facts, revision="third")
    assert made.difference < 1e-5
    assert "base_model: some-one/tiny" in (made.path / "README.md").read_text()


# ---------------------------------------------------------------- what is refused, before weights are loaded


def test_a_target_that_is_taken_is_refused(run: Run, tmp_path: Path, loads: list[str]) -> None:
    (tmp_path / "eve").mkdir()
    with pytest.raises(StoreError, match=r"eve' exists already"):
        study.merge(run, out=tmp_path)
    assert loads == []
    assert [path.name for path in tmp_path.iterdir()] == ["eve"]


def test_an_unknown_type_is_refused_with_the_known_ones(run: Run, tmp_path: Path, loads: list[str]) -> None:
    with pytest.raises(ConfigError, match="--dtype: found 'int8'; allowed: float32, bfloat16, float64"):
        study.merge(run, out=tmp_path, dtype="int8")
    assert loads == []


def test_a_disk_with_too_little_room_is_refused(
    run: Run, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = sum(value.numel() for value in tiny.model("llama").state_dict().values())
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(4 * numbers * 6))
    with pytest.raises(StoreError, match=r"needs [\d,]+ bytes for 6 merged models, and [\d,]+ are free"):
        study.merge(run, out=tmp_path / "new" / "out")
    assert loads == []
    assert study.merge(run, client="ada", out=tmp_path)  # one has room


def test_another_base_instead_of_the_old_one_is_refused(here: Path, run: Run, tmp_path: Path, loads: list[str]) -> None:
    other = small_study.save_base(tmp_path / "other", seed=9)
    facts = replace(run.facts, base_model=str(other))
    with pytest.raises(ModelError, match="is not the base this run was trained on"):
        merge_adapters([run.adapters("ada")], [tmp_path / "out"], facts=facts)
    gone = replace(run.facts, base_model=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="no such folder"):
        merge_adapters([run.adapters("ada")], [tmp_path / "out"], facts=gone)
    assert loads == []


def test_a_damaged_base_is_refused(here: Path, run: Run, tmp_path: Path, loads: list[str]) -> None:
    own = tmp_path / "own"
    shutil.copytree(here / "base", own)
    (own / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ModelError, match="cannot be read"):
        merge_adapters([run.adapters("ada")], [tmp_path / "out"], facts=replace(run.facts, base_model=str(own)))
    assert loads == []


def test_a_base_in_parts_is_counted_by_its_index(here: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(here / "base")
    whole.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    numbers = sum(value.numel() for value in whole.state_dict().values())
    save_file({"x": torch.zeros(9)}, tmp_path / "other.safetensors")  # that the index does not name
    assert merge._count_parameters(tmp_path) == numbers == merge._count_parameters(here / "base")


# ---------------------------------------------------------------- what is not kept


def test_a_merge_with_different_logits_is_removed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())  # the base without the adapter
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(
            ModelError, match=r"logits differ by .* base and adapter; 1e-04 is allowed\. It was removed"
        ):
            study.merge(run, client="007", out=tmp_path, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_is_not_saved_as_it_was_is_removed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = transformers.PreTrainedModel.save_pretrained

    def damaged(model: Any, *arguments: Any, **options: Any) -> None:
        next(value for value in model.parameters() if value.ndim == 2).data.zero_()
        save(model, *arguments, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", damaged)
    with pytest.raises(ModelError, match=r"logits differ by .* the saved model; 1e-04 is allowed\. It was removed"):
        study.merge(run, client="007", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_finite_is_not_merged(here: Path, tmp_path: Path) -> None:
    facts = make_adapter(here / "base", tmp_path / "ada")
    path = tmp_path / "ada" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(StoreError, match=r"ada/adapter_model\.safetensors' has numbers that are not finite"):
        merge_adapters([tmp_path / "ada"], [tmp_path / "out" / "ada"], facts=facts)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing_half(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(StoreError, match=r"cannot write '.*ada': No space left"):
        study.merge(run, client="ada", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the command


def test_merge_on_the_command_line_prints_the_path_and_how_far_logits_are(run: Run, tmp_path: Path) -> None:
    ended = command("export", run.path, "--client", "007", "--merge", folder=tmp_path)
    assert (ended.code, ended.out) == (0, "merged/007\n"), ended.err
    assert "007: logits differ by at most " in ended.err
    assert "(float32); the adapter moves them by " in ended.err
    assert ended.err.endswith("vllm serve merged/007\n")
    assert "Warning" not in ended.err
    again = command("export", run.path, "--client", "007", "--merge", folder=tmp_path)
    assert (again.code, again.out) == (2, "")
    assert "exists already" in again.err


def test_merge_in_json_gives_models_and_differences(run: Run, tmp_path: Path) -> None:
    options = ("--client", "ada", "--merge", "--dtype", "bfloat16", "--json", "--out", tmp_path / "out")
    ended = command("export", run.path, *options)
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["models"] == [str(tmp_path / "out" / "ada")]
    assert 0 < found["differences"]["ada"] < 0.2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "float32"], "give --merge too"),
        (["--merge", "--dtype", "float8"], "allowed: float32, bfloat16, float64"),
        (["--merge", "--client", "nobody"], "there are: 007, ada"),
    ],
)
def test_invalid_options_are_refused(options: list[str], words: str, run: Run, tmp_path: Path) -> None:
    ended = command("export", run.path, *options, folder=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err
    assert not has_traceback(ended.err)
    assert list(tmp_path.iterdir()) == []
