"""How an exported adapter is asked: the base's tokenizer, with a chat template that writes the trained prompt.

Every program that loads a model knows `apply_chat_template`, and few know that an adapter was trained on Alpaca's
prompts or on bare ones. So each template becomes a chat template: a single request is one message of the user. It is
tried on several questions, and written only if it gives, token by token, what `fedmira chat` would ask.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedmira.data.encode import encode_questions
from fedmira.data.formats import Record, Turn
from fedmira.data.templates import FIELDS, Template
from fedmira.disk.files import FILE_MODE, copy_file
from fedmira.disk.folders import TOKENIZER_FILES
from fedmira.errors import FedMiraError
from fedmira.export.card import EXAMPLE

CHAT_TEMPLATE = "chat_template.jinja"
MOST_LEADING = 4  # tokens that a tokenizer puts before a text

_ONE = (
    "{%- if messages | map(attribute='role') | list not in (['user'], ['user', 'assistant']) -%}"
    "{{- raise_exception('trained on single requests: give one message, of the user') -}}{%- endif -%}"
    "{%- set instruction = messages[0]['content'] -%}{%- set input = input | default('') -%}"
)
_ANSWER = "{%- if messages | length == 2 -%}{{- messages[1]['content'] -}}{{- eos_token -}}{%- endif -%}"
# Questions that a template is tried on: instruction, input.
_PROBES = (
    (EXAMPLE, ""),
    (" Two words ", ""),
    ("first line\n\n  second <b>line</b> & 'quoted' \"text\" \\ {{ x }}\n", ""),
    ("Größe 東京 😀", ""),
    (EXAMPLE, "Mars,\nVenus"),
)


@dataclass(frozen=True)
class Asking:
    """How the adapters of a run are asked. source: of the chat template; None: none gives the trained prompt."""

    template: str  # its name in the config; only the last part of a path
    source: str | None
    prompt: str  # one in full, as the model gets it, for EXAMPLE; "" if the template cannot show that
    tokenizer: transformers.PreTrainedTokenizerBase

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files and the chat template into a folder."""
        self.tokenizer.save_pretrained(str(folder))
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)  # of the base: not trained with
        path = folder / CHAT_TEMPLATE
        path.unlink(missing_ok=True)
        config = folder / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        if settings.pop("chat_template", None) is not None:
            config.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
        if self.source is not None:
            path.write_text(self.source, encoding="utf-8", newline="")
        for written in tokenizer_files(folder):
            written.chmod(FILE_MODE)


@dataclass(frozen=True)
class _Question:
    """A request as `fedmira chat` asks it: with an addition (the input of an instruction), its text, its ids."""

    instruction: str
    addition: str
    text: str
    ids: list[int]


def find_asking(template: Template, tokenizer: transformers.PreTrainedTokenizerBase) -> Asking:
    """Find the chat template that writes what a template of the config writes."""
    name = Path(template.name).name
    questions = list(_expected(template, tokenizer))
    shown = next((question for question in questions if question.instruction == EXAMPLE), None)
    for source in _candidates(template, tokenizer, questions):
        try:
            if questions and all(_agrees(tokenizer, source, question) for question in questions):
                text = "" if shown is None else _ask(tokenizer, source, shown, tokenize=False)
                return Asking(name, source, str(text), tokenizer)
        except Exception:
            continue
    return Asking(name, None, "" if shown is None else shown.text, tokenizer)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return a folder's files of a tokenizer, the chat template among them, in order."""
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def share_files(paths: Sequence[Path], target: Path) -> None:
    """Put files into another folder as hard links; as copies where a file system takes no links.

    A run has thousands of adapters and one tokenizer. A file of several folders is read-only: written through one name
    it would change under all.
    """
    for path in paths:
        (target / path.name).unlink(missing_ok=True)
        try:
            os.link(path, target / path.name)
            path.chmod(0o400)
        except OSError:
            copy_file(path, target / path.name)


