"""Turn a record into text: what is shown to the model, and what is trained on.

A template is a value: a name and a function from a record to `Rendered`. A model's own chat template comes from its
tokenizer; nothing here depends on the form of a model's turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedmira.data.formats import Record, Turn
from fedmira.data.unread import REASONING
from fedmira.errors import DataError, nearest

PLAIN = "plain"
CHATS = {  # chat templates for bases whose tokenizer has none; each turn of the assistant ends with the end of text
    PLAIN: (
        "{% for message in messages %}"
        "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{{ '\n\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
        "{% if message['role'] == 'assistant' and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
        "{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
NAMES = ("alpaca", "chat", "none", *CHATS)
FIELDS = ("instruction", "input")  # what a template file for single requests may show
# The date given to templates that write today's, so that data do not change overnight: 26 July 2024, as in Llama 3's.
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
_TODAY = "format" + "".join(f" | replace('{code}', '{text}')" for code, text in _DATE.items())
_SAME_DAY = f"{{%- macro strftime_now(format) -%}}{{{{ {_TODAY} }}}}{{%- endmacro -%}}"

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
_MARKS = ("\ue000", "\ue001")  # private-use characters, which have no meaning in text


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt; `trained`: loss is taken on it (an earlier turn of the assistant)."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Rendered:
    """One example as text: prompt, then the answer to train on."""

    prompt: tuple[Segment, ...]
    answer: str
    question: str  # the prompt for generation; may end before `prompt` does
    begins: bool = True  # the question is a prefix of the example; otherwise generation differs from training
    around: tuple[str, str] = ("", "")  # what the template writes in `answer` before and after the text of the data
    closing: str = ""  # of what is before it: the end of a reasoning, after which the answer begins


@dataclass(frozen=True)
class Template:
    """How a record becomes text. complete: the text contains its special tokens, the tokenizer adds none.

    source: in Jinja; empty for those that are not written in it. escape: what a text of the data becomes before it is
    shown.
    """

    name: str
    render: Callable[[Record], Rendered]
    complete: bool = False
    source: str = ""
    escape: Callable[[str], str] = str


class ChatTokenizer(Protocol):
    """What this module needs of a tokenizer; every tokenizer of transformers has it."""

    def get_chat_template(self, chat_template: str | None = None) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, chat_template: str, tokenize: bool, **variables: Any
    ) -> str: ...


def make_template(name: str, *, usual: str, tokenizer: ChatTokenizer) -> Template:
    """Return the template of a name: "alpaca", "none", "chat" (the tokenizer's), one of CHATS, or a Jinja file.

    "auto" is `usual`. A file that shows `messages` is a chat template as in transformers; any other shows `instruction`
    and `input`.
    Raises DataError: an unknown name, a file that cannot be used, "chat" where the tokenizer has no chat template.
    """
    chosen = usual if name == "auto" else name
    if chosen in ("alpaca", "none"):
        return ALPACA if chosen == "alpaca" else NONE
    if chosen == "chat":
        try:
            source = tokenizer.get_chat_template()
        except ValueError:
            hint = "; these data are conversations, which need one" if usual == "chat" else ""
            raise DataError(
                f"data.template '{name}': the tokenizer of this base has no chat template{hint}. Take a plain "
                f"one (data.template: {', '.join(CHATS)}) or a Jinja file (data.template: my_template.jinja), or use a "
                "base that was trained on conversations"
            ) from None
        return _chat_template("chat", source, tokenizer)
    if chosen in CHATS:
        return _chat_template(chosen, _first_token(tokenizer) + CHATS[chosen], tokenizer)
    return _from_file(name, tokenizer)


def _first_token(tokenizer: Any) -> str:
    """Return what a template writes first: the BOS token, if the tokenizer begins texts with it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    begins = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    return "{{ bos_token }}" if begins else ""


def _from_file(name: str, tokenizer: ChatTokenizer) -> Template:
    path = Path(name)
    if not path.is_file():
        known = f"known: auto, {', '.join(NAMES)}, or a file (current folder: {Path.cwd()})"
        raise DataError(f"data.template '{name}' is neither a template nor a file{nearest(name, NAMES)}; {known}")
    try:
        source = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"data.template '{name}': byte {error.start} is not UTF-8; save the file as UTF-8") from None
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        tree = environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        if "messages" in source:  # only transformers knows tags such as {% generation %}
            return _chat_template(name, source, tokenizer)
        raise DataError(f"data.template '{name}', line {error.lineno}: not a Jinja template: {error.message}") from None
    try:
        shown, compiled = meta.find_undeclared_variables(tree), environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:  # an unknown filter or test
        raise DataError(f"data.template '{name}', line {error.lineno}: {error.message}") from None
    if "messages" in shown:
        return _chat_template(name, source, tokenizer)
    unknown = sorted(shown - set(FIELDS))
    if unknown or "instruction" not in shown:
        what = f"'{unknown[0]}' is unknown{nearest(unknown[0], FIELDS)}" if unknown else "it shows no instruction"
        raise DataError(
            f"data.template '{name}': {what}; a template shows {' and '.join(FIELDS)}, or messages as a chat template"
        )
    if next(tree.find_all((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)), None):
        raise DataError(f"data.template '{name}' uses another file; write it as one file")

    def request(record: Record) -> str:
        try:
            return compiled.render(instruction=record.instruction, input=record.input)
        except Exception as error:  # any error of the template, such as a division by zero
            raise DataError(f"data.template '{name}' cannot show {record.source}: {type(error).__name__}") from None

    return Template(name, lambda record: _single(record, request(_request_only(record, name))), source=source)


