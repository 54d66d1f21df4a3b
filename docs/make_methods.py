"""Write docs/methods: a page for every method, made from its docstring, its Config and what it builds.

    python docs/make_methods.py

The pages are kept beside the source so that they can be read without building anything; a test fails where they differ
from what this file makes now.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters, lora_layout, start_adapters
from fedmira.methods import ALIASES, MethodModule, load, names
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, Settings, Tools

FOLDER = Path(__file__).parent / "methods"
SCRIPT = "docs/make_methods.py"
CLIENTS = 4
LAYOUT = lora_layout([("layer", 4, 4)], 2)
LETTERS = (
    "S: clients of a round. P: numbers of one client's adapter, as rows are sent (padded to a multiple of 16). "
    "4 bytes each; the headers of a real network are not counted."
)


def pages() -> dict[str, str]:
    """Return the text of every page by its file name."""
    return {f"{name}.md": method_page(name, load(name)) for name in names()} | {"README.md": overview(names())}


def method_page(name: str, module: MethodModule) -> str:
    """Return the page of one method. Raises ValueError for a setting without a comment beside it."""
    first, *rest = inspect.cleandoc(module.__doc__ or "").split("\n")
    rows = list(settings_rows(module.Config))
    table = ["| key | default | may be | meaning |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    also = [alias for alias, target in ALIASES.items() if target == name]
    facts = describe(build(module))
    parts = [
        f"# {name}",
        _prose(first),
        *_paragraphs(rest),
        *([f"It may be called `{'`, `'.join(also)}` too."] if also else []),
        "## Settings",
        "\n".join(table) if rows else "None.",
        "## What it needs and gives",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in facts.items())]),
        LETTERS,
        "## In a config",
        f"With every setting at its default:\n\n```yaml\n{snippet(name, module)}```",
        f"Made by `{SCRIPT}` from [{name}.py](../../src/fedmira/methods/{name}.py); to change it, change that.",
    ]
    return "\n\n".join(parts) + "\n"


def overview(listed: Sequence[str]) -> str:
    """Return the table of all methods."""
    lines = []
    for name in listed:
        module = load(name)
        facts = describe(build(module))
        title = _prose((module.__doc__ or "").strip().splitlines()[0]).replace("|", "\\|")
        lines.append(f"| [{name}]({name}.md) | {title} | {' | '.join(facts.values())} |")
    columns = ["method", "what it does", *describe(build(load(listed[0])))]
    parts = [
        "# Methods",
        "A study names those that it compares: `methods: [{name: local}, {name: mira, lambda: 0.1}]`. The command "
        "`fedmira methods` lists them; a file of your own is [as good](../adding-a-method.md). The table is about the "
        "default settings.",
        "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines]),
        LETTERS,
        f"Made by `{SCRIPT}` from the [files of the methods](../../src/fedmira/methods).",
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- the docstring


def _paragraphs(lines: Sequence[str]) -> Iterator[str]:
    """Yield prose, and indented lines (equations) as blocks."""
    for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
        for block in re.findall(r"(?m)(?:^ {4}.*\n?)+|(?:^(?! {4}).*\n?)+", paragraph):
            text = str(block).rstrip("\n")
            equations = text.startswith("    ")
            own = re.sub(r"\n(?=Sources?:)", "\n\n", text)
            yield f"```text\n{textwrap.dedent(text)}\n```" if equations else _prose(own)


def _prose(text: str) -> str:
    """Keep Markdown from reading the signs of formulas; make arXiv numbers links. Code in backticks stays as it is."""
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [re.sub(r"([*<\[\]])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", piece) for piece in pieces[::2]]
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "".join(pieces))


# ---------------------------------------------------------------- settings


def settings_rows(kind: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, default, what it may be, meaning) for every setting, those of sections by their dotted key.

    Raises ValueError for a setting without a comment beside it.
    """
    schema = kind.model_json_schema(by_alias=True)["properties"] if kind.model_fields else {}
    said = comments(kind)
    for name, field in kind.model_fields.items():
        key = field.alias or name
        annotations = (field.annotation, *get_args(field.annotation))
        inner = [one for one in annotations if isinstance(one, type) and issubclass(one, Settings)]
        if inner:
            yield from settings_rows(inner[0], f"{prefix}{key}.")
            continue
        if not said.get(name):
            raise ValueError(f"{kind.__module__}.{kind.__name__}.{name} has no comment beside it: say what it means")
        usual = "must be given" if field.is_required() else f"`{_scalar(field.get_default(call_default_factory=True))}`"
        cells = (f"`{prefix}{key}`", usual, allowed(schema[key]), _prose(said[name]))
        yield tuple(cell.replace("|", "\\|") for cell in cells)  # type: ignore[misc]


