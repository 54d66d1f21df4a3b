"""A page of docs and what it shows: blocks are written, run and compared; commands in a sentence are looked up.

A page's blocks take effect in the order in which they stand, in one folder:
    ```LANGUAGE file=NAME     the block is this file
    ```yaml config=NAME       the file NAME.yaml: study.yaml with these sections in the place of its own
    ```python                 code that is run; what it names, later blocks of the page know
    ```output                 what the code just before has printed
    ```console                lines that begin with "$ " are commands, the others what they print on a terminal
In what is printed, "..." on a line of its own stands for any lines. Of the commands, `fedmira` and `ls` are run; of
`make` it is checked that there is such a target.
"""

import contextlib
import difflib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import typer
from tests import tiny
from tests.small_study import Ended, command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedmira.cli.main import app

ROOT = Path(__file__).parent.parent
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


def split_page(page: str) -> tuple[list[tuple[int, str, str]], dict[int, str]]:
    """Return fenced blocks of a page (first line of text, opening fence, text), and the lines around them by number.

    Raises WrongPage for a block that is never closed.
    """
    blocks: list[tuple[int, str, str]] = []
    prose: dict[int, str] = {}
    opening: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.splitlines(), start=1):
        fence = line.lstrip().startswith("```")
        if fence and opening is None:
            opening, lines = (number + 1, line), []
        elif fence and opening is not None:
            blocks.append((*opening, "".join(f"{line}\n" for line in lines)))
            opening = None
        elif opening is not None:
            lines.append(line)
        else:
            prose[number] = line
    if opening is not None:
        raise WrongPage(f"line {opening[0] - 1}: this block is never closed")
    return blocks, prose


def read_blocks(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page. Raises WrongPage for one that nothing would check."""
    for line, fence, text in split_page(page)[0]:
        yield _block(line, fence, text)


def _block(line: int, fence: str, text: str) -> Block:
    found = re.fullmatch(r"```(\w+)(?: (file|config)=([\w./-]+))?", fence)
    language, kind, name = found.groups() if found else ("", None, None)
    alone = language in ("console", "output") if kind else language not in ("console", "output", "python")
    if not found or alone or (kind == "config" and language != "yaml"):
        raise WrongPage(f"line {line - 1}: nothing checks a block that begins with {fence!r}")
    return Block(line, language, name if kind == "file" else None, name if kind == "config" else None, text)


def run_page(page: str, folder: Path) -> int:
    """Write, run and compare all blocks of a page; return how many were run. Raises WrongPage with every fault."""
    blocks = list(read_blocks(page))
    faults, ran = list(_unused(blocks)), 0
    names: dict[str, Any] = {}
    printed: list[str] | None = None
    for block in blocks:
        if block.file is not None:
            _write(folder / block.file, block.text)
        elif block.config is not None:
            _write(folder / f"{block.config}.yaml", replace_sections((folder / STUDY).read_text("utf-8"), block.text))
        elif block.language == "python":
            fault, printed = run_code(block, folder, names)
            faults += fault
            ran += 1
        elif block.language == "output":
            if printed is None:
                raise WrongPage(f"line {block.line}: no code before this output")
            faults += _compare(f"line {block.line}: output", block.text.splitlines(), printed)
            printed = None
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


def run_code(block: Block, folder: Path, names: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Run Python code in a folder with what is named already; return a fault if it fails, and what it printed."""
    faults: list[str] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "dont_write_bytecode", True)  # a page may write a module twice in a second
        patch.syspath_prepend(str(folder))  # as for a script that lies there
        try:
            exec(compile(block.text, "page", "exec"), names)
        except Exception as error:
            lines = [
                frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "page"
            ]
            faults.append(f"line {block.line - 1 + max(lines, default=1)}: {error!r}")
    _forget_modules(folder)
    return faults, out.getvalue().splitlines()