# ---------------------------------------------------------------- single requests


def _single(record: Record, prompt: str) -> Rendered:
    return Rendered((Segment(prompt, False),), record.answers[0], prompt)


def _request_only(record: Record, name: str) -> Record:
    if record.turns:
        raise DataError(
            f"data.template '{name}' shows single requests, and {record.source} is a conversation; use "
            "data.template: chat, or a Jinja file that shows `messages`"
        )
    return record


def _alpaca(record: Record) -> Rendered:
    """Show the two preambles of Stanford Alpaca, with and without an input; white space alone is not an input.

    Source: tatsu-lab/stanford_alpaca train.py, PROMPT_DICT; the last line break as in tloen/alpaca-lora.
    """
    _request_only(record, "alpaca")
    if record.input.strip():
        return _single(
            record,
            f"{_TASK}, paired with an input that provides further context. {_REQUEST}\n\n"
            f"### Instruction:\n{record.instruction}\n\n### Input:\n{record.input}\n\n### Response:\n",
        )
    return _single(record, f"{_TASK}. {_REQUEST}\n\n### Instruction:\n{record.instruction}\n\n### Response:\n")


def _none(record: Record) -> Rendered:
    """Show the instruction, then the input, if there is one, on a separate line."""
    _request_only(record, "none")
    has_input = bool(record.input.strip())
    return _single(record, f"{record.instruction}\n{record.input}" if has_input else record.instruction)


ALPACA = Template("alpaca", _alpaca)
NONE = Template("none", _none)


# ---------------------------------------------------------------- conversations


def _chat_template(name: str, source: str, tokenizer: ChatTokenizer) -> Template:
    """Render conversations by a chat template; a single request becomes one user's turn.

    The assistant's texts are located by a second rendering with marks instead of them, so that any template works that
    shows them unchanged, and no template needs special tags.
    """

    if "strftime_now" in source:
        source = _SAME_DAY + source

    shows: dict[tuple[str, str], bool] = {}  # (role, key) -> does the template show it?

    def show(turns: Sequence[Turn], record: Record, *, ask: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text, **turn.more} for turn in turns]
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # any error here is the template's
            # a message written in the template may be shown, text of the data never
            reason = str(error) if str(error) in source else type(error).__name__
            raise DataError(f"data.template '{name}' cannot show {record.source}: {reason}") from None

    def check_more(turns: Sequence[Turn], record: Record) -> None:
        for index, turn in enumerate(turns):
            for key in turn.more:
                if (turn.role, key) not in shows:
                    probe = replace(turn, more={**turn.more, key: _MARKS[0]})
                    shows[turn.role, key] = _MARKS[0] in show((*turns[:index], probe), record)
                if not shows[turn.role, key]:
                    raise DataError(
                        f"data.template '{name}' does not show '{key}' of the {turn.role}'s turn in {record.source}; "
                        "remove the key from the data, or write a Jinja file that shows it"
                    )

    def render(record: Record) -> Rendered:
        request = "\n\n".join(text for text in (record.instruction, record.input) if text.strip())
        turns = (*(record.turns or (Turn("user", request),)), Turn("assistant", record.answers[0], more=record.more))
        check_more(turns, record)
        return _mark_turns(turns, record, name, show)

    return Template(name, render, complete=True, source=source)


