"""Code of templates that is kept from one process to the next."""

import sys
from pathlib import Path

import pytest
from jinja2 import DictLoader, Environment

from fedmira.reports.templates import CompiledTemplates


@pytest.fixture(autouse=True)
def _python_may_write_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)


def render(module: str, text: str = "hello {{ who }}") -> str:
    """What a new environment makes of a template."""
    environment = Environment(
        autoescape=True, loader=DictLoader({"page": text}), bytecode_cache=CompiledTemplates(module)
    )
    return environment.get_template("page").render(who="<you>")


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_code_is_kept_beside_the_code_of_the_module(tmp_path: Path) -> None:
    assert render(str(tmp_path / "templates.cpython-311.pyc")) == "hello &lt;you&gt;"
    (file,) = kept(tmp_path)
    assert file.name.startswith("templates.cpython-311.")
    assert file.suffix == ".jinja"


def test_kept_code_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = render(str(tmp_path / "templates.pyc"))
    monkeypatch.setattr(Environment, "_parse", lambda *_: pytest.fail("the template was compiled again"))
    assert render(str(tmp_path / "templates.pyc")) == first


def test_a_changed_template_is_compiled_again(tmp_path: Path) -> None:
    render(str(tmp_path / "templates.pyc"))
    assert render(str(tmp_path / "templates.pyc"), "bye {{ who }}") == "bye &lt;you&gt;"
    assert render(str(tmp_path / "templates.pyc"), "bye {{ who }}") == "bye &lt;you&gt;"


@pytest.mark.parametrize("damaged", [b"", b"j2", b"nonsense"])
def test_a_damaged_file_is_replaced(tmp_path: Path, damaged: bytes) -> None:
    page = render(str(tmp_path / "templates.pyc"))
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    for content in (damaged, whole[: len(whole) // 2], whole[:40] + b"\x00" + whole[41:]):
        file.write_bytes(content)
        assert render(str(tmp_path / "templates.pyc")) == page
        assert file.read_bytes() == whole


def test_nothing_is_kept_where_python_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert render(str(tmp_path / "templates.pyc")) == "hello &lt;you&gt;"
    assert kept(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_costs_nothing_but_time(tmp_path: Path) -> None:
    assert render(str(tmp_path / "missing" / "templates.pyc")) == "hello &lt;you&gt;"
    assert kept(tmp_path) == []
