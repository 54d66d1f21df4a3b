"""Talking to prompts: every speaker answers as its folder does through PEFT, LoRA beside it, and the base too."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests import prompted, small_study, tiny
from tests.small_study import command, has_traceback

from fedmira.cli import chat
from fedmira.cli.chat import open_chat
from fedmira.errors import ConfigError, StoreError
from fedmira.export.peft_folder import export_adapter
from fedmira.model.base import load
from fedmira.model.base.load import Base, load_base

QUESTION = "w3 w4 w5 w6"
NEW = 4
TOKENS = {"eve": 5, "bo": 3, "cy": 3}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with fast bfloat16 would chat in it without a run, and rounding may turn a greedy answer."""
    monkeypatch.setattr(load, "choose_dtype", lambda dtype, device: torch.float32)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, prompts of 5, 3 and 3 virtual tokens made for it, and two LoRA adapters."""
    place = tmp_path_factory.mktemp("chat")
    small_study.save_base(place / "base")
    base = load_base(str(place / "base"), dtype="float32", device="cpu", targets=["q_proj", "v_proj"])
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        own = prompted.encoders(base, 1, tokens=tokens, seed=seed)
        prompted.export_one(place / name, base, own, base_model=str(place / "base"))
    for seed, rank in ((3, 2), (4, 4)):
        export_adapter(
            place / f"lora-{rank}",
            tiny.adapters(tiny.layout(base, rank), [rank], seed=seed, dtype=torch.float32),
            base_model=str(place / "base"),
            target_modules=["q_proj", "v_proj"],
            fan_in_fan_out=False,
            card={},
        )
    return place


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Of each pass of answers: how many virtual tokens stand before its texts, and the length of each question."""
    seen: list[tuple[int, list[int]]] = []
    original = chat.answers

    def noted(base: Base, adapters: Any, prompts: Sequence[Sequence[Sequence[int]]], **options: Any) -> list[list[str]]:
        seen.append((adapters.layout.virtual_tokens, [len(ids) for own in prompts for ids in own]))
        return original(base, adapters, prompts, **options)

    monkeypatch.setattr(chat, "answers", noted)
    return seen


def test_speakers_of_several_kinds_answer_as_peft_does(here: Path, passes: list[tuple[int, list[int]]]) -> None:
    names = ["bo", "lora-4", "eve", "lora-2", "cy"]
    replies = open_chat(folders=[here / name for name in names], max_new_tokens=NEW).ask(QUESTION)
    judged = {name: prompted.folder_answer(here / "base", here / name, QUESTION, new=NEW) for name in names}
    assert replies == {"base": prompted.folder_answer(here / "base", None, QUESTION, new=NEW), **judged}
    assert list(replies) == ["base", *names]
    assert len(set(replies.values())) >= 5  # speakers that change seats would be seen
    assert passes == [(0, [4] * 3), (3, [4] * 2), (5, [4])]


def test_a_prompt_alone_brings_its_base(here: Path) -> None:
    ended = command("chat", "--adapter", here / "eve", "-p", QUESTION, "--max-new-tokens", NEW, "--json")
    assert ended.code == 0, ended.err
    expected = {
        name: prompted.folder_answer(here / "base", path, QUESTION, new=NEW)
        for name, path in (("base", None), ("eve", here / "eve"))
    }
    assert json.loads(ended.out) == expected
    assert expected["base"] != expected["eve"]


def test_virtual_tokens_take_positions_of_the_base(here: Path, passes: list[tuple[int, list[int]]]) -> None:
    long = " ".join(["w3"] * 90)
    open_chat(folders=[here / "eve"], max_new_tokens=10).ask(long)
    assert passes == [(0, [tiny.POSITIONS - 10]), (5, [tiny.POSITIONS - 10 - 5])]
    assert open_chat(folders=[here / "eve", here / "bo"]).max_new_tokens == (tiny.POSITIONS - 5) // 2
    assert open_chat(folders=[here / "eve"], max_new_tokens=58).max_new_tokens == 58
    with pytest.raises(ConfigError, match="59: the base has 64 positions in all, of which virtual tokens take 5"):
        open_chat(folders=[here / "eve"], max_new_tokens=59)