def _forget_modules(folder: Path) -> None:
    """Let the next import read the files of a folder as they are then; other pages have files of the same name."""
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        places = [getattr(spec, "origin", None), *(getattr(spec, "submodule_search_locations", None) or [])]
        if any(isinstance(place, str) and Path(place).is_relative_to(folder) for place in places):
            del sys.modules[name]


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
    ended = run_command(line, words, folder)
    title = f"line {line}: {words} (exit code {ended.code})"
    printed = (ended.err + ended.out).splitlines()  # a terminal shows both, and progress comes first
    if ended.code != 2 * any(text.startswith("error: ") for text in shown):
        return [title, *printed]
    return _compare(title, shown, printed)


def run_command(line: int, words: str, folder: Path) -> Ended:
    """Run what may be run of a page. Raises WrongPage for anything else."""
    program, *arguments = shlex.split(words)
    if program == "fedmira":
        with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
            patch.setattr(sys, "stdin", nothing)  # who asks is told at once that there is nothing
            return command(*arguments, folder=folder)
    if program == "ls":
        lists = ["ls", *arguments]
        done = subprocess.run(lists, cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr)
    if program == "make":
        if missing := [name for name in arguments if "=" not in name and name not in make_targets()]:
            raise WrongPage(f"line {line}: the Makefile has no target '{missing[0]}'")
        return Ended(0, "", "")
    raise WrongPage(f"line {line}: '{program}' is not run here, only fedmira and ls are")


def make_targets() -> set[str]:
    """Return the targets of the Makefile that are meant for people."""
    (names,) = re.findall(r"(?m)^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"))
    return set(names.split())


def _compare(title: str, shown: list[str], printed: list[str]) -> list[str]:
    if matches(shown, printed):
        return []
    return [title, *difflib.unified_diff(shown, printed, "on the page", "printed", lineterm="")]


def spans(page: str) -> Iterator[tuple[int, str]]:
    """Yield what stands in backticks in the sentences and tables of a page, with its line."""
    for number, line in split_page(page)[1].items():
        for found in re.finditer(r"(`+)(.+?)\1", line):
            yield number, found[2].strip()


def unknown_words(page: str) -> Iterator[str]:
    """Yield a fault for each command of a sentence that is not there, or has no such option."""
    options = command_options()
    for line, text in spans(page):
        program, *words = text.split()
        if " ".join(words[:2]) in options:  # a command of a group: federation init
            words[:2] = [" ".join(words[:2])]
        own = {word.strip("[],").partition("=")[0] for word in words if word.strip("[],").startswith("-")}
        if program == "python" and words and words[0].endswith(".py") and not (ROOT / words[0]).is_file():
            yield f"line {line}: `{text}`: no such file"
        elif program == "make":
            targets = [word for word in words if "=" not in word]
            yield from (f"line {line}: `{text}`: no target '{one}'" for one in targets if one not in make_targets())
        elif program == "fedmira" and words and words[0].strip("|") not in options:
            yield f"line {line}: `{text}`: no command '{words[0]}'"
        elif program == "fedmira" and words:
            yield from (f"line {line}: `{text}`: no option '{one}'" for one in own - options[words[0]])
        elif text.startswith("--") and text.partition(" ")[0] not in set().union(*options.values()):
            yield f"line {line}: `{text}`: no command has this option"


def command_options() -> dict[str, set[str]]:
    """Return the options of every command of `fedmira`, those of groups as "federation init"; its own are there too."""
    group: Any = typer.main.get_command(app)
    alone = {word: {word} for word in ("--help", *(word for one in group.params for word in one.opts))}
    commands = dict(group.commands)
    for name, inner in group.commands.items():
        commands |= {f"{name} {word}": own for word, own in getattr(inner, "commands", {}).items()}
    return alone | {name: {word for one in own.params for word in one.opts} for name, own in commands.items()}


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


def load_script(path: str) -> ModuleType:
    """Import a script that is in no package, by its path below the project's root."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
