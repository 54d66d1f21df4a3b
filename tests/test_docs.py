"""The pages of docs are true: all that they show is written, run and compared.

A page's blocks take effect in the order in which they stand, in one folder:
    ```LANGUAGE file=NAME     the block is this file
    ```yaml config=NAME       the file NAME.yaml: study.yaml with these sections in the place of its own
    ```python                 code that is run, to make files that are no text
    ```console                lines that begin with "$ " are commands, the others what they print on a terminal;
                              "..." on a line of its own stands for any lines
Beside them lies `base`, a small base model with one token per byte.
"""

import difflib
import re
import shlex
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tests import tiny
from tests.small_study import command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedmira.config import PARTITIONERS, ClientsConfig, DataConfig, SplitConfig
from fedmira.data.chats import ROLES
from fedmira.data.formats import FORMATS
from fedmira.data.sources import EXTENSIONS
from fedmira.data.templates import NAMES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("data",)

STUDY = "study.yaml"
# In the manner of Zephyr: a name for each turn, and the end of text after it.
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


class WrongPage(AssertionError):
    """A page says what is not so; the message says where."""


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its first line of text, counted from 1."""

    line: int
    language: str
    file: str | None
    config: str | None
    text: str


def read_blocks(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page. Raises WrongPage for one that nothing would check."""
    opening: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.splitlines(), start=1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif opening is None:
            opening, lines = (number + 1, line), []
        else:
            yield _block(opening[0], opening[1], "".join(f"{line}\n" for line in lines))
            opening = None
    if opening is not None:
        raise WrongPage(f"line {opening[0] - 1}: this block is never closed")


def _block(line: int, fence: str, text: str) -> Block:
    found = re.fullmatch(r"```(\w+)(?: (file|config)=([\w./-]+))?", fence)
    language, kind, name = found.groups() if found else ("", None, None)
    if not found or (kind is None) != (language in ("console", "python")) or (kind == "config" and language != "yaml"):
        raise WrongPage(f"line {line - 1}: nothing checks a block that begins with {fence!r}")
    return Block(line, language, name if kind == "file" else None, name if kind == "config" else None, text)


def run_page(page: str, folder: Path) -> int:
    """Write, run and compare all blocks of a page; return how many commands ran. Raises WrongPage with every fault."""
    blocks = list(read_blocks(page))
    faults, ran = list(_unused(blocks)), 0
    for block in blocks:
        if block.file is not None:
            _write(folder / block.file, block.text)
        elif block.config is not None:
            _write(folder / f"{block.config}.yaml", replace_sections((folder / STUDY).read_text("utf-8"), block.text))
        elif block.language == "python":
            faults += _run_code(block, folder)
        else:
            for line, words, shown in read_session(block):
                faults += _differences(line, words, shown, folder)
                ran += 1
    if faults:
        raise WrongPage("\n".join(faults))
    return ran


def _unused(blocks: list[Block]) -> Iterator[str]:
    """Yield a fault for each file that no later block names: nothing would check it."""
    for place, block in enumerate(blocks):
        name = f"{block.config}.yaml" if block.config else (block.file or "").partition("/")[0]
        if not any(name in later.text for later in blocks[place + 1 :]) and name:
            yield f"line {block.line}: nothing uses '{name}'"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def replace_sections(config: str, sections: str) -> str:
    """Return a config with some of its top-level sections replaced."""

    def split(text: str) -> dict[str, str]:
        return {part.partition(":")[0]: part for part in re.split(r"(?m)^(?=\w)", text) if part}

    return "".join({**split(config), **split(sections)}.values())


