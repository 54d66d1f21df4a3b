"""The pages of docs are true: all that they show is written, run and compared; pages.py says how. So is the README."""

import dataclasses
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.laws import laws
from tests.pages import (
    ROOT,
    Block,
    WrongPage,
    matches,
    replace_sections,
    run_code,
    run_command,
    run_page,
    save_base,
    spans,
    split_page,
    unknown_words,
)

import fedmira
from fedmira.config.partitioners import PARTITIONERS
from fedmira.config.sections import ClientsConfig, DataConfig, SchedulerKwargs, SplitConfig, TrainingConfig
from fedmira.data.chats import ROLES
from fedmira.data.formats import FORMATS
from fedmira.data.sources import EXTENSIONS
from fedmira.data.templates import NAMES
from fedmira.engine import events as run_events
from fedmira.methods.base import Change, Clock, Method, State, Tools
from fedmira.study import events as study_events

DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))  # those of the methods are made: test_make_methods.py
LONG_PAGES = ("data", "python-api", "adding-a-method")  # each runs for 10 seconds and more
EVERY = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *DOCS.glob("**/*.md")))


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("docs") / "base")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG_PAGES else name for name in PAGES]
)
def test_what_a_page_shows_is_what_happens(name: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    run_page(read(f"docs/{name}.md"), tmp_path)


@pytest.mark.parametrize("page", EVERY)
def test_commands_and_targets_that_a_sentence_names_are_there(page: str) -> None:
    assert list(unknown_words(read(page))) == []


@pytest.mark.parametrize("page", EVERY)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    prose = "\n".join(split_page(read(page))[1].values())
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose)):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    prose = split_page(page.read_text(encoding="utf-8"))[1].values()
    headings = [line.lstrip("# ") for line in prose if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------- the README

# What stands in the README for something of the reader's, and what stands there in this test.
STANDS_FOR = {
    "Qwen/Qwen2.5-0.5B": "base",
    "FILE": "other.yaml",
    "PATH": "my.jsonl",
    "NAME": "base",
    "CONFIG": "small.yaml",
    '"demo"': '"small.yaml"',
    "STUDY_OR_RUN": "runs/mine",
    "RUN": "runs/mine/mira/seed-0",
    "ID": "hospital_a",
    "NEW": "hospital_c",
    "DIR": "out",
    r"csv\|md\|latex": "md",
    "N": "11",
    "a.b=c ...": "training.batch_size=4",
    "mira-paper data.path=...": "mira-paper data.path=tasks.jsonl model.base_model=base federation.rounds=1 "
    "data.max_length=1004 evaluation.metrics=[loss]",
}


def run_readme(page: str, folder: Path) -> int:
    """Run every command and every piece of code of a README; return how many ran. Raises WrongPage with every fault.

    Blocks are run one after another, commands of a sentence or a table each in a copy of what the blocks have left.
    """
    blocks, faults, ran = split_page(page)[0], [], 0
    names: dict[str, Any] = {}
    _save_rows(folder, [text for _, fence, text in blocks if fence == "```json"])
    for line, fence, text in blocks:
        if fence == "```python":
            faults += run_code(Block(line, "python", None, None, fill_in(text)), folder, names)[0]
            ran += 1
        elif fence == "```bash":
            for number, words in enumerate(text.splitlines(), start=line):
                faults += _run_words(number, words, folder)
                ran += 1
        elif fence != "```json":
            raise WrongPage(f"line {line - 1}: nothing checks a block that begins with {fence!r}")
    if (folder / "mine.yaml").is_file():
        sections = "output_dir: runs/small\nfederation: {rounds: 1}\n"
        text = (folder / "mine.yaml").read_text(encoding="utf-8")
        (folder / "small.yaml").write_text(replace_sections(text, sections), encoding="utf-8")
    for place, (line, text) in enumerate(spans(page)):
        copy = folder.with_name(f"{folder.name}-{place}")
        if text.startswith(("fedmira ", "fedmira.")):
            shutil.copytree(folder, copy)
            code = Block(line, "python", None, None, fill_in(text))
            faults += (
                _run_words(line, text, copy)
                if text.startswith("fedmira ")
                else run_code(code, copy, {"fedmira": fedmira})[0]
            )
            ran += 1
    if faults:
        raise WrongPage("\n".join(faults))
    return ran


def fill_in(text: str) -> str:
    """Put something real where the README says FILE or NAME."""
    for name in sorted(STANDS_FOR, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])", lambda _, name=name: STANDS_FOR[name], text)
    return text