def comments(kind: type[Settings]) -> dict[str, str]:
    """Return what the source says beside each setting of a class and of those it is made from."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not issubclass(one, Settings) or one is Settings:
            continue
        source = inspect.cleandoc("\n" + inspect.getsource(one))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        beside = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno is not None:
                lines = range(node.lineno, node.end_lineno + 1)
                found[node.target.id] = " ".join(beside[line] for line in lines if line in beside)
    return found


def allowed(schema: Mapping[str, Any]) -> str:
    """Say what a JSON schema lets a value be."""
    if "anyOf" in schema:
        return " or ".join(allowed(one) for one in schema["anyOf"])
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if choices:
        return ", ".join(f"`{_scalar(choice)}`" for choice in choices)
    kinds = {"number": "number", "integer": "whole number", "string": "text", "boolean": "`true`, `false`"}
    kind = schema.get("type")
    if kind == "null":
        return "`null`"
    if kind == "array" and "prefixItems" in schema:
        return f"[{', '.join(allowed(one) for one in schema['prefixItems'])}]"
    if kind == "array":
        return f"list of {allowed(schema.get('items', {}))}"
    signs = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([kinds.get(str(kind), "anything"), " and ".join(bounds)]).strip()


def _scalar(value: Any) -> str:
    """Write a default as YAML does."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_scalar(one) for one in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_scalar(one)}" for key, one in value.items()) + "}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def snippet(name: str, module: MethodModule) -> str:
    """Return a section `methods:` with the yardstick and this method, every setting written out but nulls."""
    settings = module.Config().model_dump(by_alias=True, exclude_none=True)
    lines = [f"  - {{name: {name}}}"] if not settings else [f"  - name: {name}"]
    lines += [f"    {key}: {_scalar(value)}" for key, value in settings.items()]
    yardstick = [] if name == "local" else ["  - {name: local}"]
    return "\n".join(["methods:", *yardstick, *lines]) + "\n"


# ---------------------------------------------------------------- the method itself


def build(module: MethodModule) -> Method:
    """Build a method with its default settings for a few clients."""
    ids = tuple(f"client-{k}" for k in range(CLIENTS))
    cohort = Cohort(ids, (1,) * CLIENTS, ({},) * CLIENTS, (np.arange(CLIENTS),), seed=0)
    return module.build(module.Config(), cohort)


def describe(method: Method) -> dict[str, str]:
    """Return what a method gives and needs, in words."""
    down, up = exchange(method)
    sees, travels = "each upload" if method.needs == "each" else "the sum of the uploads", "nothing"
    if method.exchanges:
        travels = f"{_amount(up)} up, {_amount(down)} down"
    own = "an adapter of its own (`personal`)"
    return {
        "each client gets": own if method.personal or method.tune else "the shared one (`global`)",
        "the server must see": sees if method.exchanges else "nothing",
        "example counts": "are used" if method.uses_weights else "are not used",
        "bytes that travel per round": travels,
    }


def _amount(message: Message) -> str:
    """Write the size of S clients' messages."""
    share = message.rows.shape[1] / LAYOUT.size
    row = f"S x {'' if share == 1 else f'{share:g} x '}P x 4"
    return f"{row} + S x {8 * len(message.scalars)}" if message.scalars else row


def exchange(method: Method) -> tuple[Message, Message]:
    """Return what is sent and what comes back in a first round with one local step, gradients all zero."""
    ids, ranks = torch.arange(CLIENTS), torch.full((CLIENTS,), 2)
    start = start_adapters(LAYOUT, ranks if method.personal else ranks[:1], 4.0, torch.Generator().manual_seed(0))
    given = method.send(method.init(start, Clock(0)), ids, Clock(1))
    adapters = Adapters(LAYOUT, given.rows[:, : LAYOUT.size].clone(), ranks, 4.0 / ranks)

    def grad(current: Adapters) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(current)), torch.zeros_like(current.rows)

    def update(current: Adapters, gradient: Tensor, memory: Memory) -> tuple[Adapters, Memory]:
        return current, memory

    def rng(purpose: str) -> list[np.random.Generator]:
        return [np.random.default_rng(k) for k in range(CLIENTS)]

    clock = Clock(1, steps=torch.ones(CLIENTS, dtype=torch.int64), learning_rate=0.1)
    tools = Tools(clock, grad, update, rng, grad)
    adapters, memory = method.begin(adapters, method.private(adapters), given, tools)
    adapters, memory = method.step(adapters, memory, given, tools)
    return given, method.finish(adapters, memory, given, tools)[0]


def main(folder: Path = FOLDER) -> None:
    """Write the pages, and remove those of methods that are no more."""
    made = pages()
    for old in folder.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
