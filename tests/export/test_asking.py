"""An exported folder says how it is asked: its tokenizer and chat template alone write the prompt that was trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small_study, tiny
from tests.small_study import command
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fedmira
from fedmira.cli import chat as chat_module
from fedmira.cli.chat import open_chat
from fedmira.data.encode import encode_questions
from fedmira.data.formats import Record, Turn
from fedmira.data.templates import CHATS, make_template
from fedmira.export.asking import CHAT_TEMPLATE, find_asking, share_files, tokenizer_files
from fedmira.study.face import Run, merge

QUESTIONS = (
    "w3 w4",
    "  two spaces first, and last  ",
    "\nline break first",
    "\ttabs\tand </s> <s> tokens",
    "'quotes' \"double\" \\ {{ braces }} {% tags %} <b>&amp;</b>",
    "Überraschung 東京 😀",
    "### Instruction:\nanother\n\n### Response:\n",
)
FILES = {
    "single": "Q: {{ instruction }}\n{% if input %}I: {{ input }}\n{% endif %}\n"
    "  {% raw %}{{x}}{% endraw %}{# no #}A:\n",
    "begins": "{{ instruction }} =>\n",
    "own-bos": "<s>{{ instruction }}\n",
    "chat": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "dated": "{{ strftime_now('%d %B %Y') }} {% for m in messages %}{{ m.content }} {% endfor %}",
}


def metaspace(scheme: str) -> dict[str, Any]:
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": pre}


@pytest.fixture(scope="module")
def tokenizers(shared_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tokenizers that write BOS and look at a text's start, each in another way, and one without BOS."""
    folder = tmp_path_factory.mktemp("tokenizers")
    source = shared_file("models/stories260K")
    found = {"bytes": AutoTokenizer.from_pretrained(shared_file("models/nano"))}
    for name, changes in {
        "legacy": {},
        "first": metaspace("first"),
        "always": metaspace("always"),
        "never": metaspace("never"),
    }.items():
        (folder / name).mkdir()
        for path in source.glob("*.json"):
            shutil.copyfile(path, folder / name / path.name)
        facts = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        (folder / name / "tokenizer.json").write_text(json.dumps(facts | changes), encoding="utf-8")
        found[name] = AutoTokenizer.from_pretrained(folder / name)
    return found