def _run_words(line: int, text: str, folder: Path) -> list[str]:
    """Run one command of the README, which has to end well."""
    words = " ".join(shlex.split(fill_in(re.sub(r"[\[\]]", "", text)), comments=True))
    if left := [word for word in re.split(r"[ =]", words) if re.fullmatch(r"[A-Z_]+|.*\.\.\..*", word)]:
        raise WrongPage(f"line {line}: nothing stands for '{left[0]}' of `{text}` here; add it to STANDS_FOR")
    ended = run_command(line, words, folder)
    return [] if ended.code == 0 else [f"line {line}: {words} (exit code {ended.code})", *ended.err.splitlines()]


def _save_rows(folder: Path, shown: Sequence[str]) -> None:
    """Write my.jsonl, rows of the README for two clients, and tasks.jsonl, a few of Natural Instructions."""
    rows = [json.loads(line) for text in shown for line in text.splitlines()]
    mine = [{**row, "client": client} for row in rows for client in ("hospital_a", "hospital_b") for _ in range(10)]
    instances = [{"input": f"{number}", "output": f"{number + 1}"} for number in range(20)]
    tasks = [{"task": name, "category": "sums", "definition": "Add 1.", "instances": instances} for name in "abcd"]
    for name, some in (("my", mine), ("tasks", tasks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


@pytest.mark.slow
def test_the_commands_and_the_code_of_the_readme_run(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "readme" / "base")
    assert run_readme(read("README.md"), tmp_path / "readme") > 0


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```bash\nfedmira method\n```", r"line 2: fedmira method \(exit code 2\)"),
        ("```bash\nfedmira methods\nmake dem\n```", "line 3: the Makefile has no target 'dem'"),
        ("```bash\ncurl x.org\n```", "line 2: 'curl' is not run here"),
        ("```\ntext\n```", "line 1: nothing checks"),
        ("```python\nfedmira = 1\n1 / 0\n```", "line 3: ZeroDivisionError"),
        ("Try `fedmira report STUDY`.", "line 1: nothing stands for 'STUDY' of `fedmira report STUDY` here"),
        ("Try `fedmira run a.yaml lora.r=...`.", r"nothing stands for '\.\.\.' of"),
        ("Try `fedmira methods --jsn`.", r"line 1: fedmira methods --jsn \(exit code 2\)"),
        ("Try `fedmira.runn`.", "line 1: AttributeError"),
    ],
)
def test_what_a_readme_shows_and_does_not_run_is_found_out(page: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "readme").mkdir()
    with pytest.raises(WrongPage, match=message):
        run_readme(page, tmp_path / "readme")


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


def test_the_page_on_training_has_a_row_for_every_key_and_names_every_choice() -> None:
    rows = re.findall(r"^\| (`.+?) \|", read("docs/training.md"), re.MULTILINE)
    words = {word for row in rows for word in re.findall(r"`(\w+)`", row)}
    assert [key for key in TrainingConfig.model_fields if key not in words] == []
    named = quoted("docs/training.md")
    choices = [choice for field in TrainingConfig.model_fields.values() for choice in get_args(field.annotation)]
    named_choices = [choice for choice in choices if isinstance(choice, str)]
    assert [word for word in (*named_choices, *SchedulerKwargs.model_fields) if word not in named] == []
    assert named_choices


def quoted(page: str) -> set[str]:
    """Return what stands in backticks on a page, whole and word by word."""
    found = {text for _, text in spans(read(page))}
    return found | {word for text in found for word in re.findall(r"\w+", text)}


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\((\S+)\)", read("docs/README.md")))
    assert {f"{name}.md" for name in PAGES} - {"README.md"} | {"methods/README.md"} <= linked