def test_each_speaker_remembers_its_own_conversation(here: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    names = ["eve", "lora-4", "bo"]
    opened = open_chat(folders=[here / name for name in names], template=str(own), max_new_tokens=NEW)
    first = opened.ask("w3 w4")
    assert [turns[1].text for turns in opened.turns] == list(first.values())
    opened.ask("w5")
    assert [[turn.role for turn in turns] for turns in opened.turns] == [["user", "assistant"] * 2] * 4


# ---------------------------------------------------------------- what is refused


def copy_of(here: Path, place: Path, **changes: Any) -> Path:
    """A prompt's folder with other settings; None takes a key away."""
    place.mkdir()
    for path in (here / "eve").iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((place / "adapter_config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (place / "adapter_config.json").write_text(json.dumps(kept))
    return place


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "only plain LoRA and P-tuning are supported"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2; allowed: null or 1"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*; allowed: only null"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; allowed: a whole number above 0"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is null; allowed: a whole number above 0"),
        (
            {"num_virtual_tokens": 4},
            r"is \(5, 16\), but adapter_config\.json says num_virtual_tokens 4",
        ),
        (
            {"peft_type": "LORA", "r": 2, "lora_alpha": 4},
            "a setting that FedMira does not know",
        ),
    ],
)
def test_a_folder_that_is_no_prompt_of_this_base_is_refused(
    changes: dict[str, Any], words: str, here: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=words):
        open_chat(folders=[copy_of(here, tmp_path / "odd", **changes)], max_new_tokens=NEW)


def test_more_virtual_tokens_than_the_base_has_positions_are_refused(here: Path, tmp_path: Path) -> None:
    odd = copy_of(here, tmp_path / "odd", num_virtual_tokens=10**4)
    save_file({"prompt_embeddings": torch.zeros(10**4, 16)}, odd / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="the base has 64 positions in all, of which virtual tokens take 10000"):
        open_chat(folders=[odd])


def test_a_prompt_of_another_width_is_refused(here: Path, tmp_path: Path) -> None:
    base = tiny.base("llama", dtype=torch.float32, hidden_size=8)
    folder = prompted.export_one(tmp_path / "narrow", base, prompted.encoders(base, 1))
    ended = command("chat", "--adapter", folder, "--model", here / "base", "-p", QUESTION, "--max-new-tokens", NEW)
    assert (ended.code, ended.out) == (2, "")
    assert "'prompt_embeddings' is (3, 8), but must be (3, 16); was it made for another base?" in ended.err
    assert not has_traceback(ended.err)


# ---------------------------------------------------------------- a run


def test_a_client_of_a_prompt_tuned_run_answers_as_its_folder_does_in_peft(here: Path, tmp_path: Path) -> None:
    method = {"name": "fedptuning", "virtual_tokens": 3, "hidden": 6}
    raw = small_study.settings(
        here / "base",
        small_study.save_data(tmp_path / "data.jsonl"),
        tmp_path / "study",
        methods=[method, {"name": "local"}],
        federation={"rounds": 1, "participation": 1.0},
        training={"learning_rate": 0.5, "local_steps": 4},
    )
    ended = command("run", small_study.save_config(tmp_path / "config.yaml", raw), "-q")
    assert ended.code == 0, ended.err
    run, other = (tmp_path / "study" / name / "seed-3" for name in ("fedptuning", "local"))
    ended = command(
        "chat",
        run,
        "--client",
        "ada",
        "--adapter",
        other / "adapters" / "ada",
        "-p",
        QUESTION,
        "--max-new-tokens",
        NEW,
        "--json",
    )
    assert ended.code == 0, ended.err
    places = {"base": None, "ada": run / "adapters" / "ada", "ada of local": other / "adapters" / "ada"}
    expected = {name: prompted.folder_answer(here / "base", path, QUESTION, new=NEW) for name, path in places.items()}
    assert json.loads(ended.out) == expected
    assert len(set(expected.values())) == 3
