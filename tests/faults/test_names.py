# ruff: noqa: RUF001 - letters that look like others are what is tested here
"""5,000 names of clients that mean harm: no file outside the run folder, no page or terminal that obeys them."""

import csv
import json
import os
import random
import re
import shutil
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import small_study
from tests.small_study import command, has_traceback

from fedmira.data.formats import Record
from fedmira.data.partition import form_clients
from fedmira.disk.folders import RunFolder

COUNT = 5000
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)
OUTSIDE = "@OUTSIDE@"  # stands for a folder beside the study, which must stay empty

KINDS: Mapping[str, Sequence[str]] = {
    "absolute": [
        f"{OUTSIDE}/x",
        f"{OUTSIDE}",
        "/",
        "//host/share",
        "C:\\Windows\\x",
        "\\\\host\\share",
        "~",
        "~root/x",
    ],
    "up": [
        "..",
        ".",
        "../x",
        "../../x",
        "a/../../../x",
        "..\\..\\x",
        "....//x",
        "./x",
        "x/",
        "x/.",
        "...",
        ". .",
        "..x",
    ],
    "encoded": ["%2e%2e", "%2e%2e%2fx", "..%2fx", "%00", "..%c0%afx", "\\u002e\\u002e", "&#46;&#46;/x", "0x2e0x2e"],
    "look-alike": [
        "․․/x",
        "．．／x",
        "∕etc∕x",
        "⁄x",
        "аda",
        "ａｄａ",
        "ada\u0301",
        "ﬁle",
        "ı",
        "ſ",
        "ß",
        "Ω",
        "Ω",
        "Å",
        "Å",
    ],
    "reserved": ["CON", "con", "nul", "NUL.txt", "aux", "PRN", "COM1", "com9", "LPT1", "lpt0", "CON-1", "con_"],
    "long": ["x" * 300, "x" * 64, "x" * 65, "x" * 255, "é" * 300, "/" * 300, "a" * 63 + "/", "X" * 64, "-" * 300],
    "dash": ["-rf", "--out=/tmp/x", "-", "--", "_", "_x", ".hidden", "-x-", "- x", "+x"],
    "control": [
        "a\nb",
        "a\r\nb",
        "\tx",
        "\x1b[2Jx",
        "\x1b]0;x\x07",
        "\x9b31mx",
        "\x7fx",
        "a\x0bb",
        "a\x85b",
        "a\u2028b",
        "\x08x",
    ],
    "invisible": [
        "\u202ex",
        "\u2066x\u2069",
        "a\u200bb",
        "\ufeffx",
        "x\u00ad",
        "\u00a0x",
        "a\u200db",
        "\u061cx",
        "\U000e0041x",
    ],
    "pictures": ["😀", "👩‍👩‍👧", "🇩🇪x", "z̷͎̈a̴l̷g̵o̶", "日本", "العربية", "ﷺ", "𝔞𝔡𝔞", "\U0010ffffx", "\ue000x"],
    "shell": [
        "$(touch x)",
        "`touch x`",
        "; touch x",
        "| tee x",
        "&& x",
        "'; x",
        '"; x',
        "$HOME",
        "*",
        "a b",
        "!x",
        "#x",
    ],
    "page": [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</td><td>",
        "<!--",
        "&lt;b&gt;",
        "{{7*7}}",
        "{% x %}",
    ],
    "yaml": [
        "!!python/object:os.x",
        "- x",
        "a: b",
        "&a",
        "*a",
        "no",
        "true",
        "null",
        "~x",
        "1e5",
        "2026-01-01",
        "<<",
        "? x",
        "@x",
    ],
    "table": ["=1+1", "+1", "-1", "@SUM(A1)", '=HYPERLINK("x")', "a,b", 'a"b', ";x", "=cmd|' /C calc'!A0", "a\tb"],
    "case": ["ada", "Ada", "ADA", "aDa", "straße", "STRASSE", "ſtraße", "i", "I", "ı", "İ"],
    "markup": ["[bold]x[/bold]", "[/]", "[link=file:///etc]x[/link]", ":smile:", "![x](http://x)", "`x`", "---", "# x"],
}


def hostile_names(outside: Path) -> list[str]:
    """5,000 distinct names: those above, each with endings and beginnings from another kind."""
    dice = random.Random(20)
    plain = [name.replace(OUTSIDE, str(outside)) for names in KINDS.values() for name in names]
    names = dict.fromkeys(plain)
    while len(names) < COUNT:
        ending = dice.choice(["", dice.choice(plain), f"-{dice.randrange(100)}", dice.choice(string.printable)])
        name = dice.choice(plain) + ending
        names[dice.choice([name, name.upper(), name.lower(), name.swapcase(), unicodedata.normalize("NFKC", name)])] = (
            None
        )
    return [name for name in names if name.strip()]