def test_the_page_on_python_has_every_public_name_with_the_arguments_that_it_takes() -> None:
    table = dict(re.findall(r"\[`(\w+)(\(.*?\))?`\]\(#", read("docs/python-api.md")))
    public = {name: getattr(fedmira, name) for name in fedmira.__all__ if name != "FedMiraError"}
    given = {
        name: f"({', '.join(inspect.signature(value).parameters)})" if inspect.isfunction(value) else ""
        for name, value in public.items()
    }
    assert table == given


def test_the_page_on_python_has_every_event_with_its_fields() -> None:
    kinds = {kind for module in (run_events, study_events) for kind in vars(module).values() if inspect.isclass(kind)}
    events = [kind for kind in kinds if issubclass(kind, run_events.Event) and kind is not run_events.Event]
    lines = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (.*)\|$", read("docs/python-api.md"), re.MULTILINE))
    assert {kind.__name__: [one.name for one in dataclasses.fields(kind)] for kind in events} == {
        name: re.findall(r"`(\w+)`", fields) for name, fields in lines.items()
    }


def test_the_page_on_adding_a_method_names_every_law_and_every_field() -> None:
    words = quoted("docs/adding-a-method.md")
    assert [name for name in laws.LAWS if name.removeprefix("law_") not in words] == []
    fields = [one.name for kind in (Method, Tools, State, Change, Clock) for one in dataclasses.fields(kind)]
    assert [name for name in fields if name not in words] == []


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
        ("```console\n$ make dem\n```", "line 2: the Makefile has no target 'dem'"),
        ("```output file=a\n```", "line 1: nothing checks"),
        ("```output\n1\n```", "line 2: no code before this output"),
        ("```python\n1\n```\n```output\n```\n```output\n```", "line 7: no code before this output"),
    ],
)
def test_a_block_that_nothing_would_check_fails(page: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WrongPage, match=message):
        run_page(page, tmp_path)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```python\nprint(1)\n```\n```output\n2\n```", r"line 5: output\n(.*\n)*-2\n\+1"),
        ("```console\n$ ls a\n```", r"line 2: ls a \(exit code 2\)"),
        ("```console\n$ ls\na.txt\n```", r"line 2: ls \(exit code 0\)\n(.*\n)*-a.txt"),
        ("```console\n$ make test\npassed\n```", r"line 2: make test \(exit code 0\)"),
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```", "line 5: AssertionError"),
    ],
)
def test_what_is_printed_otherwise_fails(page: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WrongPage, match=message):
        run_page(page, tmp_path)


def test_code_is_run_with_what_stands_before_it_on_the_page(tmp_path: Path) -> None:
    page = """```python file=mine/one.py
x = 1
```
```python
from mine.one import x
print(x)
```
```output
1
```
```python file=mine/one.py
x = 2
```
```python
x += 1
from mine.one import x as newer
print(x, newer)
```
```output
2 2
```
```console
$ ls mine
...
one.py
$ make test
```
"""
    assert run_page(page, tmp_path) == 4


@pytest.mark.parametrize(
    ("sentence", "fault"),
    [
        ("`fedmira runn x`", "no command 'runn'"),
        ("`fedmira run x --show-exampel`", "no option '--show-exampel'"),
        ("`--show-exampel`", "no command has this option"),
        ("``make demos``", "no target 'demos'"),
        ("`python docs/make_method.py`", "no such file"),
    ],
)
def test_a_sentence_that_names_what_is_not_there_fails(sentence: str, fault: str) -> None:
    assert [text.partition(": ")[2].split(": ")[1] for text in unknown_words(f"# Title\n\nTry {sentence}.")] == [fault]


def test_a_sentence_may_name_all_that_is_there() -> None:
    page = "`fedmira run CONFIG [a.b=c ...] --dry-run`, `--json`, `make install PYTHON=python3.12`, `fedmira`, `make`\n"
    assert list(unknown_words(f"{page}`python docs/make_methods.py`\n```text\n`fedmira runn`\n```\n")) == []


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


def test_each_promise_of_the_security_page_names_a_test_that_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", read("SECURITY.md"))
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in read(file) if test else (ROOT / file).is_file(), (file, test)
