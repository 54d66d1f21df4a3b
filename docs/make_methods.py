"""Write docs/methods, a page for every method, and the list that `fedmira methods` prints.

    python docs/make_methods.py

Both are made from each method's docstring, its Config and what it builds; the list is kept in a file of the package, so
that the command need not build anything.
Bytes as measured are those of benchmarks/results, which benchmarks/methods/measure.py keeps. The pages are kept
beside the source so that they can be read without building anything; a test fails where they differ from what this file
makes now.
"""

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from fedmira.cli import method_list
from fedmira.cli.method_facts import build_default, method_facts
from fedmira.cli.method_list import MethodFacts
from fedmira.config.strict import Strict
from fedmira.methods import ALIASES, MethodModule, load, names
from fedmira.methods.base import Settings

FOLDER = Path(__file__).parent / "methods"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SCRIPT = "docs/make_methods.py"
MEASURED = {"demo": "on the demo", "ni": "on Natural Instructions"}  # as in methods-demo.json
LETTERS = (
    "S: clients of a round. P: numbers of one client's row, padded to a multiple of 16; where clients differ in rank, "
    "each one's own, on average. 4 bytes each; the headers of a real network are not counted."
)


FURTHER = {
    "A": "numbers of its A factors alone",
    "B": "numbers of its B factors alone",
    "E": "rows of other clients that a round's clients are sent, all together",
    "Q": "numbers that were added to the base and that a round's clients do not have yet, all together",
}


def letters(text: str) -> str:
    """Say what the letters of the formulas in a text mean."""
    return " ".join([LETTERS, *(f"{letter}: {words}." for letter, words in FURTHER.items() if f"{letter} x " in text)])


def pages() -> dict[str, str]:
    """Return the text of every page by its file name."""
    return {f"{name}.md": method_page(name, load(name)) for name in names()} | {"README.md": overview(names())}


def method_page(name: str, module: MethodModule) -> str:
    """Return the page of one method. Raises ValueError for a setting without a comment beside it."""
    first, *rest = inspect.cleandoc(module.__doc__ or "").split("\n")
    rows = list(settings_rows(module.Config))
    table = ["| key | default | may be | meaning |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    also = [alias for alias, target in ALIASES.items() if target == name]
    facts = describe(method_facts(module)) | measured(name, stored())
    parts = [
        f"# {name}",
        _prose(first),
        *_paragraphs(rest),
        *([f"It may be called `{'`, `'.join(also)}` too."] if also else []),
        "## Settings",
        "\n".join(table) if rows else "None.",
        "## What it needs and gives",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in facts.items())]),
        letters(str(facts)),
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
        facts = method_facts(module)
        title = _prose(facts.about).replace("|", "\\|")
        lines.append(f"| [{name}]({name}.md) | {title} | {' | '.join(describe(facts).values())} |")
    columns = ["method", "what it does", *describe(method_facts(load(listed[0])))]
    parts = [
        "# Methods",
        "A study names those that it compares: `methods: [{name: local}, {name: mira, lambda: 0.1}]`. The command "
        "`fedmira methods` lists them; a file of your own is [as good](../adding-a-method.md). The table is about the "
        "default settings; [every method](../results/methods.md) was measured on two data sets.",
        "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines]),
        letters(str(lines)),
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


def settings_rows(kind: type[Strict], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, default, what it may be, meaning) for every setting, those of sections by their dotted key.

    Raises ValueError for a setting without a comment beside it.
    """
    schema = kind.model_json_schema(by_alias=True)["properties"] if kind.model_fields else {}
    said = comments(kind)
    for name, field in kind.model_fields.items():
        key = field.alias or name
        annotations = (field.annotation, *get_args(field.annotation))
        inner = [one for one in annotations if isinstance(one, type) and issubclass(one, Strict)]
        if inner:
            yield from settings_rows(inner[0], f"{prefix}{key}.")
            continue
        if not said.get(name):
            raise ValueError(f"{kind.__module__}.{kind.__name__}.{name} has no comment beside it: say what it means")
        usual = "must be given" if field.is_required() else f"`{_scalar(field.get_default(call_default_factory=True))}`"
        cells = (f"`{prefix}{key}`", usual, allowed(schema[key]), _prose(said[name]))
        yield tuple(cell.replace("|", "\\|") for cell in cells)  # type: ignore[misc]


def comments(kind: type[Strict]) -> dict[str, str]:
    """Return what the source says beside each setting of a class and of those it is made from."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not issubclass(one, Strict) or one in (Strict, Settings):
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
    if build_default(module).regime.optimizer == "sgd":
        settings["training"] = {"optimizer": "sgd", "momentum": 0}
    lines = [f"  - {{name: {name}}}"] if not settings else [f"  - name: {name}"]
    lines += [f"    {key}: {_scalar(value)}" for key, value in settings.items()]
    yardstick = [] if name == "local" else ["  - {name: local}"]
    return "\n".join(["methods:", *yardstick, *lines]) + "\n"


# ---------------------------------------------------------------- the method itself


def describe(facts: MethodFacts) -> dict[str, str]:
    """Return what a method gives and needs, in words."""
    sees = {
        "each": "each upload",
        "sum": "the sum of the uploads",
        "relay": "nothing; it forwards each upload as it is",
        "nothing": "nothing",
    }
    own = "an adapter of its own (`personal`)"
    return {
        "paper": _prose(", ".join(facts.papers)) or "none",
        "each client gets": own if facts.view == "personal" else "the shared one (`global`)",
        "the server must see": sees[facts.needs],
        "example counts": "are used" if facts.weighs else "are not used",
        "what is sent": facts.sends,
        "bytes that travel per round": facts.bytes,
        "with `lora.start` a client begins with": facts.starts,
    }


def stored(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return what is kept of each method, by its label, for each data set that every method was measured on."""
    paths = {what: folder / f"methods-{what}.json" for what in MEASURED}
    return {what: json.loads(path.read_text("utf-8"))["methods"] for what, path in paths.items() if path.is_file()}


def measured(name: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the bytes of one client in one round as they were counted, for each data set that has this method."""
    lines = {}
    for what, methods in found.items():
        if (entry := methods.get(name)) is None:
            continue
        ends = {key: [run[key] for run in entry["runs"].values()] for key in ("bytes_up", "bytes_down")}
        up, down = (_range(min(low for low, _ in one), max(high for _, high in one)) for one in ends.values())
        amount = f"{up} up and as many down" if up == down else f"{up} up, {down} down"
        each = f"{amount}, of one client in one round (P = {entry['parameters']:,} before padding)"
        key = f"bytes [measured](../results/methods.md) {MEASURED[what]}"
        lines[key] = "nothing" if (up, down) == ("0", "0") else each
    return lines


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def listed_facts() -> str:
    """Return the text of the file that `fedmira methods` reads."""
    return json.dumps({name: asdict(method_facts(load(name))) for name in names()}, indent=1) + "\n"


def main(folder: Path = FOLDER, listed: Path = method_list.FILE) -> None:
    """Write the pages and the list, and remove the pages of methods that are no more."""
    listed.write_text(listed_facts(), encoding="utf-8")
    made = pages()
    for old in folder.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