def _run_code(block: Block, folder: Path) -> list[str]:
    """Run Python code in a folder; return a fault if it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            exec(compile(block.text, "page", "exec"), {})
        except Exception as error:
            lines = [
                frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "page"
            ]
            return [f"line {block.line - 1 + max(lines, default=1)}: {error!r}"]
    return []


def read_session(block: Block) -> Iterator[tuple[int, str, list[str]]]:
    """Yield each command of a console block with its line and what the page shows of its output."""
    lines = block.text.splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith("$ ")]
    if not starts or starts[0] != 0:
        raise WrongPage(f"line {block.line}: a console block begins with a command")
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield block.line + start, lines[start].removeprefix("$ "), lines[start + 1 : stop]


def _differences(line: int, words: str, shown: list[str], folder: Path) -> list[str]:
    """Run a command; return a fault if it does not print what is shown, or ends as the page does not say."""
    program, *arguments = shlex.split(words)
    if program != "fedmira":
        raise WrongPage(f"line {line}: '{program}' is not run here, only fedmira is")
    ended = command(*arguments, folder=folder)
    printed = (ended.err + ended.out).splitlines()  # a terminal shows both, and progress comes first
    if matches(shown, printed) and ended.code == 2 * any(text.startswith("error: ") for text in shown):
        return []
    diff = difflib.unified_diff(shown, printed, "on the page", "printed", lineterm="")
    return [f"line {line}: {words} (exit code {ended.code})", *diff]


def matches(shown: list[str], printed: list[str]) -> bool:
    """Are these the same lines, apart from white space at their ends and lines that "..." stands for?"""
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()) + r"\n" for line in shown)
    text = "".join(line.rstrip() + "\n" for line in printed)
    return re.fullmatch(f"{pattern}\n*", text) is not None or (not pattern and not text)


def save_base(folder: Path) -> Path:
    """Write a base with one token per byte and a chat template, so that a reader can count the tokens on a page."""
    words = ["</s>", *TURNS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", extra_special_tokens=list(TURNS), chat_template=CHAT
    ).save_pretrained(folder)
    sizes = {"vocab_size": len(words), "eos_token_id": 0, "max_position_embeddings": 1024}
    tiny.model("llama", dtype=torch.float32, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("docs") / "base")


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_shows_is_what_happens(name: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    assert run_page((DOCS / f"{name}.md").read_text(encoding="utf-8"), tmp_path) > 0


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    headings = [line.lstrip("# ") for line in page.splitlines() if re.match(r"#+ ", line)]
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    found = re.findall(r"\]\(([^)\s]+)\)", page)
    local = [link for link in found if not link.startswith("https://")]
    lost = [
        link
        for link in local
        if not (link[1:] in anchors if link.startswith("#") else (DOCS / link.partition("#")[0]).exists())
    ]
    assert lost == []


# ---------------------------------------------------------------- nothing is left out


def words_of_data() -> Iterator[str]:
    """Yield every key and choice of `data:`, as the page on data has to write them."""
    for section in (DataConfig, SplitConfig, ClientsConfig):
        yield from section.model_fields
    for entry in FORMATS:
        yield entry.name
        yield from (word for name, keys in entry.keys.items() for word in (name, *keys))
    yield from EXTENSIONS
    yield from ("auto", *NAMES)
    yield from (word for role, words in ROLES.items() for word in (role, *words))
    yield from ("error", "skip", "shuffle: true", "seed: null")


def test_the_page_on_data_names_every_key_and_every_choice() -> None:
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    quoted = set(re.findall(r"`([^`\n]+)`", page))
    named = quoted | {word for text in quoted for word in re.findall(r"[\w.]+", text)}
    assert [word for word in words_of_data() if word not in named] == []


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_page_on_data_has_each_partitioners_parameters_and_defaults(name: str) -> None:
    page = (DOCS / "data.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in page if line.startswith(f"| `{name}` |"))
    for parameter, field in PARTITIONERS[name].model_fields.items():
        if parameter in ("name", "shuffle", "seed"):
            continue
        usual = "" if field.is_required() or field.default is None else f": {field.default}"
        assert f"`{parameter}{usual}`".replace("False", "false") in row


# ---------------------------------------------------------------- a page that is wrong is found out

METHODS = "$ fedmira methods\n{}\n$ fedmira run none.yaml\n{}\n"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("local        something else\n...", "error: none.yaml: 1 fault\n..."),
        ("...\nflora        a method that is not there\n...", "error: none.yaml: 1 fault\n..."),
        ("", "error: none.yaml: 1 fault\n..."),
        ("...", "error: none.yaml: 1 fault"),
        ("...", "..."),  # an error that the page does not show
    ],
)
def test_output_that_is_not_what_the_page_shows_fails(first: str, second: str, tmp_path: Path) -> None:
    with pytest.raises(WrongPage, match=r"line [24]: fedmira (methods|run none.yaml) \(exit code [02]\)"):
        run_page(f"```console\n{METHODS.format(first, second)}```\n", tmp_path)


def test_output_that_is_what_the_page_shows_passes(tmp_path: Path) -> None:
    page = f"```console\n{METHODS.format('...', 'error: none.yaml: 1 fault' + chr(10) + '...')}```\n"
    assert run_page(page, tmp_path) == 2


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```\ntext\n```", "line 1: nothing checks"),
        ("text\n```json\n{}\n```", "line 2: nothing checks"),
        ("```yaml conf=x\n```", "line 1: nothing checks"),
        ("```json config=x\n```", "line 1: nothing checks"),
        ("- a list\n  ```python\n  ```", "line 2: nothing checks"),
        ("```python\nx = 1\n", "line 1: this block is never closed"),
        ("```json file=a/b.json\n{}\n```", "line 2: nothing uses 'a'"),
        ("```console\nfedmira methods\n```", "line 2: a console block begins with a command"),
        ("```console\n$ rm -r runs\n```", "line 2: 'rm' is not run here"),
    ],
)
def test_a_block_that_nothing_would_check_fails(page: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WrongPage, match=message):
        run_page(page, tmp_path)


def test_code_on_a_page_that_fails_fails_the_page(tmp_path: Path) -> None:
    with pytest.raises(WrongPage, match=r"line 3: AssertionError\(\)"):
        run_page("```python\nwrong = 1 + 1\nassert wrong == 3\n```", tmp_path)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["a", "..."], ["a"], True),
        (["a", "...", "d"], ["a", "b", "c", "d"], True),
        (["...", "b"], ["a", "b ", ""], True),
        (["a", "...", "d"], ["a", "b"], False),
        (["a.c"], ["abc"], False),
        (["a"], ["a", "b"], False),
        ([], ["a"], False),
        ([], [], True),
    ],
)
def test_three_dots_stand_for_any_lines_and_nothing_else_does(shown: list[str], printed: list[str], same: bool) -> None:
    assert matches(shown, printed) is same


def test_sections_of_a_config_take_the_place_of_its_own() -> None:
    config = "# a study\nseeds: [0]\ndata:           # yours\n  path: a\n  format: auto\nlora: {r: 2}\n"
    assert (
        replace_sections(config, "data:\n  path: b\n\nreport: {}\n")
        == "# a study\nseeds: [0]\ndata:\n  path: b\n\nlora: {r: 2}\nreport: {}\n"
    )
