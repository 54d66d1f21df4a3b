"""The pages of the methods are what their source says today, and their configs run."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
import yaml
from pydantic import Field
from tests.pages import ROOT, load_script, split_page

import fedmira
from fedmira.adapters.columns import factor_columns
from fedmira.cli import method_list
from fedmira.cli.method_facts import build_default, method_facts
from fedmira.methods import load, names
from fedmira.methods.base import Client, Facts, Message, Settings

FOLDER = ROOT / "docs" / "methods"


made = load_script("docs/make_methods.py")


def test_the_pages_of_the_methods_are_what_the_source_says_today() -> None:
    kept = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    pages = made.pages()
    stale = sorted(name for name in {**kept, **pages} if kept.get(name) != pages.get(name))
    assert stale == [], "these pages of docs/methods are not what the source says; run: python docs/make_methods.py"


def test_the_list_of_the_command_is_what_the_source_says_today() -> None:
    kept = method_list.FILE.read_text(encoding="utf-8")
    assert kept == made.listed_facts(), "fedmira methods is stale; run: python docs/make_methods.py"
    assert method_list.stored_facts() == {name: method_facts(load(name)) for name in names()}


@pytest.mark.slow
def test_the_config_that_a_page_shows_runs(tmp_path: Path) -> None:
    entries: dict[str, Any] = {}
    pages = made.pages()
    for name in names():
        (text,) = (text for _, fence, text in split_page(pages[f"{name}.md"])[0] if fence == "```yaml")
        entries |= {entry["name"]: entry for entry in yaml.safe_load(text)["methods"]}
    assert sorted(entries) == names()
    small = ["data.clients.first=3", "federation.rounds=1", "training.local_steps=1", "evaluation.metrics=[loss]"]
    shown = f"methods={yaml.safe_dump(list(entries.values()), default_flow_style=True)}"
    config = fedmira.load_config("demo", [f"output_dir={tmp_path / 'study'}", *small, shown])
    assert [run.facts.state for run in fedmira.run(config).runs] == ["complete"] * len(entries)


def test_pages_are_written_and_those_of_methods_that_are_no_more_go(tmp_path: Path) -> None:
    (tmp_path / "gone.md").write_text("old", encoding="utf-8")
    made.main(tmp_path, tmp_path / "list.json")
    assert (tmp_path / "list.json").read_text(encoding="utf-8") == made.listed_facts()
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")} == made.pages()


class Inner(Settings):
    """A section."""

    kind: Literal["near", "far"] = "near"  # where | from


class Outer(Settings):
    """Settings of every kind."""

    rate: float = Field(default=0.5, ge=0, lt=1, alias="lambda")  # *stars* stay
    steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None,  # beside the default, on a line of its own
    )
    fast: bool = True  # sets_no_italics_
    parts: tuple[str, ...] = ("a", "b")  # names
    must: str  # has no default
    inner: Inner = Inner()


class Grown(Outer):
    """Settings that inherit."""

    more: float = Field(default=1.0, gt=0)  # of the same


class Silent(Settings):
    """A setting that nobody explains."""

    share: float = 0.5


def test_settings_are_shown_as_they_are_written_in_a_config() -> None:
    assert list(made.settings_rows(Grown)) == [
        ("`lambda`", "`0.5`", "number at least 0 and below 1", "\\*stars\\* stay"),
        ("`steps`", "`null`", "whole number at least 1 or `null`", "beside the default, on a line of its own"),
        ("`fast`", "`true`", "`true`, `false`", "sets_no_italics\\_"),
        ("`parts`", "`[a, b]`", "list of text", "names"),
        ("`must`", "must be given", "text", "has no default"),
        ("`inner.kind`", "`near`", "`near`, `far`", "where \\| from"),
        ("`more`", "`1.0`", "number above 0", "of the same"),
    ]


def test_a_setting_without_a_comment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Silent\.share has no comment beside it"):
        list(made.settings_rows(Silent))


def test_equations_become_blocks_and_sources_links() -> None:
    lines = ["", "    a = b * c", "      + d", "", "With `a*b` and a*b,", "see arXiv:1602.05629.", "Source: [x] 2017"]
    assert list(made._paragraphs(lines)) == [
        "```text\na = b * c\n  + d\n```",
        "With `a*b` and a\\*b,\nsee [arXiv:1602.05629](https://arxiv.org/abs/1602.05629).\n\nSource: \\[x\\] 2017",
    ]


def test_nested_settings_are_written_on_one_line() -> None:
    assert made._scalar({"kind": "file", "on": True, "at": None, "of": [1, 2]}) == (
        "{kind: file, on: true, at: null, of: [1, 2]}"
    )


def described(name: str, **changes: Any) -> Mapping[str, str]:
    module = fedmira.load_method(name)
    return made.describe(method_facts(module, replace(build_default(module), **changes)))


def test_the_facts_are_those_of_the_method_that_is_built() -> None:
    assert list(described("fedavg").values()) == [
        "[arXiv:1602.05629](https://arxiv.org/abs/1602.05629), [arXiv:2305.05644](https://arxiv.org/abs/2305.05644)",
        "the shared one (`global`)",
        "the sum of the uploads",
        "are used",
        "the LoRA factors",
        "S x P x 4 up, S x P x 4 down",
        "the mean of all clients'",
    ]
    assert list(described("local").values()) == [
        "none",
        "an adapter of its own (`personal`)",
        "nothing",
        "are not used",
        "nothing",
        "nothing",
        "its own",
    ]
    assert described("fedptuning")["what is sent"] == "the prompt encoder"
    assert described("fedavg", facts=Facts(needs="each"))["the server must see"] == "each upload"


def test_what_travels_is_measured_on_the_messages() -> None:
    def finish(adapters: Any, memory: Any, given: Message, tools: Any) -> Any:
        assert len(tools.rng("noise")) == len(adapters)
        return Message(adapters.rows, {"loss": torch.zeros(len(adapters))}, {"second": given.rows}), memory

    key = "bytes that travel per round"
    client = Client(finish=finish)
    assert described("fedavg", client=client)[key] == "S x 2 x P x 4 + S x 8 up, S x P x 4 down"
    half: dict[str, Any] = {"travels": lambda layout, clock: factor_columns(layout, "A")}
    assert described("fedavg", **half)[key] == "S x A x 4 up, S x A x 4 down"
    assert described("fedavg", client=client, **half)[key] == "S x 2 x A x 4 + S x 8 up, S x A x 4 down"
    trained: dict[str, Any] = {"trained": half["travels"]}
    assert described("fedavg", **trained)[key] == "S x A x 4 up, S x P x 4 down"


def test_what_does_not_travel_makes_the_view_personal() -> None:
    half: dict[str, Any] = {"travels": lambda layout, clock: factor_columns(layout, "A")}
    assert described("fedavg", **half)["each client gets"] == "an adapter of its own (`personal`)"
    frozen = described("fedavg", trained=half["travels"], **half)
    assert frozen["each client gets"] == "the shared one (`global`)"


def entry(up: list[int], down: list[int]) -> dict[str, Any]:
    return {"parameters": 1004, "runs": {"0": {"bytes_up": up, "bytes_down": down}}}


def test_stored_bytes_stand_on_the_page_of_the_method_that_they_are_of(tmp_path: Path) -> None:
    methods = {
        "fedavg": entry([4032, 4032], [4032, 4032]),
        "local": entry([0, 0], [0, 0]),
        "half": entry([2016, 4032], [8, 8]),
    }
    (tmp_path / "methods-demo.json").write_text(json.dumps({"methods": methods}), encoding="utf-8")
    found = made.stored(tmp_path)
    key = "bytes [measured](../results/methods.md) on the demo"
    assert made.measured("fedavg", found) == {
        key: "4,032 up and as many down, of one client in one round (P = 1,004 before padding)"
    }
    assert made.measured("half", found)[key].startswith("2,016 to 4,032 up, 8 down, of one client")
    assert made.measured("local", found) == {key: "nothing"}
    assert made.measured("mira", found) == {}