def _expected(template: Template, tokenizer: Any) -> Iterator[_Question]:
    """Give the probes that a template can show, as `fedmira chat` asks them."""
    for instruction, addition in _PROBES:
        if template.complete and addition:
            continue
        turns = (Turn("user", instruction),) if template.complete else ()
        record = Record("" if turns else instruction, addition, ("-",), {}, "a question", turns)
        try:
            rendered = template.render(record)
            (ids,) = encode_questions([rendered], tokenizer, template, max_question=None)
        except FedMiraError:  # this template wants another kind of question
            continue
        yield _Question(instruction, addition, rendered.question, ids)


def _agrees(tokenizer: Any, source: str, question: _Question) -> bool:
    """Does a chat template write a question as it is asked? Its text too: unknown words have one id."""
    text = str(_ask(tokenizer, source, question, tokenize=False))
    return text.endswith(question.text) and _ask(tokenizer, source, question, tokenize=True) == question.ids


def _ask(tokenizer: Any, source: str, question: _Question, *, tokenize: bool) -> list[int] | str:
    found: list[int] | str = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.instruction}],
        chat_template=source,
        add_generation_prompt=True,
        tokenize=tokenize,
        **({"return_dict": False} if tokenize else {}),
        **({"input": question.addition} if question.addition else {}),
    )
    return found


def takes_single_requests(source: str) -> bool:
    """Was this chat template written here for single requests, so that it shows no earlier turns?"""
    return source.startswith(_ONE)


def _candidates(template: Template, tokenizer: Any, questions: Sequence[_Question]) -> Iterator[str]:
    """Give chat templates, the likeliest first.

    Those of single requests differ in what precedes the text: the ids that the tokenizer puts before one, and a space
    where it reads a text's start as the start of a word and what follows a special token as the middle of one.
    """
    if template.complete:
        yield template.source
        return
    try:
        body = _without_text(template.source or _as_jinja(template))
    except jinja2.TemplateSyntaxError:
        return
    start = [] if not questions else questions[0].ids[:MOST_LEADING]
    special = [index in tokenizer.all_special_ids for index in start]
    lengths = [length for length in range(len(start) + 1) if all(special[:length])]
    captured = f"{_ONE}{{%- set prompt -%}}{body}{{%- endset -%}}"
    for length in lengths:
        first = "".join(tokenizer.convert_ids_to_tokens(start[:length]))
        for space in ("", "{{- '' if prompt.startswith(' ') else ' ' -}}"):
            yield f"{captured}{{{{- {_quoted(first)} -}}}}{space}{{{{- prompt -}}}}{_ANSWER}"


def _as_jinja(template: Template) -> str:
    """Write the requests of a template that is not a file as a Jinja template."""
    shown = {field: f"{{{{ {field} }}}}" for field in FIELDS}
    both, alone = (
        template.render(Record(shown["instruction"], text, ("-",), {}, "a question")).question
        for text in (shown["input"], "")
    )
    return f"{{% if input.strip() %}}{both}{{% else %}}{alone}{{% endif %}}"


def _without_text(source: str) -> str:
    """Write a Jinja template so that all of its text is in quotes.

    transformers reads chat templates with other rules for white space around tags; none is left there.
    """
    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
    environment.parse(source)
    open_with = {"block_begin": "{%- ", "variable_begin": "{{- "}
    close_with = {"block_end": " -%}", "variable_end": " -}}"}
    written = []
    inside = False
    for _, kind, text in environment.lex(source):
        if kind == "data":
            written.append(f"{{{{- {_quoted(text)} -}}}}")
        elif kind in open_with or kind in close_with:
            inside = kind in open_with
            written.append({**open_with, **close_with}[kind])
        elif inside:
            written.append(text)
    return "".join(written)


def _quoted(text: str) -> str:
    """Return a text as a string of Jinja."""
    return json.dumps(text, ensure_ascii=False)
