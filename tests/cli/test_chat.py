"""Talking to adapters: the same words as PEFT writes, side by side with the base, one question or many."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests import small_study
from tests.small_study import Ended, command, has_traceback
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmira.cli.chat import open_chat
from fedmira.config.faults import check_config
from fedmira.study import face as study

QUESTION = "w3 w4 w5 w6"
NEW = 4


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of local and fedavg, trained hard enough that adapters answer otherwise than the base."""
    folder = tmp_path_factory.mktemp("chat")
    base = small_study.save_base(folder / "base")
    raw = small_study.settings(
        base,
        small_study.save_data(folder / "data.jsonl"),
        folder / "study",
        methods=[{"name": "local"}, {"name": "fedavg"}],
        federation={"rounds": 2, "participation": 1.0},
        training={"learning_rate": 0.5, "local_steps": 4},
    )
    study.run(check_config(raw))
    return folder


def by_peft(folder: Path, client: str | None, method: str = "local") -> str:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    if client is not None:
        model = PeftModel.from_pretrained(model, folder / "study" / method / "seed-3" / "adapters" / client)
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def ask(folder: Path, *arguments: object) -> Ended:
    return command("chat", folder / "study" / "local" / "seed-3", "--max-new-tokens", NEW, *arguments)


def test_base_and_adapters_answer_as_peft_does(done: Path) -> None:
    others = [done / "study" / "fedavg" / "seed-3" / "adapters" / "ada"]
    chat = open_chat(done / "study" / "local" / "seed-3", client="ada", folders=others, max_new_tokens=NEW)
    replies = chat.ask(QUESTION)
    assert replies == {
        "base": by_peft(done, None),
        "ada": by_peft(done, "ada"),
        "ada of fedavg": by_peft(done, "ada", "fedavg"),
    }
    assert replies["ada"] != replies["base"]


def test_one_prompt_on_the_command_line_is_one_answer_of_each(done: Path) -> None:
    ended = ask(done, "--client", "007", "-p", QUESTION, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {"base": by_peft(done, None), "007": by_peft(done, "007")}
    lines = ask(done, "--client", "007", "-p", QUESTION).out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["base", "007"]


def test_an_adapter_alone_brings_its_base(done: Path) -> None:
    path = done / "study" / "local" / "seed-3" / "adapters" / "eve"
    ended = command("chat", "--adapter", path, "-p", QUESTION, "--max-new-tokens", NEW, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {"base": by_peft(done, None), "eve of local": by_peft(done, "eve")}


def test_every_speaker_remembers_its_own_conversation_where_the_template_shows_turns(
    done: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    chat = open_chat(done / "study" / "local" / "seed-3", client="ada", template=str(own), max_new_tokens=NEW)
    chat.ask("w3 w4")
    chat.ask("w5")
    assert [[turn.role for turn in own] for own in chat.turns] == [["user", "assistant"] * 2] * 2
    assert chat.turns[0][1] != chat.turns[1][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat"], "no adapter to chat with"),
        (["chat", "--client", "ada"], "give the run too"),
        (["chat", "{run}"], "--client is missing; clients of this run: 007, ada"),
        (["chat", "{run}", "--client", "../ada"], "there are: 007, ada"),
        (["chat", "{run}", "--client", "ada", "--max-new-tokens", "64"], "64 positions"),
        (["chat", "{run}", "--client", "ada", "--max-new-tokens", "0"], "at least 1"),
        (["chat", "{run}", "--client", "ada", "-p", " "], "the question is empty"),
        (["chat", "{run}", "--client", "ada", "--template", "chat", "-p", "w3"], "no chat template"),
        (["chat", "--adapter", "{study}"], "no adapter_config.json"),
        (["chat", "none"], "none"),
    ],
)
def test_what_cannot_be_talked_to_is_refused(arguments: list[str], words: str, done: Path) -> None:
    places = {"{run}": done / "study" / "local" / "seed-3", "{study}": done / "study"}
    ended = command(*[places.get(word, word) for word in arguments])
    assert (ended.code, ended.out) == (2, ""), ended
    assert words in ended.err
    assert not has_traceback(ended.err)


def test_an_adapter_of_another_base_or_kind_is_refused(done: Path, tmp_path: Path) -> None:
    other = small_study.save_base(tmp_path / "other", seed=9)
    run, kept = done / "study" / "local" / "seed-3", done / "base"
    kept.rename(done / "away")
    try:
        other.rename(kept)
        ended = command("chat", run, "--client", "ada", "-p", "w3")
        assert ended.code == 2
        assert "is not the base this run was trained on" in ended.err
        kept.rename(other)
    finally:
        (done / "away").rename(kept)
    odd = tmp_path / "odd"
    odd.mkdir()
    for config, words in (
        ("{", "damaged"),
        ('{"peft_type": "PROMPT_TUNING"}', "only plain LoRA"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": true}', "use_dora is true; allowed: only null"),
    ):
        (odd / "adapter_config.json").write_text(config)
        ended = command("chat", run, "--adapter", odd, "-p", "w3")
        assert ended.code == 2
        assert words in ended.err, ended.err


def test_a_base_that_an_adapter_names_and_that_is_elsewhere_is_asked_for(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ada"
    shutil.copytree(done / "study" / "local" / "seed-3" / "adapters" / "ada", folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": "elsewhere"}))
    ended = command("chat", "--adapter", folder, "-p", "w2", folder=tmp_path)
    assert ended.code == 2
    assert f"'{folder}' names this base: give its folder with --model" in ended.err
    base = settings["base_model_name_or_path"]
    assert command("chat", "--adapter", folder, "--model", base, "-p", "w2", folder=tmp_path).code == 0