@pytest.mark.parametrize("name", ["bytes", "legacy", "first", "always", "never"])
@pytest.mark.parametrize("template", ["alpaca", "none", *CHATS, *FILES])
def test_the_folder_alone_writes_the_trained_prompt_to_the_token(
    name: str, template: str, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = tokenizers[name]
    if template in FILES:
        (tmp_path / "t.jinja").write_text(FILES[template], encoding="utf-8")
        template = str(tmp_path / "t.jinja")
    rendered_by = make_template(template, usual=template, tokenizer=tokenizer)
    asking = find_asking(rendered_by, tokenizer)
    assert asking.source is not None
    (tmp_path / "alone").mkdir()
    asking.write(tmp_path / "alone")
    alone = AutoTokenizer.from_pretrained(tmp_path / "alone")
    for question in QUESTIONS:
        turns = (Turn("user", question),) if rendered_by.complete else ()
        record = Record("" if turns else question, "", ("-",), {}, "x", turns)
        (expected,) = encode_questions([rendered_by.render(record)], tokenizer, rendered_by, max_question=None)
        messages = [{"role": "user", "content": question}]
        found = alone.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == expected, question
        if not rendered_by.complete:
            text = alone.apply_chat_template(
                [*messages, {"role": "assistant", "content": "An answer."}], tokenize=False
            )
            assert text.endswith(f"{rendered_by.render(record).question}An answer.{tokenizer.eos_token}")
    if not rendered_by.complete:
        with pytest.raises(Exception, match="give one message, of the user"):
            alone.apply_chat_template([*messages, *messages])


def test_a_template_that_no_chat_template_can_follow_gives_none(tmp_path: Path) -> None:
    """Jinja's `tojson` escapes what that of transformers does not; the base's own chat template is not given either."""
    (tmp_path / "t.jinja").write_text("{{ instruction | tojson }}", encoding="utf-8")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    asking = find_asking(make_template(str(tmp_path / "t.jinja"), usual="none", tokenizer=tokenizer), tokenizer)
    assert asking.source is None
    asking.write(tmp_path)
    assert not (tmp_path / CHAT_TEMPLATE).exists()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    assert tokenizer.chat_template is not None


def test_shared_files_are_one_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    tiny.tokenizer().save_pretrained(tmp_path / "a")
    share_files(tokenizer_files(tmp_path / "a"), tmp_path / "b")
    one, other = (tmp_path / name / "tokenizer.json" for name in ("a", "b"))
    assert one.samefile(other)
    assert other.stat().st_mode & 0o222 == 0

    def no_links(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("os.link", no_links)
    share_files(tokenizer_files(tmp_path / "a"), tmp_path / "c")
    copy = tmp_path / "c" / "tokenizer.json"
    assert not copy.samefile(one)
    assert copy.read_bytes() == one.read_bytes()


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose tokenizer puts a token before each text, trained on Alpaca's prompts."""
    folder = tmp_path_factory.mktemp("here")
    base = small_study.save_base(folder / "base")
    words = {"<unk>": 0, "</s>": tiny.END, "<s>": 2} | {f"w{word}": word for word in range(3, tiny.VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>", bos_token="<s>")
    tokenizer.save_pretrained(base)
    raw = small_study.settings(
        base,
        small_study.save_data(folder / "data.jsonl"),
        folder / "study",
        methods=[{"name": "local"}],
        data={"template": "alpaca", "max_length": 60},
        federation={"rounds": 1, "participation": 1.0},
        evaluation={"metrics": ["loss"]},
    )
    ended = command("run", small_study.save_config(folder / "config.yaml", raw), "-q")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that chat asks from now on."""
    seen: list[list[int]] = []
    answers = chat_module.answers

    def noted(base: Any, adapters: Any, prompts: Any, **options: Any) -> Any:
        seen.extend(list(ids) for client in prompts for ids in client)
        return answers(base, adapters, prompts, **options)

    monkeypatch.setattr(chat_module, "answers", noted)
    return seen


def alone(folder: Path, question: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return found


def test_every_exported_folder_asks_as_chat_does(here: Path, run: Run, asked: list[list[int]], tmp_path: Path) -> None:
    copies = fedmira.export(run, out=tmp_path / "copies")
    (merged,) = merge(run, client="ada", out=tmp_path / "merged")
    open_chat(run.path, client="ada", max_new_tokens=2).ask("w5 w6")
    expected = asked[0]
    assert expected[0] == 2
    assert expected.count(2) == 1
    for folder in (run.adapters("ada"), *copies, merged.path):
        assert alone(folder, "w5 w6") == expected
    asked.clear()
    chat = open_chat(folders=[copies[0]], model=str(here / "base"), max_new_tokens=2)
    chat.ask("w5 w6")
    chat.ask("w5 w6")  # single requests: nothing is remembered
    assert [ids for ids in asked if ids != expected] == []


def test_a_run_and_an_export_have_one_tokenizer_for_all_clients(run: Run, tmp_path: Path) -> None:
    copies = fedmira.export(run, out=tmp_path / "copies")
    for folders in ([run.adapters(name) for name in small_study.CLIENTS], copies):
        files = [folder / "tokenizer.json" for folder in folders]
        assert all(path.samefile(files[0]) for path in files)
    assert not (copies[0] / "tokenizer.json").samefile(run.adapters("ada") / "tokenizer.json")


def test_the_card_shows_one_prompt_in_full_and_code_that_writes_it(run: Run) -> None:
    card = (run.adapters("ada") / "README.md").read_text(encoding="utf-8")
    asking = card.partition("## How to ask it")[2].partition("\n## ")[0]
    tokenizer = AutoTokenizer.from_pretrained(run.adapters("ada"))
    messages = [{"role": "user", "content": "Name the largest planet."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert f"template `alpaca`. This is one in full, as the model reads it:\n\n```text\n{prompt}\n```" in asking
    code = asking.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(run.adapters("ada"))), names)
    assert isinstance(names["inputs"]["input_ids"], torch.Tensor)
    assert "`AutoPeftModelForCausalLM` does not find this base" in card


def test_a_link_instead_of_a_tokenizers_file_is_not_copied(run: Run, here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "study", tmp_path / "study")
    mine = tmp_path / "study" / "local" / "seed-3"
    path = mine / "adapters" / "ada" / CHAT_TEMPLATE
    path.unlink()
    path.symlink_to("/etc/hostname")
    for options in ([], ["--merge"]):
        ended = command("export", mine, "--client", "ada", "--out", tmp_path / "out", *options)
        assert ended.code == 2
        assert f"{CHAT_TEMPLATE}' is a link to" in ended.err


def test_vllm_gets_the_template_of_the_adapters(run: Run, tmp_path: Path) -> None:
    ended = command("export", run.path, "--client", "ada", "--out", tmp_path / "out")
    assert f" --chat-template {tmp_path}/out/ada/{CHAT_TEMPLATE} --lora-modules ada=" in ended.err


def test_the_merged_card_says_how_to_ask_too(run: Run, tmp_path: Path) -> None:
    (merged,) = merge(run, client="bo", out=tmp_path / "merged")
    assert "## How to ask it" in (merged.path / "README.md").read_text(encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(merged.path)