def listing(folder: Path) -> dict[str, int]:
    """Everything below a folder with its time of change; a link is itself."""
    return {
        os.path.join(root, name): os.lstat(os.path.join(root, name)).st_mtime_ns
        for root, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def unprintable(text: str) -> set[str]:
    return {letter for letter in text if not letter.isprintable() and letter != "\n"}


# ---------------------------------------------------------------- ids


def test_all_5000_names_get_ids_of_the_contract_that_no_file_system_takes_for_one_another(tmp_path: Path) -> None:
    names = hostile_names(tmp_path / "outside")
    assert len(names) >= COUNT
    records = [Record("w2", "", ("w3",), {"task": name}, f"x:{place}") for place, name in enumerate(names)]
    clients = form_clients(records, validation=0, test=0)
    assert [client.name for client in clients] == names
    ids = [client.id for client in clients]
    assert [id for id in ids if not ID.fullmatch(id) or RESERVED.fullmatch(id)] == []
    assert len({id.casefold() for id in ids}) == len(names)
    before = listing(tmp_path)
    run = RunFolder(tmp_path / "study" / "local" / "seed-0")
    for id in ids:
        (run.adapters / id).mkdir(parents=True)
        (run.adapters / id / "adapter_config.json").write_text("{}")
    made = {Path(path) for path in listing(tmp_path).keys() - before.keys()}
    assert {path.name for path in made if path.parent == run.adapters} == set(ids)
    assert [path for path in made if not path.is_relative_to(tmp_path / "study")] == []


# ---------------------------------------------------------------- a real study


class Tags(HTMLParser):
    """Collects every tag and attribute of a page, and where its links lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.links: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(name for name, _ in attributes)}
        self.links |= {str(value) for name, value in attributes if name == "href"}


def write_rows(path: Path, names: Sequence[str]) -> None:
    """Three rows per name, but one of the first, which is therefore spoken of on the terminal."""
    rows: Iterator[dict[str, Any]] = (
        {"prompt": "w2 w3 w4", "completion": f"w{5 + index}", "client": name, "group": name[::-1]}
        for place, name in enumerate(names)
        for index in range(3 if place else 1)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("count", [220, COUNT])
def test_a_real_study_of_hostile_names_writes_into_its_folder_only_and_nothing_obeys_them(
    count: int, tmp_path: Path
) -> None:
    here = tmp_path / "home" / "here"
    (here / "work").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    every = hostile_names(outside)
    plain = sum(len(names) for names in KINDS.values())
    names = every if count == COUNT else [*every[:plain], *random.Random(2).sample(every[plain:], count - plain)]
    names.sort(key=lambda name: name != "\x1b[2Jx")
    base = small_study.save_base(here / "base")
    write_rows(here / "rows.jsonl", names)
    methods = [{"name": "mira", "graph": {"kind": "groups", "column": "group"}}]
    raw = small_study.settings(
        base,
        here / "rows.jsonl",
        here / "work" / "study",
        methods=methods,
        federation={"rounds": 1, "participation": 1.0 if count < COUNT else 0.05, "cohort": 100},
        evaluation={"metrics": ["loss"]},
        data={"split": {"validation": 0.34, "test": 0.34}},
    )
    config = small_study.save_config(here / "config.yaml", raw)
    before = listing(tmp_path)
    ended = command("run", config, folder=here / "work")
    assert ended.code == 0, ended.err[-2000:]
    study = here / "work" / "study"
    after = listing(tmp_path)
    changed = {
        path for path, time in after.items() if before.get(path) != time and not Path(path).is_relative_to(study)
    }
    assert changed == {str(here / "work")}  # in which the study is new
    assert before.keys() <= after.keys()
    assert unprintable(ended.err + ended.out) == set()
    assert "such as '?[2Jx'" in ended.err
    shown = command("run", config, "--show-example", folder=here / "work")
    assert unprintable(shown.out + shown.err) == set()
    as_json = command("run", config, "--show-example", "--json", folder=here / "work")
    assert as_json.out.isascii()
    assert unprintable(as_json.out) == set()
    for run in small_study.run_folders(study):
        clients = json.loads((run / "clients.json").read_text(encoding="utf-8"))
        assert sorted(client["name"] for client in clients.values()) == sorted(names)
        assert all(ID.fullmatch(id) and client["folder"] == id for id, client in clients.items())
        assert {path.name for path in (run / "adapters").iterdir()} == set(clients)
        with (run / "results.csv").open(newline="", encoding="utf-8") as file:
            assert {line["client"] for line in csv.DictReader(file)} == set(clients)
        assert {name for record in RunFolder(run).records() for name in record["clients"]} <= set(clients)
        assert unprintable((run / "log.txt").read_text(encoding="utf-8")) == set()
        for card in (run / "adapters").glob("*/README.md"):
            check_card(card.read_text(encoding="utf-8"))
    page = (study / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", page)
    tags = Tags(page)
    assert not {"script", "img", "iframe", "object", "link", "onerror", "onload", "src"} & tags.found
    assert [link for link in tags.links if link[:1] != "#" and str(study / link) not in after] == []
    export = command("export", study / "mira" / "seed-3", "--out", here / "work" / "copies", "--json")
    assert sorted(Path(path).name for path in json.loads(export.out)["adapters"]) == sorted(clients)
    assert not list(outside.iterdir())


def check_card(text: str) -> None:
    """A model card is its own front matter and lines, whatever a group is called."""
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert unprintable(text) == set()
    (group,) = [line for line in body.splitlines() if line.startswith("- group: ")]
    assert re.fullmatch(r"- group: `[^`]*`", group)


# ---------------------------------------------------------------- names that cannot be


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_study.save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "", "  ", None, 5.5, ["x"], {"x": 1}])
def test_a_name_that_is_no_text_or_none_at_all_is_refused_or_read_as_text(
    name: object, base: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "w2", "completion": "w3", "client": "ada"}, {"prompt": "w2", "completion": "w3", "client": name}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, local = {"clients": {"by": "client"}}, [{"name": "local"}]
    raw = small_study.settings(base, tmp_path / "rows.jsonl", tmp_path / "study", data=data, methods=local)
    ended = command("run", small_study.save_config(tmp_path / "config.yaml", raw), "--dry-run", "--json")
    assert not has_traceback(ended.err)
    if name == 5.5:
        assert json.loads(ended.out)["clients"] == 2
    else:
        assert (ended.code, ended.out) == (2, "")
        assert "rows.jsonl:2" in ended.err


FILES = [
    b"-rf",
    b"$(touch x)",
    b"a\nb",
    b"\x1b[2J",
    b"=1+1",
    "😀".encode(),
    "\u202ex".encode(),
    b"<script>",
    b"%2e",
    b"con",
]


@pytest.mark.parametrize("extra", [[], [b"\xff"]])
def test_files_with_hostile_names_are_clients_and_their_faults_are_told_in_print(
    extra: list[bytes], base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for place, name in enumerate([*FILES, *extra]):
        with open(os.fsencode(folder) + b"/" + name + b".jsonl", "wb") as file:
            file.writelines([b'{"prompt": "w2", "completion": "w3"}\n'] * (place + 2))
    data = {"clients": {"by": "file"}}
    raw = small_study.settings(base, folder, tmp_path / "study", data=data, methods=[{"name": "local"}])
    config = small_study.save_config(tmp_path / "config.yaml", raw)
    before = listing(tmp_path)
    ended = command("run", config, folder=folder)
    assert unprintable(ended.err + ended.out) == set()
    assert not has_traceback(ended.err)
    if extra:  # a name that is no text in UTF-8
        assert ended.code == 2
        assert "file" in ended.err
        assert listing(tmp_path) == before
        return
    assert ended.code == 0, ended.err
    clients = json.loads((tmp_path / "study" / "local" / "seed-3" / "clients.json").read_text())
    assert sorted(client["name"].encode() for client in clients.values()) == sorted(FILES)
    assert all(ID.fullmatch(id) for id in clients)
    assert {
        path for path in listing(tmp_path).keys() - before.keys() if not path.startswith(f"{tmp_path}/study")
    } == set()
    shutil.rmtree(tmp_path / "study")
    (folder / "\x1b[2J.jsonl").write_text("{")
    spoilt = command("run", config)
    assert spoilt.code == 2
    assert "?[2J.jsonl:1: not JSON" in spoilt.err
    (folder / "\x1b[2J.jsonl").write_text('{"prompt": "w2", "completion": 5}\n')
    skipped = command("run", config, "data.on_bad_row=skip", "-v")
    assert skipped.code == 0
    assert "  - ?[2J.jsonl:1: 'completion' is a number" in skipped.err
    assert unprintable(spoilt.err + skipped.err) == set()