def _mark_turns(turns: Sequence[Turn], record: Record, name: str, show: Callable[..., str]) -> Rendered:
    """Split a conversation into what is shown and what the assistant says, each turn with its end.

    The pieces between the assistant's texts come from a rendering with marks; the end of a turn is what follows the
    last text (without trailing white space). What the template writes between the generation prompt and the text, the
    model must write too, so it is trained on.
    """
    spoken = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    marks = {index: f"{_MARKS[0]}{number}{_MARKS[1]}" for number, index in enumerate(spoken)}
    if any(mark in text for turn in turns for text in (turn.text, *turn.more.values()) for mark in _MARKS):
        raise DataError(f"{record.source}: the text contains private-use characters (U+E000, U+E001); remove them")
    shown = show([replace(t, text=marks[index]) if index in marks else t for index, t in enumerate(turns)], record)
    pieces, suffix = [], shown
    for mark in marks.values():
        before, separator, suffix = suffix.partition(mark)
        if not separator or mark in suffix:
            raise DataError(
                f"data.template '{name}' leaves out or repeats what the assistant says in {record.source}, so that "
                "the trained text is ambiguous; write a Jinja file that shows every turn once"
            )
        pieces.append(before)
    whole = show(turns, record)
    end = suffix.rstrip()
    texts = [turns[index].text for index in spoken]
    if _join(pieces, texts, suffix) != whole:
        texts = [text.strip() for text in texts]
        if _join(pieces, texts, suffix) != whole:
            raise DataError(
                f"data.template '{name}' changes what the assistant says in {record.source}, so that the trained text "
                "is ambiguous; write a Jinja file that shows it unchanged"
            )
    segments: list[Segment] = []
    before = ""
    for number, piece in enumerate(pieces):
        if number:  # the end of the assistant's previous turn
            closed = end if end and piece.startswith(end) else ""
            spoken_text = segments.pop().text + texts[number - 1] + closed
            segments.append(Segment(spoken_text, turns[spoken[number - 1]].trained))
            before += texts[number - 1] + closed
            piece = piece[len(closed) :]
        turn, last = turns[spoken[number]], number == len(pieces) - 1
        question = show(turns[: spoken[number]], record, ask=True) if turn.more or last else ""
        start = _written_from(turn, before, piece, question)
        segments += [Segment(piece[:start], False), Segment(piece[start:], True)]
        before += piece
    begins = before.startswith(question)
    answer_prefix = before[len(question) :] if begins else piece[start:]
    if not piece.endswith(answer_prefix):
        answer_prefix = ""
    segments[-2:] = [Segment(piece.removesuffix(answer_prefix), False)]
    answer = answer_prefix + texts[-1] + end
    prompt_parts = tuple(part for part in segments if part.text)
    return Rendered(prompt_parts, answer, question, begins, (answer_prefix, end), _closing(turns[-1], answer_prefix))


def _written_from(turn: Turn, before: str, piece: str, question: str) -> int:
    """Return where, in the text before an answer, what the model must write begins: after the prompt asked with.

    Its end for a turn without keys of its own: what a template writes for every turn is not learned in earlier ones.
    """
    start = common_length(question, before + piece) - len(before)
    return start if turn.more and turn.trained and start >= 0 else len(piece)


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    shorter = min(len(one), len(other))
    return next((n for n, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs), shorter)


def _closing(turn: Turn, prefix: str) -> str:
    """Return what a template writes between a turn's reasoning and its text."""
    reasonings = [turn.more[key].strip() for key in REASONING if key in turn.more]
    return next((prefix.rpartition(text)[2].strip() for text in reasonings if text and text in prefix), "")


def _join(pieces: Sequence[str], texts: Sequence[str], suffix: str) -> str:
    return "".join(piece + text for piece, text in zip(pieces, texts, strict=True)) + suffix
